"""The notebook of the documentation: kept without outputs, and executed as it is."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.factories.workspace import environment

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "quickstart.ipynb"


def read_notebook() -> Any:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebook_is_kept_without_outputs_and_explains_every_cell() -> None:
    notebook = read_notebook()
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(notebook))
    kinds = [cell.cell_type for cell in notebook.cells]
    assert all("markdown" in pair for pair in pairwise(kinds))
    assert max(len(line) for cell in notebook.cells for line in cell.source.splitlines()) <= 120


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_notebook_trains_searches_and_loads_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    notebook = read_notebook()
    client = NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment(IPYTHONDIR=str(tmp_path / "ipython")))
    results = [
        output.data
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type in ("execute_result", "display_data")
    ]
    assert [list(data).count("image/png") for data in results].count(1) == 1  # the front
    texts = [data["text/plain"] for data in results]
    sweep = tmp_path / "outputs" / "sweeps" / "notebook"
    [export] = [folder for folder in sweep.glob("exports/*") if f"'{folder}'" in "".join(texts)]
    assert (export / "model.safetensors").is_file()
    assert (sweep / "front.html").is_file()
    assert any("'p_value'" in text for text in texts)
    assert any("notebook-teacher" in text and "finished" in text for text in texts)

"""Extra sources for the runs of `tests.factories.training.make_run`, with labels."""

from pathlib import Path

from raydistill.config.run import Dataset, ExtraSources
from raydistill.data.extra import ensure_extra, read_extra
from raydistill.label_sets.label_set import Candidate, write_label_set
from raydistill.label_sets.manifest import LabelManifest
from raydistill.training.inputs import EXTRA_SOURCES, extra_labels
from tests.factories.data_files import write_jsonl
from tests.factories.training import text_pairs


def write_extra(root: Path, n: int = 5) -> Path:
    """Write a file of `n` sources, none of which is in a folder of `write_run_workspace`."""
    sources, _ = text_pairs(n, seed=9)
    return write_jsonl(root / "more.jsonl", [{"text": f"Number {i}. {source}"} for i, source in enumerate(sources)])


def label_extra(workspace: Path, path: Path) -> dict[str, Path]:
    """The folders of a run on pseudo-labels with extra sources: label sets and sources, by name in `LabelFolders`."""
    folder = ensure_extra(Dataset(name=str(workspace)), ExtraSources(name=str(path)), workspace / "extra")
    ids = read_extra(folder).ids
    labels = [(row_id, [Candidate(f"A label of row {i}.", 0.0)]) for i, row_id in enumerate(ids)]
    write_label_set(workspace / "extra-labels", labels, lambda: LabelManifest(rows=len(ids)))
    return {
        "pseudo": workspace / "labels",
        extra_labels("pseudo"): workspace / "extra-labels",
        EXTRA_SOURCES: folder,
    }

"""The outputs that the page shows side by side, and their histograms."""

from pathlib import Path

import numpy as np
import pytest

from raydistill.config.serving import ServingConfig
from raydistill.core.errors import UserError
from raydistill.results import outputs, samples
from raydistill.results.outputs import TextRow, read_outputs, read_texts, write_outputs, write_texts
from raydistill.results.samples import System, make_samples, make_system


def row(i: int, source: str = "s") -> TextRow:
    return TextRow(id=str(i), source=source, reference="a b")


def test_texts_are_read_as_written_and_limited_to_the_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "MAX_ROWS", 2)
    write_texts(tmp_path / "texts", [(str(i), "two\nlines \u2028", "r") for i in range(3)])
    write_outputs(tmp_path / "outputs", ["", "ä\n", "third"])
    texts = [TextRow(id=str(i), source="two\nlines \u2028", reference="r") for i in range(2)]
    assert read_texts(tmp_path / "texts") == texts
    assert read_outputs(tmp_path / "outputs") == ["", "ä\n"]
    assert read_outputs(tmp_path / "absent") is None
    config = ServingConfig(beams=1, length_penalty=1.0)
    assert outputs.outputs_filename("selection", config) == "outputs-selection-b1.jsonl"


@pytest.mark.parametrize("content", ["{", "[1]\n", '"text"\n{}\n'])
def test_a_damaged_file_of_outputs_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "outputs.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"outputs\.jsonl: damaged"):
        read_outputs(path)


def test_sentence_bleu_of_the_first_rows_is_the_score_of_a_system() -> None:
    statistics = np.array([[2, 1, 0, 0, 2, 1, 0, 0, 2, 2], [0, 0, 0, 0, 2, 1, 0, 0, 2, 2], [1] * 10])
    system = make_system("k", "label", "bleu", statistics, ["a b", "c d"])
    assert system.scores == [100.0, 0.0]  # n-grams longer than the output do not count


def test_histograms_by_hand() -> None:
    # 3 and 2 words against references of 2 and 2; one of the two bigrams "a a", "a a" is repeated
    system = System(key="k", label="k", outputs=["a a a", "a b"], scores=[1.0, 2.0])
    result = make_samples("rouge2", "the test split", [row(0), row(1)], [system, system])
    lengths, repetition = result.histograms
    assert lengths.labels == ["0", "1", "2", "3"]
    assert lengths.shares == {"reference": [0, 0, 1.0, 0], "k": [0, 0, 0.5, 0.5]}
    assert repetition.shares["k"] == [0.5, 0, 0, 0, 0, 0.5]
    assert repetition.shares["reference"] == [1.0, 0, 0, 0, 0, 0]


def test_the_rows_with_the_largest_regressions_are_kept_where_texts_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_PAGE_CHARACTERS", 220)
    rows = [row(i, "s" * 98) for i in range(4)]  # with its reference of 3 characters and the outputs: 101 characters
    teacher = System(key="teacher", label="teacher", outputs=[""] * 4, scores=[10.0] * 4)
    student = System(key="s", label="s", outputs=[""] * 4, scores=[10.0, 1.0, 12.0, 5.0])
    result = make_samples("bleu", "the test split", rows, [teacher, student])
    assert [kept.id for kept in result.rows] == ["1", "3"]
    assert result.systems[1].scores == [1.0, 5.0]
    assert "on 4 rows of the test split, of which the 2 with the largest regressions are shown" in result.note
    assert "sentence BLEU" in result.note

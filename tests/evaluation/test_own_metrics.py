"""Metrics of users, `module:function`: scores, bootstrap and errors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raydistill.core.errors import UserError
from raydistill.evaluation import metrics
from raydistill.evaluation.metric import WORKING_DIR_ENV, load_own_metric

MODULE = "tests.evaluation.own_metrics"
PREDICTIONS, REFERENCES = ["a b c", "a b"], ["a b c", "a b c d"]
SOURCES = ["a x", "a b"]


def test_a_function_of_rows_has_the_mean_as_corpus_score() -> None:
    name = f"{MODULE}:length_match"
    scored = metrics.score(name, PREDICTIONS, REFERENCES)
    assert scored.row_stats == pytest.approx([100, 100 / 3])
    assert scored.metrics == pytest.approx({name: 200 / 3})
    assert metrics.signature(name).startswith(f"{name}|source:")


def test_numerators_and_denominators_are_summed_before_the_division() -> None:
    name = f"{MODULE}:copy_rate"
    scored = metrics.score(name, PREDICTIONS, REFERENCES, SOURCES, reported=["exact_match"])
    assert scored.row_stats.tolist() == [[100, 3], [200, 2]]
    assert scored.metrics == pytest.approx({name: 100 * 3 / 5, "exact_match": 50})
    # All pairs of two rows: 1 of 3, 3 of 5 (twice) and 2 of 2
    resampled = metrics.bootstrap_scores(name, [scored.row_stats], 0, 4000)[0]
    assert sorted(set(np.round(resampled, 6))) == pytest.approx([100 / 3, 60, 100])
    assert np.mean(np.isclose(resampled, 60)) == pytest.approx(0.5, abs=0.03)
    assert metrics.row_scores(name, scored.row_stats) == pytest.approx([100 / 3, 100])


def test_chunks_of_rows_have_the_score_of_all_rows() -> None:
    for name in (f"{MODULE}:copy_rate", f"{MODULE}:length_match", "chrf++", "bleu", "exact_match"):
        accumulator = metrics.ScoreAccumulator(name)
        for i in range(2):
            accumulator.add(PREDICTIONS[i : i + 1], REFERENCES[i : i + 1], SOURCES[i : i + 1])
        expected = metrics.score(name, PREDICTIONS, REFERENCES, SOURCES).metrics
        assert accumulator.metrics() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "module no_such_module cannot be imported .ModuleNotFoundError"),
        (f"{MODULE}:missing", "missing of tests.evaluation.own_metrics does not exist"),
        (f"{MODULE}:not_a_metric", "not_a_metric of tests.evaluation.own_metrics is no function but of type int"),
        (f"{MODULE}:too_few", r"a number for each row, \[2\], or .* the result has the shape \[1\]"),
        (f"{MODULE}:three_numbers", r"the result has the shape \[2, 3\]"),
        (f"{MODULE}:not_finite", "the value of row 0 is not finite"),
        (f"{MODULE}:failing", "failed: KeyError: 'term list'"),
    ],
)
def test_an_error_names_the_metric_and_the_contract(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        metrics.score(name, PREDICTIONS, REFERENCES)


def test_statistics_are_read_without_the_code_of_the_user() -> None:
    """Names of metrics in records start no code."""
    for rows in (np.array([0.0, 100.0, 50.0]), np.array([[0.0, 1.0], [100.0, 1.0], [50.0, 1.0]])):
        low, high = metrics.bootstrap_interval("no_such_module:f", rows)
        assert low < metrics.corpus_score("no_such_module:f", rows) == 50 < high
        assert metrics.paired_bootstrap("no_such_module:f", rows, rows).difference == 0
    zero = np.zeros((3, 2))
    assert metrics.corpus_score("no_such_module:f", zero) == 0


def test_a_module_in_the_directory_of_the_command_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metric_7f.py").write_text("def zero(rows):\n    return [0 for row in rows]\n")
    monkeypatch.setenv(WORKING_DIR_ENV, str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert metrics.score("my_metric_7f:zero", ["a"], ["b"]).metrics == {"my_metric_7f:zero": 0}
    load_own_metric.cache_clear()


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    """The module of docs/metrics.md, imported in another process from its directory."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    (tmp_path / "my_metrics.py").write_text(page.split("# my_metrics.py\n")[1].split("```")[0])
    script = (
        "from raydistill.evaluation.metrics import score\n"
        "texts = ['Sie nimmt Aspirin.', 'Er nimmt etwas.'], ['Aspirin nimmt sie.', 'Er nimmt Ibuprofen.']\n"
        "scores = score('my_metrics:term_recall', *texts, reported=['my_metrics:length_ratio']).metrics\n"
        "print(*(round(value, 6) for value in scores.values()))"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["50.0", "100.0"]  # one of two terms; three words on each side, twice


def test_the_recipe_for_comet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of docs/metrics.md, with a package `comet` that has the two functions that the recipe calls.

    unbabel-comet cannot be installed next to raydistill; its scores are 0.5 for equal texts, else 0.
    """
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    module = page.split("# comet_metric.py\n")[1].split("```")[0]
    (tmp_path / "comet_metric.py").write_text(module.replace("~/comet/bin/python", sys.executable))
    (tmp_path / "comet.py").write_text(
        "from types import SimpleNamespace\n"
        "def load_from_checkpoint(path):\n"
        "    assert path == 'FOLDER/checkpoints/model.ckpt'\n"
        "    print('Lightning writes lines of its own')\n"
        "    return SimpleNamespace(predict=predict)\n"
        "def predict(samples, batch_size=16, gpus=1, progress_bar=True):\n"
        "    assert [sample['src'] for sample in samples] == ['quelle', 'zeile\\nzeile']\n"
        "    return SimpleNamespace(scores=[float(s['mt'] == s['ref']) / 2 for s in samples])\n"
    )
    # The recipe only counts devices; the import of torch itself would take seconds.
    (tmp_path / "torch.py").write_text("from types import SimpleNamespace as N\ncuda = N(device_count=lambda: 0)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(WORKING_DIR_ENV, str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = "comet_metric:wmt22_comet_da"
    scored = metrics.score(name, ["a", "ä\nb"], ["b", "ä\nb"], ["quelle", "zeile\nzeile"])
    assert scored.row_stats.tolist() == [0, 50]
    load_own_metric.cache_clear()

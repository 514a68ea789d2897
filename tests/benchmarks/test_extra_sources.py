"""The comparison of extra sources with all originals: its data, its spaces and its table."""

from pathlib import Path

import pytest

from benchmarks.extra_sources import EXTRA, LABELS, ORIGINALS, SideScores, as_markdown, divide, group_trials
from raydistill.config.run import Dataset
from raydistill.config.space import corner_runs, read_space
from raydistill.data.corpus import read_corpus
from raydistill.evaluation.metrics import Comparison
from raydistill.results.records import Trial
from raydistill.training.loop import StepCounts
from tests.factories.workspace import write_corpus

SPACES = Path(__file__).parents[2] / "benchmarks" / "spaces"


def test_training_rows_are_divided_and_other_splits_copied(tmp_path):
    data = write_corpus(tmp_path / "all", train=200)
    counts = divide(str(data), tmp_path / "out", 0.3)
    assert counts["train"] + counts["more"] == 200
    assert 40 <= counts["train"] <= 80
    original = read_corpus(Dataset(name=str(data)), "train")
    kept = read_corpus(Dataset(name=str(tmp_path / "out" / "data")), "train")
    rest = read_corpus(Dataset(name=str(tmp_path / "out" / "more.jsonl")), "train", need_targets=False)
    assert not rest.labelled
    assert sorted([*kept.ids, *rest.ids]) == sorted(original.ids)
    test = [read_corpus(Dataset(name=str(folder)), "test") for folder in (data, tmp_path / "out" / "data")]
    assert test[0].fingerprint == test[1].fingerprint


@pytest.mark.parametrize("name", ["extra_multi30k", "all_originals_multi30k", "choose_multi30k"])
def test_spaces_of_the_comparisons_are_valid(name):
    assert read_space(SPACES / f"{name}.yaml").name == name


def test_all_sides_have_equal_recipes_and_numbers_of_validations():
    """Multi30k has 29,000 training rows; a share of 30 % by hash differs from 8,700 by about a hundred rows."""
    recipes, efforts = set(), set()
    for name in ("extra_multi30k", "all_originals_multi30k"):
        for run in corner_runs(read_space(SPACES / f"{name}.yaml")):
            settings = run.training
            all_rows = run.pseudo.extra is None or run.pseudo.extra_rows is None
            for rows in (28_900, 29_000) if all_rows else (8_500, 8_700, 8_900):
                counts = StepCounts.of(settings, rows)
                validated = {*range(counts.per_validation, counts.total + 1, counts.per_validation), counts.total}
                efforts.add((counts.total, len(validated)))
            recipes.add((run.student.size, settings.learning_rate, settings.batch_size, settings.dropout))
    assert efforts == {(660, 5)}
    assert len(recipes) == 1


def make_trial(tmp_path: Path, seed: int, **params: int | None) -> Trial:
    params = {f"pseudo.{name}": value for name, value in params.items()}
    return Trial(f"key-{seed}", tmp_path, "done", seed, params=params, seed=seed)


def test_trials_are_grouped_by_side_and_ordered_by_seed(tmp_path):
    extra = [make_trial(tmp_path, seed, extra_rows=rows) for seed in (1, 0) for rows in (None, 0)]
    originals = [make_trial(tmp_path, seed) for seed in (1, 0)]
    sides = group_trials(extra, originals)
    assert {name: [trial.seed for trial in trials] for name, trials in sides.items()} == {
        LABELS: [0, 1],
        EXTRA: [0, 1],
        ORIGINALS: [0, 1],
    }
    assert all(trial.params["pseudo.extra_rows"] is None for trial in sides[EXTRA])
    with pytest.raises(SystemExit, match="different seeds"):
        group_trials(extra, originals[:1])
    running = Trial("slow", tmp_path, "running")
    with pytest.raises(SystemExit, match="not finished: slow"):
        group_trials([*extra, running], originals)


def test_table_has_scores_by_seed_and_the_difference_with_its_interval():
    difference = Comparison(0.5, -0.25, 1.25, 0.2)
    sides = [
        SideScores(EXTRA, {0: 35.0, 1: 36.0}, [660, 660], [5, 5], difference),
        SideScores(ORIGINALS, {0: 34.0, 1: 36.0}, [660, 660], [5, 5]),
    ]
    text = as_markdown(sides)
    row = text.splitlines()[-2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *(EXTRA, "660", "5", "35.00", "36.00", "35.50", "+0.50 [-0.25, +1.25]"),
    ]
    assert "unfair" not in text
    unequal = [sides[0], SideScores(ORIGINALS, {0: 34.0, 1: 36.0}, [660, 660], [5, 2])]
    assert "unfair" in as_markdown(unequal)

"""A space for every table of the paper: each names it, and plans the right trials at the paper's costs."""

import re
from pathlib import Path

import pytest

from raydistill.cluster.plan import describe_plan
from raydistill.cluster.prepare import runs_of
from raydistill.config.space import read_space

SPACES = Path(__file__).parents[1] / "search_spaces"
TABLES = sorted(SPACES.glob("table*.yaml"))
MINI = sorted(SPACES.glob("mini_table*.yaml"))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_has_a_space_that_dry_runs(path, offline, tmp_path):
    space = read_space(path)
    assert space.name == path.stem
    assert space.description.startswith(f"Table {re.match(r'table([0-9]+)_', path.stem)[1]},")
    plan = describe_plan(space, tmp_path)
    assert plan["trials"] == plan["combinations"]
    assert plan["rows"] > 200_000
    assert plan["teacher"] in ("bart", "pegasus", "marian", "mbart")
    assert plan["expected_gpu_hours"] > 0
    assert "expected device-hours: about" in plan["text"]


def test_all_the_papers_tables_of_runs_are_there():
    kinds = {"5": 6, "6": 2, "7": 2, "8": 1, "9": 2, "10": 6}  # rows of teacher and data
    found = [re.match(r"table(\d+)_", path.stem)[1] for path in TABLES]
    assert {number: found.count(number) for number in found} == kinds


@pytest.mark.parametrize(
    ("name", "hours"),
    [
        ("table5_cnn_bart", 2 + 14 + 2 + 17.5),  # Table 5: sft, kd, and pl as a run of sft and the labels
        ("table10_xsum_bart", 4 * 2.5 + (15 - 2.5) + (34 - 13)),  # four runs, the labels of BART and of Pegasus
        ("table6_xsum_bart", 15 * 787 / 102),  # sizes that Table 5 does not have
    ],
)
def test_expected_hours_are_the_papers_costs(name, hours, offline, tmp_path):
    plan = describe_plan(read_space(SPACES / f"{name}.yaml"), tmp_path)
    assert plan["expected_gpu_hours"] == pytest.approx(hours)


def test_the_initialisations_are_those_of_table_8():
    starts = {(r.student.init, r.student.copy_from) for r in runs_of(read_space(SPACES / "table8_xsum_bart.yaml"))}
    assert starts == {
        ("spaced", None),
        ("spaced", "facebook/bart-large"),
        ("spaced", "facebook/bart-large-cnn"),
        *((init, None) for init in ("last", "first", "middle", "repeated", "random")),
    }


@pytest.mark.parametrize("path", MINI, ids=lambda path: path.stem)
def test_the_miniatures_run_every_setting_with_three_seeds(path):
    space = read_space(path)
    runs = runs_of(space)
    assert len(runs) == space.search.trials
    settings = {}
    for run in runs:
        plain = run.model_dump_json(exclude={"training": {"seed"}})
        settings.setdefault(plain, set()).add(run.training.seed)
    assert all(seeds == {0, 1, 2} for seeds in settings.values())
    assert len(MINI) == 3

"""A space for every table of the paper: each names it, and plans the right trials at the paper's costs."""

import re
from pathlib import Path

import pytest

from raydistill.config.corners import point_values
from raydistill.config.run import parse_size
from raydistill.config.space import read_space, resolve
from raydistill.models.layer_choice import layers_to_copy
from raydistill.paper import published
from raydistill.paper.ablations import variation
from raydistill.search.dry_run import describe_plan
from raydistill.search.prepare import runs_of

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


def place_of(path):
    """(teacher, data) of a table's space, by the paper's names."""
    teacher = {"bart": "BART", "pegasus": "Pegasus", "marian": "Marian", "mbart": "mBART"}
    data = {"xsum": "XSUM", "cnn": "CNN", "enro": "EN-RO"}
    _, where, who = path.stem.split("_")
    return teacher[who], data[where]


def of_table(number):
    return pytest.mark.parametrize("path", SPACES.glob(f"table{number}_*.yaml"), ids=lambda path: path.stem)


@of_table(5)
def test_the_methods_are_those_of_table_5(path):
    [theirs] = [row for (teacher, _, data), row in published.TABLE_5.items() if (teacher, data) == place_of(path)]
    runs = runs_of(read_space(path))
    assert sorted(r.method for r in runs) == sorted(m for m in ("sft", "kd", "pl") if getattr(theirs, m))
    assert {r.label_source for r in runs} == {"pseudo" if r.method == "pl" else "original" for r in runs}


@of_table("[89]")
def test_the_initialisations_are_those_of_tables_8_and_9(path):
    depth = {"BART": 12, "Marian": 6}[place_of(path)[0]]
    starts = []
    for run in runs_of(read_space(path)):
        if run.student.init == "random":
            starts.append(((), ""))
        else:
            layers = tuple(layers_to_copy(depth, parse_size(run.student.size)[1], run.student.init))
            starts.append((layers, run.student.copy_from or "teacher"))
    assert sorted(starts) == sorted(published.INITIALISATIONS[place_of(path)])


@of_table(10)
def test_the_labels_are_those_of_table_10(path):
    [theirs] = [row for (teacher, _, data), row in published.TABLE_10.items() if (teacher, data) == place_of(path)]
    other = {"BART": "pegasus", "Pegasus": "bart"}.get(place_of(path)[0])
    mixes = ["original", "pseudo", "original+pseudo", f"original+pseudo+pseudo@{other}"]
    wanted = [mix for mix, figure in zip(mixes, theirs[1:], strict=True) if figure is not None]
    assert sorted(r.labels for r in runs_of(read_space(path))) == sorted(wanted)


def test_section_6_3_varies_one_thing_at_a_time_and_stops_no_trial():
    space = read_space(SPACES / "section63_xsum_bart.yaml")
    assert space.search.trials == len(space.points)
    assert not space.search.stops_early
    runs = [resolve(space, point_values(space.run, point), "s") for point in space.points]
    assert {run.method for run in runs} == {"kd"}
    assert [variation(run.loss) for run in runs] == [
        "plain KD",
        "no hidden loss",
        "attention maps 1",
        "cosine 1",
        "normalised hidden",
        "temperature 1",
    ]


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


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_recipes_are_the_authors(path):
    """Typed from ../shared/reference/README.md, apart from the spaces: rate, batch, smoothing, Adam's epsilon."""
    recipes = {
        ("BART", "XSUM"): (3e-4, 64, 0.0, 1e-8),
        ("BART", "CNN"): (3e-5, 32, 0.0, 1e-8),
        ("Pegasus", "XSUM"): (1e-4 * 8, 256, 0.0, 1e-8),
        ("Pegasus", "CNN"): (1e-4 * 8, 256, 0.0, 1e-8),
        ("Marian", "EN-RO"): (3e-4, 64, 0.0, 1e-8),
        ("mBART", "EN-RO"): (3e-5, 64, 0.1, 1e-6),
    }
    for run in runs_of(read_space(path)):
        how = run.training
        found = (how.learning_rate, how.batch_size, run.loss.label_smoothing, how.adam_eps)
        assert found == pytest.approx(recipes[place_of(path)])
        assert (how.warmup_steps, how.schedule, how.weight_decay, how.gradient_clip) == (500, "linear", 0, 1)
        assert how.epochs <= 5
        assert how.accumulation == (8 if place_of(path)[0] == "Pegasus" else 1)

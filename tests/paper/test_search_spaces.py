"""The search spaces of the paper's tables: their names, trials, costs and recipes."""

import re
from pathlib import Path

import pytest

from raydistill.config.corners import iter_corners, resolve_point
from raydistill.config.run import parse_size
from raydistill.config.space import corner_runs, make_run, read_space
from raydistill.models.layer_choice import layers_to_copy
from raydistill.paper import published
from raydistill.paper.ablations import describe_loss
from raydistill.search.dry_run import describe_plan

SPACES = Path(__file__).parents[2] / "search_spaces"
TABLES = sorted(SPACES.glob("table*.yaml"))
MINI = sorted(SPACES.glob("mini_table*.yaml"))
# All others compare settings at one size with the recipe of the paper's table.
SEARCHES = [SPACES / f"{name}.yaml" for name in ("best_xsum", "kd_xsum", "mscmdlets", "multi30k", "quickstart")]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_space_of_every_table_can_be_planned(path, offline, tmp_path):
    space = read_space(path)
    assert space.name == path.stem
    assert space.description.startswith(f"Table {re.match(r'table([0-9]+)_', path.stem)[1]},")
    plan = describe_plan(space, tmp_path)
    assert plan["trials"] == plan["combinations"]
    assert plan["rows"] > 200_000
    assert plan["teacher"] in ("bart", "pegasus", "marian", "mbart")
    assert plan["expected_device_hours"] > 0
    assert "expected device-hours: about" in plan["text"]


def test_every_table_of_training_runs_has_its_spaces():
    num_rows = {"5": 6, "6": 2, "7": 2, "8": 1, "9": 2, "10": 6}  # teacher and data set pairs by table
    tables = [re.match(r"table(\d+)_", path.stem)[1] for path in TABLES]
    assert {number: tables.count(number) for number in tables} == num_rows


@pytest.mark.parametrize(
    ("name", "hours"),
    [
        ("table5_cnn_bart", 2 + 2 * 14 + 2 + 17.5),  # Table 5: sft, two kd runs, and pl as an sft run plus labels
        ("table10_xsum_bart", 4 * 2.5 + (15 - 2.5) + (34 - 13)),  # four runs, plus the labels of BART and of Pegasus
        ("table6_xsum_bart", 22 * 787 / 102),  # Table 5 has no costs for these sizes
    ],
)
def test_expected_hours_follow_the_published_costs(name, hours, offline, tmp_path):
    plan = describe_plan(read_space(SPACES / f"{name}.yaml"), tmp_path)
    assert plan["expected_device_hours"] == pytest.approx(hours)


def paper_key(path):
    """(teacher, data) of a table's space, with the paper's names."""
    teacher = {"bart": "BART", "pegasus": "Pegasus", "marian": "Marian", "mbart": "mBART"}
    data = {"xsum": "XSUM", "cnn": "CNN", "enro": "EN-RO"}
    _, data_key, teacher_key = path.stem.split("_")
    return teacher[teacher_key], data[data_key]


def published_result(table, path):
    """The row of a published table for the teacher and data of a space."""
    [result] = [row for (teacher, _, data), row in table.items() if (teacher, data) == paper_key(path)]
    return result


def for_spaces_of_table(number):
    return pytest.mark.parametrize("path", SPACES.glob(f"table{number}_*.yaml"), ids=lambda path: path.stem)


@for_spaces_of_table(5)
def test_methods_match_table_5(path):
    [published_row] = [
        row for (teacher, _, data), row in published.TABLE_5.items() if (teacher, data) == paper_key(path)
    ]
    runs = corner_runs(read_space(path))
    assert {r.method for r in runs} == {m for m in ("sft", "kd", "pl") if getattr(published_row, m)}
    assert {r.resolved_labels for r in runs} == {"pseudo" if r.method == "pl" else "original" for r in runs}


@for_spaces_of_table("[89]")
def test_initialisations_match_tables_8_and_9(path):
    depth = {"BART": 12, "Marian": 6}[paper_key(path)[0]]
    inits = []
    for run in corner_runs(read_space(path)):
        if run.student.init == "random":
            inits.append(((), ""))
        else:
            layers = tuple(layers_to_copy(depth, parse_size(run.student.size)[1], run.student.init))
            inits.append((layers, run.student.copy_from or "teacher"))
    assert sorted(inits) == sorted(published.INITIALISATIONS[paper_key(path)])


@for_spaces_of_table(10)
def test_labels_match_table_10(path):
    [published_row] = [
        row for (teacher, _, data), row in published.TABLE_10.items() if (teacher, data) == paper_key(path)
    ]
    other = {"BART": "pegasus", "Pegasus": "bart"}.get(paper_key(path)[0])
    mixes = ["original", "pseudo", "original+pseudo", f"original+pseudo+pseudo@{other}"]
    expected = [mix for mix, difference in zip(mixes, published_row[1:], strict=True) if difference is not None]
    assert {r.labels for r in corner_runs(read_space(path))} == set(expected)


def test_table_6_trains_12_3_on_the_labels_of_pegasus():
    """The paper's 12-3 with 22.40 points was trained on labels of Pegasus; Table 10 adds them to the originals."""
    labels: dict[str, set[str]] = {}
    for run in corner_runs(read_space(SPACES / "table6_xsum_bart.yaml")):
        if run.method == "pl":
            labels.setdefault(str(run.student.size), set()).add(run.resolved_labels)
    assert labels.pop("12-3") == {"pseudo", "pseudo@pegasus", "original+pseudo+pseudo@pegasus"}
    assert len(labels) == 4
    assert all(own == {"pseudo"} for own in labels.values())


@pytest.mark.parametrize("path", [*TABLES, SPACES / "kd_xsum.yaml"], ids=lambda path: path.stem)
def test_kd_is_tried_with_the_papers_and_the_released_weight_of_the_data_loss(path):
    runs = corner_runs(read_space(path))
    weights = {run.loss.alpha_data for run in runs if run.method == "kd"}
    assert weights in (set(), {1.0, 0.2})
    assert {run.loss.alpha_data for run in runs if run.method != "kd"} <= {1.0}


@pytest.mark.parametrize(
    "path", [*TABLES, SPACES / "kd_xsum.yaml", SPACES / "section63_xsum_bart.yaml"], ids=lambda p: p.stem
)
def test_every_space_of_the_paper_says_where_its_settings_are_from(path):
    comment = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# "))
    assert "the authors' " in comment
    assert "command" in comment
    if path.stem.startswith("table"):
        number = re.match(r"table([0-9]+)_", path.stem)[1]
        assert re.search(rf"From the paper: .*\(Table {number}[);,]", comment)


def test_section_6_3_varies_one_loss_setting_at_a_time_without_early_stopping():
    space = read_space(SPACES / "section63_xsum_bart.yaml")
    assert space.search.trials == len(space.points)
    assert not space.search.stops_early
    runs = [make_run(space, resolve_point(space.run, point), "s") for point in space.points]
    assert {run.method for run in runs} == {"kd"}
    assert [describe_loss(run.loss) for run in runs] == [
        "plain KD",
        "no hidden loss",
        "attention maps 1",
        "cosine 1",
        "normalised hidden",
        "temperature 1",
    ]


@pytest.mark.parametrize("path", MINI, ids=lambda path: path.stem)
def test_miniature_spaces_run_every_setting_with_three_seeds(path):
    space = read_space(path)
    runs = corner_runs(space)
    assert len(runs) == space.search.trials
    seeds_by_setting = {}
    for run in runs:
        setting = run.model_dump_json(exclude={"training": {"seed"}})
        seeds_by_setting.setdefault(setting, set()).add(run.training.seed)
    assert all(seeds == {0, 1, 2} for seeds in seeds_by_setting.values())
    assert len(MINI) == 3


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_searches_vary_the_learning_rate_by_depth_and_give_trained_encoders_a_rate_of_their_own(path):
    run = read_space(path).run
    rates, encoder_layers = {}, set()
    corners = list(iter_corners(run, keys=("training.learning_rate", "training.encoder_learning_rate")))
    for params in corners:
        encoder, _ = parse_size(params["student.size"])
        rates.setdefault(params["student.size"], set()).add(params["training.learning_rate"])
        encoder_layers.add(encoder)
    assert all(len(values) == 2 for values in rates.values())  # the bounds of a range
    largest = {size: max(values) for size, values in rates.items()}
    single = [rate for size, rate in largest.items() if parse_size(size)[1] == 1]
    deeper = [rate for size, rate in largest.items() if parse_size(size)[1] > 1]
    assert min(single) > max(deeper)
    for params in corners:  # an encoder with all layers and units is frozen
        shrunk = parse_size(params["student.size"])[0] < max(encoder_layers)
        shrunk |= params.get("student.encoder_ffn", 1) != 1
        assert ("training.encoder_learning_rate" in params) == shrunk


def test_points_of_the_papers_kd_search_have_the_papers_learning_rate():
    space = read_space(SPACES / "kd_xsum.yaml")
    runs = [make_run(space, resolve_point(space.run, point), "s") for point in space.points]
    assert {(run.training.learning_rate, run.loss.alpha_hidden) for run in runs} == {(3e-4, 3)}


def test_every_setting_of_the_miniature_of_table_5_has_two_learning_rates():
    runs = corner_runs(read_space(SPACES / "mini_table5.yaml"))
    rates = {size: {r.training.learning_rate for r in runs if r.student.size == size} for size in ("6-3", "6-1")}
    assert rates == {"6-3": {5e-4, 2e-3}, "6-1": {2e-3, 4e-3}}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_recipes_match_the_authors(path):
    """Rates, rows a step, accumulation, label smoothing and Adam's epsilon, from ../shared/reference/README.md."""
    pegasus_rates = {1e-4 * accumulation for accumulation in (2, 4, 8)}
    recipes = {  # for fine-tuning
        ("BART", "XSUM"): ({3e-4}, 64, 1, 0.0, 1e-8),
        ("BART", "CNN"): ({3e-5}, 32, 1, 0.0, 1e-8),
        ("Pegasus", "XSUM"): (pegasus_rates, 256, 8, 0.0, 1e-8),
        ("Pegasus", "CNN"): (pegasus_rates, 256, 8, 0.0, 1e-8),
        ("Marian", "EN-RO"): ({3e-4}, 64, 1, 0.0, 1e-8),
        ("mBART", "EN-RO"): ({3e-5}, 64, 1, 0.1, 1e-6),
    }
    rates, batch_size, accumulation, smoothing, epsilon = recipes[paper_key(path)]
    runs = corner_runs(read_space(path))
    assert sorted({run.training.learning_rate for run in runs}) == pytest.approx(sorted(rates))
    for run in runs:
        training = run.training
        rows = (batch_size, accumulation)
        if paper_key(path) == ("BART", "XSUM"):
            uses_labels = run.resolved_labels != "original"
            rows = (32, 2) if run.method == "kd" else (32, 1) if uses_labels else (64, 1)
        assert (training.batch_size, training.accumulation) == rows
        assert (run.loss.label_smoothing, training.adam_eps) == (smoothing, epsilon)
        assert (training.warmup_steps, training.schedule, training.weight_decay, training.gradient_clip) == (
            500,
            "linear",
            0,
            1,
        )
        assert training.epochs <= 5

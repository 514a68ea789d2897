"""The space file of a user's data and teacher, and the recipe of a new teacher."""

import json

import pytest

from raydistill.config.presets import check_teacher
from raydistill.config.run import Dataset, Run
from raydistill.config.space import corner_runs, read_space
from raydistill.core.errors import UserError
from raydistill.models.loading import load_config
from raydistill.search.dry_run import describe_plan
from raydistill.search.new_space import (
    Request,
    choose_metrics,
    is_guessed_translation,
    learning_rate_cases,
    student_sizes,
    write_space,
)
from raydistill.search.user_inputs import measure_lengths, read_data
from raydistill.train import load_run
from tests.factories.data_files import write_jsonl
from tests.factories.models import save_tiny
from tests.factories.workspace import corpus_rows, write_corpus


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "outputs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def request(folder, teacher=None, metric="rouge2", **dataset):
    return Request("news", Dataset(name=str(folder), **dataset), teacher, metric, folder.parent / "news.yaml")


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        ((12, 12), ["12-6", "12-3", "12-1"]),
        ((16, 16), ["16-8", "16-4", "16-1"]),
        ((6, 6), ["6-3", "6-2", "6-1"]),
        ((2, 4), ["2-2", "2-1"]),
        ((2, 2), ["2-1"]),
        ((4, 1), ["2-1", "1-1"]),
        ((1, 1), ["1-1"]),
    ],
)
def test_sizes_follow_from_the_layers_of_the_teacher(layers, sizes):
    assert student_sizes(*layers) == sizes


@pytest.mark.parametrize(
    ("sizes", "width", "cases"),
    [
        (["6-3", "6-2", "6-1"], 128, [(["6-3", "6-2"], (3e-4, 2e-3)), (["6-1"], (5e-4, 4e-3))]),
        (["12-1"], 1024, [(["12-1"], (3e-4, 4e-3))]),
    ],
)
def test_a_single_decoder_layer_has_larger_learning_rates(sizes, width, cases):
    assert learning_rate_cases(sizes, width) == cases


def test_limits_cover_99_percent_of_the_texts():
    # 1 to 200 tokens: the 99th percentile by the nearest rank is the 198th of 200
    texts = [str(n) for n in range(1, 201)]
    lengths = measure_lengths(lambda chunk: [[0] * int(text) for text in chunk], texts, None)
    assert (lengths.median, lengths.p99, lengths.longest, lengths.limit, lengths.cut_share) == (100, 198, 200, 200, 0)
    short = measure_lengths(lambda chunk: [[0] * int(text) for text in chunk], texts, 150)
    assert (short.limit, short.cut_share) == (150, 0.25)


def test_space_of_a_teacher_loads_and_can_be_planned(home):
    teacher = save_tiny("bart", home / "teacher", dropout=0.0)
    data = write_corpus(home / "data")
    asked = request(data, str(teacher))
    written = write_space(asked, read_data(asked.dataset))
    space = read_space(written.space)
    config = load_config(teacher)
    assert space.run["student"]["size"]["choice"] == student_sizes(config.encoder_layers, config.decoder_layers)
    assert {run.method for run in corner_runs(space)} == {"sft", "kd", "pl"}
    assert [point["method"] for point in space.points] == ["sft", "kd", "pl"]
    assert space.run["evaluation"] == {"metric": "rouge2"}
    assert {tuple(case["when"]["student.size"]) for case in space.run["training"]["learning_rate"]["cases"]} == {
        ("2-2",),
        ("2-1",),
    }
    assert space.run["dataset"]["max_source_tokens"] <= config.max_position_embeddings
    assert written.recipe is None
    plan = describe_plan(space, home / "outputs" / "sweeps" / "news")
    assert plan["rows"] == 48
    assert "not available" not in plan["text"]


def test_recipe_of_a_new_teacher_and_its_space_belong_together(home):
    asked = request(write_corpus(home / "data"))
    written = write_space(asked, read_data(asked.dataset))
    run, space = load_run(written.recipe, []), read_space(written.space)
    assert isinstance(run, Run)
    assert run.start.max_positions > max(run.dataset.max_source_tokens, run.dataset.max_target_tokens)
    assert space.run["teacher"] == "outputs/runs/news-teacher/best"
    assert run.name == "news-teacher"
    layers = (run.start.encoder_layers, run.start.decoder_layers)
    assert space.run["student"]["size"]["choice"] == student_sizes(*layers)
    with pytest.raises(UserError, match="no such folder"):
        check_teacher(f"./{space.run['teacher']}")  # not trained yet


def test_settings_of_imperfect_data_are_written(home):
    rows = [{"body": row["source"], "head": row["target"], "id": f"{i % 40}"} for i, row in enumerate(corpus_rows(48))]
    (home / "data").mkdir()
    write_jsonl(home / "data" / "train.jsonl", [*rows, {"body": "", "head": "empty", "id": "x"}])
    write_jsonl(home / "data" / "validation.jsonl", rows[:8])
    asked = request(home / "data", columns={"source": "body", "target": "head"})
    written = write_space(asked, read_data(asked.dataset))
    dataset = read_space(written.space).run["dataset"]
    assert dataset["skip_bad_rows"] is True
    assert dataset["columns"] == {"source": "body", "target": "head", "id": ""}
    assert "Rows that cannot be used and are skipped: 1." in written.space.read_text()


def test_names_that_yaml_would_misread_are_quoted(home):
    data = write_corpus(home / "it's #1: data")
    asked = Request("1e5", Dataset(name=str(data)), None, "rouge2", home / "x.yaml")
    space = read_space(write_space(asked, read_data(asked.dataset)).space)
    assert space.name == "1e5"
    assert space.run["dataset"]["name"] == str(data)


def test_translation_is_recognised_by_its_columns(home):
    (home / "pairs").mkdir()
    rows = [{"translation": {"en": f"house {i}", "de": f"Haus {i}"}} for i in range(20)]
    for split in ("train", "validation"):
        write_jsonl(home / "pairs" / f"{split}.jsonl", [json.dumps(row) for row in rows])
    dataset = Dataset(name=str(home / "pairs"))
    data = read_data(dataset)
    assert choose_metrics(dataset, "auto", data).names == ("chrf++", "bleu")
    assert not is_guessed_translation(dataset, data)
    assert data.task.languages == ("en", "de")


def write_pairs(home):
    """Pairs without common words, of about equal length, in columns whose names say nothing."""
    (home / "pairs").mkdir()
    rows = [{"source": f"two dogs run {i}", "target": f"zwei Hunde rennen {i + 30}"} for i in range(20)]
    for split in ("train", "validation"):
        write_jsonl(home / "pairs" / f"{split}.jsonl", [json.dumps(row) for row in rows])
    return home / "pairs"


def test_a_translation_that_the_texts_show_is_scored_by_chrf_with_bleu_reported(home):
    asked = request(write_pairs(home), metric="auto")
    data = read_data(asked.dataset)
    assert is_guessed_translation(asked.dataset, data)
    written = write_space(asked, data)
    assert read_space(written.space).run["evaluation"] == {"metric": "chrf++", "report": ["bleu"]}
    run = load_run(written.recipe, [])
    assert (run.evaluation.metric, run.evaluation.report, run.start.family) == ("chrf++", ["bleu"], "marian")
    assert "# Translation: a target has" in written.space.read_text()


def test_a_requested_metric_is_written_and_decides_about_texts_that_are_no_certain_translation(home):
    asked = request(write_pairs(home), metric="rouge2")
    written = write_space(asked, read_data(asked.dataset))
    assert read_space(written.space).run["evaluation"] == {"metric": "rouge2"}
    assert load_run(written.recipe, []).start.family == "bart"
    assert "# Not a translation.\n" in written.space.read_text()


def test_data_without_a_validation_split_are_refused(home):
    path = write_jsonl(home / "train.jsonl", corpus_rows(4))
    with pytest.raises(UserError, match="no validation split; available: train"):
        read_data(Dataset(name=str(path)))

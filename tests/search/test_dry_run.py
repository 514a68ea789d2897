"""Estimates of `raydistill sweep --dry-run`."""

import json

import pytest
import yaml

from raydistill.config.presets import DATASETS
from raydistill.config.run import Run, Student
from raydistill.config.shapes import Shape
from raydistill.core.errors import UserError
from raydistill.models.loading import load_config
from raydistill.search.dry_run import (
    DatasetSize,
    count_extra_rows,
    describe_plan,
    describe_stopping,
    estimate_cache_bytes,
    estimate_infeasible_sizes,
    shape_row,
)
from raydistill.search.shape_latency import count_params_m
from raydistill.sweep import sweep_command
from tests.factories.data_files import write_jsonl
from tests.factories.models import save_tiny
from tests.factories.sweeps import make_space, shape_table, sweep_record
from tests.factories.workspace import make_world


def test_cache_of_xsum_at_full_size_takes_about_170_gb_of_encoder_states():
    """The configuration of BART-large is the default of its class; 204,017 rows of 358 words (Table 3 of the paper)."""
    from transformers import BartConfig

    rows, source, target = DATASETS["xsum"].paper_stats
    run = Run.model_validate(
        {"name": "r", "teacher": "bart", "dataset": "xsum", "method": "kd", "student": {"size": "12-3"}}
    )
    data = DatasetSize(rows, source, target, "")
    encoder, decoder = estimate_cache_bytes([run], BartConfig(), data)
    assert 160e9 < encoder < 180e9
    assert decoder == pytest.approx(3 * encoder * target / source, rel=1e-3)  # layers 3, 7 and 11
    int8 = run.model_copy(update={"training": run.training.model_copy(update={"cache_precision": "int8"})})
    # Width 1024: 1024 integers and 8 scales of 4 bytes, instead of 1024 numbers of 2 bytes
    sizes = [round(size * 1056 / 2048) for size in (encoder, decoder)]
    assert estimate_cache_bytes([int8], BartConfig(), data) == pytest.approx(sizes, rel=1e-6)
    off = run.model_copy(update={"training": run.training.model_copy(update={"teacher_cache": "off"})})
    assert estimate_cache_bytes([off], BartConfig(), data) == (0, 0)
    shrunk = run.model_copy(update={"student": run.student.model_copy(update={"size": "6-3"})})
    assert estimate_cache_bytes([shrunk], BartConfig(), data) == (0, decoder)


def test_the_plan_names_infeasible_sizes_by_parameters_and_by_costs_once_measured(tmp_path):
    config = load_config(save_tiny("bart", tmp_path / "teacher"))
    between = (count_params_m(config, "2-1") + count_params_m(config, "2-3")) / 2
    budgets = {"small": {"params_m": between}, "share": {"params_m": "1%"}}
    space = make_space().model_copy(update={"budgets": budgets})
    infeasible, remark = estimate_infeasible_sizes(space, ["2-1", "2-3", "full"], config, tmp_path)
    assert infeasible == ["2-3", "full"]  # the teacher has 2-3 layers
    assert "by their parameters" in remark
    costs = {"2-1": {"latency_ms": 50.0}, "2-3": {"latency_ms": 90.0}}
    cheapest = {"2-1": {"latency_ms": 30.0}, "2-3": {"latency_ms": 72.0}}
    shapes = shape_table(costs, cheapest, teacher_size="2-3")
    sweep_record(shapes=shapes).write(tmp_path / "sweep.json")
    fast = space.model_copy(update={"budgets": {"fast": {"latency_ms": "60%"}}})
    # 60 % of 90 ms is 54 ms, and 1.3 times that is 70.2 ms
    assert estimate_infeasible_sizes(fast, ["2-1", "2-3"], config, tmp_path) == (["2-3"], "")
    assert estimate_infeasible_sizes(fast, ["2-1"], config, tmp_path) == ([], "")


def test_the_plan_lists_pruned_shapes_with_their_parameters(tmp_path):
    config = load_config(save_tiny("bart", tmp_path / "teacher"))
    shapes = ["2-1", "2-1-ffn1-0.5", "full-ffn0.5-1"]
    full, half, whole_depth = (count_params_m(config, name) for name in shapes)
    assert full - half == pytest.approx(16 * (16 + 1 + 16) / 1e6)  # one layer without 16 units of width 16
    runs = [
        Run.model_validate(
            {"name": "r", "teacher": "t", "dataset": "d", "student": Student.of_shape(Shape.parse(name))}
        )
        for name in shapes
    ]
    assert shape_row("full-ffn0.5-1", runs, config) == ["full-ffn0.5-1", "[0, 1, 2]", f"{whole_depth:.1f}"]
    space = make_space().model_copy(update={"budgets": {"small": {"params_m": (full + half) / 2}}})
    infeasible, _ = estimate_infeasible_sizes(space, shapes, config, tmp_path)
    assert infeasible == ["2-1", "full-ffn0.5-1"]


def test_the_plan_says_when_trials_stop():
    plan = describe_stopping(make_space(sampler="tpe", max_device_hours=3))
    assert "after 12.5% of its steps, if it is not in the better 1/3 of its shape" in plan
    assert "no trial starts after 3 device-hours" in plan
    assert describe_stopping(make_space()) == "no trial is stopped early"  # the table of a grid is complete


def dry_run(folder, capsys, **run):
    """The exit of `sweep --dry-run --json` for a space with some settings of the run, as (problem, plan)."""
    data = {"teacher": str(folder / "teacher"), "dataset": str(folder / "data"), "student": {"size": "2-1"}, **run}
    (folder / "space.yaml").write_text(yaml.safe_dump({"name": "s", "run": data}))
    problem = ""
    try:
        sweep_command(folder / "space.yaml", dry_run=True, as_json=True)
    except UserError as error:
        problem = str(error)
    return problem, json.loads(capsys.readouterr().out)


def test_the_plan_counts_the_runs_with_further_seeds(tmp_path, monkeypatch):
    """Three seeds for the chosen student of each of two budgets and for its nearest rival."""
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    budgets = {"small": {"params_m": 1}, "large": {"params_m": 2}}
    plan = describe_plan(make_space(seeds=3).model_copy(update={"budgets": budgets}), tmp_path)
    assert plan["seed_repeats"] == 2 * 2 * 2
    assert "further seeds: 8 runs after the search if every budget has another choice and rival" in plan["text"]
    assert "not part of the device-hours" in plan["text"]
    assert "further seeds" not in describe_plan(make_space(), tmp_path)["text"]


def test_missing_inputs_are_problems_of_the_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "outputs"))
    problem, plan = dry_run(tmp_path, capsys)
    assert problem.startswith("the sweep would not start: ")
    assert [str(tmp_path / name) in text for name, text in zip(("teacher", "data"), plan["problems"], strict=True)]
    make_world(tmp_path)
    problem, plan = dry_run(tmp_path, capsys)
    assert (problem, plan["problems"], plan["rows"]) == ("", [], 48)
    problem, _ = dry_run(tmp_path, capsys, dataset={"name": str(tmp_path / "data"), "max_source_tokens": 100_000})
    assert "dataset.max_source_tokens is 100000, but the model has" in problem
    (tmp_path / "data" / "validation.jsonl").unlink()
    assert "there is no validation" in dry_run(tmp_path, capsys)[0]


def test_the_plan_counts_the_extra_rows_that_trials_read(tmp_path):
    path = write_jsonl(tmp_path / "more.jsonl", [{"text": f"text {i}"} for i in range(30)])

    def runs(*settings):
        return [
            Run.model_validate({"name": "r", "teacher": "t", "dataset": "d", "method": method, "pseudo": pseudo})
            for method, pseudo in settings
        ]

    extra = {"extra": str(path)}
    rows, text = count_extra_rows(runs(("pl", {**extra, "extra_rows": 10}), ("pl", extra), ("sft", extra)))
    assert rows == 30
    assert "30 rows, of which trials read 10 or 30" in text
    assert count_extra_rows(runs(("sft", extra), ("pl", {}))) == (None, "")
    assert "not available" in count_extra_rows(runs(("pl", {"extra": f"{tmp_path}/none.jsonl"})))[1]

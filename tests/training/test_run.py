"""One run, from config to checkpoint and result; a run killed at any step of its end finishes with the same result."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from raydistill.config.run import Dataset, Run, Student
from raydistill.config.shapes import Shape
from raydistill.core import artifact
from raydistill.core.artifact import Manifest
from raydistill.core.errors import UserError
from raydistill.core.files import SCHEMA_VERSION
from raydistill.data.batching import Examples
from raydistill.evaluation.metrics import Scores
from raydistill.evaluation.scoring import EvaluationResult
from raydistill.models import families
from raydistill.models.calibration import Calibration
from raydistill.models.loading import load_model
from raydistill.models.measured_layers import measure_layers
from raydistill.models.metadata import METADATA_FILE, CheckpointMetadata
from raydistill.models.pruning import best_units, random_units
from raydistill.models.saving import CHECKPOINT_KIND
from raydistill.models.shrinking import plan_student
from raydistill.models.teacher import open_teacher
from raydistill.results.records import read_trials
from raydistill.training import loop, validation
from raydistill.training import run as training_run
from raydistill.training.inputs import RunInputs
from raydistill.training.records import RESULT_FILE, RunResult, read_run
from raydistill.training.run import ActiveRun, collapse_reason, train
from raydistill.training.run_folder import delete_working_files
from raydistill.training.student import StudentSetup, make_student
from raydistill.training.student_choice import StudentChoice
from raydistill.training.teacher_states import make_distillation_step
from raydistill.training.tokenized_data import load_tokenized_data, make_examples
from raydistill.training.validation import Validator
from raydistill.training.workers import Worker
from tests.factories.kills import kill_at_every_step
from tests.factories.models import save_tiny
from tests.factories.training import (
    TIMING_METRICS,
    fail_if_called,
    flat_weights,
    make_run,
    no_report,
    parse_json_file,
    read_metrics,
    read_state,
    text_pairs,
)


@pytest.mark.parametrize("method", ["sft", "kd", "pl"])
def test_run_writes_checkpoint_metadata_and_result(workspace, method, tmp_path):
    reports = []
    inputs = RunInputs(
        label_folders={"pseudo": workspace / "labels"},
        cache_root=tmp_path / "cache",
        costs={"latency_ms": 5.0},
        number=3,
    )
    folder = tmp_path / "run"
    result = train(make_run(workspace, method), folder, lambda m, f: reports.append(m), inputs)
    assert result.to_json() == parse_json_file(folder / "result.json")
    assert (result.status, result.steps, result.size, result.number) == ("done", 3, "2-1", 3)
    assert result.metrics["latency_ms"] == 5.0
    assert set(result.metrics) >= {"rouge1", "rouge2", "rougeL", "rougeLsum", "score", "val_loss", "device_hours"}
    assert result.labels == {"pl": "pseudo"}.get(method, "original")
    assert [m["step"] for m in reports] == [2, 3]
    assert {"step_ms", "data_wait", "validation_s"} <= set(reports[0])
    assert 0 <= reports[0]["data_wait"] <= 1
    assert reports == read_metrics(folder)
    with np.load(folder / "rows.npz") as rows:
        assert (rows["validation"].shape, rows["test"].shape) == ((6,), (5,))
        assert rows["validation"].mean() == pytest.approx(result.metrics["rouge2"])
    assert sorted(p.name for p in folder.iterdir()) == [
        *("best", "input_fingerprints.json", "metrics.jsonl", "result.json", "rows.npz", "run.json")
    ]

    metadata = parse_json_file(folder / "best" / "raydistill.json")
    assert metadata["teacher"] == str(workspace / "teacher")
    assert (metadata["size"], metadata["method"]) == ("2-1", method)
    assert metadata["copied"] == {"encoder": [0, 1], "decoder": [0]}
    assert metadata["supervised"] == {"encoder": [0, 1], "decoder": [2]}
    assert metadata["config"] == make_run(workspace, method).model_dump(mode="json")
    assert parse_json_file(folder / "run.json") == {"schema": SCHEMA_VERSION, **metadata["config"]}
    assert set(metadata["data"]) == set(metadata["scores"]) | {"train"} == {"train", "validation", "test"}
    assert metadata["scores"]["validation"]["rouge2"] == result.metrics["rouge2"]
    assert metadata["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]

    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "best")
    assert families.size_name(model.config) == "2-1"
    assert (model.generation_config.num_beams, model.generation_config.max_length) == (2, 8)
    assert AutoTokenizer.from_pretrained(folder / "best")("A dog").input_ids
    assert model.state_dict()["final_logits_bias"].abs().sum() > 0
    written_at = (folder / "result.json").stat().st_mtime_ns
    assert train(make_run(workspace, method), folder, fail_if_called, inputs) == result
    assert (folder / "result.json").stat().st_mtime_ns == written_at


def test_a_pruned_student_is_trained_and_its_metadata_name_its_units(workspace, tmp_path):
    student = {"size": "2-1", "encoder_ffn": 0.5, "decoder_ffn": 8}
    run, inputs = make_run(workspace, "kd", student=student), RunInputs(cache_root=tmp_path / "cache")
    result = train(run, tmp_path / "run", no_report, inputs)
    assert (result.status, result.size, result.ffn) == ("done", "2-1-ffn0.5-8", {"encoder": 16, "decoder": 8})
    metadata = CheckpointMetadata.read_from(tmp_path / "run" / "best")
    assert (metadata.size, metadata.ffn) == (result.size, result.ffn)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "best")
    assert (model.config.encoder_ffn_dim, model.config.decoder_ffn_dim) == (16, 8)
    assert result.metrics["params_m"] == sum(p.numel() for p in model.parameters()) / 1e6
    units = StudentChoice.read(tmp_path / "run" / "student.json").units
    assert [len(layer) for layer in units["encoder"]] == [16, 16]
    assert [len(layer) for layer in units["decoder"]] == [8, 8, 8]
    teacher = load_model(workspace / "teacher")
    [expected] = best_units(
        teacher, replace(plan_student(teacher.config, run.student), ffn=(None, 8)), calibration_of(run)
    ).values()
    assert [layer.tolist() for layer in expected] == units["decoder"]


def test_a_resumed_run_keeps_the_units_that_it_was_started_with(workspace, tmp_path):
    """Another machine could rank units of nearly equal scores in another order."""
    run = make_run(workspace, student={"size": "2-3", "decoder_ffn": 2})
    recorded = StudentChoice(units={"decoder": [[0, 1], [2, 3], [4, 5]]})
    recorded.write(tmp_path / "run" / "student.json")
    train(
        run.model_copy(update={"training": run.training.model_copy(update={"learning_rate": 1e-12})}),
        tmp_path / "run",
        no_report,
    )
    student, teacher = load_model(tmp_path / "run" / "best"), load_model(workspace / "teacher")
    weights, original = student.state_dict(), teacher.state_dict()
    name = "model.decoder.layers.1.fc1.weight"
    torch.testing.assert_close(weights[name], original[name][[2, 3]], rtol=0, atol=1e-6)


def test_measured_layers_are_copied_and_recorded(workspace, tmp_path):
    run = make_run(workspace, "kd", student={"size": "2-2", "init": "measured"})
    result = train(run, tmp_path / "run", no_report, RunInputs(cache_root=tmp_path / "cache"))
    choice = StudentChoice.read(tmp_path / "run" / "student.json")
    teacher = load_model(workspace / "teacher")
    expected = measure_layers(teacher, 2, calibration_of(run))
    assert [tuple(candidate.layers) for candidate in choice.layers] == list(expected)
    assert [candidate.divergence for candidate in choice.layers] == pytest.approx(list(expected.values()), rel=1e-4)
    assert result.copied == {"encoder": [0, 1], "decoder": choice.layers[0].layers}
    assert (result.size, result.ffn) == ("2-2", None)
    assert read_run(tmp_path / "run" / "run.json") == run
    full = make_run(workspace, student={"size": "2-3", "init": "measured"})
    assert train(full, tmp_path / "full", no_report).copied["decoder"] == [0, 1, 2]


def calibration_of(run):
    """The rows that a run's units are ranked on, from the original targets."""
    teacher = open_teacher(run.teacher, run.dataset)
    data = load_tokenized_data(run, None, teacher.tokenizer, teacher.model.config)
    return Calibration.of(make_examples(run, data, teacher.tokenizer, {}))


def test_killed_run_resumes_to_the_same_checkpoint(workspace, tmp_path):
    run = make_run(workspace, "kd", training={"epochs": 2})

    class Killed(Exception):
        pass

    def kill(_metrics, _folder):
        raise Killed

    train(run, tmp_path / "whole", no_report)
    for _ in range(2):
        with pytest.raises(Killed):
            train(run, tmp_path / "run", kill)
    train(run, tmp_path / "run", no_report)
    whole, resumed = (load_model(tmp_path / name / "best") for name in ("whole", "run"))
    assert torch.equal(flat_weights(whole), flat_weights(resumed))
    untimed = [
        [{k: v for k, v in m.items() if k not in TIMING_METRICS} for m in read_metrics(tmp_path / n)]
        for n in ("whole", "run")
    ]
    assert untimed[0] == untimed[1]


def test_diverged_run_writes_a_failed_result_with_its_reason(workspace, tmp_path):
    run = make_run(workspace, training={"learning_rate": 1e30, "warmup_steps": 0, "epochs": 4, "schedule": "constant"})
    result = train(run, tmp_path / "run", no_report, RunInputs(number=1))
    assert (result.status, result.number, result.size) == ("failed", 1, "2-1")
    assert list(result.metrics) == ["device_hours"]  # the device-hours count although the run failed
    assert result.metrics["device_hours"] > 0
    assert "is nan at step" in result.reason or "is inf at step" in result.reason
    assert train(run, tmp_path / "run", no_report) == result


def test_run_reads_an_existing_teacher_cache(workspace, tmp_path):
    run, inputs = make_run(workspace, "kd"), RunInputs(cache_root=tmp_path / "cache")
    train(run, tmp_path / "first", no_report, inputs)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    assert sorted(p.parent.name for p in files) == ["layer-02", "states"]
    assert "model" not in vars(open_teacher(run.teacher, run.dataset))  # the weights are not in memory while steps run
    train(run, tmp_path / "run", no_report, inputs)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")} == files


@pytest.mark.parametrize(
    ("modes", "training", "size", "reads"),
    [
        (("full", "off"), {}, "2-1", (True, True, False)),
        (("encoder", "full"), {}, "2-1", (True, False, True)),
        (("off", "full"), {}, "2-1", (False, False, True)),
        (("auto", "full"), {}, "2-1", (True, True, False)),
        (("auto", "encoder"), {}, "2-1", (True, False, True)),
        (("auto", "off"), {}, "2-1", (False, False, True)),
        (("full", "off"), {}, "1-1", (False, True, True)),  # the teacher's encoder supervises the shrunk encoder
        (("full", "off"), {}, "2-1-ffn1-0.5", (True, True, False)),
        (("full", "off"), {}, "2-3-ffn0.5-0.5", (False, True, True)),  # a pruned encoder is supervised too
        (("full", "off"), {"freeze_encoder": False}, "2-1", (False, True, False)),
        (("full", "off"), {"freeze_embeddings": False}, "2-1", (False, True, True)),  # for the teacher's LM head
    ],
)
def test_run_reads_the_configured_cache_and_runs_the_teacher_when_needed(
    workspace, tmp_path, modes, training, size, reads
):
    """`modes`: the setting, and the mode for `auto`; `reads`: cached encoder states, cached decoder states, teacher."""
    setting, auto_mode = modes
    shape = Student.of_shape(Shape.parse(size)).model_dump()
    run = make_run(workspace, "kd", student=shape, training={"teacher_cache": setting, **training})
    teacher = open_teacher(str(workspace / "teacher"), Dataset(name=str(workspace)))
    units = random_units(teacher.model.config, plan_student(teacher.model.config, run.student), seed=0)
    student, layers = make_student(run, teacher, units)
    setup = StudentSetup(student, teacher.tokenizer, layers, teacher)
    examples = Examples([[5, 6, 2]], [[7, 2]], [0])
    inputs = RunInputs(cache_root=tmp_path, cache_mode=auto_mode)
    distillation = make_distillation_step(run, setup, examples, inputs, Worker())
    sources = (distillation.cached_encoder_states, distillation.cached_decoder_states, distillation.teacher)
    assert tuple(bool(source) for source in sources) == reads


def test_stopped_run_scores_and_keeps_its_best_checkpoint(workspace, tmp_path):
    run = make_run(workspace, training={"epochs": 4})
    reasons = iter([None, "others are better"])
    result = train(run, tmp_path / "s", lambda metrics, folder: next(reasons), RunInputs())
    assert (result.status, result.reason) == ("stopped", "others are better")
    lines = read_metrics(tmp_path / "s")
    assert len(lines) == 2
    assert lines[-1]["step"] == result.steps
    assert 0 < lines[0]["step"] < lines[1]["step"] < lines[1]["total_steps"]
    assert result.interval[0] <= result.metrics["score"] <= result.interval[1]
    assert (tmp_path / "s" / "best" / "model.safetensors").is_file()
    assert train(run, tmp_path / "s", no_report, RunInputs()) == result


def test_preempted_run_is_saved_at_its_step_and_resumes_to_the_same_weights(workspace, tmp_path):
    """The preemption falls between two validations; no step is repeated."""
    run = make_run(workspace, training={"epochs": 4, "checks_per_epoch": 1, "patience": 9})
    train(run, tmp_path / "whole", no_report)
    calls = []

    def is_draining():
        calls.append(True)
        return len(calls) == 4

    with pytest.raises(loop.Preempted, match="saved at step 5"):  # step 3 has a validation
        train(run, tmp_path / "run", no_report, RunInputs(), Worker(is_draining=is_draining))
    assert read_state(tmp_path / "run").step == 5
    steps = []
    train(run, tmp_path / "run", lambda metrics, folder: steps.append(metrics["step"]))
    assert steps == [6, 9, 12]
    whole, resumed = (flat_weights(load_model(tmp_path / name / "best")) for name in ("whole", "run"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-6)


def stop_at_second_validation():
    """A report callback that stops the run at its second validation."""
    reasons = iter([None, "others are better"])
    return lambda metrics, folder: next(reasons)


def test_stopped_run_killed_while_scored_is_still_stopped(workspace, tmp_path, monkeypatch):
    run = make_run(workspace, training={"epochs": 4})
    whole = train(run, tmp_path / "whole", stop_at_second_validation(), RunInputs())
    score = validation.Validator.score

    def interrupted_score(self, checkpoint, *arguments, **options):
        if checkpoint.name == "best":
            raise KeyboardInterrupt
        return score(self, checkpoint, *arguments, **options)

    monkeypatch.setattr(validation.Validator, "score", interrupted_score)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", stop_at_second_validation(), RunInputs())
    monkeypatch.setattr(validation.Validator, "score", score)
    resumed = train(run, tmp_path / "run", fail_if_called, RunInputs())
    for name in ("status", "reason", "steps", "best_step", "interval", "test"):
        assert getattr(resumed, name) == getattr(whole, name), name
    assert torch.equal(*(flat_weights(load_model(tmp_path / name / "best")) for name in ("whole", "run")))


def test_collapsed_run_keeps_its_reason_and_hours_but_no_checkpoint(workspace, tmp_path):
    folder = tmp_path / "trials" / "run"
    result = train(make_run(workspace), folder, no_report, RunInputs(teacher_repetition=-1.0))
    assert (result.status, list(result.metrics)) == ("failed", ["repetition", "device_hours"])
    assert "collapsed" in result.reason
    assert result.engine == "ctranslate2 fp32"
    assert not (folder / "best").exists()
    (folder / "best").mkdir()  # a kill before the deletion leaves the folder
    [trial] = read_trials(tmp_path)
    assert trial.checkpoint is None


def test_collapse_is_judged_relative_to_the_repetition_of_the_teacher():
    assert collapse_reason(0.9, None) is None
    assert collapse_reason(0.9, 0.6) is None
    assert "90% of its outputs" in str(collapse_reason(0.9, 0.1))


def test_out_of_memory_error_names_the_settings_to_change(tmp_path):
    """The error is raised by the report callback, in the middle of training."""
    save_tiny("bart", tmp_path / "teacher")

    def run_out_of_memory(metrics, folder):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    lines = [
        json.dumps({"id": str(i), "source": s, "target": t})
        for i, (s, t) in enumerate(zip(*text_pairs(6), strict=True))
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "validation.jsonl").write_text("\n".join(lines))
    run = {"name": "r", "teacher": str(tmp_path / "teacher"), "student": {"size": "2-2"}, "dataset": str(tmp_path)}
    run["training"] = {"max_steps": 1, "precision": "fp32"}
    with pytest.raises(UserError, match=r"too little memory: CUDA out of memory\. Lower training\.micro_tokens"):
        train(Run.model_validate(run), tmp_path / "run", run_out_of_memory)


# The end of a run


MEASURED = ("device_hours", "startup_s")  # times, which differ from call to call


@dataclass(frozen=True)
class FixedScores(Validator):
    """A validator that generates no texts, so that the end of a run takes milliseconds."""

    def score(self, folder, splits, beam, required_engine=None):
        artifact.open_artifact(folder, Manifest, CHECKPOINT_KIND)
        scores = Scores({"rouge2": 10.0}, np.full(6, 10.0), "rouge2")
        return {split: EvaluationResult(scores, (9.0, 11.0), 0.1, [], 1.0, "ctranslate2 fp32") for split in splits}


@pytest.fixture
def trained(workspace, tmp_path, monkeypatch) -> ActiveRun:
    """A run that has taken its last step; a copy of its folder is in `tmp_path`/copy."""

    def interrupt(*_):
        raise KeyboardInterrupt

    folder = tmp_path / "home" / "run"
    with monkeypatch.context() as context:
        context.setattr(training_run, "promote_best_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(make_run(workspace), folder, no_report)
    shutil.copytree(folder, tmp_path / "copy")
    active = training_run._prepare(make_run(workspace), folder, RunInputs(), Worker(), 0.0)
    validator = active.validator
    fixed = FixedScores(**vars(validator))
    return replace(active, validator=fixed)


def finish(active: ActiveRun) -> RunResult:
    """What `train` does after the last step."""
    result = RunResult.read_if_present(active.folder / RESULT_FILE)
    if result is None:
        return training_run._score_and_write_result(active, read_state(active.folder))
    delete_working_files(active.folder, result)
    return result


# The changes of the end of a run; in brackets those up to the rename of the result. Finished: rename of the checkpoint
# and its fsync, five for each of rows.npz, raydistill.json (and result.json); rename, fsync and the deletion of the two
# files and the folder of the state; the unlink of the progress. Failed: no metadata, but the removal of best/ with its
# manifest and five files.
END_STEPS = {"done": (23, 15), "failed": (27, 10)}


@pytest.mark.parametrize(("teacher_repetition", "status"), [(None, "done"), (-1.0, "failed")])
def test_a_run_killed_at_any_step_of_its_end_finishes_with_the_same_result(
    teacher_repetition, status, trained, tmp_path
):
    active = replace(trained, inputs=RunInputs(teacher_repetition=teacher_repetition))
    num_killed_before_result = 0

    def finish_again(folder: Path) -> tuple[dict, list[str]]:
        nonlocal num_killed_before_result
        num_killed_before_result += not (folder / RESULT_FILE).exists()
        result = finish(active)
        assert result == RunResult.read(folder / RESULT_FILE)
        if result.scored:
            manifest = artifact.open_artifact(folder / "best", Manifest, CHECKPOINT_KIND)
            files = {path.relative_to(folder / "best").as_posix() for path in (folder / "best").rglob("*")}
            assert files == {*manifest.files, artifact.MANIFEST, METADATA_FILE}
            assert CheckpointMetadata.read_from(folder / "best").scores["validation"].metrics["rouge2"] == 10.0
        content = result.model_dump(exclude={"ended_at"})
        content["metrics"] = {name: value for name, value in result.metrics.items() if name not in MEASURED}
        return content, sorted(path.name for path in folder.iterdir())

    outcomes = kill_at_every_step(
        lambda: finish(active),
        lambda: shutil.copytree(tmp_path / "copy", active.folder),
        active.folder,
        finish_again,
    )
    assert outcomes[-1][0]["status"] == status
    assert all(outcome == outcomes[-1] for outcome in outcomes)
    kept = ["best"] if status == "done" else []
    assert outcomes[-1][1] == [
        *(*kept, "input_fingerprints.json", "metrics.jsonl", "result.json", "rows.npz", "run.json")
    ]
    assert (len(outcomes) - 1, num_killed_before_result) == END_STEPS[status]

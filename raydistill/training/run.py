"""One run, from config to checkpoint. Read this module first: it shows the steps of a run in their order.

`train` locks the run's folder (run_folder.py), prepares the student (student.py), the data (tokenized_data.py) and the
teacher states (teacher_states.py), trains (loop.py), and scores the best checkpoint (validation.py). The folder then
holds the config, every validation, the checkpoint and, written last, the result. A call on the folder of an interrupted
run resumes the run.
"""

import platform
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from raydistill.config.run import Run
from raydistill.core import artifact
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.evaluation.scoring import EvaluationResult
from raydistill.models.freezing import freeze
from raydistill.models.metadata import CheckpointMetadata, SplitScores, library_versions
from raydistill.training.inputs import RunInputs
from raydistill.training.loop import NonFiniteLoss, ReportFn, fit
from raydistill.training.optimizer_step import OptimizerStep
from raydistill.training.records import RESULT_FILE, InputFingerprints, RunIdentity, RunResult
from raydistill.training.run_folder import (
    check_same_config,
    check_same_inputs,
    delete_working_files,
    promote_best_checkpoint,
    write_result,
    write_row_statistics,
)
from raydistill.training.state import TrainingState
from raydistill.training.student import StudentSetup, prepare_student
from raydistill.training.teacher_states import make_distillation_step
from raydistill.training.tokenized_data import extra_fingerprint, load_tokenized_data, make_examples
from raydistill.training.validation import Validator
from raydistill.training.workers import Worker

# A worker may outlive its driver by some seconds, until Ray ends it; the worker of a retry waits for the lock.
LOCK_TIMEOUT_S = 60.0
# A student has collapsed if the share of its outputs that repeat themselves exceeds the teacher's share by more than
# this.
MAX_EXTRA_REPETITION = 0.5


def train(
    run: Run, folder: Path, report: ReportFn, inputs: RunInputs | None = None, worker: Worker | None = None
) -> RunResult | None:
    """Carry out a run in a folder, or resume it.

    Args:
        run: The run's config.
        folder: The run's folder, created if missing.
        report: Called with the metrics and the folder after every validation. A text that it returns stops the run:
            the best checkpoint is scored and kept, and the result has the status "stopped".
        inputs: Label sets, teacher cache and costs that are prepared before the run.
        worker: This data-parallel worker; by default the only one, on the CPU.

    Returns:
        The result; None on workers other than the main process.

    Raises:
        UserError: The user has to act: another run's folder, too little memory, unreadable data and others.
        TransientError: Another process holds the folder.
        Preempted: The node is being preempted; the state is saved.
    """
    inputs = inputs or RunInputs()
    worker = replace(worker or Worker(), compute_dtype=inputs.compute_dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with artifact.lock(folder, LOCK_TIMEOUT_S) if worker.is_main_process else nullcontext():
        worker.barrier()  # the main process holds the lock before any worker reads the folder
        started_at = time.monotonic()
        if worker.is_main_process:
            check_same_config(folder, run)
        result = RunResult.read_if_present(folder / RESULT_FILE)
        if result is None:
            return _fit_and_score(_prepare(run, folder, inputs, worker, started_at), report)
        if worker.is_main_process:
            delete_working_files(folder, result)  # a kill can come between the result and the deletion
        return result


@dataclass(frozen=True)
class ActiveRun:
    """A run that is ready to train.

    Attributes:
        run: The run's config.
        folder: The run's folder.
        inputs: What was prepared before the run.
        setup: The student, with its frozen parts, and the teacher.
        step: Takes the optimiser steps.
        validator: Scores the student.
        started_at: When the run began, on the monotonic clock.
        startup_seconds: Time from the beginning to the first step.
    """

    run: Run
    folder: Path
    inputs: RunInputs
    setup: StudentSetup
    step: OptimizerStep
    validator: Validator
    started_at: float
    startup_seconds: float

    @property
    def worker(self) -> Worker:
        """The worker that trains the run."""
        return self.step.worker

    @property
    def identity(self) -> RunIdentity:
        """What the run trains."""
        return RunIdentity.of(self.run, self.setup.layer_plan, self.setup.size)

    def result(
        self, status: Literal["done", "stopped", "failed"], reason: str, metrics: dict[str, float], **fields: Any
    ) -> RunResult:
        """The result of the run; `fields` are fields that only some runs have."""
        return RunResult(
            key=self.folder.name,
            status=status,
            reason=reason,
            **asdict(self.identity),
            number=self.inputs.number,
            params=self.inputs.params,
            metrics=metrics,
            validation_part="search" if self.run.dataset.selection_share else "all",
            seed=self.run.training.seed,
            ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
            host=platform.node(),
            **fields,
        )


def _prepare(run: Run, folder: Path, inputs: RunInputs, worker: Worker, started_at: float) -> ActiveRun:
    """Load or create everything that the run trains with."""
    setup = prepare_student(run, folder, worker, inputs.label_folders)
    teacher, student = setup.teacher, setup.student
    data = load_tokenized_data(run, teacher.preset if teacher else None, setup.tokenizer, student.config)
    if worker.is_main_process:
        fingerprints = {**data.fingerprints, **extra_fingerprint(inputs.label_folders)}
        check_same_inputs(folder, InputFingerprints(teacher=teacher.key if teacher else None, data=fingerprints))
        if inputs.number is None:  # the trials of a sweep have the metric of its teacher
            print_progress(data.metrics.describe())
    examples = make_examples(run, data, setup.tokenizer, inputs.label_folders)
    freeze(student, setup.frozen_parts(run))
    torch.nn.Module.to(student, worker.device)
    distillation = make_distillation_step(run, setup, examples, inputs, worker)
    step = OptimizerStep.create(distillation, run.training, worker)
    validator = Validator.create(run, setup, data, examples, worker)
    return ActiveRun(run, folder, inputs, setup, step, validator, started_at, time.monotonic() - started_at)


def _fit_and_score(active: ActiveRun, report: ReportFn) -> RunResult | None:
    """Train the student, score its best checkpoint and write the result."""
    worker = active.worker
    try:
        state = fit(active.step, active.folder, active.validator.validate, report, active.started_at)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU has too little memory: {str(error).partition('. ')[0]}. Lower training.micro_tokens, or raise "
            f"training.gpus where runs share a GPU; the same command then resumes the run"
        ) from None
    except NonFiniteLoss as error:
        if not worker.is_main_process:
            return None
        hours = worker.device_hours(error.seconds, active.run.training)
        result = active.result("failed", str(error), {"device_hours": hours})
        write_result(active.folder, result)
        return result
    return _score_and_write_result(active, state) if worker.is_main_process else None


def _score_and_write_result(active: ActiveRun, state: TrainingState) -> RunResult:
    """Score the best checkpoint with the run's decoding; write its metadata and, last, the result.

    A kill in between leaves the state: the next call scores the checkpoint again.
    """
    started = time.monotonic()
    folder, validator = active.folder, active.validator
    best = promote_best_checkpoint(folder, state.best_step)
    # A stopped run is scored on the test split only if it is chosen later.
    splits = ("validation",) if state.stopped else ("validation", "test")
    evaluations = validator.score(best, splits, validator.beam, state.engine)
    if evaluations:
        write_row_statistics(
            folder / "rows.npz", {split: evaluation.scores.row_stats for split, evaluation in evaluations.items()}
        )
    hours = active.worker.device_hours(state.seconds + time.monotonic() - started, active.run.training)
    validation = evaluations.get("validation")
    if validation and (reason := collapse_reason(validation.repetition_rate, active.inputs.teacher_repetition)):
        # The losses of a run that took all its steps stay valid for tables of losses, which use the repetition.
        metrics = {} if state.stopped else {"repetition": validation.repetition_rate}
        result = active.result("failed", reason, {**metrics, "device_hours": hours}, engine=validation.engine)
    else:
        _checkpoint_metadata(active, evaluations).write_to(best)
        result = _scored_result(active, state, evaluations, hours)
    write_result(folder, result)
    return result


def _scored_result(
    active: ActiveRun, state: TrainingState, evaluations: dict[str, EvaluationResult], device_hours: float
) -> RunResult:
    validation, test = evaluations.get("validation"), evaluations.get("test")
    teacher = active.setup.teacher
    return active.result(
        "stopped" if state.stopped else "done",
        state.reason or "all epochs done",
        {
            **_best_metrics(state, validation, active.validator.metric),
            "params_m": sum(p.numel() for p in active.setup.student.parameters()) / 1e6,
            "device_hours": device_hours,
            "startup_s": active.startup_seconds,
            **active.inputs.costs,
        },
        interval=validation.score_interval if validation else None,
        test=_split_scores(test) if test else None,
        steps=state.step,
        best_step=state.best_step,
        signature=active.validator.signature,
        engine=validation.engine if validation else None,
        alignment=teacher.alignment_error if teacher else None,
    )


def _checkpoint_metadata(active: ActiveRun, evaluations: dict[str, EvaluationResult]) -> CheckpointMetadata:
    teacher, layer_plan = active.setup.teacher, active.setup.layer_plan
    return CheckpointMetadata(
        teacher=active.run.teacher,
        **asdict(active.identity),
        config=active.run,
        versions=library_versions(),
        supervised=layer_plan.supervised if layer_plan else None,
        vocabulary=len(teacher.token_ids) if teacher and teacher.token_ids else None,
        teacher_key=teacher.key if teacher else None,
        teacher_commit=teacher.commit if teacher else None,
        data={**active.validator.data.fingerprints, **extra_fingerprint(active.inputs.label_folders)},
        scores={split: _split_scores(evaluation) for split, evaluation in evaluations.items()},
        decoding=asdict(active.validator.beam),
        signature=active.validator.signature,
    )


def _split_scores(evaluation: EvaluationResult) -> SplitScores:
    return SplitScores.model_validate({**evaluation.summary(), "engine": evaluation.engine})


def _best_metrics(state: TrainingState, validation: EvaluationResult | None, metric: str) -> dict[str, float]:
    """Scores and loss of the best checkpoint, with the run's decoding where texts are scored."""
    assert state.best is not None
    best = {"score": state.best["score"], "val_loss": state.best["val_loss"]}
    if validation:
        scores = validation.scores.metrics
        best |= {**scores, "score": scores[metric], "repetition": validation.repetition_rate}
    return best


def collapse_reason(repetition: float, teacher_repetition: float | None) -> str | None:
    """Why a student counts as collapsed, or None.

    Args:
        repetition: Share of the student's outputs that repeat themselves, 0 to 1.
        teacher_repetition: Share of the teacher's outputs that repeat themselves; None where this share is unknown.
    """
    if teacher_repetition is None or repetition <= teacher_repetition + MAX_EXTRA_REPETITION:
        return None
    return (
        f"collapsed: {repetition:.0%} of its outputs repeat themselves (the teacher's: {teacher_repetition:.0%}); "
        f"try a lower learning rate, more steps, or pseudo-labels"
    )

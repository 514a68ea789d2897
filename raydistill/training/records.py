"""The records in the folder of a run. The module imports no torch, so that results are read without it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from raydistill.config.run import Run
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.files import (
    SCHEMA_VERSION,
    check_schema,
    corrupt_file_error,
    read_json,
    write_atomic,
    write_json_atomic,
)
from raydistill.core.records import Record
from raydistill.models.metadata import SplitScores

if TYPE_CHECKING:
    from raydistill.models.shrinking import LayerPlan

RUN_FILE = "run.json"
HISTORY_FILE = "metrics.jsonl"
FINGERPRINTS_FILE = "input_fingerprints.json"
PROGRESS_FILE = "progress.json"
RESULT_FILE = "result.json"
DEGENERATE_REPETITION = 0.5  # share of a model's outputs that repeat themselves, above which the model is not usable


def read_run(path: Path) -> Run:
    """Read the config of a run, run.json. Missing settings have their defaults.

    Raises:
        UserError: The file is missing, is damaged, or has another schema version.
    """
    content = read_json(path)
    check_schema(path, content)
    with corrupt_file_error(path):
        return Run.model_validate({name: value for name, value in content.items() if name != "schema"})


def write_run(path: Path, run: Run) -> None:
    """Write the config of a run."""
    write_json_atomic(path, {"schema": SCHEMA_VERSION, **run.model_dump(mode="json")})


class Validation(BaseModel):
    """A validation of a run: a line of metrics.jsonl.

    Scores, loss terms and further measurements are fields of their names, such as "rouge2" and "loss_logits".

    Attributes:
        step: Optimiser steps taken.
        total_steps: Optimiser steps of the whole run.
        metric: The metric of the score; "val_loss" where no text is scored.
        score: What checkpoints are compared by; higher is better.
        epoch: Passes over the training data.
        time_s: Seconds since the start of the run.
        device_hours: Hours of all devices since the start of the run.
        val_loss: Cross-entropy in nats per target token of the validation split.
        repetition: Share of the outputs that repeat themselves.
        engine: The engine of the scores, with its precision; None where no text is scored.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, FiniteFloat]
    step: int = Field(ge=0)
    total_steps: int = Field(gt=0)
    metric: str
    score: FiniteFloat
    epoch: FiniteFloat = 0.0
    time_s: FiniteFloat = 0.0
    device_hours: FiniteFloat = 0.0
    val_loss: FiniteFloat | None = None
    repetition: FiniteFloat | None = None
    engine: str | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """All values that were measured, by name."""
        measured = self.model_dump(exclude={"engine", "metric"}, exclude_unset=True)
        return {name: value for name, value in measured.items() if value is not None}


def write_history(folder: Path, validations: Iterable[Mapping[str, Any]]) -> None:
    """Write the validations of a run, given as fields of `Validation`."""
    lines = (Validation.model_validate(metrics).model_dump_json(exclude_unset=True) for metrics in validations)
    write_atomic(folder / HISTORY_FILE, "".join(f"{line}\n" for line in lines).encode())


def read_history(folder: Path, remedy: str | None = None) -> list[Validation]:
    """Read the validations of a run in order. An incomplete last line, which a kill can leave, is skipped.

    Args:
        folder: The run's folder.
        remedy: What the user can do about a damaged file; by default, delete the folder.

    Raises:
        UserError: Another line is not a validation.
    """
    path = folder / HISTORY_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    validations = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            validations.append(Validation.model_validate(json.loads(line)))
        except (ValueError, RecursionError) as error:
            if i == len(lines) - 1:
                break
            detail = error.errors()[0] if isinstance(error, ValidationError) else None
            problem = f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" if detail else str(error)
            raise UserError(
                f"{path}: damaged: line {i + 1}: {problem}. {remedy or f'Delete {folder} and run the command again'}"
            ) from None
    return validations


class RunProgress(Record):
    """The progress of a run that is training, progress.json, written every few seconds between validations.

    Attributes:
        step: Optimiser steps taken.
        total_steps: Optimiser steps of the whole run.
        resumed_step: The step that the process started from; 0 for a new run.
        seconds: Seconds of training since that step, with validations.
        updated_at: When the record was written, in seconds since the epoch.
    """

    step: int
    total_steps: int
    resumed_step: int
    seconds: float
    updated_at: float

    @property
    def steps_per_s(self) -> float | None:
        """Steps per second since the process started; None before the first step."""
        steps = self.step - self.resumed_step
        return steps / self.seconds if steps and self.seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step at the speed so far; None before the first step."""
        return (self.total_steps - self.step) / self.steps_per_s if self.steps_per_s else None


class InputFingerprints(Record):
    """The fingerprints of the teacher and of each split that a run was started with.

    `teacher` is None for a run without a teacher.
    """

    teacher: str | None
    data: dict[str, str]

    def changes(self, current: "InputFingerprints") -> list[str]:
        """The inputs that differ: "teacher", "train split" and so on."""
        changed = ["teacher"] if self.teacher != current.teacher else []
        return changed + [f"{split} split" for split, value in self.data.items() if current.data.get(split) != value]


@dataclass(frozen=True)
class RunIdentity:
    """What a run trains, as results and checkpoint metadata name it.

    Attributes:
        method: "sft", "kd" or "pl".
        size: Name of the shape: encoder and decoder layers, such as "12-3"; of a student with fewer feed-forward
            units also these, as `config.shapes.Shape.name` does.
        copied: The teacher layers copied, by side; None for a random start.
        labels: Source of the training targets, such as "original+pseudo".
        ffn: Feed-forward units per layer, by side; None for the teacher's.
    """

    method: str
    size: str | None
    copied: dict[str, list[int] | None] | None
    labels: str
    ffn: dict[str, int | None] | None = None

    @classmethod
    def of(cls, run: Run, layer_plan: "LayerPlan | None", model_size: str | None) -> "RunIdentity":
        """The identity of a run; `model_size` names the size of a model without a layer plan."""
        if layer_plan is None:
            return cls(run.method, model_size, None, run.resolved_labels)
        shape = run.student.shape.with_full_size("-".join(map(str, layer_plan.size)))
        return cls(run.method, shape.name, layer_plan.copied, run.resolved_labels, layer_plan.kept_ffn)


class RunResult(Record):
    """The result of a run, result.json. The record is written last: a run that has one is finished.

    Attributes:
        key: Name of the run's folder.
        status: "done"; "stopped" by the report callback, with a scored checkpoint; "failed", without a checkpoint: the
            run diverged or collapsed.
        reason: Why the run ended; for a failed run with the remedy.
        method: "sft", "kd" or "pl".
        size: Name of the shape, such as "12-3".
        copied: The teacher layers copied, by side; None for a random start.
        labels: Source of the training targets, such as "original+pseudo".
        ffn: Feed-forward units per layer, by side; None for the teacher's.
        number: Position in the order of proposals of a sweep; None outside sweeps.
        params: The values that a sweep's search chose.
        metrics: Validation scores and costs of the best checkpoint.
        validation_part: The validation rows of the scores: "all", or "search" where the others are kept for the choice.
        interval: 95 % confidence interval of the validation score; None where no text is scored.
        test: Test scores; None where the test split is not scored.
        steps: Optimiser steps taken.
        best_step: Step of the best checkpoint.
        signature: Metric library and options of the scores; "val_loss" where no text is scored.
        engine: The engine of the scores, with its precision, such as "ctranslate2 fp32"; None where no text is scored.
        seed: Seed of training.
        alignment: Relative difference of the logits of a full-depth copy of the teacher; None without a teacher.
        ended_at: Time of the end, in ISO format.
        host: The machine of the main process.
    """

    key: str
    status: Literal["done", "stopped", "failed"]
    reason: str = ""
    method: str = ""
    size: str | None = None
    copied: dict[str, list[int] | None] | None = None
    labels: str = ""
    ffn: dict[str, int | None] | None = None
    number: int | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    validation_part: Literal["all", "search"] = "all"
    interval: tuple[float, float] | None = None
    test: SplitScores | None = None
    steps: int = 0
    best_step: int | None = None
    signature: str = ""
    engine: str | None = None
    seed: int = 0
    alignment: float | None = None
    ended_at: str = ""
    host: str = ""

    @property
    def scored(self) -> bool:
        """Whether the run has a checkpoint with scores."""
        return self.status != "failed"


def check_teacher_repetition(teacher: str, repetition: float | None, allowed: bool) -> None:
    """Refuse a teacher of whose outputs most repeat themselves, or print a warning if such a teacher is allowed.

    Args:
        teacher: The teacher, for the message.
        repetition: The share of its outputs that repeat themselves, 0 to 1; None if unknown.
        allowed: `evaluation.allow_repetitive_teacher`.

    Raises:
        UserError: Most outputs repeat themselves, and that is not allowed.
    """
    if repetition is None or repetition <= DEGENERATE_REPETITION:
        return
    if not allowed:
        raise UserError(
            f"{repetition:.0%} of the outputs of the teacher {teacher} repeat themselves, as students would. "
            f"Train the teacher further or decode with other settings, or allow the teacher with "
            f"evaluation.allow_repetitive_teacher: true (raydistill pseudolabel --allow-repetitive)"
        )
    print_progress(str(repetition_warning(f"teacher {teacher}", repetition)))


def repetition_warning(model: str, repetition: float | None) -> str | None:
    """A warning for a model of whose outputs most repeat themselves; None if they do not, or if that is unknown."""
    if repetition is None or repetition <= DEGENERATE_REPETITION:
        return None
    return (
        f"warning: {repetition:.0%} of the outputs of {model} repeat themselves. The model is not usable: try a lower "
        f"learning rate or more steps before it is distilled or served"
    )

"""The records that a run leaves: its result (result.json) and the metadata of its checkpoint (raydistill.json)."""

import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from raydistill.config.run import Run
from raydistill.core.files import SCHEMA_VERSION
from raydistill.models.shrinking import LayerPlan


@dataclass(frozen=True)
class RunIdentity:
    """What a run trains, as results and checkpoint metadata name it.

    Attributes:
        method: "sft", "kd" or "pl".
        size: Encoder and decoder layers, such as "12-3".
        copied: The teacher layers copied, by side; None for a random start.
        labels: Source of the training targets, such as "original+pseudo".
    """

    method: str
    size: str | None
    copied: dict[str, list[int] | None] | None
    labels: str

    @classmethod
    def of(cls, run: Run, layer_plan: LayerPlan | None, model_size: str | None) -> "RunIdentity":
        """The identity of a run; `model_size` names the size of a model without a layer plan."""
        return cls(
            method=run.method,
            size=model_size if layer_plan is None else "-".join(map(str, layer_plan.size)),
            copied=layer_plan.copied if layer_plan else None,
            labels=run.resolved_labels,
        )


@dataclass(frozen=True)
class RunResult:
    """The result of a run whose best checkpoint is scored.

    Attributes:
        key: Name of the run's folder.
        stopped: Whether the report callback stopped the run early.
        reason: Why the run ended.
        identity: What the run trained.
        extra_fields: Fields that the caller of the run adds, such as the trial's number.
        metrics: Validation scores and costs of the best checkpoint.
        interval: Confidence interval of the validation score; None where no text is scored.
        test: Test scores; None where the test split is not scored.
        steps: Optimiser steps taken.
        best_step: Step of the best checkpoint.
        signature: Metric library and options of the scores; "val_loss" where no text is scored.
        seed: Seed of training.
        alignment: Relative difference of the logits of a full-depth copy of the teacher; None without a teacher.
    """

    key: str
    stopped: bool
    reason: str
    identity: RunIdentity
    extra_fields: dict[str, Any]
    metrics: dict[str, float]
    interval: tuple[float, float] | None
    test: dict[str, Any] | None
    steps: int
    best_step: int
    signature: str
    seed: int
    alignment: float | None

    def to_json(self) -> dict[str, Any]:
        """The content of result.json, with the current time and host."""
        return {
            "schema": SCHEMA_VERSION,
            "key": self.key,
            "status": "stopped" if self.stopped else "done",
            "reason": self.reason,
            **asdict(self.identity),
            **self.extra_fields,
            "metrics": self.metrics,
            "interval": list(self.interval) if self.interval else None,
            "test": self.test,
            "steps": self.steps,
            "best_step": self.best_step,
            "signature": self.signature,
            "checkpoint": "best",
            "seed": self.seed,
            "alignment": self.alignment,
            "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
        }


@dataclass(frozen=True)
class FailedResult:
    """The result of a run that diverged or collapsed; no checkpoint is kept.

    Attributes:
        key: Name of the run's folder.
        reason: Why the run failed, and the remedy.
        identity: What the run trained.
        extra_fields: Fields that the caller of the run adds, such as the trial's number.
        device_hours: Device-hours that the run took.
        seed: Seed of training.
        metrics: Metrics that are known nevertheless, of a run that failed after its last step.
    """

    key: str
    reason: str
    identity: RunIdentity
    extra_fields: dict[str, Any]
    device_hours: float
    seed: int
    metrics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of result.json, with the current host."""
        return {
            "schema": SCHEMA_VERSION,
            "key": self.key,
            "status": "failed",
            "reason": self.reason,
            **asdict(self.identity),
            **self.extra_fields,
            "metrics": {**self.metrics, "gpu_hours": self.device_hours},
            "interval": None,
            "test": None,
            "seed": self.seed,
            "host": platform.node(),
        }


@dataclass(frozen=True)
class CheckpointMetadata:
    """The origin of a checkpoint.

    Attributes:
        run: The run's config.
        identity: What the run trained.
        supervised: The teacher layers that supervise the student's layers, by side; None for a random start.
        teacher_key: Content key of the teacher; None without a teacher.
        teacher_commit: Commit of the teacher on the Hugging Face hub, where it comes from the hub.
        data: Fingerprint of each split.
        scores: Scores of each scored split.
        decoding: The decoding of the scores.
        signature: Metric library and options of the scores.
    """

    run: Run
    identity: RunIdentity
    supervised: dict[str, list[int]] | None
    teacher_key: str | None
    teacher_commit: str | None
    data: dict[str, str]
    scores: dict[str, dict[str, Any]]
    decoding: dict[str, Any]
    signature: str

    def to_json(self) -> dict[str, Any]:
        """The content of raydistill.json, with the versions of the libraries."""
        return {
            "teacher": self.run.teacher,
            "supervised": self.supervised,
            "config": self.run.model_dump(mode="json"),
            "versions": {name: version(name) for name in ("raydistill", "torch", "transformers")},
            **asdict(self.identity),
            "teacher_key": self.teacher_key,
            "teacher_commit": self.teacher_commit,
            "data": self.data,
            "scores": self.scores,
            "decoding": self.decoding,
            "signature": self.signature,
        }

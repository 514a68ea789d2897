"""The records that a run leaves: its result (result.json) and the metadata of its checkpoint (raydistill.json)."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raydistill.config.run import Run
from raydistill.core.records import Record

if TYPE_CHECKING:
    from raydistill.models.shrinking import LayerPlan

RESULT_FILE = "result.json"


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
    def of(cls, run: Run, layer_plan: "LayerPlan | None", model_size: str | None) -> "RunIdentity":
        """The identity of a run; `model_size` names the size of a model without a layer plan."""
        return cls(
            method=run.method,
            size=model_size if layer_plan is None else "-".join(map(str, layer_plan.size)),
            copied=layer_plan.copied if layer_plan else None,
            labels=run.resolved_labels,
        )


class SplitScores(BaseModel):
    """The scores on a split: a number for each metric, which are further fields.

    Attributes:
        interval: 95 % confidence interval of the main metric.
        engine: The engine that generated the texts, with its precision, such as "ctranslate2 fp32".
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, float]
    interval: tuple[float, float] | None = None
    engine: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The scores by name."""
        return dict(self.__pydantic_extra__)


class RunResult(Record):
    """The result of a run, result.json. The record is written last: a run that has one is finished.

    Attributes:
        key: Name of the run's folder.
        status: "done"; "stopped" by the report callback, with a scored checkpoint; "failed", without a checkpoint: the
            run diverged or collapsed.
        reason: Why the run ended; for a failed run with the remedy.
        method: "sft", "kd" or "pl".
        size: Encoder and decoder layers, such as "12-3".
        copied: The teacher layers copied, by side; None for a random start.
        labels: Source of the training targets, such as "original+pseudo".
        number: Position in the order of proposals of a sweep; None outside sweeps.
        params: The values that a sweep's search chose.
        metrics: Validation scores and costs of the best checkpoint.
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
    number: int | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
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

"""The metadata of a checkpoint: raydistill.json, next to the weights. The module imports no torch."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

from raydistill.config.run import Run
from raydistill.config.serving import ServingRecord
from raydistill.core.records import Record

METADATA_FILE = "raydistill.json"


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


class CheckpointMetadata(Record):
    """The origin and the scores of a checkpoint.

    Attributes:
        teacher: The teacher; None for a new model.
        method: "sft", "kd" or "pl"; None for a student without training.
        size: Name of the shape: encoder and decoder layers, such as "12-3".
        copied: The teacher layers copied, by side; None for a random start.
        copied_from: The checkpoint whose decoder layers were copied, for a student without training.
        labels: Source of the training targets, such as "original+pseudo".
        ffn: Feed-forward units per layer, by side; None for the teacher's.
        vocabulary: Tokens of a trimmed vocabulary; None for the teacher's.
        supervised: The teacher layers that supervise the student's layers, by side; None for a random start.
        trained: Whether the checkpoint was trained.
        config: The run that trained the checkpoint.
        versions: Versions of the libraries.
        teacher_key: Content key of the teacher.
        teacher_commit: Commit of the teacher on the Hugging Face hub, where it comes from the hub.
        data: Fingerprint of each split.
        scores: Scores of each scored split.
        decoding: The decoding of the scores: the fields of `BeamSearchParams`.
        signature: Metric library and options of the scores.
        serving: How an exported student is served.
    """

    remedy: ClassVar[str] = "Create the checkpoint again, or delete this file"

    teacher: str | None = None
    method: str | None = None
    size: str | None = None
    copied: dict[str, list[int] | None] | None = None
    copied_from: str | None = None
    labels: str | None = None
    ffn: dict[str, int | None] | None = None
    vocabulary: int | None = None
    supervised: dict[str, list[int]] | None = None
    trained: bool = True
    config: Run | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    teacher_key: str | None = None
    teacher_commit: str | None = None
    data: dict[str, str] = Field(default_factory=dict)
    scores: dict[str, SplitScores] = Field(default_factory=dict)
    decoding: dict[str, Any] | None = None
    signature: str | None = None
    serving: ServingRecord | None = None

    @classmethod
    def read_from(cls, checkpoint: Path) -> Self:
        """Read the metadata of a checkpoint.

        Raises:
            UserError: The metadata is missing, damaged or of another schema version.
        """
        return cls.read(checkpoint / METADATA_FILE)

    def write_to(self, checkpoint: Path) -> None:
        """Write the metadata of a checkpoint."""
        self.write(checkpoint / METADATA_FILE)


def library_versions() -> dict[str, str]:
    """The versions of the libraries that determine what a checkpoint computes."""
    return {name: version(name) for name in ("raydistill", "torch", "transformers")}

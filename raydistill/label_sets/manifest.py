"""The manifest of a label set: what training needs, and what `raydistill pseudolabel` writes."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from raydistill.core.artifact import Manifest

LABEL_SET = "label set"  # the kind of artifact


class _ManifestPart(BaseModel):
    """A frozen part of a manifest. Unknown keys are kept, so that label sets may carry notes of other programs."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class TeacherRecord(_ManifestPart):
    """The checkpoint that wrote the labels.

    `fingerprint` covers the weights, `settings` the configuration and the tokenizer; `commit` is the revision of a
    checkpoint from the hub.
    """

    name: str
    fingerprint: str
    path: str = ""
    settings: str = ""
    commit: str | None = None


class DataRecord(_ManifestPart):
    """The labelled split. `skipped` counts rows that cannot be used, `dataset` holds the settings of the data set."""

    name: str
    split: str
    fingerprint: str
    skipped: int
    dataset: dict[str, Any]


class LabelDescription(_ManifestPart):
    """Teacher, data and decoding of a label set, known before any text is generated.

    `decoding` holds the fields of BeamSearchParams and `max_source_tokens`. `n_best` is the number of candidates per
    row, `key` the content key of the label set. `source_prefix` is the text before every source; None for the teacher's
    own.
    """

    key: str = ""
    teacher: TeacherRecord
    data: DataRecord
    decoding: dict[str, Any]
    n_best: int = 1
    languages: list[str] | None = None
    source_prefix: str | None = None


class LabelManifest(Manifest):
    """The manifest of any label set. A manifest that a user writes by hand needs `schema` and `rows` only.

    Unknown keys are kept, so that label sets may carry notes of other programs. `rows` is the number of rows that have
    candidates.

    `device_hours` is the generation time on all devices. `quality` holds scores of the labels against the original
    targets. `source_label_set` is the name of the set that a curated set was derived from, `curation` its rules, and
    `dropped` the number of dropped rows by rule. `hosts` holds the number of rows that each machine labelled.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    kind: str = LABEL_SET
    rows: int = Field(ge=0)
    device_hours: float = 0.0
    quality: dict[str, float] | None = None
    hosts: dict[str, int] = Field(default_factory=dict)
    source_label_set: str | None = None
    curation: dict[str, Any] | None = None
    dropped: dict[str, int] = Field(default_factory=dict)

    @property
    def teacher_name(self) -> str | None:
        """The name of the teacher, None if the manifest has none."""
        teacher = (self.model_extra or {}).get("teacher")
        return str(teacher["name"]) if isinstance(teacher, dict) and "name" in teacher else None


class PseudolabelManifest(LabelManifest):
    """The manifest of a label set that `raydistill pseudolabel` or a curation wrote.

    `metric` is the main metric of `quality`. `empty` counts empty labels, `target_words_mean` and
    `original_words_mean` are words per label and per original target. `engine_fallback_reason` says why CTranslate2
    was not used.
    """

    teacher: TeacherRecord
    decoding: dict[str, Any]
    metric: str
    engine: str
    device_hours: float
    empty: int
    target_words_mean: float
    original_words_mean: float | None = None
    data: DataRecord | None = None
    n_best: int = 1
    languages: list[str] | None = None
    source_prefix: str | None = None
    engine_fallback_reason: str | None = None

    @property
    def teacher_name(self) -> str:
        """The name of the teacher."""
        return self.teacher.name

"""The named data sets and teachers, with the paper's lengths and decoding."""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

from raydistill.config.run import Columns, Decoding
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home


@dataclass(frozen=True)
class DatasetPreset:
    """A data set by name: where it is, its columns, lengths in tokens, and its task's score."""

    hub: str
    config: str | None = None
    revision: str | None = None
    columns: Columns | None = None
    metric: str = "rouge2"
    max_source_tokens: int = 1024
    max_target_tokens: int = 128
    languages: tuple[str, str] | None = None
    # Training rows, mean source and target words: the paper's Table 3.
    paper_stats: tuple[int, float, float] | None = None


@dataclass(frozen=True)
class TeacherPreset:
    """A teacher for one data set: where it is, its decoding, its lengths in tokens, its languages (mBART, T5).

    Precision is the family's: Pegasus overflows in fp16, so no command computes it so (`generate.open_engine`).
    """

    hub: str
    revision: str
    decoding: Decoding = field(default_factory=Decoding)
    max_source_tokens: int = 1024
    max_target_tokens: int = 128
    languages: tuple[str, str] | None = None


DATASETS: dict[str, DatasetPreset] = {
    # The hub's own Parquet conversion: the data set's main branch holds a loading script, which is never run.
    "xsum": DatasetPreset(
        "EdinburghNLP/xsum",
        revision="refs/convert/parquet",
        columns=Columns(source="document", target="summary", id="id"),
        max_target_tokens=60,
        paper_stats=(204_017, 358, 21),
    ),
    "cnn_dailymail": DatasetPreset(
        "abisee/cnn_dailymail",
        config="3.0.0",
        columns=Columns(source="article", target="highlights", id="id"),
        max_target_tokens=142,
        paper_stats=(262_567, 756, 56),
    ),
    "wmt16_en_ro": DatasetPreset(
        "wmt/wmt16",
        config="ro-en",
        columns=Columns(source="translation.en", target="translation.ro"),
        metric="bleu",
        max_source_tokens=128,
        max_target_tokens=128,
        languages=("en_XX", "ro_RO"),
        paper_stats=(610_319, 23, 23),
    ),
    "demo": DatasetPreset("demo", max_source_tokens=128, max_target_tokens=32),
}

# Revisions are commits where one could be looked up in public code that names it (none was fetched: there is no hub
# on the machine that this was written on). "main" is not pinned: its commit could not be looked up.
BART_CNN_REVISION = "37f520fa929c961707657b28798b30c003dd100b"
PEGASUS_XSUM_REVISION = "8d8ffc158a3bee9fbb03afacdfc347c823c5ec8b"
MBART_EN_RO_REVISION = "2534e987b9ed03c416bbbaefa1a39e3441439bdd"
T5_BASE_REVISION = "a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1"
UNPINNED_REVISION = "main"

TEACHERS: dict[str, dict[str, TeacherPreset]] = {
    "bart": {
        "xsum": TeacherPreset(
            "facebook/bart-large-xsum",
            UNPINNED_REVISION,
            Decoding(beams=6, length_penalty=1.0, min_length=11, max_length=62),
            max_target_tokens=60,
        ),
        "cnn_dailymail": TeacherPreset(
            "facebook/bart-large-cnn",
            BART_CNN_REVISION,
            Decoding(beams=4, length_penalty=2.0, min_length=56, max_length=142, no_repeat_ngram=3),
            max_target_tokens=142,
        ),
    },
    "pegasus": {
        "xsum": TeacherPreset(
            "google/pegasus-xsum",
            PEGASUS_XSUM_REVISION,
            Decoding(beams=8, length_penalty=0.6, max_length=64),
            max_source_tokens=512,
            max_target_tokens=64,
        ),
        "cnn_dailymail": TeacherPreset(
            "google/pegasus-cnn_dailymail", UNPINNED_REVISION, Decoding(beams=8, length_penalty=0.8, max_length=128)
        ),
    },
    "mbart": {
        "wmt16_en_ro": TeacherPreset(
            "facebook/mbart-large-en-ro",
            MBART_EN_RO_REVISION,
            Decoding(beams=5, length_penalty=1.0, max_length=128),
            max_source_tokens=128,
            languages=("en_XX", "ro_RO"),
        ),
    },
    "marian": {
        "wmt16_en_ro": TeacherPreset(
            "Helsinki-NLP/opus-mt-en-ro",
            UNPINNED_REVISION,
            Decoding(beams=4, length_penalty=1.0, max_length=128),
            max_source_tokens=128,
        ),
    },
    # The paper's future work. T5 was trained on both tasks, among others; its config.json names their prefixes and,
    # under task_specific_params, this decoding.
    "t5": {
        "cnn_dailymail": TeacherPreset(
            "google-t5/t5-base",
            T5_BASE_REVISION,
            Decoding(beams=4, length_penalty=2.0, min_length=30, max_length=200, no_repeat_ngram=3),
            max_source_tokens=512,
            max_target_tokens=142,
        ),
        "wmt16_en_ro": TeacherPreset(
            "google-t5/t5-base",
            T5_BASE_REVISION,
            Decoding(beams=4, max_length=300),
            max_source_tokens=128,
            languages=("en", "ro"),
        ),
    },
}

DEMO_TEACHER_RUN = "demo-teacher"


def default_dataset(teacher: str) -> str | None:
    """The data set that a named teacher means when none is given: the first of its presets."""
    if teacher == "demo":
        return "demo"
    return next(iter(TEACHERS[teacher])) if teacher in TEACHERS else None


def teacher_preset(teacher: str, dataset: str) -> TeacherPreset | None:
    """The preset of a named teacher for a data set, or None where the teacher is a hub name or a path.

    A named teacher with a data set of one's own takes the preset of its first data set.
    """
    if teacher not in TEACHERS:
        return None
    presets = TEACHERS[teacher]
    if dataset in DATASETS and dataset != "demo" and dataset not in presets:
        known = ", ".join(presets)
        raise UserError(
            f"teacher {teacher!r} has no checkpoint fine-tuned on {dataset!r} (it has: {known}); "
            f"give the checkpoint's hub name or path as the teacher instead"
        )
    return presets.get(dataset) or next(iter(presets.values()))


def resolve_metric(dataset: str, requested: str = "auto") -> str:
    """The score of a data set's task: as asked, else the preset's, else rouge2."""
    if requested != "auto":
        return requested
    return DATASETS[dataset].metric if dataset in DATASETS else "rouge2"


def check_teacher(name: str) -> None:
    """What can be known of a teacher's name at once, without loading anything; UserError where it can be none.

    A known name, a folder, or a name of the hub's form (owner/name).
    """
    if name == "demo":
        if not (raydistill_home() / "runs" / DEMO_TEACHER_RUN / "best").is_dir():
            raise UserError("the demo's teacher is not trained yet: run `raydistill train demo` first")
    elif name not in TEACHERS and not Path(name).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        known = ", ".join([*TEACHERS, "demo"])
        near = difflib.get_close_matches(name, [*TEACHERS, "demo"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known names: {known}"
        raise UserError(f"{name}: no such folder, and not a hub name (owner/name); {hint}")

"""Named data sets and teachers, with the lengths and decoding of the paper."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raydistill.config.metric_names import AUTO, TRANSLATION_METRICS, MetricChoice
from raydistill.config.run import Columns, Dataset, Decoding
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.core.suggestions import closest_name


@dataclass(frozen=True)
class DatasetPreset:
    """A named data set.

    Attributes:
        hub: Repository on the Hugging Face hub.
        config: Configuration of the hub data set.
        revision: Revision of the repository; default: its main branch.
        columns: Column names; default: detected.
        metric: The score of the task.
        max_source_tokens, max_target_tokens: Lengths after truncation.
        languages: Source and target language codes, for mBART.
        paper_stats: Training rows, mean source words and mean target words in Table 3 of the paper.
        text_language: Language of sources and targets, as an ISO 639-1 code, where it is the same.
        licence: Licence that the hub's data card names, as the hub's identifier; None if the card names none.
        skip_blank_rows: Whether rows without a source or a target are left out. The paper's XSUM has 28 training rows
            less than the hub's, and the paper's WMT16 one row less.
        targets_have_lines: Whether targets have several lines. The released models write targets of one line, except
            Pegasus, which has a token for line breaks; see `joins_lines`.
    """

    hub: str
    config: str | None = None
    revision: str | None = None
    columns: Columns | None = None
    metric: str = "rouge2"
    max_source_tokens: int = 1024
    max_target_tokens: int = 128
    languages: tuple[str, str] | None = None
    paper_stats: tuple[int, float, float] | None = None
    text_language: str | None = None
    licence: str | None = None
    skip_blank_rows: bool = False
    targets_have_lines: bool = False


@dataclass(frozen=True)
class TeacherPreset:
    """A named teacher for one data set.

    Attributes:
        hub: Repository on the Hugging Face hub.
        revision: Revision of the repository.
        decoding: Beam search settings.
        max_source_tokens, max_target_tokens: Lengths after truncation.
        languages: Source and target language codes, for teachers that need them.
        multilingual: Whether the teacher translates between many languages, so that `languages` hold for the named
            data set only.
    """

    hub: str
    revision: str
    decoding: Decoding = field(default_factory=Decoding)
    max_source_tokens: int = 1024
    max_target_tokens: int = 128
    languages: tuple[str, str] | None = None
    multilingual: bool = False


DATASETS: dict[str, DatasetPreset] = {
    # The hub's Parquet conversion: the main branch has a loading script, and code from the hub is never run.
    "xsum": DatasetPreset(
        "EdinburghNLP/xsum",
        revision="refs/convert/parquet",
        columns=Columns(source="document", target="summary", id="id"),
        max_target_tokens=60,
        paper_stats=(204_017, 358, 21),
        text_language="en",
        skip_blank_rows=True,
    ),
    "cnn_dailymail": DatasetPreset(
        "abisee/cnn_dailymail",
        config="3.0.0",
        columns=Columns(source="article", target="highlights", id="id"),
        max_target_tokens=142,
        paper_stats=(262_567, 756, 56),  # the hub has 287,113 training rows
        text_language="en",
        licence="apache-2.0",
        skip_blank_rows=True,
        targets_have_lines=True,
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
        skip_blank_rows=True,
    ),
    "demo": DatasetPreset("demo", max_source_tokens=128, max_target_tokens=32, text_language="en"),
}

# Revisions are commits that public code names; they were not downloaded, because this file was written offline.
# Checkpoints without a known commit use the main branch and are not pinned.
BART_CNN_REVISION = "37f520fa929c961707657b28798b30c003dd100b"
PEGASUS_XSUM_REVISION = "8d8ffc158a3bee9fbb03afacdfc347c823c5ec8b"
MBART_EN_RO_REVISION = "2534e987b9ed03c416bbbaefa1a39e3441439bdd"
T5_BASE_REVISION = "a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1"
NLLB_REVISION = "f8d333a098d19b4fd9a8b18f94170487ad3f821d"
M2M100_REVISION = "55c2e61bbf05dfb8d7abccdc3fae6fc8512fd636"
FLAN_T5_BASE_REVISION = "7bcac572ce56db69c1ea7c8af255c5d7c9672fc2"
UNPINNED_REVISION = "main"

TEACHERS: dict[str, dict[str, TeacherPreset]] = {
    "bart": {
        "xsum": TeacherPreset(
            "facebook/bart-large-xsum",
            UNPINNED_REVISION,
            Decoding(beams=6, length_penalty=1.0, min_length=11, max_length=62, no_repeat_ngram=3),
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
    # Multilingual models as published, without fine-tuning. The beam sizes are from the papers of the models.
    "mbart50": {
        "wmt16_en_ro": TeacherPreset(
            "facebook/mbart-large-50-many-to-many-mmt",
            UNPINNED_REVISION,
            Decoding(beams=5, length_penalty=1.0, max_length=128),
            max_source_tokens=128,
            languages=("en_XX", "ro_RO"),
            multilingual=True,
        ),
    },
    "nllb": {
        "wmt16_en_ro": TeacherPreset(
            "facebook/nllb-200-distilled-600M",
            NLLB_REVISION,
            Decoding(beams=4, length_penalty=1.0, max_length=128),
            max_source_tokens=128,
            languages=("eng_Latn", "ron_Latn"),
            multilingual=True,
        ),
    },
    "m2m100": {
        "wmt16_en_ro": TeacherPreset(
            "facebook/m2m100_418M",
            M2M100_REVISION,
            Decoding(beams=5, length_penalty=1.0, max_length=128),
            max_source_tokens=128,
            languages=("en", "ro"),
            multilingual=True,
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
    # The paper names T5 as future work. T5 was trained on both tasks; the decoding is from task_specific_params in its
    # config.json.
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
    # Flan-T5 keeps T5's tasks in its config.json.
    "flan-t5": {
        "cnn_dailymail": TeacherPreset(
            "google/flan-t5-base",
            FLAN_T5_BASE_REVISION,
            Decoding(beams=4, length_penalty=2.0, min_length=30, max_length=200, no_repeat_ngram=3),
            max_source_tokens=512,
            max_target_tokens=142,
        ),
        "wmt16_en_ro": TeacherPreset(
            "google/flan-t5-base",
            FLAN_T5_BASE_REVISION,
            Decoding(beams=4, max_length=300),
            max_source_tokens=128,
            languages=("en", "ro"),
        ),
    },
    # A T5 1.1 with a token for each target language, which its card puts before the source.
    "madlad400": {
        "wmt16_en_ro": TeacherPreset(
            "google/madlad400-3b-mt",
            UNPINNED_REVISION,
            Decoding(beams=4, max_length=128),
            max_source_tokens=128,
            languages=("en", "ro"),
            multilingual=True,
        ),
    },
    # mT5 itself is only pre-trained; this checkpoint is fine-tuned on XL-Sum, summaries of BBC articles like XSUM's.
    "mt5": {
        "xsum": TeacherPreset(
            "csebuetnlp/mT5_multilingual_XLSum",
            UNPINNED_REVISION,
            Decoding(beams=4, length_penalty=0.6, max_length=84, no_repeat_ngram=2),
            max_source_tokens=512,
            max_target_tokens=84,
        ),
    },
}

DEMO_TEACHER_RUN = "demo-teacher"
HUB_NAME = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"  # owner/name, with a revision or without
_LANGUAGE = re.compile(r"[a-z]{2}(_[A-Z]{2})?|[a-z]{3}_[A-Z][a-z]{3}")  # en, en_XX, eng_Latn


def default_dataset(teacher: str) -> str | None:
    """The default data set of a named teacher: the first of its presets; None for other teachers."""
    if teacher == "demo":
        return "demo"
    return next(iter(TEACHERS[teacher])) if teacher in TEACHERS else None


def teacher_preset(teacher: str, dataset: str) -> TeacherPreset | None:
    """The preset of a named teacher for a data set; None if the teacher is a hub name or a path.

    For a data set without a name, this is the preset of the teacher's first data set.

    Raises:
        UserError: There is no checkpoint of the teacher that is fine-tuned on the named data set.
    """
    if teacher not in TEACHERS:
        return None
    presets = TEACHERS[teacher]
    if dataset in DATASETS and dataset != "demo" and dataset not in presets:
        known = ", ".join(presets)
        raise UserError(
            f"teacher {teacher!r} has no checkpoint fine-tuned on {dataset!r} (it has: {known}); "
            f"use the hub name or path of a checkpoint as the teacher instead"
        )
    return presets.get(dataset) or next(iter(presets.values()))


def hub_teacher(teacher: str, dataset: str) -> str | None:
    """The hub name of a teacher, without its revision; None if the teacher is a path or the demo's."""
    preset = teacher_preset(teacher, dataset)
    if preset is not None:
        return preset.hub
    is_hub_name = re.fullmatch(HUB_NAME, teacher) and not Path(teacher).exists()
    return teacher.partition("@")[0] if is_hub_name else None


def resolve_metrics(
    dataset: Dataset,
    requested: str = AUTO,
    report: Sequence[str] = (),
    columns: Columns | None = None,
    evidence: str = "",
) -> MetricChoice:
    """The metrics of a data set.

    "auto" means the metric of the data set's preset; else chrf++ for a translation, with bleu reported next to it; else
    rouge2. chrF++ needs no rules for words of the target language, unlike BLEU.

    Args:
        dataset: The data set.
        requested: `evaluation.metric`.
        report: `evaluation.report`.
        columns: The columns that the rows were read from; default: the columns of the configuration.
        evidence: What else shows that the data are a translation, such as "its texts".
    """
    deciding, reason = requested, ""
    if requested == AUTO:
        preset = DATASETS.get(dataset.name)
        evidence = translation_evidence(dataset, columns) or evidence
        if preset:
            deciding, reason = preset.metric, f"the metric of {dataset.name}"
        elif evidence:
            deciding, reason = "chrf++", f"a translation, by {evidence}"
            report = [*report, "bleu"]
        else:
            deciding, reason = "rouge2", "no translation"
    reported = tuple(name for name in dict.fromkeys(report) if name != deciding)
    return MetricChoice(deciding, reported, reason)


def is_translation(dataset: Dataset, metric: str, columns: Columns | None = None) -> bool:
    """Whether a data set is a translation: by its languages or columns, or because a metric of translations decides."""
    return metric in TRANSLATION_METRICS or bool(translation_evidence(dataset, columns))


def translation_evidence(dataset: Dataset, columns: Columns | None = None) -> str:
    """By what a data set is recognised as a translation: two languages or columns as of WMT; empty if it is none.

    The rows were read from `columns`; default: the columns of the configuration.
    """
    preset = DATASETS.get(dataset.name)
    languages = dataset.languages or (preset.languages if preset else None)
    if languages and languages[0] != languages[1]:
        return f"the languages {languages[0]} and {languages[1]}"
    columns = columns or dataset.columns or (preset.columns if preset else None)
    if columns and columns.target:
        names = (columns.source, columns.target)
        if column_languages(columns) or all(name.startswith("translation.") for name in names):
            return f"the columns {names[0]} and {names[1]}"
    return ""


def column_languages(columns: Columns) -> tuple[str, str] | None:
    """Source and target language, if the columns have the names of two, such as "translation.en" and "de"."""
    source, target = (str(name).rpartition(".")[2] for name in (columns.source, columns.target))
    are_languages = _LANGUAGE.fullmatch(source) and _LANGUAGE.fullmatch(target) and source != target
    return (source, target) if are_languages else None


def joins_lines(dataset: str) -> bool:
    """Whether targets are trained on as one line, except by a tokenizer with a token for line breaks.

    True for the named data sets whose targets have several lines; the texts of other data sets are used as they are.
    """
    return dataset in DATASETS and DATASETS[dataset].targets_have_lines


def check_teacher(name: str) -> None:
    """Validate the name of a teacher without loading a model.

    Raises:
        UserError: The name is no named teacher, no existing path and no hub name (owner/name), or the demo teacher is
            not trained yet.
    """
    if name == "demo":
        if not (raydistill_home() / "runs" / DEMO_TEACHER_RUN / "best").is_dir():
            raise UserError("the teacher of the demo is not trained yet; run `raydistill train demo` first")
    elif name not in TEACHERS and not Path(name).exists() and not re.fullmatch(HUB_NAME, name):
        known = ", ".join([*TEACHERS, "demo"])
        similar = closest_name(name, [*TEACHERS, "demo"])
        hint = f"did you mean {similar!r}?" if similar else f"known names: {known}"
        raise UserError(f"{name}: no such folder, and not a hub name (owner/name); {hint}")

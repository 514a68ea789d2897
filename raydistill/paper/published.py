"""The numbers published in "Pre-trained Summarization Distillation" (Shleifer and Rush, 2020), as in its tables.

Keys are (teacher, size, data) with the paper's names. Scores are ROUGE-2 on XSUM and CNN and BLEU on EN-RO; costs are
hours on one Nvidia RTX 2080. Cells that a table leaves blank or marks with a dash are omitted.
"""

from pathlib import Path
from typing import NamedTuple

from raydistill.config.presets import TEACHERS

PaperKey = tuple[str, str, str]

METRICS = ("rouge2", "bleu")  # the metrics of the scores in Tables 5 and 10
DATA_NAMES = {"xsum": "XSUM", "cnn_dailymail": "CNN", "wmt16_en_ro": "EN-RO"}
TEACHER_NAMES = {"bart": "BART", "pegasus": "Pegasus", "mbart": "mBART", "marian": "Marian", "t5": "T5"}
_HUB_NAMES = {preset.hub: name for name, presets in TEACHERS.items() for preset in presets.values()}


def teacher_name(teacher: str) -> str:
    """The paper's name of a teacher, given as a preset, hub name or folder; `short_name` for other teachers."""
    without_revision = teacher.partition("@")[0]
    preset = _HUB_NAMES.get(without_revision, without_revision)
    return TEACHER_NAMES.get(preset, short_name(teacher))


def short_name(name: str) -> str:
    """The last part of a folder's path; a hub name, which has at most two parts, unchanged."""
    return Path(name).name if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name


def data_name(dataset: str) -> str:
    """The paper's name of a data set; the last part of the path or hub name for other data sets."""
    return DATA_NAMES.get(dataset, dataset.rstrip("/").rpartition("/")[2])


# Table 2: hours by method, for BART 12-6 on CNN.
TABLE_2 = {"sft": 2.5, "pl": 19.0, "kd": 14.0}
TABLE_2_SETTING: PaperKey = ("BART", "12-6", "CNN")


class CorpusStatistics(NamedTuple):
    """A row of Table 3: number of rows, mean words per source and target, size in megabytes."""

    rows: int
    source_words: int
    target_words: int
    megabytes: int


TABLE_3 = {
    "CNN": CorpusStatistics(262_567, 756, 56, 1331),
    "XSUM": CorpusStatistics(204_017, 358, 21, 501),
    "EN-RO": CorpusStatistics(610_319, 23, 23, 178),
}

# Table 4: (teacher, data) -> GPU hours, and number of experiments of at least 15 minutes.
TABLE_4 = {
    ("BART", "XSUM"): (787, 102),
    ("BART", "CNN"): (365, 59),
    ("mBART", "EN-RO"): (332, 48),
    ("Pegasus", "XSUM"): (766, 42),
    ("Marian", "EN-RO"): (185, 26),
    ("Pegasus", "CNN"): (196, 10),
}


class MainResult(NamedTuple):
    """A row of Table 5: the teacher's score, and (score, hours) of each method."""

    teacher: float
    sft: tuple[float, float]
    kd: tuple[float, float] | None
    pl: tuple[float, float]


TABLE_5: dict[PaperKey, MainResult] = {
    ("BART", "12-3", "XSUM"): MainResult(22.29, (21.08, 2.5), (21.63, 6), (21.38, 15)),
    ("Pegasus", "16-4", "XSUM"): MainResult(24.56, (22.64, 13), (21.92, 22), (23.18, 34)),
    ("BART", "12-6", "CNN"): MainResult(21.06, (21.21, 2), (20.95, 14), (19.93, 19.5)),
    ("Pegasus", "16-4", "CNN"): MainResult(21.37, (21.29, 31), None, (20.1, 48)),
    ("Marian", "6-3", "EN-RO"): MainResult(27.69, (25.91, 4), (24.96, 4), (26.85, 28)),
    ("mBART", "12-3", "EN-RO"): MainResult(26.457, (25.6083, 16), (25.87, 24), (26.09, 50)),
}


def rouge_l_metric(dataset_name: str) -> str:
    """The metric that the paper calls ROUGE-L on a data set.

    On CNN it is the summary-level score over sentences (rougeLsum): bart-large-cnn has 40.89 in the paper, and about
    30.6 by the sentence-level score (transformers issue 6808).
    """
    return "rougeLsum" if dataset_name == "CNN" else "rougeL"


class SizeResult(NamedTuple):
    """A row of Tables 6 and 7: parameters in millions, latency in ms for a batch of 32, speed-up, ROUGE.

    `rougeL` is the metric of `rouge_l_metric`.
    """

    params: int
    latency_ms: int
    speedup: float | None
    rouge2: float
    rougeL: float


# Tables 6 (XSUM) and 7 (CNN); sizes "12-12" and "16-16" are the teachers.
TABLES_6_7: dict[PaperKey, SizeResult] = {
    ("BART", "12-1", "XSUM"): SizeResult(222, 743, 2.35, 17.98, 33.31),
    ("BART", "12-3", "XSUM"): SizeResult(255, 905, 1.93, 22.40, 37.30),
    ("BART", "6-6", "XSUM"): SizeResult(230, 1179, 1.48, 21.17, 36.21),
    ("BART", "9-6", "XSUM"): SizeResult(268, 1184, 1.47, 22.08, 37.24),
    ("BART", "12-6", "XSUM"): SizeResult(306, 1221, 1.43, 22.32, 37.39),
    ("BART", "12-12", "XSUM"): SizeResult(406, 1743, 1.00, 22.29, 37.20),
    ("Pegasus", "16-4", "XSUM"): SizeResult(369, 2038, 2.40, 23.18, 38.13),
    ("Pegasus", "16-8", "XSUM"): SizeResult(435, 2515, 1.94, 23.25, 38.03),
    ("Pegasus", "16-16", "XSUM"): SizeResult(570, 4890, None, 24.46, 39.15),
    ("BertABS", "6-6", "XSUM"): SizeResult(110, 1120, None, 16.50, 31.27),
    ("BART", "12-3", "CNN"): SizeResult(255, 1483, 1.66, 20.57, 40.31),
    ("BART", "6-6", "CNN"): SizeResult(230, 1684, 1.46, 20.17, 39.55),
    ("BART", "12-6", "CNN"): SizeResult(306, 1709, 1.44, 21.19, 41.01),
    ("BART", "12-12", "CNN"): SizeResult(406, 2461, 1.00, 21.08, 40.89),
    ("Pegasus", "16-4", "CNN"): SizeResult(369, 3728, 2.67, 21.29, 40.34),
    ("Pegasus", "16-16", "CNN"): SizeResult(570, 9965, None, 21.37, 41.04),
    ("BertABS", "6-6", "CNN"): SizeResult(110, 1582, None, 19.6, 39.18),
}

# The decoder layers that a student copies, and their source: "teacher" (the fine-tuned teacher) or a checkpoint.
# ((), "") is a randomly initialised decoder.
DecoderInit = tuple[tuple[int, ...], str]
# Tables 8 and 9: (teacher, data) -> initialisation -> the paper's name and the minimum validation cross-entropy.
INITIALISATIONS: dict[tuple[str, str], dict[DecoderInit, tuple[str, float]]] = {
    ("BART", "XSUM"): {
        ((0, 6, 11), "teacher"): ("SFT", 2.14),
        ((9, 10, 11), "teacher"): ("SFT hi", 2.18),
        ((0, 1, 2), "teacher"): ("SFT lo", 2.20),
        ((5, 6, 7), "teacher"): ("SFT mid", 2.19),
        ((0, 0, 0), "teacher"): ("SFT 000", 2.24),
        ((), ""): ("SFT rand decoder", 2.26),
        ((0, 6, 11), "facebook/bart-large"): ("From Pre-trained", 2.17),
        ((0, 6, 11), "facebook/bart-large-cnn"): ("From FT on CNN", 2.18),
    },
    ("BART", "CNN"): {
        ((0, 6, 11), "teacher"): ("SFT", 2.02),
        ((0, 6, 11), "facebook/bart-large"): ("From Pre-trained", 2.17),
        ((9, 10, 11), "teacher"): ("SFT hi", 2.31),
        ((), ""): ("SFT rand", 3.91),
    },
    ("Marian", "EN-RO"): {
        ((0, 2, 5), "teacher"): ("SFT", 1.66),
        ((3, 4, 5), "teacher"): ("SFT Back", 1.70),
        ((0, 1, 2), "teacher"): ("SFT Front", 1.88),
        ((), ""): ("SFT rand", 2.2),
    },
}


class LabelStrategyScores(NamedTuple):
    """A row of Table 10: the teacher's score, and the difference student - teacher for each mix of labels."""

    teacher: float
    orig: float
    pl: float
    orig_pl: float | None
    orig_pl_pl: float | None


TABLE_10: dict[PaperKey, LabelStrategyScores] = {
    ("BART", "12-3", "XSUM"): LabelStrategyScores(22.3, -1.2, -0.9, -0.8, 0.1),
    ("Pegasus", "16-4", "XSUM"): LabelStrategyScores(24.5, -1.9, -2.2, -1.2, -1.6),
    ("BART", "12-3", "CNN"): LabelStrategyScores(21.1, -1.4, -2.0, -2.0, None),
    ("Pegasus", "16-4", "CNN"): LabelStrategyScores(21.37, -0.1, -1.4, None, None),
    ("Marian", "6-3", "EN-RO"): LabelStrategyScores(27.7, -1.8, -0.8, -1.8, None),
    ("mBART", "12-3", "EN-RO"): LabelStrategyScores(26.5, -0.8, -0.4, -0.6, None),
}

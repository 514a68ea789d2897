"""The figures of "Pre-trained Summarization Distillation" (Shleifer and Rush, 2020), as its tables print them.

Settings are (teacher, size, data) by the paper's names. Scores are ROUGE-2 on XSUM and CNN, BLEU on EN-RO; costs are
hours on one Nvidia RTX 2080. What a table leaves blank or marks with a dash is not here.
"""

from pathlib import Path
from typing import NamedTuple

from raydistill.config.presets import TEACHERS

Setting = tuple[str, str, str]

DATA_NAMES = {"xsum": "XSUM", "cnn_dailymail": "CNN", "wmt16_en_ro": "EN-RO"}
TEACHER_NAMES = {"bart": "BART", "pegasus": "Pegasus", "mbart": "mBART", "marian": "Marian", "t5": "T5"}
_HUB_NAMES = {preset.hub: name for name, presets in TEACHERS.items() for preset in presets.values()}


def teacher_name(teacher: str) -> str:
    """A teacher by the paper's name where it is one of the named ones; else as it is called (`last_part`)."""
    plain = teacher.partition("@")[0]
    return TEACHER_NAMES.get(_HUB_NAMES.get(plain, plain), last_part(teacher))


def last_part(name: str) -> str:
    """A folder by the last part of its path; a name on the hub, of one or two parts, as it is."""
    return Path(name).name if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name


def data_name(dataset: str) -> str:
    """A data set by the paper's name where it has one; else the last part of its path or hub name."""
    return DATA_NAMES.get(dataset, dataset.rstrip("/").rpartition("/")[2])


# Table 2: hours for CNN, BART, 12-6.
TABLE_2 = {"sft": 2.5, "pl": 19.0, "kd": 14.0}
TABLE_2_SETTING: Setting = ("BART", "12-6", "CNN")


class Corpus(NamedTuple):
    """A row of Table 3; words are means, the size is in megabytes."""

    rows: int
    source_words: int
    target_words: int
    megabytes: int


TABLE_3 = {
    "CNN": Corpus(262_567, 756, 56, 1331),
    "XSUM": Corpus(204_017, 358, 21, 501),
    "EN-RO": Corpus(610_319, 23, 23, 178),
}

# Table 4: (teacher, data) -> GPU hours, experiments of 15 minutes or more.
TABLE_4 = {
    ("BART", "XSUM"): (787, 102),
    ("BART", "CNN"): (365, 59),
    ("mBART", "EN-RO"): (332, 48),
    ("Pegasus", "XSUM"): (766, 42),
    ("Marian", "EN-RO"): (185, 26),
    ("Pegasus", "CNN"): (196, 10),
}


class Main(NamedTuple):
    """A row of Table 5: the teacher's score, then (score, cost) per method."""

    teacher: float
    sft: tuple[float, float]
    kd: tuple[float, float] | None
    pl: tuple[float, float]


TABLE_5: dict[Setting, Main] = {
    ("BART", "12-3", "XSUM"): Main(22.29, (21.08, 2.5), (21.63, 6), (21.38, 15)),
    ("Pegasus", "16-4", "XSUM"): Main(24.56, (22.64, 13), (21.92, 22), (23.18, 34)),
    ("BART", "12-6", "CNN"): Main(21.06, (21.21, 2), (20.95, 14), (19.93, 19.5)),
    ("Pegasus", "16-4", "CNN"): Main(21.37, (21.29, 31), None, (20.1, 48)),
    ("Marian", "6-3", "EN-RO"): Main(27.69, (25.91, 4), (24.96, 4), (26.85, 28)),
    ("mBART", "12-3", "EN-RO"): Main(26.457, (25.6083, 16), (25.87, 24), (26.09, 50)),
}


class Best(NamedTuple):
    """A row of Tables 6 and 7: millions of parameters, milliseconds for a batch of 32, speed-up, ROUGE."""

    params: int
    ms: int
    speedup: float | None
    rouge2: float
    rougeL: float


# Table 6 (XSUM) and 7 (CNN); size "12-12" or "16-16" is the teacher itself.
TABLES_6_7: dict[Setting, Best] = {
    ("BART", "12-1", "XSUM"): Best(222, 743, 2.35, 17.98, 33.31),
    ("BART", "12-3", "XSUM"): Best(255, 905, 1.93, 22.40, 37.30),
    ("BART", "6-6", "XSUM"): Best(230, 1179, 1.48, 21.17, 36.21),
    ("BART", "9-6", "XSUM"): Best(268, 1184, 1.47, 22.08, 37.24),
    ("BART", "12-6", "XSUM"): Best(306, 1221, 1.43, 22.32, 37.39),
    ("BART", "12-12", "XSUM"): Best(406, 1743, 1.00, 22.29, 37.20),
    ("Pegasus", "16-4", "XSUM"): Best(369, 2038, 2.40, 23.18, 38.13),
    ("Pegasus", "16-8", "XSUM"): Best(435, 2515, 1.94, 23.25, 38.03),
    ("Pegasus", "16-16", "XSUM"): Best(570, 4890, None, 24.46, 39.15),
    ("BertABS", "6-6", "XSUM"): Best(110, 1120, None, 16.50, 31.27),
    ("BART", "12-3", "CNN"): Best(255, 1483, 1.66, 20.57, 40.31),
    ("BART", "6-6", "CNN"): Best(230, 1684, 1.46, 20.17, 39.55),
    ("BART", "12-6", "CNN"): Best(306, 1709, 1.44, 21.19, 41.01),
    ("BART", "12-12", "CNN"): Best(406, 2461, 1.00, 21.08, 40.89),
    ("Pegasus", "16-4", "CNN"): Best(369, 3728, 2.67, 21.29, 40.34),
    ("Pegasus", "16-16", "CNN"): Best(570, 9965, None, 21.37, 41.04),
    ("BertABS", "6-6", "CNN"): Best(110, 1582, None, 19.6, 39.18),
}

# Tables 8 and 9: (teacher, data) -> (layers copied, from) -> least validation cross-entropy. "teacher": the fine-tuned
# teacher itself; other names are checkpoints; layers () are a random decoder.
Source = tuple[tuple[int, ...], str]
INITIALISATIONS: dict[tuple[str, str], dict[Source, tuple[str, float]]] = {
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


class Labels(NamedTuple):
    """A row of Table 10: the teacher's score, and each student's less the teacher's."""

    teacher: float
    orig: float
    pl: float
    orig_pl: float | None
    orig_pl_pl: float | None


TABLE_10: dict[Setting, Labels] = {
    ("BART", "12-3", "XSUM"): Labels(22.3, -1.2, -0.9, -0.8, 0.1),
    ("Pegasus", "16-4", "XSUM"): Labels(24.5, -1.9, -2.2, -1.2, -1.6),
    ("BART", "12-3", "CNN"): Labels(21.1, -1.4, -2.0, -2.0, None),
    ("Pegasus", "16-4", "CNN"): Labels(21.37, -0.1, -1.4, None, None),
    ("Marian", "6-3", "EN-RO"): Labels(27.7, -1.8, -0.8, -1.8, None),
    ("mBART", "12-3", "EN-RO"): Labels(26.5, -0.8, -0.4, -0.6, None),
}

# Section 6.4, 12,000 BART shapes on a GPU in half precision: what one more layer adds to the time, in per cent.
LAYER_COST = {"decoder": 8.0, "encoder": 4.0}

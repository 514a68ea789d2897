"""A small label set: its rows, and a manifest as `raydistill pseudolabel` writes one."""

from raydistill.label_sets.label_set import Candidate

LABEL_ROWS = [
    ("a", [Candidate("Ein Hund.", -0.5), Candidate("Zwei Hunde.", -0.75)]),
    ("b", [Candidate("Über Öl – schön.", -1.25)]),
    ("c", [Candidate("", -2.0)]),
]
PSEUDOLABEL_MANIFEST = {
    "teacher": {"name": "t", "fingerprint": "f"},
    "rows": 3,
    "decoding": {"beams": 4},
    "metric": "rouge2",
    "engine": "ctranslate2 fp32",
    "device_hours": 0.5,
    "empty": 1,
    "target_words_mean": 1.7,
    "quality": None,
}

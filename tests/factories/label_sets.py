"""A small label set: its rows, and a manifest as `raydistill pseudolabel` writes one."""

from pathlib import Path
from typing import Any

from raydistill.core.files import SCHEMA_VERSION, write_json_atomic
from raydistill.label_sets.label_set import Candidate, write_label_set
from raydistill.label_sets.manifest import LabelManifest, PseudolabelManifest

LABEL_ROWS = [
    ("a", [Candidate("Ein Hund.", -0.5), Candidate("Zwei Hunde.", -0.75)]),
    ("b", [Candidate("Über Öl – schön.", -1.25)]),
    ("c", [Candidate("", -2.0)]),
]


def pseudolabel_manifest(**changes: Any) -> PseudolabelManifest:
    """The manifest of `LABEL_ROWS`."""
    record = {
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
    return PseudolabelManifest.model_validate({**record, **changes})


def write_labels(folder: Path, rows: Any = LABEL_ROWS, manifest: LabelManifest | None = None) -> None:
    """Write a label set whose manifest counts three rows, unless `manifest` is given."""
    write_label_set(folder, rows, lambda: manifest or LabelManifest(rows=3))


def write_manifest_by_hand(folder: Path, **keys: Any) -> None:
    """Replace the manifest of a label set by the schema version and the given keys, as a user might write it."""
    write_json_atomic(folder / "manifest.json", {"schema": SCHEMA_VERSION, **keys})

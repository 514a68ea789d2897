"""The benchmark of shortlists: the front of served models."""

from typing import Any

from benchmarks.shortlist import ServedModel, front_text, served_models


def record(model: str, beams: int, variant: str, test: float, **times: float) -> dict[str, Any]:
    """A row of the benchmark; `times` are the baseline's milliseconds and the factor."""
    precision, _, name = variant.partition(" ")
    row = {"model": model, "beams": beams, "precision": precision, "list": name, "test": test}
    return {**row, "speedup_32": times} if times else row


RECORDS = [
    record("6-3", 4, "fp32 none", 35.0),
    record("6-3", 4, "int8 none", 34.9, baseline_ms=80.0, factor=2.0),
    record("6-3", 4, "int8 fixed 2000", 33.0),  # loses too much and is not timed
    record("6-1", 4, "fp32 none", 30.0),
    record("6-1", 4, "int8 none", 30.1, baseline_ms=50.0, factor=2.5),
    record("6-1", 1, "fp32 none", 29.0),
    record("6-1", 1, "int8 none", 29.0, baseline_ms=16.0, factor=2.0),
]


def test_version_1_serves_in_fp32_with_the_most_beams():
    first, every = served_models(RECORDS)
    assert first == [
        ServedModel("6-3, 4 beams, fp32, none", 80, 35.0),
        ServedModel("6-1, 4 beams, fp32, none", 50, 30.0),
    ]
    assert [(served.ms, served.bleu) for served in every] == [
        *((80, 35.0), (40, 34.9)),
        *((50, 30.0), (20, 30.1)),
        *((16, 29.0), (8, 29.0)),
    ]


def test_the_front_names_the_best_way_within_each_time():
    text = front_text(RECORDS)
    assert "| 6-1, 4 beams, fp32, none | 50 | 30.00 | 6-3, 4 beams, int8, none | 40 | 34.90 |" in text
    assert "| 6-3, 4 beams, fp32, none | 80 | 35.00 | 6-3, 4 beams, fp32, none | 80 | 35.00 |" in text
    # Up to 80 ms: (80 - 50) x 30 = 900; (80 - 8) x 29 + (80 - 20) x 1.1 + (80 - 40) x 4.8 = 2,346
    assert "900 as version 1 serves the models, 2,346 with all ways (2.61x)" in text

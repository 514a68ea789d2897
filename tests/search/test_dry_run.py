"""Estimates of `raydistill sweep --dry-run`."""

import pytest

from raydistill.config.presets import DATASETS
from raydistill.config.run import Run
from raydistill.search.dry_run import estimate_cache_bytes


def test_cache_of_xsum_at_full_size_takes_about_170_gb_of_encoder_states():
    """The configuration of BART-large is the default of its class; 204,017 rows of 358 words (Table 3 of the paper)."""
    from transformers import BartConfig

    rows, source, target = DATASETS["xsum"].paper_stats
    run = Run.model_validate(
        {"name": "r", "teacher": "bart", "dataset": "xsum", "method": "kd", "student": {"size": "12-3"}}
    )
    data = {"rows": rows, "source": source, "target": target}
    encoder, decoder = estimate_cache_bytes([run], BartConfig(), data)
    assert 160e9 < encoder < 180e9
    assert decoder == pytest.approx(3 * encoder * target / source, rel=1e-3)  # layers 3, 7 and 11
    off = run.model_copy(update={"training": run.training.model_copy(update={"teacher_cache": "off"})})
    assert estimate_cache_bytes([off], BartConfig(), data) == (0, 0)
    shrunk = run.model_copy(update={"student": run.student.model_copy(update={"size": "6-3"})})
    assert estimate_cache_bytes([shrunk], BartConfig(), data) == (0, decoder)

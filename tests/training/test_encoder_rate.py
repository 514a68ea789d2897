"""A trained encoder at the learning rate that a shallow decoder needs, and at a smaller rate of its own.

After 681 steps at one rate, version 1's 6-1 student collapsed (docs/log.md). A 6-3 student shows the damage early,
because three copied layers write fair outputs from the first steps on.
"""

from pathlib import Path
from typing import Any

import pytest

from raydistill.config.run import Run
from raydistill.training.run import train
from tests.factories.engines import REAL_TEACHER, SHARED

STEPS, BATCH_SIZE = 60, 32
RATE = 4e-3  # what a decoder of a single layer needs (docs/log.md)


def train_student(folder: Path, name: str, **training: Any) -> float:
    """The validation loss of a 6-3 student of the trained teacher after `STEPS` steps at `RATE`."""
    settings = {"learning_rate": RATE, "batch_size": BATCH_SIZE, "epochs": 1, "warmup_steps": STEPS // 4}
    rows = {"train_rows": STEPS * BATCH_SIZE, "validation_rows": 64, "test_rows": 8}
    run = Run.model_validate(
        {
            "name": name,
            "teacher": str(REAL_TEACHER),
            "dataset": {
                **{"name": str(SHARED / "data" / "multi30k_en_de"), "max_source_tokens": 64, "max_target_tokens": 64},
                **rows,
            },
            "student": {"size": "6-3"},
            "loss": {"label_smoothing": 0.1},
            "training": {**settings, "checks_per_epoch": 1, "dropout": 0.1, **training},
            "decoding": {"beams": 1, "max_length": 32},
            "evaluation": {"metric": "bleu"},
        }
    )
    result = train(run, folder / name, lambda metrics, folder: None)
    assert result is not None
    return result.metrics["val_loss"]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_TEACHER.is_dir(), reason="the shared teacher is not available")
def test_training_the_encoder_harms_the_student_at_the_decoders_rate_and_not_at_a_rate_of_its_own(tmp_path):
    """Measured: 2.595 nats with a frozen encoder, 2.801 at the same rate and 2.600 at a rate of its own."""
    frozen = train_student(tmp_path, "frozen")
    same_rate = train_student(tmp_path, "same-rate", freeze_encoder=False)
    own_rate = train_student(tmp_path, "own-rate", freeze_encoder=False, encoder_learning_rate=2e-4)
    print(f"loss on validation: frozen {frozen:.3f}, same rate {same_rate:.3f}, own rate {own_rate:.3f}")
    assert same_rate > frozen + 0.1
    assert own_rate < frozen + 0.05

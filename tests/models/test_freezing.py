"""Frozen parts of a student."""

import pytest

from raydistill.core.errors import UserError
from raydistill.models.freezing import FrozenParts, freeze
from raydistill.models.loading import load_model
from tests.factories.models import save_tiny


def test_freezing_everything_is_rejected(tmp_path):
    student = load_model(save_tiny("bart", tmp_path / "t"))
    for parameter in student.get_decoder().parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(student, FrozenParts(True, True, True))

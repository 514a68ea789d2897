"""Validation errors: credentials in configurations."""

import pytest

from raydistill.config.space import read_space
from raydistill.core.errors import UserError


def test_credentials_anywhere_in_a_space_are_rejected(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("name: x\nrun:\n  teacher: {choice: [demo, 's3://K:S@b/t']}\n  dataset: demo\n")
    with pytest.raises(UserError, match=r"space\.yaml:3: run\.teacher\.choice\.1: contains a password"):
        read_space(path)

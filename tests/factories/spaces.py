"""Space files, and the errors that reading them raises."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from raydistill.config.space import read_space
from raydistill.core.errors import UserError

RUN = {"teacher": "demo", "dataset": "demo"}
HEAD = "name: x\nrun:\n  teacher: demo\n  dataset: demo\n"


def write_space(folder: Path, content: str | dict[str, Any]) -> Path:
    """Write space.yaml from YAML text or data."""
    path = folder / "space.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def space_error(path: Path, *overrides: str) -> str:
    """The message of the UserError that reading an invalid space raises."""
    with pytest.raises(UserError) as caught:
        read_space(path, list(overrides))
    return str(caught.value)

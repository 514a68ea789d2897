"""An exported student without a real model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raydistill.core import artifact
from raydistill.models.metadata import CheckpointMetadata
from raydistill.tracking import mlflow_registry


@pytest.fixture
def make_export() -> Callable[[Path, str], Path]:
    """A function that writes SWEEP/exports/KEY like `export_student`, with empty metadata and no weights."""

    def write(sweep: Path, key: str) -> Path:
        folder = sweep / "exports" / key
        folder.mkdir(parents=True, exist_ok=True)
        CheckpointMetadata().write_to(folder)
        (folder / "README.md").write_text("chosen for fast")
        mlflow_registry.write_mlmodel(folder)
        artifact.seal(folder, artifact.Manifest(kind="export"))
        return folder

    return write

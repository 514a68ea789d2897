"""Saves checkpoints: a model and its tokenizer in a folder that `from_pretrained` reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from raydistill.core import artifact
from raydistill.models.metadata import CheckpointMetadata

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINT_KIND = "checkpoint"


def save_checkpoint(
    model: "PreTrainedModel",
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    metadata: CheckpointMetadata | None = None,
) -> None:
    """Save a model (as safetensors) and its tokenizer as an artifact, together with its metadata if given.

    Raises:
        OSError: The disk is full, for example.
    """
    with build_checkpoint(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if metadata:
            metadata.write_to(temporary)


@contextmanager
def build_checkpoint(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes the checkpoint at the end of the block; see `artifact.build`."""
    manifest = artifact.Manifest(kind=CHECKPOINT_KIND)
    with safetensors_os_error(folder), artifact.build(folder, lambda: manifest) as temporary:
        yield temporary


@contextmanager
def safetensors_os_error(path: Path) -> Iterator[None]:
    """Turn an error of safetensors while it writes `path`, such as a full disk, into an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"{path}: could not be written ({error}); no data is lost: free disk space and run the command again"
        ) from None

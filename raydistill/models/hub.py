"""Resolves a checkpoint to a local folder, and converts pickled weights to safetensors.

A checkpoint is a folder written by `save_pretrained`, or a hub name, optionally with a revision: `owner/name@revision`.
Models are loaded from safetensors only, because opening a pickle can run code. Checkpoints that have nothing else are
read once with torch's restricted unpickler, which builds tensors only, and cached as safetensors.
"""

import os
import shutil
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

from raydistill.config.presets import TEACHERS
from raydistill.core import artifact
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.files import check_symlinks, corrupt_file_error, read_json
from raydistill.models import conversions

# Files to download: none from sub-folders, no weights of other frameworks.
CONFIG_AND_TOKENIZER_PATTERNS = ["*.json", "*.model", "*.spm", "*.txt"]
SAFETENSORS_PATTERN = "model*.safetensors"
PICKLE_PATTERN = "pytorch_model*.bin"
HUB_TIMEOUT_S = 5.0  # seconds until the hub counts as unreachable


def resolve_checkpoint(checkpoint: str | Path, weights: bool = True, convert_pickles: bool = True) -> Path:
    """Return the local folder of a checkpoint, downloading it from the hub if it is not cached.

    With `weights=False` only the configuration and tokenizer files are downloaded. If a checkpoint has only pickled
    weights, the folder of its conversion is returned (`convert_to_safetensors`); with `convert_pickles=False`, the
    folder without weights. With HF_HUB_OFFLINE=1 only the cache is read.

    Raises:
        UserError: The folder or hub name does not exist, the hub cannot be reached, or the pickled weights are refused.
    """
    folder = Path(checkpoint)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{checkpoint}: is a file; a checkpoint is a folder with config.json and model.safetensors")
    from_hub = not folder.is_dir()
    if from_hub:
        folder = _download_checkpoint(checkpoint, SAFETENSORS_PATTERN if weights else None)
    if not weights or not convert_pickles or weight_files(folder):
        return folder
    if from_hub:
        folder = _download_checkpoint(checkpoint, PICKLE_PATTERN)
    return convert_to_safetensors(folder, checkpoint) if list(folder.glob(PICKLE_PATTERN)) else folder


def hub_commit(checkpoint: str | Path) -> str | None:
    """Return the commit that a hub name refers to in the local cache, since branches move; None for a folder."""
    return None if Path(checkpoint).is_dir() else resolve_checkpoint(checkpoint, weights=False).name


def convert_to_safetensors(folder: Path, checkpoint: str | Path) -> Path:
    """Convert a pickled checkpoint once; return the folder below HOME/cache/safetensors that holds the conversion.

    The pickle is opened with `weights_only=True`, which builds tensors and plain containers and calls nothing else.

    Raises:
        UserError: The pickle holds anything else, is damaged, or does not fit config.json.
    """
    pickles = sorted(folder.glob(PICKLE_PATTERN))
    identity = [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in pickles]
    target = conversions.default_folder("safetensors") / sha256(str(identity).encode()).hexdigest()[:16]
    kind = conversions.KINDS["safetensors"]

    def build() -> None:
        _check_no_external_links(folder)
        for path in pickles:
            _check_pickle(path)
        with artifact.build(target, lambda: conversions.make_manifest(target, kind, checkpoint)) as temporary:
            _write_safetensors(folder, temporary, checkpoint)

    conversions.ensure_built(target, kind, build, print_progress)
    return target


def check_weights(folder: Path, checkpoint: str | Path) -> None:
    """Check that the safetensors files of a folder exist and are not truncated.

    Raises:
        UserError: A file is missing or damaged.
    """
    files = weight_files(folder)
    if not files:
        raise UserError(f"{checkpoint}: has neither model.safetensors nor pytorch_model.bin; copy the checkpoint again")
    for path in files:
        if not path.is_file():
            raise UserError(f"{checkpoint}: {path.name} is missing; the index lists it. Copy the checkpoint again")
        try:
            with safe_open(path) as tensors:
                tensors.keys()
        except Exception as error:
            raise UserError(
                f"{path}: damaged or truncated ({first_error_line(error)}); copy the checkpoint again"
            ) from None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: one file, or the shards that the index lists; [] if it has none.

    Raises:
        UserError: The index is damaged or lists files outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [p for p in [folder / "model.safetensors"] if p.is_file()]
    with corrupt_file_error(index, "Copy the checkpoint again"):
        names = set(read_json(index)["weight_map"].values())
        # The check is on the names, since the files of the hub's cache are links to another folder.
        if not all(
            isinstance(name, str) and fnmatch(name, SAFETENSORS_PATTERN) and Path(name).name == name for name in names
        ):
            raise ValueError(f"weight_map names other files than shards called {SAFETENSORS_PATTERN}")
    return [folder / name for name in sorted(names)]


def safe_open(path: Path) -> Any:
    """Open a safetensors file as a context manager."""
    from safetensors import safe_open as open_file

    return open_file(path, framework="pt")


def first_error_line(error: BaseException) -> str:
    """Return the first line of an error message, at most 300 characters, or the error's type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def check_no_missing_weights(info: dict[str, Any], checkpoint: str | Path) -> None:
    """Check the loading info of `from_pretrained`, which initialises missing weights randomly.

    Raises:
        UserError: Weights are missing.
    """
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{checkpoint}: the weights do not fit config.json: {len(missing)} are missing, such as {missing[0]}"
        )


def _check_no_external_links(folder: Path) -> None:
    """Raise UserError if a link points outside the checkpoint's folder and outside its files in the hub's cache."""
    in_cache = folder.parent.name == "snapshots"
    check_symlinks(folder, folder.parents[1] / "blobs" if in_cache else None)


def _check_pickle(path: Path) -> None:
    """Raise UserError if a pickle holds more than tensors; neither code is run nor tensor data read."""
    import torch

    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: refused: it is damaged, or holds more than tensors and could run code "
            f"({first_error_line(error)}); use a revision of the checkpoint that has model.safetensors"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: refused: expected a mapping of names to tensors, as save_pretrained wrote it")


def _write_safetensors(folder: Path, output_dir: Path, checkpoint: str | Path) -> None:
    """Save a checked pickled checkpoint as safetensors in `output_dir` and copy its tokenizer and config files."""
    from transformers import AutoModelForSeq2SeqLM

    try:
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            folder, use_safetensors=False, weights_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise UserError(f"{checkpoint}: the pickled weights cannot be loaded: {first_error_line(error)}") from None
    check_no_missing_weights(info, checkpoint)
    model.save_pretrained(output_dir)
    for pattern in CONFIG_AND_TOKENIZER_PATTERNS:
        for path in folder.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, output_dir / path.name)


def _is_valid_repo_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _download_checkpoint(checkpoint: str | Path, weights_pattern: str | None) -> Path:
    """Return the cached snapshot of a hub name with config, tokenizer and, if a pattern is given, weight files."""
    name, _, revision = str(checkpoint).partition("@")
    if not _is_valid_repo_id(name):
        known = ", ".join([*TEACHERS, "demo"])
        raise UserError(f"{checkpoint}: no such folder, and not a hub name (owner/name); named teachers are {known}")
    patterns = [*CONFIG_AND_TOKENIZER_PATTERNS, *([weights_pattern] if weights_pattern else [])]
    return _download_snapshot(name, revision or None, patterns)


def _download_snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                etag_timeout=HUB_TIMEOUT_S,
            )
        )
    except GatedRepoError:
        raise UserError(f"{name}: the model requires a login; accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: neither a folder nor a public model on the hub; check the name, or set HF_TOKEN for a private "
            f"model"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{name}: the hub has no revision {revision!r} of this model; give a branch, tag or commit that exists"
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            reason = "HF_HUB_OFFLINE is set and the checkpoint is not in the local cache"
        else:
            reason = (
                f"the checkpoint is not in the local cache and the hub cannot be reached ({first_error_line(error)})"
            )
        raise UserError(
            f"{name}: no such folder; {reason}. Give a folder, or download the checkpoint with a network connection: "
            f"hf download {name}"
        ) from None

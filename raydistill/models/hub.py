"""Where a checkpoint's files are: a folder here, or the hub's, and in which form its weights are.

A checkpoint is a folder as `save_pretrained` writes it, or the hub's name of one; `owner/name@revision` is a
revision of it. Models are loaded from safetensors only, since a pickled file can run code when it is opened. Old
checkpoints that have nothing else are read once, as tensors and nothing but tensors, and kept as safetensors.
"""

import os
import shutil
import tempfile
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from raydistill.config.presets import TEACHERS
from raydistill.core.errors import UserError
from raydistill.core.files import check_symlinks, corrupt_file_error, read_json
from raydistill.core.paths import raydistill_home

# The hub's files that are needed: none from sub-folders, no other frameworks' weights.
CONFIG_AND_TOKENIZER_PATTERNS = ["*.json", "*.model", "*.spm", "*.txt"]
SAFETENSORS_PATTERN = "model*.safetensors"
PICKLE_PATTERN = "pytorch_model*.bin"
HUB_TIMEOUT_S = 5.0  # seconds until the hub counts as unreachable


def resolve_checkpoint(checkpoint: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint, fetched from the hub where it is not here yet.

    `weights=False` fetches only what the configuration and the tokenizer need. Where a checkpoint has only pickled
    weights, the folder is that of its conversion (`convert_to_safetensors`). With HF_HUB_OFFLINE=1 only the cache is
    read. Raises UserError: no such folder, not on the hub, the hub is out of reach.
    """
    folder = Path(checkpoint)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{checkpoint}: is a file; a checkpoint is a folder with config.json and model.safetensors")
    name, _, revision = str(checkpoint).partition("@")
    from_hub = not folder.is_dir()
    if from_hub:
        if not _is_valid_repo_id(name):
            known = ", ".join([*TEACHERS, "demo"])
            raise UserError(
                f"{checkpoint}: no such folder, and not a hub name (owner/name); named teachers are {known}"
            )
        folder = _download_snapshot(
            name,
            revision or None,
            [*CONFIG_AND_TOKENIZER_PATTERNS, SAFETENSORS_PATTERN] if weights else CONFIG_AND_TOKENIZER_PATTERNS,
        )
    if not weights or weight_files(folder):
        return folder
    if from_hub:
        folder = _download_snapshot(name, revision or None, [*CONFIG_AND_TOKENIZER_PATTERNS, PICKLE_PATTERN])
    return convert_to_safetensors(folder, checkpoint) if list(folder.glob(PICKLE_PATTERN)) else folder


def hub_commit(checkpoint: str | Path) -> str | None:
    """The hub's commit that a hub name stands for in the local cache ("main" moves on); None for a folder."""
    return None if Path(checkpoint).is_dir() else resolve_checkpoint(checkpoint, weights=False).name


def convert_to_safetensors(folder: Path, checkpoint: str | Path) -> Path:
    """The folder under `home()/cache/safetensors` that holds a pickled checkpoint as safetensors; made once.

    The pickle is opened with `weights_only=True`, which builds tensors and plain containers and calls nothing else.
    Raises UserError where it holds anything more, is damaged, or does not fit its config.json.
    """
    pickled = sorted(folder.glob(PICKLE_PATTERN))
    marks = [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in pickled]
    place = raydistill_home() / "cache" / "safetensors" / sha256(str(marks).encode()).hexdigest()[:16]
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        if not place.is_dir():
            _check_no_external_links(folder)
            for path in pickled:
                _check_pickle(path)
            making = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent))
            try:
                _write_safetensors(folder, making, checkpoint)
                making.rename(place)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    return place


def check_weights(folder: Path, checkpoint: str | Path) -> None:
    """Raise a UserError where a folder's safetensors are absent, truncated or incomplete."""
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
    """The safetensors files of a checkpoint: one, or the shards that its index lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [p for p in [folder / "model.safetensors"] if p.is_file()]
    with corrupt_file_error(index, "Copy the checkpoint again"):
        names = set(read_json(index)["weight_map"].values())
        # By its name alone a shard stays in the folder; the files of the hub's cache are links.
        if not all(
            isinstance(name, str) and fnmatch(name, SAFETENSORS_PATTERN) and Path(name).name == name for name in names
        ):
            raise ValueError(f"weight_map names other files than shards called {SAFETENSORS_PATTERN}")
    return [folder / name for name in sorted(names)]


def safe_open(path: Path) -> Any:
    """An open safetensors file, for use in a `with`."""
    from safetensors import safe_open as open_file

    return open_file(path, framework="pt")


def first_error_line(error: BaseException) -> str:
    """An error's text, cut to a line."""
    lines = str(error).strip().splitlines()
    return f"{lines[0][:300]}" if lines else type(error).__name__


def _check_no_external_links(folder: Path) -> None:
    """UserError where a checkpoint to be copied holds links that lead out of it, or out of the hub's cache of it."""
    in_cache = folder.parent.name == "snapshots"
    check_symlinks(folder, folder.parents[1] / "blobs" if in_cache else None)


def _check_pickle(path: Path) -> None:
    """UserError where a file holds more than tensors. Nothing is called, and no data are read but the structure."""
    import torch

    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: refused: it is damaged, or holds more than tensors and could run code "
            f"({first_error_line(error)}); "
            f"use a revision of the checkpoint that has model.safetensors"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: refused: expected a mapping of names to tensors, as save_pretrained wrote it")


def _write_safetensors(folder: Path, output_dir: Path, checkpoint: str | Path) -> None:
    """Load a checked pickled checkpoint and save it in `output_dir` with its tokenizer and configs as they were."""
    from transformers import AutoModelForSeq2SeqLM

    try:
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            folder, use_safetensors=False, weights_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise UserError(f"{checkpoint}: the pickled weights cannot be loaded: {first_error_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{checkpoint}: the weights do not fit config.json: {len(missing)} are missing, such as {missing[0]}"
        )
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
        raise UserError(f"{name}: the hub asks for a login; accept its terms and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: neither a folder here nor a model on the hub (or a private one)") from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no revision {revision!r} of it") from None
    except (LocalEntryNotFoundError, OSError) as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            why = "HF_HUB_OFFLINE is set and it is not in the local cache"
        else:
            why = f"it is not in the local cache and the hub cannot be reached ({first_error_line(error)})"
        raise UserError(
            f"{name}: no such folder; {why}. Give a folder, or fetch it where there is a network: hf download {name}"
        ) from None

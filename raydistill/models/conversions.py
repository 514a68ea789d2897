"""Converted checkpoints below HOME/cache: artifacts that are derived, so that a damaged one is built again."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raydistill.core import artifact
from raydistill.core.artifact import MANIFEST, Manifest
from raydistill.core.files import mark_used
from raydistill.core.paths import raydistill_home

# The kind of the artifacts in each folder below HOME/cache.
KINDS = {"ctranslate2": "conversion", "safetensors": "safetensors"}
SERVING_PREFIX = "serving-"  # of the folders with the students that a sweep is serving, converted for CTranslate2


class ConversionManifest(Manifest):
    """The manifest of a converted checkpoint.

    Attributes:
        checkpoint: Hub name or folder of the checkpoint that was converted. Equal checkpoints share a conversion.
        unavailable_reason: Why CTranslate2 cannot decode the checkpoint, if the conversion holds no model.
        max_logprob_diff: How much CTranslate2's log-probabilities differ, if that was measured and is finite.
    """

    checkpoint: str
    unavailable_reason: str | None = None
    max_logprob_diff: float | None = None


@dataclass(frozen=True)
class ConversionInfo:
    """A converted checkpoint on disk.

    `checkpoint` is None if the conversion is incomplete or damaged. `last_used` is in seconds since the epoch.
    """

    folder: Path
    kind: str
    checkpoint: str | None
    size_bytes: int
    last_used: float


def default_folder(name: str) -> Path:
    """The folder of the conversions of a format, "ctranslate2" or "safetensors"."""
    return raydistill_home() / "cache" / name


def serving_folder(sweep_id: str) -> Path:
    """The folder of the conversions that a sweep needs while its students are served."""
    return default_folder(f"{SERVING_PREFIX}{sweep_id}")


def conversion_folders() -> dict[Path, str]:
    """The folders of conversions, with the kind of their artifacts; also the folders that killed sweeps left."""
    serving = (raydistill_home() / "cache").glob(f"{SERVING_PREFIX}*/")
    return {default_folder(name): kind for name, kind in KINDS.items()} | dict.fromkeys(serving, KINDS["ctranslate2"])


def make_manifest(
    folder: Path,
    kind: str,
    checkpoint: str | Path,
    unavailable_reason: str | None = None,
    max_logprob_diff: float | None = None,
) -> ConversionManifest:
    """The manifest of the conversion in `folder`, whose name is the key. A NaN or infinite difference becomes None."""
    is_finite = max_logprob_diff is not None and math.isfinite(max_logprob_diff)
    return ConversionManifest(
        kind=kind,
        key=folder.name,
        checkpoint=str(Path(checkpoint).absolute() if Path(checkpoint).is_dir() else checkpoint),
        unavailable_reason=unavailable_reason,
        max_logprob_diff=max_logprob_diff if is_finite else None,
    )


def ensure_built(
    folder: Path, kind: str, build: Callable[[], None], on_wait: Callable[[str], None] | None = None
) -> ConversionManifest:
    """Open a conversion; call `build` before if it is missing, incomplete or damaged. One process at a time builds.

    Raises:
        UserError: `build` has left no complete conversion.
    """
    manifest = artifact.open_if_whole(folder, ConversionManifest, kind)
    if manifest is None:
        with artifact.lock(folder, math.inf, on_wait):
            manifest = artifact.open_if_whole(
                folder, ConversionManifest, kind
            )  # another process may have built it while this one waited
            if manifest is None:
                build()
                manifest = artifact.open_artifact(folder, ConversionManifest, kind)
    mark_used(folder / MANIFEST)
    return manifest


def list_conversions() -> list[ConversionInfo]:
    """The conversions below HOME/cache, least recently used first."""
    conversions = []
    for parent, kind in conversion_folders().items():
        for folder in parent.glob("[!.]*/"):
            manifest = artifact.open_if_whole(folder, ConversionManifest, kind)
            size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            used = (folder / MANIFEST if manifest else folder).stat().st_mtime
            checkpoint = manifest.checkpoint if manifest else None
            conversions.append(ConversionInfo(folder, kind, checkpoint, size_bytes, used))
    return sorted(conversions, key=lambda conversion: conversion.last_used)


def remove(info: ConversionInfo) -> None:
    """Delete a conversion.

    Raises:
        LockHeld: Another process builds or checks the conversion.
    """
    with artifact.lock(info.folder):
        artifact.remove(info.folder)

"""What a run leaves in its folder: its claim, its checkpoints, and last of all its result."""

import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistill.config.run import HOW, Run
from raydistill.core.errors import PassingError, UserError
from raydistill.core.files import CARD, damage_told, read_json, sync, write_json_atomic
from raydistill.models.shrinking import Plan

HELD_WAIT_S = 60.0
ORIGIN = "origin.json"  # which teacher and which data a run was begun with


def claim(folder: Path, run: Run) -> None:
    """The folder belongs to this config: another config's work is neither gone on with nor taken for this one's.

    What an older release wrote lacks settings that it did not know; they had the values that are the defaults now.
    Settings of memory (`HOW`) may change.
    """
    path = folder / "run.json"
    if not path.is_file():
        write_json_atomic(path, run.model_dump(mode="json"))
        return
    with damage_told(path):
        begun = Run.model_validate(read_json(path))
    if begun.model_dump(exclude=HOW) != run.model_dump(exclude=HOW):
        raise UserError(f"{folder}: holds a run with other settings; give this run another name, or delete the folder")


def claim_origin(folder: Path, now: dict[str, Any]) -> None:
    """Teacher and data (as `material.origin_of` tells) that the run was begun with stay the same to its end.

    UserError where a run is taken up after the teacher behind its path, or a data file, became another one.
    """
    path = folder / ORIGIN
    if not path.is_file():
        write_json_atomic(path, now)
    elif changed := changes(read_json(path), now):
        raise UserError(
            f"{folder}: the {' and the '.join(changed)} changed since this run was begun; results of both are not "
            f"mixed: give the run another name, or delete the folder"
        )


def changes(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is another than it was: "teacher", "train split" and so on."""
    found = ["teacher"] if begun.get("teacher") != now["teacher"] else []
    marks = begun.get("data") or {}
    return found + [f"{split} split" for split, mark in marks.items() if now["data"].get(split) != mark]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The run's folder, for one process at a time.

    A worker may outlive its driver for some seconds, until Ray ends it; the one that takes its run up waits for that.
    PassingError where the folder is not free after `HELD_WAIT_S`.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=HELD_WAIT_S)
    except Timeout:
        raise PassingError(f"{folder}: another process trains this run; wait for it, or end it first") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def making(target: Path) -> Iterator[Path]:
    """A name to write a file or folder under, which takes `target`'s place at the end of the block.

    Nothing is left of it when the block fails. OSError where the disk is full, safetensors' own error included.
    """
    place = target.with_name(f".{target.name}.making")
    _remove(place)
    try:
        yield place
        for path in [place, *place.rglob("*")]:
            if path.is_file():
                sync(path)
        if target.is_dir():
            shutil.rmtree(target)
        place.replace(target)
    except SafetensorError as error:
        raise OSError(
            f"{target}: could not be written ({error}); nothing is lost: free some disk and run again"
        ) from None
    finally:
        _remove(place)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder that `from_pretrained` reads (safetensors); whole or not at all."""
    with making(folder) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)


def identity(run: Run, layers: Plan | None, size: str | None) -> dict[str, Any]:
    """What was trained, as results and cards name it; `size` is that of a model without a plan."""
    return {
        "method": run.method,
        "size": size if layers is None else "-".join(map(str, layers.size)),
        "copied": layers.copied if layers else None,
        "labels": run.label_source,
    }


def write_card(best: Path, run: Run, layers: Plan | None, facts: dict[str, Any]) -> None:
    """`raydistill.json` beside the weights: where this checkpoint comes from."""
    card = {
        "teacher": run.teacher,
        "supervised": layers.supervised if layers else None,
        "config": run.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("raydistill", "torch", "transformers")},
        **facts,
    }
    write_json_atomic(best / CARD, card)


def write_failure(
    folder: Path, run: Run, facts: dict[str, Any], reason: str, hours: float, metrics: dict[str, float] | None = None
) -> dict[str, Any]:
    """The result of a run that cannot go on, and the device-hours that it took all the same. No checkpoint is kept.

    `metrics`: what is known besides, of a run that came to its end before it was found to have failed.
    """
    result = {
        "key": folder.name,
        "status": "failed",
        "reason": reason,
        **facts,
        "metrics": {**(metrics or {}), "gpu_hours": hours},
        "interval": None,
        "test": None,
        "seed": run.training.seed,
        "host": platform.node(),
    }
    write_json_atomic(folder / "result.json", result)
    for left in [*folder.glob("state*"), *folder.glob("checkpoint-*"), folder / "best"]:
        _remove(left)
    return result


def write_rows(path: Path, rows: dict[str, np.ndarray]) -> None:
    """Per-row statistics by split; whole or not at all."""
    with making(path) as place, place.open("wb") as file:
        np.savez_compressed(file, **rows)  # type: ignore[arg-type]

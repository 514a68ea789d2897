"""What a run leaves in its folder: its claim, its checkpoints, and last of all its result."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistill.config.errors import UserError
from raydistill.config.files import write_json_atomic
from raydistill.config.run import Run
from raydistill.model.shrink import Plan

CARD = "raydistill.json"


def claim(folder: Path, run: Run) -> None:
    """The folder belongs to this config: another config's work is neither gone on with nor taken for this one's."""
    asked = run.model_dump(mode="json")
    path = folder / "run.json"
    if not path.is_file():
        write_json_atomic(path, asked)
    elif json.loads(path.read_text(encoding="utf-8")) != asked:
        raise UserError(f"{folder}: holds a run with other settings; give this run another name, or delete the folder")


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder that `from_pretrained` reads (safetensors); whole or not at all."""
    making = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    model.save_pretrained(making)
    tokenizer.save_pretrained(making)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)


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


def write_failure(folder: Path, run: Run, facts: dict[str, Any], reason: str) -> dict[str, Any]:
    """The result of a run that cannot go on."""
    result = {
        "key": folder.name,
        "status": "failed",
        "reason": reason,
        **facts,
        "metrics": {},
        "interval": None,
        "test": None,
        "seed": run.training.seed,
    }
    write_json_atomic(folder / "result.json", result)
    return result


def write_rows(path: Path, rows: dict[str, np.ndarray]) -> None:
    """Per-row statistics by split; whole or not at all."""
    making = path.with_name(f".{path.name}")
    with making.open("wb") as file:
        np.savez_compressed(file, **rows)  # type: ignore[arg-type]
    making.replace(path)

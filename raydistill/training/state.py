"""The saved state of a run, from which it resumes to the same weights."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from raydistill.core.files import atomic_path, corrupt_file_error, safe_join, write_atomic
from raydistill.models.saving import safetensors_os_error

STATE_FILE = "state.json"


@dataclass
class TrainingState:
    """The progress of a run; all of its state but the tensors.

    Attributes:
        step: Optimiser steps taken.
        best_score: The best validation score; None before the first validation.
        best_step: The step of the best score.
        checks_since_best: Validations since the best score.
        seconds: Time of the run, with start-up and validations.
        ended_early: Whether the report callback or a lack of better scores ended the run.
        stopped: Whether the report callback ended the run.
        reason: Why the run ended early.
        history: The metrics of every validation, as metrics.jsonl holds them.
    """

    step: int = 0
    best_score: float | None = None
    best_step: int = 0
    checks_since_best: int = 0
    seconds: float = 0.0
    ended_early: bool = False
    stopped: bool = False
    reason: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)


def has_state(folder: Path) -> bool:
    """Whether a run's folder holds a saved state."""
    return (folder / STATE_FILE).is_file()


def save_state(folder: Path, state: TrainingState, student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Save the state with the trainable weights and the optimiser's tensors.

    The tensors go into a file named after the step, then state.json points to that file: a kill leaves the previous
    state or this one, never a mixture.

    Raises:
        OSError: The disk is full, for example.
    """
    trainable = {name: p.detach().contiguous() for name, p in student.named_parameters() if p.requires_grad}
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in trainable.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    path = folder / _tensors_file_name(state)
    with safetensors_os_error(path), atomic_path(path) as temporary:
        save_file(tensors, temporary)
    write_state_file(folder, state)
    for stale in [*folder.glob("state-*.safetensors"), *folder.glob(".state-*.tmp")]:
        if stale != path:
            stale.unlink()


def write_state_file(folder: Path, state: TrainingState) -> None:
    """Write state.json; the file of the tensors at this step exists."""
    write_atomic(folder / STATE_FILE, json.dumps({**asdict(state), "tensors": _tensors_file_name(state)}).encode())


def load_state(
    folder: Path,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
) -> TrainingState:
    """Load the saved state, with the tensors of student and optimiser and the step of the learning-rate schedule.

    Raises:
        UserError: A file is damaged, or state.json names a file outside the folder.
    """
    path = folder / STATE_FILE
    with corrupt_file_error(path, f"Delete {path} to start the run again"):
        saved = json.loads(path.read_text(encoding="utf-8"))
        try:
            tensors = load_file(safe_join(folder, saved.pop("tensors")))
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        state = TrainingState(**saved)
    _restore_tensors(tensors, student, optimizer)
    scheduler.last_epoch = state.step
    for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = rate * scheduler.lr_lambdas[0](state.step)
    return state


def _restore_tensors(tensors: dict[str, Tensor], student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Copy saved tensors into the student and the optimiser; the names are as `save_state` writes them."""
    parameters = dict(student.named_parameters())
    slots: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "model":
                parameters[name].copy_(value)
            elif kind == "optimizer":
                index, _, slot = name.partition("/")
                slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def _tensors_file_name(state: TrainingState) -> str:
    return f"state-{state.step}.safetensors"

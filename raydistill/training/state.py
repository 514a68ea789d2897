"""The saved state of a run, from which it resumes to the same weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydistill.core import artifact
from raydistill.core.artifact import Manifest
from raydistill.core.files import corrupt_file_error
from raydistill.models.saving import safetensors_os_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE_FOLDER = "state"
STATE_KIND = "training state"


@dataclass
class TrainingState:
    """The progress of a run; all of its state but the tensors.

    Attributes:
        step: Optimiser steps taken.
        best_step: The step of the best validation: the highest score and, among equal scores, the lowest loss.
        checks_since_best: Validations since the score last rose.
        seconds: Time of the run, with start-up and validations.
        ended_early: Whether the report callback or a lack of better scores ended the run.
        stopped: Whether the report callback ended the run.
        reason: Why the run ended early.
        history: The metrics of every validation, as metrics.jsonl holds them.
    """

    step: int = 0
    best_step: int = 0
    checks_since_best: int = 0
    seconds: float = 0.0
    ended_early: bool = False
    stopped: bool = False
    reason: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, Any] | None:
        """The metrics of the best validation; None before the first validation."""
        return next((metrics for metrics in self.history if metrics["step"] == self.best_step), None)

    @property
    def engine(self) -> str | None:
        """The engine that scored the first validation, such as "ctranslate2 fp32"; None if there is none.

        All validations of a run use this engine: scores of two engines are not comparable.
        """
        return self.history[0].get("engine") if self.history else None


class StateManifest(Manifest):
    """The manifest of a saved state, an artifact with one file of tensors."""

    kind: str = STATE_KIND
    progress: TrainingState

    @property
    def tensors_file(self) -> str:
        """The file of the trainable weights and the optimiser's tensors.

        Named after the step, so that no mixture of two states looks complete.
        """
        return f"step-{self.progress.step}.safetensors"


def has_state(folder: Path) -> bool:
    """Whether a run's folder holds a saved state."""
    return artifact.is_complete(folder / STATE_FOLDER)


def save_state(
    folder: Path, state: TrainingState, student: "PreTrainedModel", optimizer: torch.optim.Optimizer
) -> None:
    """Save the state with the trainable weights and the optimiser's tensors.

    Raises:
        OSError: The disk is full, for example.
    """
    trainable = {name: p.detach().contiguous() for name, p in student.named_parameters() if p.requires_grad}
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in trainable.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    path, manifest = folder / STATE_FOLDER, StateManifest(progress=state)
    with safetensors_os_error(path), artifact.build(path, lambda: manifest) as temporary:
        save_file(tensors, temporary / manifest.tensors_file)


def save_progress(folder: Path, state: TrainingState) -> None:
    """Save a state whose tensors equal the tensors of the saved state."""
    path = folder / STATE_FOLDER / artifact.MANIFEST
    StateManifest.read(path).model_copy(update={"progress": state}).write(path)


def load_state(
    folder: Path,
    student: "PreTrainedModel",
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
) -> TrainingState:
    """Load the saved state, with the tensors of student and optimiser and the step of the learning-rate schedule.

    Raises:
        UserError: A file is missing or damaged.
    """
    path = folder / STATE_FOLDER
    manifest = artifact.open_artifact(path, StateManifest, STATE_KIND)
    state = manifest.progress
    with corrupt_file_error(path / manifest.tensors_file):
        try:
            tensors = load_file(path / manifest.tensors_file)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
    _restore_tensors(tensors, student, optimizer)
    scheduler.last_epoch = state.step
    for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = rate * scheduler.lr_lambdas[0](state.step)
    return state


def _restore_tensors(tensors: dict[str, Tensor], student: "PreTrainedModel", optimizer: torch.optim.Optimizer) -> None:
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

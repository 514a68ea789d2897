"""A run's state on disk, from which it goes on exactly."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydistill.core.files import damage_told, inside, write_atomic
from raydistill.training.distillation import Supervision
from raydistill.training.run_folder import making


@dataclass
class State:
    """How far a run is; everything but the tensors."""

    step: int = 0
    best_score: float | None = None
    best_step: int = 0
    checks_since_best: int = 0
    seconds: float = 0.0
    finished: bool = False
    stopped: bool = False
    reason: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)


def has_state(folder: Path) -> bool:
    """Whether a run was begun here."""
    return (folder / "state.json").is_file()


def save_state(folder: Path, state: State, supervision: Supervision, optimizer: torch.optim.Optimizer) -> None:
    """Tensors into a file named after the step, then the small file that points to it: always one whole state."""
    trainable = {n: p.detach().contiguous() for n, p in supervision.student.named_parameters() if p.requires_grad}
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in trainable.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    with making(folder / _tensors_name(state)) as place:
        save_file(tensors, place)
    write_state(folder, state)
    for stale in folder.glob("state-*.safetensors"):
        if stale.name != _tensors_name(state):
            stale.unlink()


def _tensors_name(state: State) -> str:
    return f"state-{state.step}.safetensors"


def write_state(folder: Path, state: State) -> None:
    """The small file; the tensors that it points to are there."""
    write_atomic(folder / "state.json", json.dumps({**asdict(state), "tensors": _tensors_name(state)}).encode())


def load_state(
    folder: Path,
    supervision: Supervision,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> State:
    """The saved state, with weights, optimiser and schedule put back where they were."""
    path = folder / "state.json"
    with damage_told(path, f"Delete {path} to begin the run anew"):
        saved = json.loads(path.read_text(encoding="utf-8"))
        try:
            tensors = load_file(inside(folder, saved.pop("tensors")))
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        state = State(**saved)
    own = dict(supervision.student.named_parameters())
    slots: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "model":
                own[rest].copy_(value)
            elif kind == "optimizer":
                index, _, name = rest.partition("/")
                slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    schedule.last_epoch = state.step
    for group, rate in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = rate * schedule.lr_lambdas[0](state.step)
    return state

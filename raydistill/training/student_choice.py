"""The layers and feed-forward units that a student copies from its teacher, where training rows decide about them.

The choice is made once per run and recorded in its folder.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from raydistill.config.run import Run, Student
from raydistill.core.records import Record
from raydistill.models import families
from raydistill.models.calibration import Calibration
from raydistill.models.loading import load_model, locate_checkpoint
from raydistill.models.measured_layers import measure_layers
from raydistill.models.pruning import best_units, random_units
from raydistill.models.shrinking import KeptUnits, LayerPlan, plan_student
from raydistill.models.teacher import Teacher
from raydistill.training.tokenized_data import load_tokenized_data, make_examples
from raydistill.training.workers import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHOICE_FILE = "student.json"


class MeasuredLayers(BaseModel):
    """Decoder layers of the teacher, and the divergence of the untrained student that copies them, in nats a token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: list[int]
    divergence: float


class StudentChoice(Record):
    """What a student copies, RUN/student.json.

    A resumed run and the other workers of a run read the record, since two machines compute scores that differ by
    rounding and could choose differently between nearly equal candidates.

    Attributes:
        layers: With `init: measured`, the candidates for the decoder layers, the lowest divergence first.
        units: By side and for each teacher layer, the indices of the feed-forward units that the student keeps, for
            each side whose units the plan reduces.
    """

    remedy: ClassVar[str | None] = "Delete the folder of the run to start the run again"

    layers: list[MeasuredLayers] = Field(default_factory=list)
    units: dict[str, list[list[int]]] = Field(default_factory=dict)

    def apply(self, student: Student) -> Student:
        """The settings of the student with the chosen layers."""
        if not self.layers:
            return student
        copied = student.copied.model_copy(update={"decoder": self.layers[0].layers})
        return student.model_copy(update={"copied": copied})

    @property
    def kept_units(self) -> KeptUnits:
        """The units as tensors."""
        return {side: [torch.tensor(layer) for layer in layers] for side, layers in self.units.items()}


def load_or_make_choice(
    run: Run, teacher: Teacher, folder: Path, worker: Worker, label_folders: Mapping[str, Path]
) -> StudentChoice:
    """The recorded choice of a run; the main process makes and records the choice if there is none.

    Args:
        run: The run's config.
        teacher: The run's teacher.
        folder: The run's folder.
        worker: This worker.
        label_folders: Folders of the label sets by source; the choice reads rows that the run trains on.
    """
    plan = plan_student(teacher.model.config, run.student)
    if plan.kept_ffn is None and not run.student.measures_layers:
        return StudentChoice()
    path = folder / CHOICE_FILE
    if worker.is_main_process and not path.is_file():
        make_choice(run, teacher, label_folders, worker.device).write(path)
    worker.share_folder()
    return StudentChoice.read(path)


def make_choice(run: Run, teacher: Teacher, label_folders: Mapping[str, Path], device: str = "cpu") -> StudentChoice:
    """Choose layers and units on rows of the training set of a run; `device` runs the teacher."""
    plan = plan_student(teacher.model.config, run.student)
    layers: list[MeasuredLayers] = []
    if run.student.measures_layers and plan.size[1] < families.num_layers(teacher.model.config)[1]:
        calibration = _calibration(run, teacher, label_folders)
        with _on_device(teacher.model, device):
            divergences = measure_layers(teacher.model, plan.size[1], calibration)
        layers = [MeasuredLayers(layers=list(chosen), divergence=value) for chosen, value in divergences.items()]
    units: KeptUnits = {}
    if plan.kept_ffn is not None and run.student.ffn_choice == "random":
        units = random_units(teacher.model.config, plan, run.training.seed)
    elif plan.kept_ffn is not None:
        units = _rank_units(run, teacher, plan, _calibration(run, teacher, label_folders), device)
    return StudentChoice(layers=layers, units={side: [unit.tolist() for unit in kept] for side, kept in units.items()})


def _rank_units(run: Run, teacher: Teacher, plan: LayerPlan, calibration: Calibration, device: str) -> KeptUnits:
    if run.student.copy_from is None:
        with _on_device(teacher.model, device):
            return best_units(teacher.model, plan, calibration)
    decoder_from = load_model(locate_checkpoint(run.student.copy_from, run.dataset.name))
    with _on_device(teacher.model, device), _on_device(decoder_from, device):
        return best_units(teacher.model, plan, calibration, decoder_from)


def _calibration(run: Run, teacher: Teacher, label_folders: Mapping[str, Path]) -> Calibration:
    data = load_tokenized_data(run, teacher.preset, teacher.tokenizer, teacher.model.config)
    return Calibration.of(make_examples(run, data, teacher.tokenizer, label_folders))


@contextmanager
def _on_device(model: "PreTrainedModel", device: str) -> Iterator[None]:
    """Move a model to a device for the block, and then back to the CPU, on which students are made."""
    torch.nn.Module.to(model, device)
    try:
        yield
    finally:
        torch.nn.Module.to(model, "cpu")

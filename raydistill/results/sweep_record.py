"""The record of a sweep, SWEEP/sweep.json: what tables, selection and MLflow need in addition to the trials."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from raydistill.config.run import NAME_PATTERN
from raydistill.config.shapes import Shape
from raydistill.config.space import DecodingSearch, check_bounds
from raydistill.core.errors import UserError
from raydistill.core.records import Record
from raydistill.results.pareto import fits_any_budget, resolve_budgets
from raydistill.training.teacher_record import TeacherScores

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class StopReason:
    """Why a search proposes no more trials; the message is empty while the search continues.

    `exhausted`: whether the search would end for the same reason if the command were run again.
    """

    message: str = ""
    exhausted: bool = False


class TeacherPasses(BaseModel):
    """Device-hours of the teacher's passes over the training data. Another sweep may use the same results.

    Attributes:
        labels: By label key, the hours of each label set.
        stores: Hours of each array of the teacher cache, such as "encoder-KEY/states".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: dict[str, dict[str, float]] = Field(default_factory=dict)
    stores: dict[str, float] = Field(default_factory=dict)

    @property
    def hours_by_artifact(self) -> dict[str, float]:
        """Hours by label set and array. A label set that several label keys share is listed once."""
        label_sets = {name: hours for sets in self.labels.values() for name, hours in sets.items()}
        return {**label_sets, **self.stores}

    @property
    def total_hours(self) -> float:
        """Hours of all passes, each counted once."""
        return float(sum(self.hours_by_artifact.values()))


class LabelSetScores(BaseModel):
    """The teacher and the rows of a label set, and the scores of its labels against the original targets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str | None
    rows: int
    quality: dict[str, float] | None


class SweepTeacher(TeacherScores):
    """The teacher of a sweep: scores, costs, and what its passes over the training data produced.

    Attributes:
        costs: Costs by name, measured like those of the shapes.
        passes: Device-hours of the passes.
        label_sets: The label sets that trials are trained on, by name.
    """

    costs: dict[str, float]
    passes: TeacherPasses
    label_sets: dict[str, LabelSetScores]


class ShapeTable(BaseModel):
    """Costs of the shapes of a sweep, measured on untrained students.

    Attributes:
        teacher_size: Size of the teacher.
        costs: By name of the shape, the costs with the teacher's number of beams, and "speedup".
        costs_fewest_beams: By name of the shape, the costs with the fewest beams that a student may be served with.
        engines: By name of the shape, engine and precision of the timings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher_size: str
    costs: dict[str, dict[str, float]]
    costs_fewest_beams: dict[str, dict[str, float]]
    engines: dict[str, str]

    @model_validator(mode="after")
    def _check_teacher_size(self) -> "ShapeTable":
        if self.teacher_size not in self.costs:
            raise ValueError(f"there are no costs of {self.teacher_size}")
        return self

    @property
    def teacher_costs(self) -> dict[str, float]:
        """Costs of the teacher."""
        return {name: value for name, value in self.costs[self.teacher_size].items() if name != "speedup"}

    def is_infeasible(self, shape: str, budgets: dict[str, dict[str, Any]]) -> bool:
        """Whether no budget admits a student of the shape of this name, even with the fewest beams."""
        name = Shape.parse(shape).with_full_size(self.teacher_size).name
        costs = self.costs_fewest_beams.get(name, {})
        return not fits_any_budget(costs, resolve_budgets(budgets, self.teacher_costs))


class SweepRecord(Record):
    """The content of sweep.json.

    Attributes:
        name: Name of the sweep, of its experiment and of its registered model.
        status: Whether the last command has finished.
        stop: Why the search ended.
        teacher: The teacher.
        shapes: Costs of the shapes.
        budgets: Bounds by budget, as in the space.
        tolerance: Points of the metric that a cheaper student may be worse and still be chosen.
        decoding: The decodings that finalists are served with.
        tracking_uri: MLflow's store.
        versions: Versions of the libraries.
    """

    name: str = Field(pattern=NAME_PATTERN)
    status: Literal["running", "finished"]
    stop: StopReason
    teacher: SweepTeacher
    shapes: ShapeTable
    budgets: dict[str, dict[str, float | str]]
    tolerance: float = Field(ge=0)
    decoding: DecodingSearch
    tracking_uri: str
    versions: dict[str, str]

    @field_validator("budgets")
    @classmethod
    def _check_budgets(cls, budgets: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, bounds in budgets.items():
            check_bounds(name, bounds)
        return budgets

    @property
    def metric(self) -> str:
        """The main metric."""
        return self.teacher.metric


def read_sweep(sweep: Path) -> SweepRecord:
    """The record of a sweep.

    Raises:
        UserError: There is no record, the record is damaged, or another version of raydistill wrote it.
    """
    path = sweep / SWEEP_FILE
    if not path.exists():
        raise UserError(
            f"{sweep}: no sweep.json; the sweep was not started, or was stopped before its first trial: "
            f"run `raydistill sweep` again"
        )
    return SweepRecord.read(path)

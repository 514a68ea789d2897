"""The record of a sweep, SWEEP/sweep.json: what tables, selection and MLflow need in addition to the trials."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from raydistill.config.run import NAME_PATTERN
from raydistill.config.serving import Serving, ServingConfig
from raydistill.config.shapes import Shape
from raydistill.config.space import SearchCost, check_bounds
from raydistill.core.errors import UserError
from raydistill.core.records import Record
from raydistill.evaluation.paired_latency import EXCLUSION_MARGIN, PairedTiming, may_exclude
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
    def hours_by_label_set(self) -> dict[str, float]:
        """Hours by label set. Label keys may use different shares of a set; the largest share counts."""
        return dict(sorted((item for sets in self.labels.values() for item in sets.items()), key=lambda item: item[1]))

    @property
    def hours_by_artifact(self) -> dict[str, float]:
        """Hours by label set and array. A label set that several label keys share is listed once."""
        return {**self.hours_by_label_set, **self.stores}

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


class ExtraSourcesRecord(BaseModel):
    """The extra sources of a sweep (data/extra.py): texts without targets that the teacher labelled.

    Attributes:
        folder: The artifact, below RAYDISTILL_HOME/extra.
        name: The file or data set.
        rows: Rows that remain, as many as any trial reads.
        dropped: Rows that were left out, by the split that they repeat.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    name: str
    rows: int
    dropped: dict[str, int]


class ShortlistCoverage(BaseModel):
    """A shortlist of a sweep, and what it excludes on the rows that students are chosen on.

    Attributes:
        folder: The artifact with the vocabulary map, below RAYDISTILL_HOME/shortlists.
        allowed_tokens: Mean number of tokens that the decoder may write for one text.
        allowed_tokens_batch: Mean number of tokens that the decoder may write for a batch of 32 texts.
        share_of_tokens_outside: Share of the tokens of the reference texts that the list excludes.
        share_of_rows_outside: Share of the reference texts with such a token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    allowed_tokens: float
    allowed_tokens_batch: float
    share_of_tokens_outside: float
    share_of_rows_outside: float


class SweepTeacher(TeacherScores):
    """The teacher of a sweep: scores, costs, and what its passes over the training data produced.

    Attributes:
        costs: Costs by name, measured like the costs of the shapes.
        passes: Device-hours of the passes.
        label_sets: The label sets that trials are trained on, by name.
        extra: The extra sources that trials are trained on; None for none.
    """

    costs: dict[str, float]
    passes: TeacherPasses
    label_sets: dict[str, LabelSetScores]
    extra: ExtraSourcesRecord | None = None


class PredictedRatio(BaseModel):
    """A latency as a share of the teacher's that was predicted from timed shapes, with a margin to both sides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float
    low: float
    high: float


class CheapestServing(BaseModel):
    """The cheapest serving of a size, by which alone the size may be excluded before training.

    Attributes:
        config: The fewest beams, and the fastest precision and shortlist.
        engine: Engine and precision of the timings.
        timings: By latency that a budget bounds, the pairs with the teacher; empty for a predicted shape.
        costs: Parameters, memory of the weights in the smallest precision, and peak memory.
        predicted: By latency that a budget bounds, the prediction; empty for a timed shape.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: ServingConfig
    engine: str
    timings: dict[str, PairedTiming]
    costs: dict[str, float]
    predicted: dict[str, PredictedRatio] = Field(default_factory=dict)

    @property
    def ratios(self) -> dict[str, float]:
        """By latency that a budget bounds, the share of the teacher's."""
        timed = {cost: timing.best_ratio for cost, timing in self.timings.items()}
        return {**{cost: prediction.ratio for cost, prediction in self.predicted.items()}, **timed}

    def exceeds(self, cost: str, bound: float) -> bool:
        """Whether a latency is certainly above a share of the teacher's, by `EXCLUSION_MARGIN`."""
        if cost in self.timings:
            return may_exclude(self.timings[cost], bound)
        return cost in self.predicted and self.predicted[cost].low > EXCLUSION_MARGIN * bound


class ShapeTable(BaseModel):
    """Costs of the shapes of a sweep, measured on untrained students.

    Attributes:
        teacher_size: Size of the teacher.
        costs: By name of the shape, the costs with the teacher's own decoding in full precision, and "speedup".
        cheapest: By name of the shape of a student, its cheapest serving.
        engines: By name of the shape, engine and precision of the costs.
        used_tokens: How many tokens the shapes of "used" tokens were timed with; None if there are none.
        predicted: Names of the shapes whose latencies are predicted from the others.
        prediction_error: Root mean square of the relative errors with which the timed shapes predict the latency of
            each other, for a batch of 32; None if every shape was timed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher_size: str
    costs: dict[str, dict[str, float]]
    cheapest: dict[str, CheapestServing]
    engines: dict[str, str]
    used_tokens: int | None = None
    predicted: tuple[str, ...] = ()
    prediction_error: float | None = None

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
        """Whether no budget admits a student of the shape of this name, even with its cheapest serving.

        A latency excludes a shape only if the whole interval of its ratio, timed or predicted, is above the bound by
        `EXCLUSION_MARGIN`, and peak memory only if it exceeds the bound by this margin.
        """
        resolved = resolve_budgets(budgets, self.teacher_costs)
        return bool(resolved) and all(self._exceeds(shape, bounds) for bounds in resolved)

    def cheapest_costs(self, shape: str) -> dict[str, float]:
        """Costs of a shape with its cheapest serving; the latencies that a budget bounds, in milliseconds."""
        teacher, name = self.teacher_costs, self._full_name(shape)
        serving = self.cheapest.get(name)
        if serving is None:
            return {cost: value for cost, value in self.costs.get(name, {}).items() if cost == "params_m"}
        return {
            **serving.costs,
            **{cost: ratio * teacher[cost] for cost, ratio in serving.ratios.items()},
        }

    def with_shapes_of(self, other: "ShapeTable") -> "ShapeTable":
        """The table with the shapes of a table that was measured at another time.

        Only ratios to the teacher are comparable, so the latencies of the other table are multiplied by the ratio of
        this teacher's latencies to the other teacher's.
        """
        teacher, own = other.teacher_costs, self.teacher_costs
        scale = {name: own[name] / teacher[name] for name in teacher if name.startswith("latency_ms")}
        costs = {
            shape: {name: value * scale.get(name, 1.0) for name, value in measured.items()}
            for shape, measured in other.costs.items()
        }
        kept = [name for name in self.predicted if name not in other.costs]
        update = {
            "costs": {**self.costs, **costs, self.teacher_size: self.costs[self.teacher_size]},
            "cheapest": {**self.cheapest, **other.cheapest},
            "engines": {**self.engines, **other.engines},
            "used_tokens": other.used_tokens,
            "predicted": (*kept, *other.predicted),
            "prediction_error": (self.prediction_error if kept else None) or other.prediction_error,
        }
        return self.model_copy(update=update)

    def _full_name(self, shape: str) -> str:
        """The name of a shape with the teacher's size in place of "full"."""
        return Shape.parse(shape).with_full_size(self.teacher_size).name

    def _exceeds(self, shape: str, bounds: dict[str, float]) -> bool:
        """Whether a shape certainly exceeds one of the bounds; costs that are not known do not."""
        costs, serving = self.cheapest_costs(shape), self.cheapest.get(self._full_name(shape))
        exact = {name: bound for name, bound in bounds.items() if name in ("params_m", "memory_mb")}
        rough = {"peak_mb": EXCLUSION_MARGIN * bounds["peak_mb"]} if "peak_mb" in bounds else {}
        if not fits_any_budget(costs, [{**exact, **rough}]):
            return True
        if serving is None:
            return False
        latencies = [cost for cost in serving.ratios if cost in bounds]
        return any(serving.exceeds(cost, bounds[cost] / self.teacher_costs[cost]) for cost in latencies)


class SweepRecord(Record):
    """The content of sweep.json.

    Attributes:
        name: Name of the sweep, of its experiment and of its registered model.
        status: Whether the last command has finished.
        stop: Why the search ended.
        teacher: The teacher.
        shapes: Costs of the shapes.
        cost: The cost that the search minimises.
        budgets: Bounds by budget, as in the space.
        tolerance: Points of the metric that a cheaper student may be worse and still be chosen.
        serving: The configurations that finalists are served with.
        shortlists: What each shortlist excludes, by its name in the space.
        tracking_uri: MLflow's store.
        versions: Versions of the libraries.
    """

    name: str = Field(pattern=NAME_PATTERN)
    status: Literal["running", "finished"]
    stop: StopReason
    teacher: SweepTeacher
    shapes: ShapeTable
    cost: SearchCost
    budgets: dict[str, dict[str, float | str]]
    tolerance: float = Field(ge=0)
    serving: Serving
    shortlists: dict[str, ShortlistCoverage]
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

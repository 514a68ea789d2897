"""A space: a run in which some values are distributions, with the search, the points and the budgets."""

import itertools
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from raydistill.config.corners import iter_corners, resolve_point
from raydistill.config.distributions import encode_choice, fill_run, split_parameters
from raydistill.config.loader import apply_overrides, read_yaml
from raydistill.config.run import NAME_PATTERN, RUNTIME_ONLY_FIELDS, Run, StrictModel
from raydistill.config.run_paths import make_paths_absolute
from raydistill.config.validation import KeyPath, format_validation_error, validate
from raydistill.core.errors import UserError

COST_METRICS = ("latency_ms", "latency_ms_b1", "params_m", "memory_mb", "peak_mb", "gpu_hours")


class DecodingSearch(StrictModel):
    """Ways of decoding that finalists are served with after the search, beside their own."""

    beams: list[Annotated[int, Field(ge=1)]] = Field([1, 2, 4])
    length_penalty: list[float] = Field([0.6, 1.0], description="for two beams and more")


class Search(StrictModel):
    """How trials are proposed and how many run at a time."""

    trials: int = Field(16, ge=1)
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="grid: every combination once, for spaces made of choices"
    )
    seed: int = 0
    concurrent: int | None = Field(None, ge=1, description="default: as many as the cluster has room for")
    cost: Literal["latency_ms", "latency_ms_b1", "params_m", "gpu_hours"] = Field(
        "latency_ms", description="what is minimised while the score is maximised"
    )
    retries: int = Field(2, ge=0, description="how often a trial that dies is taken up again")
    stopping: Literal["auto", "per_shape", "off"] = Field(
        "auto",
        description="per_shape: a trial that falls behind others of its own shape stops early; auto: unless sampler is "
        "grid, whose table is to be whole",
    )
    grace: float = Field(
        0.125, gt=0, lt=1, description="share of a run's steps before which no trial is stopped; at least its warm-up"
    )
    reduction: int = Field(3, ge=2, description="the better 1/reduction of a shape's trials go on at each comparison")
    max_device_hours: float | None = Field(
        None, gt=0, description="no trial starts once trials and teacher passes have taken so much"
    )
    max_hours: float | None = Field(None, gt=0, description="no trial starts later than this in one run of the command")

    decoding: DecodingSearch = DecodingSearch()

    @property
    def stops_early(self) -> bool:
        """`stopping` with `auto` resolved."""
        return self.stopping == "per_shape" or (self.stopping == "auto" and self.sampler != "grid")


class Space(StrictModel):
    """A sweep: the run with distributions, how to search it, and the budgets to choose for."""

    name: str = Field(pattern=NAME_PATTERN, max_length=100)
    description: str = ""
    run: dict[str, Any]
    search: Search = Search()
    points: list[dict[str, Any]] = Field([], description="settings to try first, such as a paper's best")
    budgets: dict[str, dict[str, float | str]] = Field(
        {}, description='upper bounds by name: {fast: {latency_ms: 900}}; "50%" is of the teacher'
    )
    tracking_uri: str | None = Field(None, description="MLflow; default: SQLite beside the sweep")

    @model_validator(mode="after")
    def _check_budgets(self) -> "Space":
        aliases: dict[str, str] = {}
        for name, bounds in self.budgets.items():
            check_bounds(name, bounds)
            if (other := aliases.setdefault(mlflow_alias(name), name)) != name:
                raise ValueError(
                    f"budgets {other} and {name} are one alias in MLflow, {mlflow_alias(name)}; rename one"
                )
        return self


def mlflow_alias(budget_name: str) -> str:
    """A budget's name as an alias: letters, digits, - and _; "v3" and "latest" are MLflow's own."""
    alias = re.sub(r"[^A-Za-z0-9_-]+", "-", budget_name).strip("-") or "chosen"
    return f"budget-{alias}" if re.fullmatch(r"[vV]\d+|latest|\d+", alias) else alias


def check_bounds(name: str, bounds: dict[str, float | str]) -> None:
    """ValueError where a budget bounds something unknown or by something that is no finite positive number."""
    for key, bound in bounds.items():
        if key not in COST_METRICS:
            raise ValueError(f"budget {name}: cannot bound {key!r}; known: {', '.join(COST_METRICS)}")
        number = bound.removesuffix("%") if isinstance(bound, str) else bound
        try:
            value = math.nan if isinstance(number, bool) else float(number)
        except ValueError:
            value = math.nan
        if value == math.inf:
            raise ValueError(f"budget {name}: {key} is {bound!r}, which bounds nothing; leave {key} out instead")
        if not value > 0:  # also for NaN
            raise ValueError(f"budget {name}: {key} is {bound!r}; expected a number above 0 or a share such as 50%")


def read_space(path: Path, overrides: list[str] | None = None) -> Space:
    """Read and check a space and every corner of it; a UserError names file, line and key."""
    data, lines = read_yaml(path)
    if "dataset" in data and "run" not in data:
        raise UserError(
            f"{path}: this is a run, not a space (there is no `run`); train it with `raydistill train {path}`"
        )
    data = apply_overrides(data, overrides or [])
    if isinstance(data.get("run"), dict):
        data["run"] = make_paths_absolute(data["run"])
    space = validate(Space, data, path, lines)
    check_run_space(space, path, lines)
    return space


def check_run_space(space: Space, path: Path | str, lines: dict[KeyPath, int]) -> None:
    """Check every corner of the run, every first point, and that a grid is made of choices."""
    try:
        _, cases = split_parameters(space.run)
        _check_shared_fields(space.run, [case.key for case in cases])
        if space.search.sampler == "grid" and any(c.distribution.choice is None for c in cases):
            raise ValueError("search.sampler: grid needs choices only; a range has no end of values")
        candidates = list(itertools.chain(iter_corners(space.run), (resolve_point(space.run, p) for p in space.points)))
    except ValueError as error:
        key = tuple(str(error).partition(":")[0].split("."))
        line = lines.get(("run", *key)) or lines.get(key) or lines.get(key[:1])
        raise UserError(f"{path}{f':{line}' if line else ''}: {error}") from None
    in_run = {at[1:]: line for at, line in lines.items() if at[:1] == ("run",)}
    for chosen in candidates:
        try:
            Run.model_validate(fill_run(space.run, chosen, space.name))
        except ValidationError as error:
            at = f" (for {', '.join(f'{k}={v}' for k, v in chosen.items())})" if chosen else ""
            raise UserError(format_validation_error(error, Run, path, in_run) + at) from None


# One teacher is scored and timed for all trials of a sweep, and they are compared on the same rows by the same measure.
SHARED_FIELDS = ("teacher", "dataset", "evaluation", "decoding")


def _check_shared_fields(run: dict[str, Any], varied_keys: list[str]) -> None:
    """ValueError where trials would differ in what a sweep has once, or have no teacher to be students of."""
    if run.get("start") is not None or any(key.split(".")[0] == "start" for key in varied_keys):
        raise ValueError("start: a sweep is of a teacher's students; make a teacher first, with `raydistill train`")
    for key in varied_keys:
        group, _, name = key.partition(".")
        if name in RUNTIME_ONLY_FIELDS.get(group, ()):
            raise ValueError(f"{key}: changes how a trial is carried out and not what comes of it; give it one value")
        if group in SHARED_FIELDS:
            raise ValueError(
                f"{key}: is one for all trials of a sweep, which are compared by the same teacher, rows and decoding; "
                f"make a space for each value (search.decoding tries beams and length penalties on finished students)"
            )


def sampler_params(run: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """Chosen values under the sampler's own names, as `study.enqueue_trial` wants them."""
    fixed, cases = split_parameters(run)
    values = {**fixed, **params}
    return {c.name: encode_choice(params[c.key]) for c in cases if c.key in params and c.is_active(values)}


def make_run(space: Space, params: dict[str, Any], name: str) -> Run:
    """The run of one trial."""
    return Run.model_validate(fill_run(space.run, params, name))

"""The configuration of a sweep: a run in which values may be distributions, the search, and the budgets."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from raydistill.config.corners import iter_corners, resolve_point
from raydistill.config.distributions import SpaceError, encode_choice, fill_run, split_parameters
from raydistill.config.examples import locate_space
from raydistill.config.loader import apply_overrides, read_yaml
from raydistill.config.run import NAME_PATTERN, RUNTIME_ONLY_FIELDS, Run, StrictModel
from raydistill.config.run_paths import make_paths_absolute
from raydistill.config.serving import Serving
from raydistill.config.setting_keys import KeyTree, complete_overrides, key_tree
from raydistill.config.validation import KeyPath, format_validation_error, validate
from raydistill.core.errors import UserError

# Measurements that budgets can bound, with their meanings.
COST_METRICS = {
    "latency_ms": "milliseconds for a batch of 32 rows",
    "latency_ms_b1": "milliseconds for one row",
    "params_m": "parameters, in millions",
    "memory_mb": "memory of the weights, in MB",
    "peak_mb": "peak memory while a batch of 32 rows is decoded, in MB",
    "device_hours": "device-hours of the trial",
    "rows_per_s": "rows per second of many rows at once, with the best setting of threads and batches (a lower bound)",
}
# Measurements of which more is better: a budget bounds them from below.
LOWER_BOUNDED = frozenset({"rows_per_s"})
# Top-level keys of a run that are equal for all trials of a sweep: the teacher is scored and timed once, and trials
# are compared by the same metric on the same rows.
SHARED_FIELDS = ("teacher", "dataset", "evaluation", "decoding")
# Keys that are equal for all trials too: the texts are checked and labelled once, and each trial reads the first rows.
SHARED_KEYS = ("pseudo.extra", "pseudo.extra_overlap")

DEFAULT_SELECTION_SHARE = 0.5

SHAPE_KEYS = ("student.size", "student.encoder_ffn", "student.decoder_ffn", "student.vocabulary")
RESOURCE_KEYS = ("training.workers", "training.threads", "training.gpus", "training.launcher")


SearchCost = Literal["latency_ms", "latency_ms_b1", "params_m", "device_hours"]


class Search(StrictModel):
    """How trials are proposed, scheduled and stopped."""

    trials: int = Field(16, ge=1, description="number of trials in total")
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="grid: every combination once, for spaces with choices only"
    )
    seed: int = Field(0, description="seed of the sampler")
    concurrent: int | None = Field(
        None, ge=1, description="maximum number of concurrent trials; default: as many as fit on the cluster"
    )
    cost: SearchCost = Field("latency_ms", description="cost to minimise while the score is maximised")
    retries: int = Field(2, ge=0, description="retries per failed trial")
    stopping: Literal["auto", "per_shape", "off"] = Field(
        "auto",
        description="per_shape: stop a trial early if it is worse than trials of the same architecture; auto: "
        "per_shape, but off for the grid sampler, whose table is to be complete",
    )
    grace: float = Field(
        0.125,
        gt=0,
        lt=1,
        description="share of the steps of a run before which no trial is stopped; at least its warm-up",
    )
    reduction: int = Field(
        3, ge=2, description="at each comparison, the best 1/reduction of the trials of an architecture continue"
    )
    seeds: int = Field(
        1,
        ge=1,
        le=100,
        description="number of seeds, the search's own included, that the chosen student of each budget and its "
        "nearest rival are trained with after the search; their scores are then means over the seeds",
    )
    max_device_hours: float | None = Field(
        None, gt=0, description="no trial starts after trials and teacher passes have used this many device-hours"
    )
    max_hours: float | None = Field(
        None, gt=0, description="no trial starts after the command has run for this many hours"
    )

    @property
    def stops_early(self) -> bool:
        """`stopping` with `auto` resolved."""
        return self.stopping == "per_shape" or (self.stopping == "auto" and self.sampler != "grid")


class Space(StrictModel):
    """The configuration of a sweep."""

    name: str = Field(
        pattern=NAME_PATTERN,
        max_length=100,
        description="name of the sweep, and of its folder `outputs/sweeps/NAME`; the same name resumes the sweep",
    )
    description: str = Field("", description="free text for readers of the file")
    run: dict[str, Any] = Field(
        description="every key of a run file except `name` and `start`; values may be distributions"
    )
    search: Search = Search()
    serving: Serving = Serving()
    points: list[dict[str, Any]] = Field(
        [], description="points of the space to try first, such as the best ones of a paper"
    )
    budgets: dict[str, dict[str, float | str]] = Field(
        {},
        description='bounds by name: {fast: {latency_ms: 900}}; "50%" is relative to the teacher; lower bounds for '
        "`rows_per_s`, upper bounds for all others",
    )
    tolerance: float = Field(
        0.5,
        ge=0,
        description="points of the metric that a cheaper student may be worse than the best within a budget and still "
        "be chosen; 0: always the highest score",
    )
    tracking_uri: str | None = Field(None, description="MLflow tracking URI; default: SQLite in the output folder")

    @model_validator(mode="after")
    def _check_budgets(self) -> "Space":
        budget_by_alias: dict[str, str] = {}
        for name, bounds in self.budgets.items():
            check_bounds(name, bounds)
            if (other := budget_by_alias.setdefault(mlflow_alias(name), name)) != name:
                raise ValueError(
                    f"budgets {other} and {name} have the same alias in MLflow, {mlflow_alias(name)}; rename one"
                )
        return self


def mlflow_alias(budget_name: str) -> str:
    """The MLflow alias of a budget: letters, digits, - and _. MLflow reserves "latest" and version names like "v3"."""
    alias = re.sub(r"[^A-Za-z0-9_-]+", "-", budget_name).strip("-") or "chosen"
    return f"budget-{alias}" if re.fullmatch(r"[vV]\d+|latest|\d+", alias) else alias


def check_bounds(name: str, bounds: dict[str, float | str]) -> None:
    """ValueError if a bound of a budget has an unknown metric, or is not a finite positive number or percentage."""
    for key, bound in bounds.items():
        if key not in COST_METRICS:
            raise ValueError(f"budget {name}: cannot bound {key!r}; known: {', '.join(COST_METRICS)}")
        number = bound.removesuffix("%") if isinstance(bound, str) else bound
        try:
            value = math.nan if isinstance(number, bool) else float(number)
        except ValueError:
            value = math.nan
        if value == math.inf:
            raise ValueError(f"budget {name}: {key} is {bound!r}, which bounds nothing; remove {key} instead")
        if not value > 0:  # also true for NaN
            raise ValueError(f"budget {name}: {key} is {bound!r}; expected a number above 0 or a share such as 50%")


def read_space(path: Path, overrides: list[str] | None = None) -> Space:
    """Read and validate a space file.

    Args:
        path: The YAML file, or `example:NAME`.
        overrides: `KEY=VALUE` strings, see `complete_overrides` and `apply_overrides`.

    Raises:
        UserError: The file, a corner of the space, or a point is invalid; names file, line and key.
    """
    path = locate_space(path)
    data, lines = read_yaml(path)
    return parse_space(data, path, lines, overrides)


def parse_space(
    data: dict[str, Any], path: Path | str, lines: dict[KeyPath, int], overrides: list[str] | None = None
) -> Space:
    """Validate the content of a space file.

    Args:
        data: The content.
        path: The file, or another name of the content, for messages.
        lines: The line of each key, for messages.
        overrides: `KEY=VALUE` strings, see `apply_overrides`.

    Raises:
        UserError: As of `read_space`.
    """
    if "dataset" in data and "run" not in data:
        raise UserError(
            f"{path}: this is a run, not a space (there is no `run` section); train it with `raydistill train {path}`"
        )
    data = apply_overrides(data, complete_overrides(overrides or [], space_keys(), path))
    if isinstance(data.get("run"), dict):
        data["run"] = make_paths_absolute(data["run"])
    space = validate(Space, data, path, lines)
    check_run_space(space, path, lines)
    return space


def space_keys() -> KeyTree:
    """The keys of a space file, with the keys of its run."""
    return {**key_tree(Space), "run": {name: keys for name, keys in key_tree(Run).items() if name != "name"}}


def check_run_space(space: Space, path: Path | str, lines: dict[KeyPath, int]) -> None:
    """Validate every corner of the run section, every point, and that a grid has choices only.

    Raises:
        UserError: The space is invalid; the message names `path`, and the line from `lines` where possible.
    """
    try:
        _, parameters = split_parameters(space.run)
        keys = [parameter.key for parameter in parameters]
        _check_shared_fields(space.run, keys)
        if space.search.seeds > 1 and "training.seed" in keys:
            raise SpaceError("search.seeds", "trains with further seeds; do not search run.training.seed as well")
        if space.search.seeds > 1 and not space.budgets:
            raise SpaceError("search.seeds", "trains the students that budgets choose; name a budget in `budgets`")
        if any(p.key == "pseudo.extra_rows" and p.distribution.choice is None for p in parameters):
            raise SpaceError("pseudo.extra_rows", "needs a `choice` of numbers, which are labelled before the trials")
        if space.search.sampler == "grid" and any(p.distribution.choice is None for p in parameters):
            raise SpaceError("search.sampler", "grid needs choices only; a range has infinitely many values")
        points = (resolve_point(space.run, point) for point in space.points)
        candidates = list(itertools.chain(iter_corners(space.run), points))
    except SpaceError as error:
        key = tuple(error.key.split("."))
        line = lines.get(("run", *key)) or lines.get(key) or lines.get(key[:1])
        raise UserError(f"{path}{f':{line}' if line else ''}: {error}") from None
    run_lines = {key_path[1:]: line for key_path, line in lines.items() if key_path[:1] == ("run",)}
    for params in candidates:
        try:
            Run.model_validate(fill_run(space.run, params, space.name))
        except ValidationError as error:
            corner = f" (for {', '.join(f'{k}={v}' for k, v in params.items())})" if params else ""
            raise UserError(format_validation_error(error, Run, path, run_lines) + corner) from None


def _check_shared_fields(run: dict[str, Any], varied_keys: list[str]) -> None:
    """SpaceError if trials differ in a shared or a runtime-only field, or train a new model instead of a student."""
    if run.get("start") is not None or any(key.split(".")[0] == "start" for key in varied_keys):
        raise SpaceError("start", "a sweep trains students of a teacher; train a teacher first with `raydistill train`")
    for key in varied_keys:
        group, _, name = key.partition(".")
        if name in RUNTIME_ONLY_FIELDS.get(group, ()):
            raise SpaceError(key, "affects execution only and cannot be searched; set a single value")
        if any(key == shared or key.startswith(f"{shared}.") for shared in SHARED_KEYS):
            raise SpaceError(
                key, "must be the same for all trials of a sweep; vary pseudo.extra_rows (0: no extra row)"
            )
        if group in SHARED_FIELDS:
            raise SpaceError(
                key,
                "must be the same for all trials of a sweep, which are compared on the same rows; "
                "write a space file per value (`serving` varies how finished students are served)",
            )


def sampler_params(run: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """Convert values by dotted key to values by sampler name, as `optuna.Study.enqueue_trial` needs them."""
    fixed, parameters = split_parameters(run)
    values = {**fixed, **params}
    return {p.sampler_name: encode_choice(params[p.key]) for p in parameters if p.key in params and p.is_active(values)}


def make_run(space: Space, params: dict[str, Any], name: str) -> Run:
    """The run of one trial, from its values by dotted key.

    Half of the validation rows are kept for the choice, unless the space says otherwise.
    """
    run = Run.model_validate(fill_run(space.run, params, name))
    if run.dataset.selection_share is not None or run.dataset.selection_split:
        return run
    dataset = run.dataset.model_copy(update={"selection_share": DEFAULT_SELECTION_SHARE})
    return run.model_copy(update={"dataset": dataset})


def corner_runs(space: Space) -> list[Run]:
    """The runs at the corners of the space, without duplicates: every choice and both ends of every range occur."""
    runs = [make_run(space, params, space.name) for params in iter_corners(space.run)]
    return list({json.dumps(run.model_dump(mode="json")): run for run in runs}.values())


def shape_runs(space: Space) -> list[Run]:
    """Runs of every shape of the space, without duplicates; of a range of units or tokens, both ends occur."""
    runs = [make_run(space, params, space.name) for params in iter_corners(space.run, keys=SHAPE_KEYS)]
    return list({run.student.shape: run for run in runs}.values())


def resource_runs(space: Space) -> list[Run]:
    """Runs with every combination of the settings that determine workers, their resources and their launcher."""
    return [make_run(space, params, space.name) for params in iter_corners(space.run, keys=RESOURCE_KEYS)]

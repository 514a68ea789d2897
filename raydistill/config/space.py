"""A space: a run in which some values are distributions, with the search, the points and the budgets."""

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raydistill.config.errors import UserError
from raydistill.config.load import Path_, absolute_paths, apply_settings, check, explain, read_yaml, reason_of
from raydistill.config.run import Model, Run

KINDS = ("choice", "uniform", "log_uniform", "int")
MAX_CORNERS = 20_000
JSON_SIGNS = ("[", "{", '"')
Scalar = str | int | float | bool | None
Whole = int  # by another name, since a distribution has a field `int`


class Distribution(BaseModel):
    """One of `choice`, `uniform`, `log_uniform`, `int`; `when` says for which other values it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    choice: list[Any] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    int: tuple[Whole, Whole] | None = None
    when: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Distribution":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(KINDS)} is needed, found {given or 'none'}")
        for value in self.choice or []:
            if not _is_plain(value):
                raise ValueError(f"choice {value!r}: expected text, numbers, lists, or mappings with text keys")
        ends = self.uniform or self.log_uniform or self.int
        if ends and ends[0] > ends[1]:
            raise ValueError(f"{given[0]} {list(ends)}: the lower end is above the upper")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform {list(self.log_uniform)}: the lower end must be above 0")
        return self

    @property
    def corners(self) -> list[Any]:
        """The values to check before anything starts: all choices, or both ends of a range."""
        if self.choice is not None:
            return list(self.choice)
        ends = self.uniform or self.log_uniform or self.int
        assert ends is not None
        return list(dict.fromkeys(ends))


class Search(Model):
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


class Space(Model):
    """A sweep: the run with distributions, how to search it, and the budgets to choose for."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    description: str = ""
    run: dict[str, Any]
    search: Search = Search()
    points: list[dict[str, Any]] = Field([], description="settings to try first, such as a paper's best")
    budgets: dict[str, dict[str, float | str]] = Field(
        {}, description='upper bounds by name: {fast: {latency_ms: 900}}; "50%" is of the teacher'
    )
    tracking_uri: str | None = Field(None, description="MLflow; default: SQLite beside the sweep")

    @model_validator(mode="after")
    def _budgets_known(self) -> "Space":
        for name, bounds in self.budgets.items():
            check_bounds(name, bounds)
        return self


BOUNDED = ("latency_ms", "latency_ms_b1", "params_m", "memory_mb", "gpu_hours")


def check_bounds(name: str, bounds: dict[str, float | str]) -> None:
    """ValueError where a budget bounds something unknown or by something that is no finite positive number."""
    for key, bound in bounds.items():
        if key not in BOUNDED:
            raise ValueError(f"budget {name}: cannot bound {key!r}; known: {', '.join(BOUNDED)}")
        number = bound.removesuffix("%") if isinstance(bound, str) else bound
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if value == math.inf:
            raise ValueError(f"budget {name}: {key} is {bound!r}, which bounds nothing; leave {key} out instead")
        if not value > 0:  # also for NaN
            raise ValueError(f"budget {name}: {key} is {bound!r}; expected a number above 0 or a share such as 50%")


class Suggest(Protocol):
    """What is needed of an optuna trial (or of a walk over the corners) to fill a space."""

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...


@dataclass(frozen=True)
class Case:
    """A distribution at a place of the run, under the name that the sampler knows it by."""

    key: str
    name: str
    distribution: Distribution

    def applies(self, values: dict[str, Any]) -> bool:
        """Whether `when` holds for the values chosen so far (and the run's fixed ones)."""
        return all(
            values.get(key) in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in (self.distribution.when or {}).items()
        )

    def suggest(self, trial: Suggest) -> Any:
        """Ask for a value. Lists go as JSON text, since samplers know only scalars."""
        d = self.distribution
        if d.choice is not None:
            return decode(trial.suggest_categorical(self.name, [encode(v) for v in d.choice]))
        if d.int is not None:
            return trial.suggest_int(self.name, *d.int)
        low, high = d.uniform or d.log_uniform or (0.0, 0.0)
        return trial.suggest_float(self.name, low, high, log=d.log_uniform is not None)


def _is_plain(value: Any) -> bool:
    """Whether a value is made of what JSON knows, keys of mappings being text."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def encode(value: Any) -> Scalar:
    """A value as a scalar: lists and mappings become JSON text, and so does text that could be taken for such."""
    structured = isinstance(value, list | dict) or (isinstance(value, str) and value.startswith(JSON_SIGNS))
    return json.dumps(value, sort_keys=True) if structured else value


def decode(value: Scalar) -> Any:
    """The inverse of `encode`."""
    return json.loads(value) if isinstance(value, str) and value.startswith(JSON_SIGNS) else value


def split(run: dict[str, Any]) -> tuple[dict[str, Any], list[Case]]:
    """The fixed values of a run by dotted key, and its distributions in an order that `when` allows."""
    fixed: dict[str, Any] = {}
    cases: list[Case] = []
    _collect(run, "", fixed, cases)
    return fixed, _in_order(cases, fixed)


def propose(run: dict[str, Any], trial: Suggest) -> dict[str, Any]:
    """The chosen values by dotted key: asks `trial` for each distribution whose `when` holds."""
    fixed, cases = split(run)
    values = dict(fixed)
    chosen: dict[str, Any] = {}
    for case in cases:
        if case.applies(values):
            if case.key in chosen:
                raise ValueError(f"{case.key}: two cases hold at once for {chosen}")
            values[case.key] = chosen[case.key] = case.suggest(trial)
    return chosen


def fill(run: dict[str, Any], chosen: dict[str, Any], name: str) -> dict[str, Any]:
    """The run's data with the chosen values in place; a distribution that does not apply is left out."""
    data = _without_distributions(run)
    for key, value in chosen.items():
        place = data
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return {**data, "name": name}


def corners(run: dict[str, Any], limit: int = MAX_CORNERS) -> Iterator[dict[str, Any]]:
    """Every combination of choices and range ends, or `limit` drawn at random where there are more."""
    walk = _Walk()
    count = 0
    while count < limit:
        yield propose(run, walk)
        count += 1
        if not walk.advance():
            return
    draw = _RandomWalk(random.Random(0))
    for _ in range(limit):
        yield propose(run, draw)


def read_space(path: Path, settings: list[str] | None = None) -> Space:
    """Read and check a space and every corner of it; a UserError names file, line and key."""
    data, lines = read_yaml(path)
    if "dataset" in data and "run" not in data:
        raise UserError(
            f"{path}: this is a run, not a space (there is no `run`); train it with `raydistill train {path}`"
        )
    data = apply_settings(data, settings or [])
    if isinstance(data.get("run"), dict):
        data["run"] = absolute_paths(data["run"])
    space = check(Space, data, path, lines)
    check_run_space(space, path, lines)
    return space


def check_run_space(space: Space, path: Path | str, lines: dict[Path_, int]) -> None:
    """Check every corner of the run, every first point, and that a grid is made of choices."""
    try:
        _, cases = split(space.run)
        if space.search.sampler == "grid" and any(c.distribution.choice is None for c in cases):
            raise ValueError("search.sampler: grid needs choices only; a range has no end of values")
        candidates = list(itertools.chain(corners(space.run), (point_values(space.run, p) for p in space.points)))
    except ValueError as error:
        key = tuple(str(error).partition(":")[0].split("."))
        line = lines.get(("run", *key)) or lines.get(key) or lines.get(key[:1])
        raise UserError(f"{path}{f':{line}' if line else ''}: {error}") from None
    in_run = {at[1:]: line for at, line in lines.items() if at[:1] == ("run",)}
    for chosen in candidates:
        try:
            Run.model_validate(fill(space.run, chosen, space.name))
        except ValidationError as error:
            at = f" (for {', '.join(f'{k}={v}' for k, v in chosen.items())})" if chosen else ""
            raise UserError(explain(error, Run, path, in_run) + at) from None


def point_values(run: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """A first point's values by dotted key, checked to lie in the space.

    Keys of the point are dotted keys of the run; a value that the point leaves out takes the first choice
    or the lower end.
    """
    walk = _PointWalk(run, point)
    chosen = propose(run, walk)
    unknown = set(point) - set(chosen)
    if unknown:
        raise ValueError(f"points: {', '.join(sorted(unknown))} is no distribution that holds at {chosen}")
    return chosen


def sampler_names(run: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Chosen values under the sampler's own names, as `study.enqueue_trial` wants them."""
    fixed, cases = split(run)
    values = {**fixed, **chosen}
    return {c.name: encode(chosen[c.key]) for c in cases if c.key in chosen and c.applies(values)}


def resolve(space: Space, chosen: dict[str, Any], name: str) -> Run:
    """The run of one trial."""
    return Run.model_validate(fill(space.run, chosen, name))


class _Walk:
    """A depth-first walk over all corners: replays a prefix of positions, and moves on at the end."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.sizes: list[int] = []
        self.at = 0

    def _take(self, values: list[Any]) -> Any:
        if self.at == len(self.positions):
            self.positions.append(0)
            self.sizes.append(len(values))
        self.sizes[self.at] = len(values)
        value = values[self.positions[self.at]]
        self.at += 1
        return value

    def advance(self) -> bool:
        self.positions, self.sizes = self.positions[: self.at], self.sizes[: self.at]
        self.at = 0
        while self.positions:
            self.positions[-1] += 1
            if self.positions[-1] < self.sizes[-1]:
                return True
            self.positions.pop()
            self.sizes.pop()
        return False

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any:
        return self._take(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._take(list(dict.fromkeys((low, high)))))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._take(list(dict.fromkeys((low, high)))))


class _RandomWalk(_Walk):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def _take(self, values: list[Any]) -> Any:
        return self.rng.choice(values)


class _PointWalk(_Walk):
    """Answers with the point's values; refuses a value that the distribution does not hold."""

    def __init__(self, run: dict[str, Any], point: dict[str, Any]) -> None:
        super().__init__()
        self.keys = {case.name: case.key for case in split(run)[1]}
        self.point = point

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any:
        wanted = self.point.get(self.keys[name], decode(choices[0]))
        wanted = encode(wanted) if _is_plain(wanted) else wanted
        if wanted not in choices:
            raise ValueError(f"points: {self.keys[name]} {wanted!r} is none of {choices}")
        return wanted

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._within(name, low, high))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._within(name, low, high))

    def _within(self, name: str, low: float, high: float) -> float:
        wanted = self.point.get(self.keys[name], low)
        if not isinstance(wanted, int | float) or not low <= wanted <= high:
            raise ValueError(f"points: {self.keys[name]} {wanted!r} is not within [{low}, {high}]")
        return wanted


def _is_distribution(value: Any) -> bool:
    return isinstance(value, dict) and ("cases" in value or any(kind in value for kind in KINDS))


def _collect(value: dict[str, Any], at: str, fixed: dict[str, Any], cases: list[Case]) -> None:
    for name, inner in value.items():
        key = f"{at}.{name}" if at else str(name)
        if not _is_distribution(inner):
            if isinstance(inner, dict):
                _collect(inner, key, fixed, cases)
            else:
                fixed[key] = inner
            continue
        listed = inner.get("cases", [inner])
        if not isinstance(listed, list) or ("cases" in inner and len(inner) > 1):
            raise ValueError(f"{key}: cases must be a list of distributions and stand alone")
        for i, one in enumerate(listed):
            try:
                distribution = Distribution.model_validate(one)
            except ValidationError as error:
                wrong = error.errors(include_url=False)
                parts = [
                    (".".join(map(str, e["loc"])), reason_of(dict(e), Distribution, tuple(e["loc"]))) for e in wrong
                ]
                reasons = "; ".join(f"{at}: {reason}" if at else reason for at, reason in parts)
                raise ValueError(f"{key}: {reasons}") from None
            cases.append(Case(key, key if len(listed) == 1 else f"{key}@{i}", distribution))


def _in_order(cases: list[Case], fixed: dict[str, Any]) -> list[Case]:
    """Cases so that what a `when` names comes first; ValueError for an unknown name or a circle."""
    known = {case.key for case in cases}
    for case in cases:
        for key in case.distribution.when or {}:
            if key not in known and key not in fixed:
                raise ValueError(f"{case.key}: when names {key!r}, which the run does not set")
    ordered: list[Case] = []
    waiting = list(cases)
    while waiting:
        ready = [
            case
            for case in waiting
            if not any(
                key in (w.key for w in waiting if w is not case) or key == case.key
                for key in case.distribution.when or {}
            )
        ]
        if not ready:
            raise ValueError(f"when: {', '.join(sorted({c.key for c in waiting}))} depend on each other in a circle")
        ordered += ready
        waiting = [case for case in waiting if case not in ready]
    return ordered


def _without_distributions(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_distributions(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if not _is_distribution(inner)
    }


def json_schema() -> dict[str, Any]:
    """The schema of a space file for editors: in `run`, any value may be a distribution."""
    schema = Space.model_json_schema()
    run = Run.model_json_schema()
    definitions: dict[str, Any] = {**schema.pop("$defs", {}), **run.pop("$defs", {})}
    one = Distribution.model_json_schema()
    definitions["Distribution"] = {
        "anyOf": [
            one,
            {
                "type": "object",
                "properties": {"cases": {"type": "array", "items": one}},
                "required": ["cases"],
            },
        ]
    }
    for name in (
        "Dataset",
        "Start",
        "Student",
        "LayerChoice",
        "Loss",
        "Training",
        "Decoding",
        "Evaluation",
        "Columns",
    ):
        _allow_distributions(definitions[name])
    _allow_distributions(run)
    run["required"] = [key for key in run.get("required", []) if key != "name"]
    dataset = run["properties"]["dataset"]
    run["properties"]["dataset"] = {"anyOf": [{"type": "string"}, dataset]}
    definitions["RunSpace"] = run
    schema["properties"]["run"] = {"$ref": "#/$defs/RunSpace"}
    return {**schema, "$defs": definitions, "$schema": "https://json-schema.org/draft/2020-12/schema"}


def _allow_distributions(model: dict[str, Any]) -> None:
    for key, value in model["properties"].items():
        model["properties"][key] = {"anyOf": [value, {"$ref": "#/$defs/Distribution"}]}

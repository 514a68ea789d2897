"""Distributions in a run: what they are, in which order they are drawn, and a run filled with drawn values."""

import json
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raydistill.config.validation import describe_error

KINDS = ("choice", "uniform", "log_uniform", "int")
JSON_PREFIXES = ("[", "{", '"')
Scalar = str | int | float | bool | None
Integer = int  # by another name, since a distribution has a field `int`


class Distribution(BaseModel):
    """One of `choice`, `uniform`, `log_uniform`, `int`; `when` says for which other values it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    choice: list[Any] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    int: tuple[Integer, Integer] | None = None
    when: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> "Distribution":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(KINDS)} is needed, found {given or 'none'}")
        for value in self.choice or []:
            if not is_json_value(value):
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


class TrialLike(Protocol):
    """What is needed of an optuna trial (or of a walk over the corners) to fill a space."""

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...


@dataclass(frozen=True)
class SearchParameter:
    """A distribution at a place of the run, under the name that the sampler knows it by."""

    key: str
    name: str
    distribution: Distribution

    def is_active(self, values: dict[str, Any]) -> bool:
        """Whether `when` holds for the values chosen so far (and the run's fixed ones)."""
        return all(
            values.get(key) in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in (self.distribution.when or {}).items()
        )

    def suggest(self, trial: TrialLike) -> Any:
        """Ask for a value. Lists go as JSON text, since samplers know only scalars."""
        d = self.distribution
        if d.choice is not None:
            return decode_choice(trial.suggest_categorical(self.name, [encode_choice(v) for v in d.choice]))
        if d.int is not None:
            return trial.suggest_int(self.name, *d.int)
        low, high = d.uniform or d.log_uniform or (0.0, 0.0)
        return trial.suggest_float(self.name, low, high, log=d.log_uniform is not None)


def is_json_value(value: Any) -> bool:
    """Whether a value is made of what JSON knows, keys of mappings being text."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_json_value(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(is_json_value, value))
    return value is None or isinstance(value, str | int | float)


def encode_choice(value: Any) -> Scalar:
    """A value as a scalar: lists and mappings become JSON text, and so does text that could be taken for such."""
    structured = isinstance(value, list | dict) or (isinstance(value, str) and value.startswith(JSON_PREFIXES))
    return json.dumps(value, sort_keys=True) if structured else value


def decode_choice(value: Scalar) -> Any:
    """The inverse of `encode_choice`."""
    return json.loads(value) if isinstance(value, str) and value.startswith(JSON_PREFIXES) else value


def split_parameters(run: dict[str, Any]) -> tuple[dict[str, Any], list[SearchParameter]]:
    """The fixed values of a run by dotted key, and its distributions in an order that `when` allows."""
    fixed: dict[str, Any] = {}
    cases: list[SearchParameter] = []
    _collect_parameters(run, "", fixed, cases)
    return fixed, _sort_by_conditions(cases, fixed)


def suggest_params(run: dict[str, Any], trial: TrialLike) -> dict[str, Any]:
    """The chosen values by dotted key: asks `trial` for each distribution whose `when` holds."""
    fixed, cases = split_parameters(run)
    values = dict(fixed)
    chosen: dict[str, Any] = {}
    for case in cases:
        if case.is_active(values):
            if case.key in chosen:
                raise ValueError(f"{case.key}: two cases hold at once for {chosen}")
            values[case.key] = chosen[case.key] = case.suggest(trial)
    return chosen


def fill_run(run: dict[str, Any], params: dict[str, Any], name: str) -> dict[str, Any]:
    """The run's data with the chosen values in place; a distribution that does not apply is left out."""
    data = _without_distributions(run)
    for key, value in params.items():
        place = data
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return {**data, "name": name}


def _is_distribution(value: Any) -> bool:
    return isinstance(value, dict) and ("cases" in value or any(kind in value for kind in KINDS))


def _collect_parameters(
    value: dict[str, Any], prefix: str, fixed: dict[str, Any], parameters: list[SearchParameter]
) -> None:
    for name, inner in value.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if not _is_distribution(inner):
            if isinstance(inner, dict):
                _collect_parameters(inner, key, fixed, parameters)
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
                    (".".join(map(str, e["loc"])), describe_error(dict(e), Distribution, tuple(e["loc"])))
                    for e in wrong
                ]
                reasons = "; ".join(f"{at}: {reason}" if at else reason for at, reason in parts)
                raise ValueError(f"{key}: {reasons}") from None
            parameters.append(SearchParameter(key, key if len(listed) == 1 else f"{key}@{i}", distribution))


def _sort_by_conditions(parameters: list[SearchParameter], fixed: dict[str, Any]) -> list[SearchParameter]:
    """Cases so that what a `when` names comes first; ValueError for an unknown name or a circle."""
    known = {case.key for case in parameters}
    for case in parameters:
        for key in case.distribution.when or {}:
            if key not in known and key not in fixed:
                raise ValueError(f"{case.key}: when names {key!r}, which the run does not set")
    ordered: list[SearchParameter] = []
    waiting = list(parameters)
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

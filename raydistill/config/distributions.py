"""Distributions in the `run` section of a space: parsing, the order of suggestion, and a run with suggested values."""

import json
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raydistill.config.validation import describe_error
from raydistill.core.suggestions import closest_name

KINDS = ("choice", "uniform", "log_uniform", "int")
JSON_PREFIXES = ("[", "{", '"')
Scalar = str | int | float | bool | None
Integer = int  # an alias, because `Distribution` has a field named `int`


class SpaceError(ValueError):
    """An invalid space. `key` is the dotted key with the invalid value, in the space or in its run."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class Distribution(BaseModel):
    """A distribution: exactly one of `choice`, `uniform`, `log_uniform` and `int`, and optionally `when`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    choice: list[Any] | None = Field(None, min_length=1, description="one of these values")
    uniform: tuple[float, float] | None = Field(None, description="a number between two bounds")
    log_uniform: tuple[float, float] | None = Field(
        None, description="a number between two bounds above 0, uniform in its logarithm"
    )
    int: tuple[Integer, Integer] | None = Field(None, description="an integer between two bounds, both included")
    when: dict[str, Any] | None = Field(
        None,
        description="values of other keys for which this distribution applies; elsewhere the key has its default",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> "Distribution":
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"exactly one of {', '.join(KINDS)} is needed, got {kinds or 'none'}")
        for value in self.choice or []:
            if not is_json_value(value):
                raise ValueError(f"choice {value!r}: expected strings, numbers, lists, or mappings with string keys")
        bounds = self.uniform or self.log_uniform or self.int
        if bounds and bounds[0] > bounds[1]:
            raise ValueError(f"{kinds[0]} {list(bounds)}: the lower bound is above the upper bound")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform {list(self.log_uniform)}: the lower bound must be above 0")
        return self


class TrialLike(Protocol):
    """The methods of an Optuna trial that suggest values. `config.corners` implements them without a sampler."""

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...


@dataclass(frozen=True)
class SearchParameter:
    """A distribution of a run.

    Attributes:
        key: Dotted key in the run.
        sampler_name: The name of the parameter in the sampler: `key`, or `key@i` for case i of several.
        distribution: The distribution of the values.
    """

    key: str
    sampler_name: str
    distribution: Distribution

    def is_active(self, values: dict[str, Any]) -> bool:
        """Whether `when` is true for the values (fixed or suggested) of the other keys."""
        return all(
            values.get(key) in (allowed if isinstance(allowed, list) else [allowed])
            for key, allowed in (self.distribution.when or {}).items()
        )

    def suggest(self, trial: TrialLike) -> Any:
        """Let `trial` suggest a value. Samplers support scalar choices only, so lists are encoded as JSON."""
        d = self.distribution
        if d.choice is not None:
            return decode_choice(trial.suggest_categorical(self.sampler_name, [encode_choice(v) for v in d.choice]))
        if d.int is not None:
            return trial.suggest_int(self.sampler_name, *d.int)
        low, high = d.uniform or d.log_uniform or (0.0, 0.0)
        return trial.suggest_float(self.sampler_name, low, high, log=d.log_uniform is not None)


def is_json_value(value: Any) -> bool:
    """Whether a value consists of JSON types only, with strings as keys of mappings."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_json_value(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_json_value, value))
    return value is None or isinstance(value, str | int | float)


def encode_choice(value: Any) -> Scalar:
    """Encode lists and mappings as JSON text; also strings that could be mistaken for such text."""
    is_ambiguous = isinstance(value, list | dict) or (isinstance(value, str) and value.startswith(JSON_PREFIXES))
    return json.dumps(value, sort_keys=True) if is_ambiguous else value


def decode_choice(value: Scalar) -> Any:
    """The inverse of `encode_choice`."""
    return json.loads(value) if isinstance(value, str) and value.startswith(JSON_PREFIXES) else value


def split_parameters(run: dict[str, Any]) -> tuple[dict[str, Any], list[SearchParameter]]:
    """Split a run into fixed values by dotted key, and parameters sorted so that `when` names earlier ones only.

    Raises:
        SpaceError: A distribution is invalid, or `when` conditions name unknown keys or are circular.
    """
    fixed: dict[str, Any] = {}
    parameters: list[SearchParameter] = []
    _collect_parameters(run, "", fixed, parameters)
    return fixed, _sort_by_conditions(parameters, fixed)


def suggest_params(run: dict[str, Any], trial: TrialLike) -> dict[str, Any]:
    """Let `trial` suggest a value for each parameter whose `when` is true; returns values by dotted key.

    Raises:
        SpaceError: As `split_parameters`, and if two cases of one key are active.
    """
    fixed, parameters = split_parameters(run)
    values = dict(fixed)
    params: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.is_active(values):
            if parameter.key in params:
                raise SpaceError(parameter.key, f"two cases apply at once for {params}")
            values[parameter.key] = params[parameter.key] = parameter.suggest(trial)
    return params


def fill_run(run: dict[str, Any], params: dict[str, Any], name: str) -> dict[str, Any]:
    """The data of a run with the values of `params` in place of distributions; others are removed."""
    data = _without_distributions(run)
    for key, value in params.items():
        mapping = data
        *parents, last = key.split(".")
        for parent in parents:
            mapping = mapping.setdefault(parent, {})
        mapping[last] = value
    return {**data, "name": name}


def _is_distribution(value: Any) -> bool:
    return isinstance(value, dict) and ("cases" in value or any(kind in value for kind in KINDS))


def _collect_parameters(
    mapping: dict[str, Any], prefix: str, fixed: dict[str, Any], parameters: list[SearchParameter]
) -> None:
    """Add the values of a nested mapping to `fixed` and its distributions to `parameters`."""
    for name, value in mapping.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if _is_distribution(value):
            parameters += _parse_cases(key, value)
        elif isinstance(value, dict):
            _check_kind_name(key, value)
            _collect_parameters(value, key, fixed, parameters)
        else:
            fixed[key] = value


def _check_kind_name(key: str, value: dict[str, Any]) -> None:
    """SpaceError if a mapping is a distribution whose kind is misspelt: its only key besides `when` has a list."""
    names = [name for name in value if name != "when"]
    if len(names) == 1 and isinstance(value[names[0]], list):
        name = str(names[0])
        similar = closest_name(name.replace("-", "_").lower(), KINDS, cutoff=0.7)
        if similar:
            raise SpaceError(key, f"unknown distribution {name!r}; did you mean {similar!r}?")


def _parse_cases(key: str, data: dict[str, Any]) -> list[SearchParameter]:
    """The parameter of a distribution, or one parameter per case of `{cases: [...]}`."""
    cases = data.get("cases", [data])
    if not isinstance(cases, list) or ("cases" in data and len(data) > 1):
        raise SpaceError(key, "cases must be a list of distributions and the only key")
    return [
        SearchParameter(key, key if len(cases) == 1 else f"{key}@{i}", _parse_distribution(key, case))
        for i, case in enumerate(cases)
    ]


def _parse_distribution(key: str, data: Any) -> Distribution:
    try:
        return Distribution.model_validate(data)
    except ValidationError as error:
        reasons = []
        for item in error.errors(include_url=False):
            location, reason = item["loc"], describe_error(dict(item), Distribution, tuple(item["loc"]))
            reasons.append(f"{'.'.join(map(str, location))}: {reason}" if location else reason)
        raise SpaceError(key, "; ".join(reasons)) from None


def _sort_by_conditions(parameters: list[SearchParameter], fixed: dict[str, Any]) -> list[SearchParameter]:
    """Sort parameters topologically: after all parameters that their `when` names, else in the given order."""
    keys = {parameter.key for parameter in parameters}
    predecessors: dict[int, list[int]] = {}
    for i, parameter in enumerate(parameters):
        conditions = parameter.distribution.when or {}
        for key in conditions:
            if key not in keys and key not in fixed:
                raise SpaceError(parameter.key, f"when names {key!r}, which the run does not set")
        predecessors[i] = [j for j, other in enumerate(parameters) if other.key in conditions]
    sorter = TopologicalSorter(predecessors)
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = ", ".join(sorted({parameters[i].key for i in error.args[1]}))
        raise SpaceError("when", f"circular conditions of {cycle}") from None
    order: list[int] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        sorter.done(*ready)
        order += ready
    return [parameters[i] for i in order]


def _without_distributions(mapping: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_distributions(value) if isinstance(value, dict) else value
        for key, value in mapping.items()
        if not _is_distribution(value)
    }

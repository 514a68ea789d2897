"""Points of a space without a sampler: its corners, which are validated, and the points that a sweep tries first."""

import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import Any

from raydistill.config.distributions import (
    Scalar,
    SpaceError,
    decode_choice,
    encode_choice,
    is_json_value,
    split_parameters,
    suggest_params,
)

MAX_CORNERS = 20_000


def iter_corners(
    run: dict[str, Any], limit: int = MAX_CORNERS, keys: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield every combination of choices and range bounds, as values by dotted key.

    If there are more than `limit` combinations: the first `limit` in order, then `limit` at random (with a fixed
    seed, with repetition).

    Args:
        run: The run section of a space.
        limit: The most combinations to enumerate.
        keys: Combine the values of these keys only, and of the keys that their conditions name; the other parameters
            have their first choice or lower bound.
    """
    names = None if keys is None else _names_of(run, keys)
    trial = _CornerTrial(names)
    count = 0
    while count < limit:
        yield suggest_params(run, trial)
        count += 1
        if not trial.advance():
            return
    random_trial = _RandomCornerTrial(names, random.Random(0))
    for _ in range(limit):
        yield suggest_params(run, random_trial)


def _names_of(run: dict[str, Any], keys: Collection[str]) -> set[str]:
    """The parameters of some keys and the parameters that their conditions depend on, by sampler name."""
    parameters = split_parameters(run)[1]
    selected = {p.key for p in parameters if any(key == p.key or key.startswith(f"{p.key}.") for key in keys)}
    for parameter in reversed(parameters):  # conditions name earlier parameters only
        if parameter.key in selected:
            selected |= set(parameter.distribution.when or ())
    return {p.sampler_name for p in parameters if p.key in selected}


def resolve_point(run: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """Complete a point of the space.

    Args:
        run: The run section of a space.
        point: Values by dotted key.

    Returns:
        Values by dotted key; parameters that `point` omits have their first choice or lower bound.

    Raises:
        SpaceError: A value is outside its distribution, or a key has no active distribution.
    """
    params = suggest_params(run, _PointTrial(run, point))
    unknown = set(point) - set(params)
    if unknown:
        raise SpaceError("points", f"{', '.join(sorted(unknown))} is not an active parameter for {params}")
    return params


class _BoundsTrial(ABC):
    """Suggests choices and range bounds only; always the first one for a parameter that is not in `names`."""

    def __init__(self, names: Collection[str] | None) -> None:
        self._names = names

    @abstractmethod
    def _select(self, values: list[Any]) -> Any: ...

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any:
        return self._suggest(name, choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._suggest(name, list(dict.fromkeys((low, high)))))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._suggest(name, list(dict.fromkeys((low, high)))))

    def _suggest(self, name: str, values: list[Any]) -> Any:
        return self._select(values) if self._names is None or name in self._names else values[0]


class _CornerTrial(_BoundsTrial):
    """Depth-first enumeration: each pass repeats the previous selections up to the last one that can advance."""

    def __init__(self, names: Collection[str] | None = None) -> None:
        super().__init__(names)
        self._indices: list[int] = []
        self._num_choices: list[int] = []
        self._depth = 0

    def _select(self, values: list[Any]) -> Any:
        if self._depth == len(self._indices):
            self._indices.append(0)
            self._num_choices.append(len(values))
        self._num_choices[self._depth] = len(values)
        value = values[self._indices[self._depth]]
        self._depth += 1
        return value

    def advance(self) -> bool:
        """Start the next pass; False if all combinations have been enumerated."""
        self._indices, self._num_choices = self._indices[: self._depth], self._num_choices[: self._depth]
        self._depth = 0
        while self._indices:
            self._indices[-1] += 1
            if self._indices[-1] < self._num_choices[-1]:
                return True
            self._indices.pop()
            self._num_choices.pop()
        return False


class _RandomCornerTrial(_BoundsTrial):
    """Selects choices and range bounds at random."""

    def __init__(self, names: Collection[str] | None, rng: random.Random) -> None:
        super().__init__(names)
        self._rng = rng

    def _select(self, values: list[Any]) -> Any:
        return self._rng.choice(values)


class _PointTrial:
    """Suggests the values of a point; SpaceError for a value outside its distribution."""

    def __init__(self, run: dict[str, Any], point: dict[str, Any]) -> None:
        self._key_by_name = {parameter.sampler_name: parameter.key for parameter in split_parameters(run)[1]}
        self._point = point

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any:
        key = self._key_by_name[name]
        value = self._point.get(key, decode_choice(choices[0]))
        value = encode_choice(value) if is_json_value(value) else value
        if value not in choices:
            raise SpaceError("points", f"{key} {value!r} is not one of {choices}")
        return value

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._value_in_range(name, low, high))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._value_in_range(name, low, high))

    def _value_in_range(self, name: str, low: float, high: float) -> float:
        key = self._key_by_name[name]
        value = self._point.get(key, low)
        if not isinstance(value, int | float) or not low <= value <= high:
            raise SpaceError("points", f"{key} {value!r} is not within [{low}, {high}]")
        return value

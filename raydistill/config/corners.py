"""Walks over a space without a sampler: its corners, to check them all, and the points to try first."""

import random
from collections.abc import Iterator
from typing import Any

from raydistill.config.distributions import (
    Scalar,
    decode_choice,
    encode_choice,
    is_json_value,
    split_parameters,
    suggest_params,
)

MAX_CORNERS = 20_000


def iter_corners(run: dict[str, Any], limit: int = MAX_CORNERS) -> Iterator[dict[str, Any]]:
    """Every combination of choices and range ends, or `limit` drawn at random where there are more."""
    walk = _CornerTrial()
    count = 0
    while count < limit:
        yield suggest_params(run, walk)
        count += 1
        if not walk.advance():
            return
    draw = _RandomCornerTrial(random.Random(0))
    for _ in range(limit):
        yield suggest_params(run, draw)


def resolve_point(run: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """A first point's values by dotted key, checked to lie in the space.

    Keys of the point are dotted keys of the run; a value that the point leaves out takes the first choice
    or the lower end.
    """
    walk = _PointTrial(run, point)
    chosen = suggest_params(run, walk)
    unknown = set(point) - set(chosen)
    if unknown:
        raise ValueError(f"points: {', '.join(sorted(unknown))} is no distribution that holds at {chosen}")
    return chosen


class _CornerTrial:
    """A depth-first walk over all corners: replays a prefix of positions, and moves on at the end."""

    def __init__(self) -> None:
        self.indices: list[int] = []
        self.sizes: list[int] = []
        self.depth = 0

    def _select(self, values: list[Any]) -> Any:
        if self.depth == len(self.indices):
            self.indices.append(0)
            self.sizes.append(len(values))
        self.sizes[self.depth] = len(values)
        value = values[self.indices[self.depth]]
        self.depth += 1
        return value

    def advance(self) -> bool:
        self.indices, self.sizes = self.indices[: self.depth], self.sizes[: self.depth]
        self.depth = 0
        while self.indices:
            self.indices[-1] += 1
            if self.indices[-1] < self.sizes[-1]:
                return True
            self.indices.pop()
            self.sizes.pop()
        return False

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any:
        return self._select(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._select(list(dict.fromkeys((low, high)))))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._select(list(dict.fromkeys((low, high)))))


class _RandomCornerTrial(_CornerTrial):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def _select(self, values: list[Any]) -> Any:
        return self.rng.choice(values)


class _PointTrial(_CornerTrial):
    """Answers with the point's values; refuses a value that the distribution does not hold."""

    def __init__(self, run: dict[str, Any], point: dict[str, Any]) -> None:
        super().__init__()
        self.keys = {case.name: case.key for case in split_parameters(run)[1]}
        self.point = point

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any:
        wanted = self.point.get(self.keys[name], decode_choice(choices[0]))
        wanted = encode_choice(wanted) if is_json_value(wanted) else wanted
        if wanted not in choices:
            raise ValueError(f"points: {self.keys[name]} {wanted!r} is none of {choices}")
        return wanted

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._value_in_range(name, low, high))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._value_in_range(name, low, high))

    def _value_in_range(self, name: str, low: float, high: float) -> float:
        wanted = self.point.get(self.keys[name], low)
        if not isinstance(wanted, int | float) or not low <= wanted <= high:
            raise ValueError(f"points: {self.keys[name]} {wanted!r} is not within [{low}, {high}]")
        return wanted

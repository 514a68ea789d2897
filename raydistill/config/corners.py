"""Walks over a space without a sampler: its corners, to check them all, and the points to try first."""

import random
from collections.abc import Iterator
from typing import Any

from raydistill.config.distributions import Scalar, decode, encode, is_plain, propose, split

MAX_CORNERS = 20_000


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
        wanted = encode(wanted) if is_plain(wanted) else wanted
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

"""Studies to which sizes, shares and numbers are positions on axes and not categories: candidates for the search.

The search proposes choices as categories, so that TPE learns nothing about 2-2 from 2-3, and it learns the rate of each
case of a range separately. Here the sampler sees positions from 0 to 1. A size has two, for the layers of encoder and
decoder, and a number or share has one, each on a logarithmic scale. All cases of a range share the position within the
range. `search_efficiency --candidates` shows whether a search with these positions is better.
"""

import math
from collections.abc import Sequence
from typing import Any

import optuna

from raydistill.config.distributions import Scalar, TrialLike, encode_choice, split_parameters, suggest_params
from raydistill.config.run import parse_size
from raydistill.search.study import SweepStudy

Position = tuple[float, ...]


def choice_positions(choices: Sequence[Scalar]) -> list[Position] | None:
    """The positions of choices, from 0 to 1 on each axis; None if the choices are not all sizes or all numbers.

    An axis on which all choices are equal is left out.
    """
    values = [_axis_values(choice) for choice in choices]
    if any(value is None for value in values) or len({len(value or ()) for value in values}) != 1:
        return None
    axes = [axis for axis in zip(*(value or () for value in values), strict=True) if min(axis) < max(axis)]
    scaled = [[(value - min(axis)) / (max(axis) - min(axis)) for value in axis] for axis in axes]
    return list(zip(*scaled, strict=True)) if axes else None


def _axis_values(choice: Scalar) -> Position | None:
    """Logarithms of the numbers of a choice: of a size both sides' layers; None, all units, counts as a share of 1."""
    if choice is None:
        return (0.0,)
    if isinstance(choice, bool):
        return None
    if isinstance(choice, str):
        try:
            return tuple(map(math.log, parse_size(choice)))
        except ValueError:
            return None
    return (math.log(choice),) if choice > 0 else None


def nearest_choice(position: Position, positions: Sequence[Position]) -> int:
    """The index of the choice whose position is nearest."""
    return min(range(len(positions)), key=lambda i: math.dist(position, positions[i]))


class NumericTrial:
    """An Optuna trial that suggests positions instead of sizes and numbers."""

    def __init__(self, trial: TrialLike) -> None:
        self._trial = trial

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any:
        """See `TrialLike`."""
        positions = choice_positions(choices)
        if positions is None:
            return self._trial.suggest_categorical(name, choices)
        names = axis_names(name, len(positions[0]))
        position = tuple(self._trial.suggest_float(axis, 0.0, 1.0) for axis in names)
        return choices[nearest_choice(position, positions)]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """See `TrialLike`."""
        share = self._trial.suggest_float(base_name(name), 0.0, 1.0)
        return low * (high / low) ** share if log else low + share * (high - low)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """See `TrialLike`."""
        return min(high, low + int(self._trial.suggest_float(base_name(name), 0.0, 1.0) * (high - low + 1)))


def base_name(name: str) -> str:
    """The name of a parameter without the number of its case."""
    return name.partition("@")[0]


def axis_names(name: str, count: int) -> list[str]:
    """The names of the axes of a choice."""
    return [f"{base_name(name)}/{axis}" for axis in range(count)]


def sampler_positions(run: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """Convert values by dotted key to what a `NumericTrial` of the run suggests.

    Args:
        run: the run section of a space.
        params: the values of a trial.
    """
    fixed, parameters = split_parameters(run)
    values = {**fixed, **params}
    result: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.key not in params or not parameter.is_active(values):
            continue
        name, value, distribution = parameter.sampler_name, params[parameter.key], parameter.distribution
        if distribution.choice is not None:
            choices = [encode_choice(choice) for choice in distribution.choice]
            positions, encoded = choice_positions(choices), encode_choice(value)
            if positions is None:
                result[name] = encoded
            else:
                position = positions[choices.index(encoded)]
                result |= dict(zip(axis_names(name, len(position)), position, strict=True))
        elif distribution.int is not None:
            first, last = distribution.int
            result[base_name(name)] = (value - first + 0.5) / (last - first + 1)
        else:
            low, high = distribution.uniform or distribution.log_uniform or (0.0, 0.0)
            is_log = distribution.log_uniform is not None
            low, value, high = (math.log(number) if is_log else number for number in (low, value, high))
            result[base_name(name)] = (value - low) / (high - low) if high > low else 0.0
    return result


class NumericStudy(SweepStudy):
    """A study whose sampler sees positions."""

    def _suggest(self, trial: TrialLike) -> dict[str, Any]:
        return suggest_params(self.space.run, NumericTrial(trial))

    def _sampler_values(self, params: dict[str, Any]) -> dict[str, Any]:
        return sampler_positions(self.space.run, params)


class MultivariateStudy(NumericStudy):
    """A study whose sampler models the positions jointly, in groups of parameters that occur together."""

    def _make_sampler(self) -> optuna.samplers.BaseSampler:
        return optuna.samplers.TPESampler(seed=self.space.search.seed, multivariate=True, group=True)

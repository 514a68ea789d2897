"""The costs of a shape: its measured costs, or the prediction of a linear fit over measured shapes.

The cost of a student is nearly a sum over its parts: an encoder layer, a decoder layer, the feed-forward units of each,
and the tokens of the output layer. A space with many shapes is therefore timed at some of them, and the others are
predicted by least squares:

    cost = a + b E + c D + d E e + f D g + h v

with E and D layers of encoder and decoder, e and g feed-forward units per layer (a share of the teacher's, or a
number), and v thousands of tokens.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from raydistill.config.shapes import Shape, Units

# Largest part of a shape's row, as a share of its norm, that measured shapes may leave unexplained.
SPAN_TOLERANCE = 1e-6


def shape_costs(measured: Mapping[str, dict[str, float]], shape: Shape) -> dict[str, float]:
    """Costs of a shape by name; empty if neither the shape nor enough comparable shapes were measured.

    Shapes with the same layers are preferred for the fit, since a fit over fewer dimensions is more accurate.

    Args:
        measured: Costs by name of the shape.
        shape: A shape with numbers of layers.
    """
    if shape.name in measured:
        return measured[shape.name]
    comparable = [name for name in measured if _is_comparable(Shape.parse(name), shape)]
    same_layers = [name for name in comparable if Shape.parse(name).size == shape.size]
    names = next((names for names in (same_layers, comparable) if _spans(names, shape)), [])
    if not names:
        return {}
    metrics = set.intersection(*(set(measured[name]) for name in names)) - {"speedup"}
    costs = {metric: _fit({name: measured[name][metric] for name in names}, shape) for metric in sorted(metrics)}
    first = measured[names[0]]
    if "speedup" in first and "latency_ms" in costs:
        costs["speedup"] = first["speedup"] * first["latency_ms"] / costs["latency_ms"]
    return costs


def prediction_errors(measured: Mapping[str, float]) -> dict[str, float]:
    """The relative error of the fit at each measured shape, when the fit does not know the shape's own cost.

    Shapes that the others do not predict are left out.

    Args:
        measured: A cost by name of the shape.
    """
    errors = {}
    for name, value in measured.items():
        others = {other: {"cost": cost} for other, cost in measured.items() if other != name}
        if predicted := shape_costs(others, Shape.parse(name)):
            errors[name] = predicted["cost"] / value - 1
    return errors


def select_spread_shapes(names: Sequence[str], count: int) -> list[str]:
    """Some shapes, from which the fit predicts the others: each differs as much as possible from the previous shapes.

    Rounds of a greedy choice, as Gram-Schmidt orthogonalisation with pivoting makes it: the next shape is the one with
    the largest part that the shapes of the round so far do not explain. A round spans all dimensions of the shapes, for
    each group of comparable shapes, so that two rounds leave a fit whose error can be estimated. The first round is
    complete, whatever `count` is.

    Args:
        names: Names of the shapes.
        count: Number of shapes to select, if the first round needs no more.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        groups.setdefault(_group(Shape.parse(name)), []).append(name)
    selected: list[str] = []
    while len(selected) < min(count, len(names)):
        is_first = not selected
        rounds = [_select_round([name for name in group if name not in selected]) for group in groups.values()]
        for name in chain.from_iterable(rounds):
            if is_first or len(selected) < count:
                selected.append(name)
    return selected


def _select_round(names: list[str]) -> list[str]:
    """Names whose rows are linearly independent and span the rows of all names, by decreasing unexplained part."""
    if not names:
        return []
    rows = np.array([_row(Shape.parse(name)) for name in names])
    rest = rows / (np.abs(rows).max(axis=0) + 1e-12)  # so that no column decides by its unit
    start = np.linalg.norm(rest, axis=1)
    selected = []
    while (norms := np.linalg.norm(rest, axis=1)).max() > SPAN_TOLERANCE * start.max():
        best = int(norms.argmax())
        selected.append(names[best])
        direction = rest[best] / norms[best]
        rest = rest - np.outer(rest @ direction, direction)
    return selected


def _spans(names: Sequence[str], shape: Shape) -> bool:
    """Whether the row of a shape is a linear combination of the rows of the names, so that a fit predicts its cost."""
    if not names:
        return False
    design, row = _design(names), np.array(_row(shape))
    combination = np.linalg.lstsq(design.T, row, rcond=None)[0]
    return bool(np.linalg.norm(design.T @ combination - row) <= SPAN_TOLERANCE * np.linalg.norm(row))


def _fit(costs: Mapping[str, float], shape: Shape) -> float:
    """The cost of a shape by a least-squares fit to the costs of other shapes."""
    coefficients = np.linalg.lstsq(_design(list(costs)), np.array(list(costs.values())), rcond=None)[0]
    return float(np.dot(_row(shape), coefficients))


def _design(names: Sequence[str]) -> np.ndarray:
    return np.array([_row(Shape.parse(name)) for name in names])


def _is_comparable(measured: Shape, shape: Shape) -> bool:
    """Whether the units of both shapes are shares or both are numbers, and likewise the tokens."""
    return _group(measured) == _group(shape)


def _group(shape: Shape) -> tuple[object, ...]:
    """What comparable shapes have in common: the kind of units of each side, and of tokens."""
    tokens = "number" if isinstance(shape.vocabulary, int) else shape.vocabulary
    return (*(isinstance(units, int) for units in shape.ffn), tokens)


def _row(shape: Shape) -> list[float]:
    """A row of the design matrix. All units are the share 1; without a number of tokens, their column is 0."""
    encoder, decoder = map(float, shape.size.split("-"))
    encoder_units, decoder_units = map(_share, shape.ffn)
    thousands = shape.vocabulary / 1000 if isinstance(shape.vocabulary, int) else 0.0
    return [1.0, encoder, decoder, encoder * encoder_units, decoder * decoder_units, thousands]


def _share(units: Units | None) -> float:
    return 1.0 if units is None else float(units)

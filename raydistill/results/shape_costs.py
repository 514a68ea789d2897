"""The measured costs of a shape, or a linear fit over measured shapes with equal layers."""

from collections.abc import Mapping

import numpy as np

from raydistill.config.shapes import Shape, Units


def shape_costs(measured: Mapping[str, dict[str, float]], shape: Shape) -> dict[str, float]:
    """Costs of a shape by name; empty if neither it nor a comparable shape was measured.

    A space with a range of feed-forward units or tokens has shapes that were not measured, between the ends of the
    range. Their costs are fitted by least squares to the measured shapes with the same layers: a + b e + c d + f v for
    e and d units of the encoder and of the decoder and v tokens, because a feed-forward layer computes a constant
    number of products per unit, and the output layer a constant number per token.

    Args:
        measured: Costs by name of the shape.
        shape: A shape with numbers of layers.
    """
    if shape.name in measured:
        return measured[shape.name]
    names = [name for name in measured if _is_comparable(Shape.parse(name), shape)]
    if not names:
        return {}
    design = np.array([_row(Shape.parse(name)) for name in names])
    metrics = set.intersection(*(set(measured[name]) for name in names)) - {"speedup"}
    costs = {}
    for metric in sorted(metrics):
        coefficients = np.linalg.lstsq(design, np.array([measured[name][metric] for name in names]), rcond=None)[0]
        costs[metric] = float(np.dot(_row(shape), coefficients))
    first = measured[names[0]]
    if "speedup" in first and "latency_ms" in costs:
        costs["speedup"] = first["speedup"] * first["latency_ms"] / costs["latency_ms"]
    return costs


def _is_comparable(measured: Shape, shape: Shape) -> bool:
    """Whether layers are equal, the units of both shapes are shares or both are numbers, and likewise the tokens."""
    numbers = isinstance(measured.vocabulary, int) and isinstance(shape.vocabulary, int)
    if measured.size != shape.size or not (numbers or measured.vocabulary == shape.vocabulary):
        return False
    return all(isinstance(a, int) == isinstance(b, int) for a, b in zip(measured.ffn, shape.ffn, strict=True))


def _row(shape: Shape) -> list[float]:
    """A row of the design matrix: the intercept, the units of both sides, and thousands of tokens if they are a number.

    All units are the share 1.
    """
    thousands = shape.vocabulary / 1000 if isinstance(shape.vocabulary, int) else 0.0
    return [1.0, *(_share(units) for units in shape.ffn), thousands]


def _share(units: Units | None) -> float:
    return 1.0 if units is None else float(units)

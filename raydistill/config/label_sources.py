"""The `labels` setting: which label sources a run trains on, and with which weights."""

from collections.abc import Callable
from typing import NamedTuple

MAX_SOURCE_WEIGHT = 100  # the weight is how often an epoch repeats the rows of a source


class LabelSource(NamedTuple):
    """One source of labels.

    Attributes:
        spec: `original`; `pseudo` (labels of the run's teacher); `pseudo@TEACHER` (labels of another teacher);
            or the folder of a label set.
        weight: How often an epoch repeats the rows of the source; a fraction selects a share of the rows.
    """

    spec: str
    weight: float = 1.0

    @property
    def is_pseudo(self) -> bool:
        """Whether a teacher generates the labels."""
        return self.spec == "pseudo" or self.spec.startswith("pseudo@")

    @property
    def other_teacher(self) -> str | None:
        """The teacher of `pseudo@TEACHER`, else None."""
        return self.spec.partition("@")[2] or None if self.is_pseudo else None

    @property
    def folder(self) -> str | None:
        """The folder of a label set, else None."""
        return None if self.spec == "original" or self.is_pseudo else self.spec


def parse_labels(labels: str) -> list[LabelSource]:
    """Parse label sources such as `original+pseudo*0.5+outputs/labels/SET`.

    Raises:
        ValueError: A source is malformed or repeated, or a weight is not in (0, MAX_SOURCE_WEIGHT].
    """
    sources = []
    for text in labels.split("+"):
        spec, star, weight = text.strip().partition("*")
        try:
            source = LabelSource(spec.strip(), float(weight) if star else 1.0)
        except ValueError:
            source = LabelSource("")
        if source.spec in ("", "pseudo@") or not 0 < source.weight <= MAX_SOURCE_WEIGHT:
            raise ValueError(
                f"labels {labels!r}: invalid label source {text!r}; expected original, pseudo, pseudo@TEACHER or the "
                f"folder of a label set, optionally with a weight above 0 and up to {MAX_SOURCE_WEIGHT}, for example "
                f"original+pseudo*0.5 (a path cannot contain + or *)"
            )
        sources.append(source)
    specs = [source.spec for source in sources]
    if repeated := next((spec for spec in specs if specs.count(spec) > 1), None):
        raise ValueError(f"labels {labels!r}: {repeated} is given twice; use a weight instead, such as {repeated}*2")
    return sources


def map_label_paths(labels: str, transform: Callable[[str], str]) -> str:
    """Apply `transform` to every teacher and folder in `labels`; weights stay. Malformed sources are not rejected."""
    mapped = []
    for text in labels.split("+"):
        spec, star, weight = text.strip().partition("*")
        kind, at, teacher = spec.partition("@")
        spec = f"pseudo@{transform(teacher)}" if (kind, at) == ("pseudo", "@") else transform(spec)
        mapped.append(f"{spec}{star}{weight}")
    return "+".join(mapped)

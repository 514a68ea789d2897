"""Names of shapes: layers and feed-forward units of a student, the key of all measured costs."""

import math
import re
from typing import NamedTuple

FULL_SIZE = "full"  # the size of a student with the teacher's layers, whose numbers a run file does not have
_NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"
_SHAPE_PATTERN = re.compile(rf"(full|\d+-\d+)(?:-ffn({_NUMBER})-({_NUMBER}))?")

Units = int | float  # a share of the teacher's feed-forward units of a layer (at most 1), or a number of units


class Shape(NamedTuple):
    """The architecture of a student, relative to its teacher's.

    Attributes:
        size: Encoder and decoder layers, such as "12-3", or "full" for the teacher's.
        encoder_ffn: Feed-forward units of an encoder layer; None for the teacher's.
        decoder_ffn: Feed-forward units of a decoder layer; None for the teacher's.
    """

    size: str
    encoder_ffn: Units | None = None
    decoder_ffn: Units | None = None

    @property
    def name(self) -> str:
        """The name: "12-3", or "12-3-ffn0.5-256" with the units of both sides, where 1 means the teacher's."""
        if self.encoder_ffn is None and self.decoder_ffn is None:
            return self.size
        units = ("1" if value is None else f"{value:g}" for value in (self.encoder_ffn, self.decoder_ffn))
        return f"{self.size}-ffn{'-'.join(units)}"

    @classmethod
    def parse(cls, name: str) -> "Shape":
        """The shape of a name.

        Raises:
            ValueError: The name is not of the form that `name` has.
        """
        match = _SHAPE_PATTERN.fullmatch(name)
        if not match:
            raise ValueError(f'{name!r} is not the name of a shape such as "12-3" or "12-3-ffn0.5-0.25"')
        encoder, decoder = (_parse_units(text) for text in match.groups()[1:])
        return cls(match[1], encoder, decoder)

    def with_full_size(self, teacher_size: str) -> "Shape":
        """The shape with the teacher's size in place of "full"."""
        return self._replace(size=teacher_size) if self.size == FULL_SIZE else self


def shape_sort_key(name: str) -> tuple[list[float], str]:
    """Sorts names of shapes from small to large: by layers, then by units. Other names come first."""
    try:
        shape = Shape.parse(name)
    except ValueError:
        return [], name
    layers = [float(number) for number in shape.size.split("-") if number != FULL_SIZE]
    return [*layers, *(math.inf if units is None else units for units in shape[1:])], name


def _parse_units(text: str | None) -> Units | None:
    if text is None or text == "1":
        return None
    return float(text) if "." in text or "e" in text else int(text)

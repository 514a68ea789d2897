"""Names of shapes: layers, feed-forward units and tokens of a student, the key of all measured costs."""

import math
import re
from typing import Literal, NamedTuple

FULL_SIZE = "full"  # size of a student with all layers of its teacher; run files do not name the teacher's layers
_USED_TOKENS_RANK = 1e9  # "used" is sorted behind numbers of tokens and before all tokens
_NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"
_SHAPE_PATTERN = re.compile(rf"(full|\d+-\d+)(?:-ffn({_NUMBER})-({_NUMBER}))?(?:-v(used|\d+))?")

Units = int | float  # a share of the teacher's feed-forward units of a layer (at most 1), or a number of units
VocabularySize = int | Literal["used"]  # a number of tokens, or the tokens that occur in the training data


class Shape(NamedTuple):
    """The architecture of a student, relative to its teacher's.

    Attributes:
        size: Encoder and decoder layers, such as "12-3", or "full" for the teacher's.
        encoder_ffn: Feed-forward units of an encoder layer; None for the teacher's.
        decoder_ffn: Feed-forward units of a decoder layer; None for the teacher's.
        vocabulary: Tokens; None for the teacher's.
    """

    size: str
    encoder_ffn: Units | None = None
    decoder_ffn: Units | None = None
    vocabulary: VocabularySize | None = None

    @property
    def name(self) -> str:
        """The name, such as "12-3".

        "-ffn0.5-256" follows if the units of a side are not the teacher's, where 1 means the teacher's; "-v30000" or
        "-vused" follows if the tokens are not the teacher's.
        """
        name = self.size
        if self.ffn != (None, None):
            name += f"-ffn{'-'.join('1' if units is None else f'{units:g}' for units in self.ffn)}"
        return name if self.vocabulary is None else f"{name}-v{self.vocabulary}"

    @property
    def ffn(self) -> tuple[Units | None, Units | None]:
        """The feed-forward units of both sides."""
        return self.encoder_ffn, self.decoder_ffn

    @classmethod
    def parse(cls, name: str) -> "Shape":
        """The shape of a name.

        Raises:
            ValueError: The name is not of the form that `name` has.
        """
        match = _SHAPE_PATTERN.fullmatch(name)
        if not match:
            raise ValueError(f'{name!r} is not the name of a shape such as "12-3" or "12-3-ffn0.5-0.25"')
        size, encoder, decoder, tokens = match.groups()
        vocabulary: VocabularySize | None = "used" if tokens == "used" else None if tokens is None else int(tokens)
        return cls(size, _parse_units(encoder), _parse_units(decoder), vocabulary)

    def with_full_size(self, teacher_size: str) -> "Shape":
        """The shape with the teacher's size in place of "full"."""
        return self._replace(size=teacher_size) if self.size == FULL_SIZE else self


def shape_sort_key(name: str) -> tuple[list[float], str]:
    """Sorts names of shapes from small to large: by layers, then by units and tokens.

    Texts that are not names of shapes come first.
    """
    try:
        shape = Shape.parse(name)
    except ValueError:
        return [], name
    layers = [float(number) for number in shape.size.split("-") if number != FULL_SIZE]
    tokens = _USED_TOKENS_RANK if shape.vocabulary == "used" else shape.vocabulary
    return [*layers, *(math.inf if value is None else value for value in (*shape.ffn, tokens))], name


def _parse_units(text: str | None) -> Units | None:
    if text is None or text == "1":
        return None
    return float(text) if "." in text or "e" in text else int(text)

"""How students are served: the configurations that a sweep compares, and the configuration of one served student."""

import math
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, ConfigDict, Field

from raydistill.config.run import StrictModel

# From the most exact to the least exact.
Precision = Literal["fp32", "bf16", "fp16", "int8_float16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEFAULT_PRECISIONS: dict[str, list[Precision]] = {"cpu": ["fp32", "int8"], "cuda": ["bf16", "int8_float16"]}


def _off(value: Any) -> Any:
    """YAML reads an unquoted `off` as false."""
    return "off" if value is False else value


# `off`: the whole vocabulary; `source`: likely translations of the source tokens; N: the N most used target tokens.
ShortlistKind = Annotated[Literal["off", "source"] | Annotated[int, Field(ge=1, strict=True)], BeforeValidator(_off)]


class EngineVariant(NamedTuple):
    """What an engine is opened with: the precision, and the tokens that the decoder may write."""

    precision: Precision
    shortlist: Literal["off", "source"] | int

    @classmethod
    def of(cls, precision: str) -> "EngineVariant":
        """A precision with the whole vocabulary."""
        assert precision in PRECISIONS, precision
        return cls(precision, "off")

    def is_as_exact_as(self, other: "EngineVariant") -> bool:
        """Whether this variant is at least as exact as another in both precision and vocabulary.

        The whole vocabulary is more exact than any shortlist, and a longer fixed list is more exact than a shorter one.
        """
        shortlist, other_shortlist = self.shortlist, other.shortlist
        is_longer = isinstance(shortlist, int) and isinstance(other_shortlist, int) and shortlist >= other_shortlist
        covers = is_longer or shortlist in ("off", other_shortlist)
        return covers and PRECISIONS.index(self.precision) <= PRECISIONS.index(other.precision)

    @property
    def exactness(self) -> tuple[int, float]:
        """A sort key, the most exact variant first: by precision, then by vocabulary."""
        tokens = {"off": -math.inf, "source": 0.0}
        vocabulary = -self.shortlist if isinstance(self.shortlist, int) else tokens[self.shortlist]
        return PRECISIONS.index(self.precision), vocabulary


class ServingConfig(StrictModel):
    """How a checkpoint is served.

    Attributes:
        beams: Number of beams.
        length_penalty: Length penalty, which has no effect with one beam.
        precision: Precision of the engine.
        shortlist: The tokens that the decoder may write.
    """

    beams: int = Field(ge=1)
    length_penalty: float
    precision: Precision = "fp32"
    shortlist: ShortlistKind = "off"

    @property
    def variant(self) -> EngineVariant:
        """What the engine is opened with."""
        return EngineVariant(self.precision, self.shortlist)

    def with_variant(self, variant: EngineVariant) -> "ServingConfig":
        """This configuration with the precision and shortlist of an engine variant."""
        return self.model_copy(update=variant._asdict())

    @property
    def key(self) -> str:
        """The configuration as part of a file name, such as "b4-p0.6-int8-s4000".

        "b1": one beam, which has no length penalty, in fp32 with the whole vocabulary.
        """
        parts = [f"b{self.beams}"]
        parts += [f"p{self.length_penalty:g}"] if self.beams > 1 else []
        parts += [self.precision] if self.precision != "fp32" else []
        parts += [f"s{self.shortlist}"] if self.shortlist != "off" else []
        return "-".join(parts)

    @property
    def label(self) -> str:
        """The configuration for tables and messages, such as "4 beams, length penalty 0.6, int8, shortlist 4000".

        fp32 and the whole vocabulary are not mentioned.
        """
        parts = ["1 beam" if self.beams == 1 else f"{self.beams} beams, length penalty {self.length_penalty:g}"]
        parts += [self.precision] if self.precision != "fp32" else []
        parts += [f"shortlist {self.shortlist}"] if self.shortlist != "off" else []
        return ", ".join(parts)


class ThroughputSetting(StrictModel):
    """Threads and batches of an engine that decodes many rows at once.

    Attributes:
        inter_threads: Batches that are decoded at the same time.
        intra_threads: Threads per batch.
        batch_tokens: Source tokens per batch, at most; None for the engine's default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    inter_threads: int = Field(ge=1)
    intra_threads: int = Field(ge=1)
    batch_tokens: int | None = Field(None, ge=1)

    @property
    def label(self) -> str:
        """The setting for readers, such as "2 batches of 2,400 tokens x 1 thread"."""
        batches = f"{self.inter_threads} {'batch' if self.inter_threads == 1 else 'batches'}"
        size = f" of {self.batch_tokens:,} tokens" if self.batch_tokens else ""
        return f"{batches}{size} x {self.intra_threads} {'thread' if self.intra_threads == 1 else 'threads'}"


class CTranslate2Serving(StrictModel):
    """What a CTranslate2 program needs to write the texts that were scored.

    Attributes:
        compute_type: Argument of `ctranslate2.Translator`.
        tokenizer: Arguments of `AutoTokenizer.from_pretrained`.
        source_prefix: Text before each source.
        target_prefix: Tokens that every output begins with.
        translate_batch: Arguments of `Translator.translate_batch`.
    """

    compute_type: str
    tokenizer: dict[str, str]
    source_prefix: str
    target_prefix: list[str]
    translate_batch: dict[str, bool | int | float]


class ServingRecord(StrictModel):
    """How an exported student is served; part of its raydistill.json. Its scores were computed with these settings.

    Attributes:
        config: Beams, length penalty, precision and shortlist.
        max_source_tokens: Tokens of a source that the student reads.
        languages: Languages of source and target.
        line_break: The token that the tokenizer writes for a line break; None if there is no such token.
        vocabulary_map: The shortlist, a file in the export.
        ctranslate2: These settings as arguments of CTranslate2; None if CTranslate2 cannot load the student.
        threads: CPU threads with which latency was measured; None on a GPU.
        throughput: Threads and batches that decode the most rows per second; None if the sweep did not measure them.
    """

    config: ServingConfig
    max_source_tokens: int
    languages: tuple[str, str] | None = None
    line_break: str | None = None
    vocabulary_map: str | None = None
    ctranslate2: CTranslate2Serving | None = None
    threads: int | None = None
    throughput: ThroughputSetting | None = None


class Serving(StrictModel):
    """The configurations that finalists and the teacher are served with, in addition to their own decoding."""

    beams: list[Annotated[int, Field(ge=1)]] = Field([1, 2, 4], description="numbers of beams")
    length_penalty: list[float] = Field([1.0], description="length penalties, used with two beams or more")
    precision: list[Precision] | None = Field(
        None,
        min_length=1,
        description="precisions of the engine; those that the device cannot compute are skipped; default: fp32 and "
        "int8 on a CPU, bf16 and int8_float16 on a GPU",
    )
    shortlist: list[ShortlistKind] = Field(
        ["off"],
        min_length=1,
        description="tokens that the decoder may write; off: all; a number N: the N most used tokens of the training "
        "targets; source: for each text the likely translations of its tokens",
    )

    def variants(self, device: str) -> list[EngineVariant]:
        """Every combination of precision and shortlist for "cpu" or "cuda", the most exact first."""
        precisions = self.precision or DEFAULT_PRECISIONS[device]
        pairs = {EngineVariant(precision, shortlist) for precision in precisions for shortlist in self.shortlist}
        return sorted(pairs, key=lambda variant: variant.exactness)

    def decodings(self, own: ServingConfig) -> list[ServingConfig]:
        """A checkpoint's own decoding, then every other combination of beams and length penalty, without duplicates.

        One beam is combined with one length penalty only, which has no effect there. Precision and shortlist are taken
        from `own`.
        """
        grid = {own.key: own}
        for beams in self.beams:
            for penalty in self.length_penalty if beams > 1 else [own.length_penalty]:
                config = own.model_copy(update={"beams": beams, "length_penalty": penalty})
                grid.setdefault(config.key, config)
        return list(grid.values())

    @property
    def named_shortlists(self) -> list[Literal["source"] | int]:
        """The shortlists that need a vocabulary map."""
        return [shortlist for shortlist in dict.fromkeys(self.shortlist) if shortlist != "off"]

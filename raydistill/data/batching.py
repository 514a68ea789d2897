"""Batches: which rows go together, in an order that only the seed and the epoch decide."""

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Examples:
    """Tokenised training pairs: example i pairs source `source_indices[i]` with `targets[i]`.

    Several examples may share a source (original and pseudo-labels of one text).
    """

    sources: list[list[int]]
    targets: list[list[int]]
    source_indices: list[int]

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def sources_key(self) -> str:
        """A content key of the sources' tokens: maximum length, language codes and tokenizer all show in them."""
        return tokens_key(self.sources)

    @cached_property
    def targets_key(self) -> str:
        """The same of the targets, and of which source each belongs to."""
        return f"{tokens_key(self.targets)}{tokens_key([self.source_indices])}"

    def count_target_tokens(self, batch: Sequence[int]) -> int:
        """Real target tokens of a batch of examples: the weight of the token-level losses."""
        return sum(len(self.targets[i]) for i in batch)

    def count_source_tokens(self, batch: Sequence[int]) -> int:
        """Real source tokens of a batch of examples: the weight of the encoder's hidden loss."""
        return sum(len(self.sources[self.source_indices[i]]) for i in batch)


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All examples once, in batches of neighbours in length, shuffled by (seed, epoch).

    Sorting within windows of 50 batches keeps padding low and the order random; the last batch may be smaller.
    """
    rng = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = batch_size * 50
    batches = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return batches


def shard_batch(batch: Sequence[int], rank: int, world_size: int, accumulation_steps: int) -> list[list[int]]:
    """A worker's micro-batches of a global batch; over all ranks each example appears once.

    Rows are dealt out in turn, so that every worker gets short and long ones alike.
    """
    mine = list(batch[rank::world_size])
    size = max(1, -(-len(mine) // accumulation_steps))
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def split_by_tokens(
    batch: Sequence[int], examples: Examples, max_tokens: int, source_weight: float = 1
) -> list[list[int]]:
    """A batch in micro-batches of at most `resolve_max_tokens` padded source and target tokens (at least one row each).

    A source token counts as `source_weight` of one.

    Rows keep their order: those of a batch are neighbours in length already.
    """
    parts: list[list[int]] = []
    source = target = 0
    for i in batch:
        longest = max(source, len(examples.sources[examples.source_indices[i]])), max(target, len(examples.targets[i]))
        if not parts or (len(parts[-1]) + 1) * (source_weight * longest[0] + longest[1]) > max_tokens:
            parts.append([])
            longest = len(examples.sources[examples.source_indices[i]]), len(examples.targets[i])
        source, target = longest
        parts[-1].append(i)
    return parts


def pad(rows: Sequence[Sequence[int]], value: int) -> list[list[int]]:
    """Rows of equal length, filled up at the end."""
    longest = max((len(row) for row in rows), default=0)
    return [[*row, *[value] * (longest - len(row))] for row in rows]


def bucket_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows longest first in batches of at most `resolve_max_tokens` padded tokens (at least one row each)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def tokens_key(rows: Sequence[Sequence[int]]) -> str:
    """A short content key of rows of numbers."""
    digest = hashlib.sha256(np.fromiter(map(len, rows), np.int32, len(rows)).tobytes())
    digest.update(np.fromiter(itertools.chain.from_iterable(rows), np.int32).tobytes())
    return digest.hexdigest()[:16]

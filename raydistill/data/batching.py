"""Tokenised examples, and batches whose content depends on the seed and the epoch only."""

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Examples:
    """Tokenised training examples. Example i pairs `sources[source_indices[i]]` with `targets[i]`.

    Several examples may share a source, for example the original target and a pseudo-label of one text.
    """

    sources: list[list[int]]
    targets: list[list[int]]
    source_indices: list[int]

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def sources_key(self) -> str:
        """Content key of the source tokens; depends on tokenizer, maximum length and language codes."""
        return tokens_key(self.sources)

    @cached_property
    def targets_key(self) -> str:
        """Content key of the target tokens and the source indices."""
        return f"{tokens_key(self.targets)}{tokens_key([self.source_indices])}"

    def with_token_ids(self, token_ids: Sequence[int]) -> "Examples":
        """A copy in another vocabulary, in which token i has the id `token_ids[i]`."""
        sources, targets = ([[token_ids[i] for i in row] for row in rows] for rows in (self.sources, self.targets))
        return Examples(sources, targets, self.source_indices)

    def count_target_tokens(self, batch: Sequence[int]) -> int:
        """Target tokens of a batch without padding: the weight of token-level losses."""
        return sum(len(self.targets[i]) for i in batch)

    def count_source_tokens(self, batch: Sequence[int]) -> int:
        """Source tokens of a batch without padding: the weight of the encoder's hidden loss."""
        return sum(len(self.sources[self.source_indices[i]]) for i in batch)


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of the indices of `lengths`, each index once, in an order given by `(seed, epoch)`.

    The indices are shuffled and sorted by length within windows of 50 batches, which keeps padding low; then the
    batches are shuffled. The last batch of a window may be smaller than `batch_size`.
    """
    rng = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window_size = batch_size * 50
    batches = []
    for start in range(0, len(order), window_size):
        window = sorted(order[start : start + window_size], key=lambda i: lengths[i])
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    rng.shuffle(batches)
    return batches


def shard_batch(batch: Sequence[int], rank: int, world_size: int, accumulation_steps: int) -> list[list[int]]:
    """The micro-batches of one worker; over all ranks, each example of the global batch occurs once.

    Workers take every `world_size`-th example, so that all get a similar mix of lengths.
    """
    shard = list(batch[rank::world_size])
    size = max(1, -(-len(shard) // accumulation_steps))
    return [shard[i : i + size] for i in range(0, len(shard), size)]


def split_by_tokens(
    batch: Sequence[int], examples: Examples, max_tokens: int, source_weight: float = 1
) -> list[list[int]]:
    """Split a batch into micro-batches of at most `max_tokens` padded tokens, but at least one example each.

    The order of examples is kept: examples of one batch have similar lengths already.

    Args:
        batch: Indices of examples.
        examples: The examples.
        max_tokens: Maximum of (`source_weight` * padded source tokens + padded target tokens).
        source_weight: Cost of a source token relative to a target token.
    """
    micro_batches: list[list[int]] = []
    source_length = target_length = 0
    for i in batch:
        own = len(examples.sources[examples.source_indices[i]]), len(examples.targets[i])
        longest = max(source_length, own[0]), max(target_length, own[1])
        if not micro_batches or (len(micro_batches[-1]) + 1) * (source_weight * longest[0] + longest[1]) > max_tokens:
            micro_batches.append([])
            longest = own
        source_length, target_length = longest
        micro_batches[-1].append(i)
    return micro_batches


def pad(rows: Sequence[Sequence[int]], value: int) -> list[list[int]]:
    """Pad rows with `value` at the end, to the length of the longest row."""
    longest = max((len(row) for row in rows), default=0)
    return [[*row, *[value] * (longest - len(row))] for row in rows]


def bucket_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest rows first, of at most `max_tokens` padded tokens but at least one row."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def tokens_key(rows: Sequence[Sequence[int]]) -> str:
    """Content key of rows of integers: 16 hex digits of a SHA-256 over lengths and values."""
    digest = hashlib.sha256(np.fromiter(map(len, rows), np.int32, len(rows)).tobytes())
    digest.update(np.fromiter(itertools.chain.from_iterable(rows), np.int32).tobytes())
    return digest.hexdigest()[:16]

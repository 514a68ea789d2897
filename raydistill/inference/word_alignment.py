"""Word translation probabilities from pairs of texts: IBM model 1, trained with EM.

Brown et al. 1993, "The Mathematics of Statistical Machine Translation", section 4.4. Each target token is aligned with
one source token of its pair, or with the empty token, and t(target | source) is the probability of the translation:

    E step: p(source | target, pair) = t(target | source) / (sum of t(target | s) over the source tokens s of the pair)
    M step: t(target | source) = (sum of p over all pairs), normalised over the targets of each source token

A token that occurs several times in a text counts once. numpy only: the aligner libraries on PyPI need a compiler
(eflomal, GPL) or a downloaded multilingual model (simalign, awesome-align).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Rows = Sequence[Sequence[int]]

EMPTY = -1  # the empty source token
# Pairs of a source and a target token that are processed together: 200 MB of arrays.
CHUNK_PAIRS = 4_000_000


@dataclass(frozen=True)
class Translations:
    """Translation probabilities: three arrays of equal length, one entry per pair of tokens, sorted by target.

    Attributes:
        sources: Source token ids; `EMPTY` for the empty token.
        targets: Target token ids.
        probabilities: t(target | source).
    """

    sources: np.ndarray
    targets: np.ndarray
    probabilities: np.ndarray

    def best(self, num_candidates: int, ignore: np.ndarray) -> dict[int, np.ndarray]:
        """The most probable targets of each source token, most probable first.

        Args:
            num_candidates: Targets per source token, at most.
            ignore: Target ids that are not candidates.
        """
        keep = (self.sources != EMPTY) & ~np.isin(self.targets, ignore)
        sources, targets, probabilities = self.sources[keep], self.targets[keep], self.probabilities[keep]
        order = np.lexsort((targets, -probabilities, sources))
        sources, targets = sources[order], targets[order]
        tokens, starts = np.unique(sources, return_index=True)
        lists = np.split(targets, starts)[1:]
        return {int(token): ids[:num_candidates] for token, ids in zip(tokens, lists, strict=True)}


@dataclass(frozen=True)
class _Chunk:
    """All token pairs of some target tokens. Each pair of texts that holds such a target contributes an occurrence.

    Attributes:
        sources: Source id of each token pair, [pairs].
        targets: Target id of each token pair, [pairs].
        pair_indices: The token pairs of all occurrences, concatenated, [sum of the lengths].
        starts: Where each occurrence begins in `pair_indices`, [occurrences].
    """

    sources: np.ndarray
    targets: np.ndarray
    pair_indices: np.ndarray
    starts: np.ndarray


def translation_probabilities(
    sources: Rows, targets: Rows, iterations: int = 5, max_pairs: int = 100_000_000
) -> Translations:
    """Estimate t(target | source) from aligned texts with EM, from uniform probabilities.

    Args:
        sources: Token ids of the source texts.
        targets: Token ids of the target texts; row i translates or summarises `sources[i]`.
        iterations: Number of EM iterations.
        max_pairs: Upper bound on the token pairs of all rows, which take 4 bytes each; if there are more, evenly spaced
            rows are used.
    """
    chunks = list(_make_chunks(*_sample_rows(sources, targets, max_pairs)))
    if not chunks:
        empty = np.empty(0, np.int64)
        return Translations(empty, empty, np.empty(0, np.float32))
    probabilities = [np.ones(len(chunk.sources), np.float32) for chunk in chunks]
    vocab_size = 1 + max(int(chunk.sources.max()) for chunk in chunks)
    for _ in range(iterations):
        counts = [_expected_counts(chunk, t) for chunk, t in zip(chunks, probabilities, strict=True)]
        totals = np.zeros(vocab_size + 1)  # the last entry belongs to the empty token
        for chunk, count in zip(chunks, counts, strict=True):
            totals += np.bincount(chunk.sources % (vocab_size + 1), count, vocab_size + 1)
        probabilities = [
            (count / totals[chunk.sources]).astype(np.float32) for chunk, count in zip(chunks, counts, strict=True)
        ]
    return Translations(
        np.concatenate([chunk.sources for chunk in chunks]),
        np.concatenate([chunk.targets for chunk in chunks]),
        np.concatenate(probabilities),
    )


def _expected_counts(chunk: _Chunk, probabilities: np.ndarray) -> np.ndarray:
    """The E step: the expected number of alignments of each token pair, [pairs]."""
    posterior = probabilities[chunk.pair_indices]
    lengths = np.diff(chunk.starts, append=len(chunk.pair_indices))
    posterior /= np.repeat(np.add.reduceat(posterior, chunk.starts), lengths)
    return np.bincount(chunk.pair_indices, posterior, len(chunk.sources))


def _sample_rows(sources: Rows, targets: Rows, max_pairs: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The distinct tokens of each text, with the empty token in each source; rows without a target are left out."""
    rows = [i for i in range(len(targets)) if len(targets[i])]
    num_pairs = sum((len(sources[i]) + 1) * len(targets[i]) for i in rows)
    if num_pairs > max_pairs:
        size = max(1, len(rows) * max_pairs // num_pairs)
        rows = [rows[i * len(rows) // size] for i in range(size)]
    distinct = [np.unique(np.asarray([EMPTY, *sources[i]], np.int64)) for i in rows]
    return distinct, [np.unique(np.asarray(targets[i], np.int64)) for i in rows]


def _make_chunks(sources: list[np.ndarray], targets: list[np.ndarray]) -> Iterator[_Chunk]:
    """Yield the token pairs, grouped by target: a target token is in one chunk only."""
    if not targets:
        return
    lengths = np.array([len(row) for row in sources])
    offsets = np.append(0, np.cumsum(lengths))
    flat_sources = np.concatenate(sources)
    flat_targets = np.concatenate(targets)
    rows = np.repeat(np.arange(len(targets)), [len(row) for row in targets])
    order = np.argsort(flat_targets, kind="stable")
    flat_targets, rows = flat_targets[order], rows[order]
    ends = np.append(np.flatnonzero(np.diff(flat_targets)) + 1, len(flat_targets))  # after the last row of each target
    pairs_before = np.append(0, np.cumsum(lengths[rows]))
    start = 0
    while start < len(rows):
        within = ends[(ends > start) & (pairs_before[ends] - pairs_before[start] <= CHUNK_PAIRS)]
        end = int(within[-1]) if len(within) else int(ends[ends > start][0])
        yield _make_chunk(flat_sources, offsets, rows[start:end], flat_targets[start:end])
        start = end


def _make_chunk(flat_sources: np.ndarray, offsets: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> _Chunk:
    """The token pairs of occurrences: `targets[i]` occurs in row `rows[i]`, whose source starts at `offsets[row]`."""
    lengths = offsets[rows + 1] - offsets[rows]
    starts = np.append(0, np.cumsum(lengths)[:-1])
    positions = np.arange(lengths.sum()) + np.repeat(offsets[rows] - starts, lengths)
    size = int(flat_sources.max()) + 2
    keys = np.repeat(targets, lengths) * size + flat_sources[positions] + 1  # the empty token is -1
    pairs, indices = np.unique(keys, return_inverse=True)
    return _Chunk(pairs % size - 1, pairs // size, indices.astype(np.int32), starts)

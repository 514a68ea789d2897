"""Near duplicates between texts, by MinHash: which texts are almost equal to rows of the evaluation splits.

The similarity of two texts is the Jaccard index of their sets of character n-grams, after case and white space are
normalised. MinHash with locality-sensitive hashing selects candidates: texts of similarity s share a band with
probability 1 - (1 - s^r)^b for b bands of r hash values (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets,
section 3.4). The similarity of each candidate is then computed exactly.
"""

import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

NGRAM_CHARS = 5
MIN_SIMILARITY = 0.7  # of near duplicates
# A pair of similarity 0.7 becomes a candidate with probability 0.99, a pair of 0.8 with 0.99995.
BANDS, BAND_ROWS = 25, 5
_WEIGHTS = np.random.default_rng(0).integers(2**63, size=NGRAM_CHARS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


class Match(NamedTuple):
    """A near duplicate: the split and the id of the row, and the similarity, 0 to 1."""

    split: str
    id: str
    similarity: float

    def __str__(self) -> str:
        kind = "equal to" if self.similarity == 1 else f"similar ({self.similarity:.2f}) to"
        return f"{kind} row {self.id!r} of the {self.split} split"


class NearDuplicateIndex:
    """An index of texts that finds near duplicates of other texts.

    Args:
        texts: The split, the id and the text of each row.
    """

    def __init__(self, texts: Iterable[tuple[str, str, str]]) -> None:
        from datasketch import MinHash, MinHashLSH

        self._empty: Any = MinHash(num_perm=BANDS * BAND_ROWS, hashfunc=int)
        self._index: Any = MinHashLSH(num_perm=BANDS * BAND_ROWS, params=(BANDS, BAND_ROWS))
        self._rows: list[tuple[str, str]] = []
        self._ngrams: list[np.ndarray] = []
        for split, row_id, text in texts:
            ngrams = hash_ngrams(text)
            self._index.insert(len(self._rows), self._signature(ngrams))
            self._rows.append((split, row_id))
            self._ngrams.append(ngrams)
        self._known = np.unique(np.concatenate(self._ngrams)) if self._ngrams else np.empty(0, np.uint32)

    def find(self, text: str) -> Match | None:
        """The most similar row whose similarity to a text is at least `MIN_SIMILARITY`; None if there is none."""
        ngrams = hash_ngrams(text)
        # The index of Jaccard is at most the share of the n-grams that occur in any row.
        if np.isin(ngrams, self._known, assume_unique=True).sum() < MIN_SIMILARITY * len(ngrams):
            return None
        similarities = {row: jaccard(ngrams, self._ngrams[row]) for row in self._index.query(self._signature(ngrams))}
        best = max(similarities, key=lambda row: (similarities[row], -row), default=None)
        if best is None or similarities[best] < MIN_SIMILARITY:
            return None
        split, row_id = self._rows[best]
        return Match(split, row_id, similarities[best])

    def _signature(self, ngrams: np.ndarray) -> Any:
        signature = self._empty.copy()
        signature.update_batch(ngrams.tolist())
        return signature


def normalize_text(text: str) -> str:
    """A text in Unicode's form NFKC, without case, and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hash_ngrams(text: str) -> np.ndarray:
    """Hashes of the distinct character n-grams of a normalised text: uint32 [n-grams], sorted. A text has at least one.

    The hash is the upper half of a sum of characters, each multiplied by an odd weight, modulo 2^64 (multilinear).
    """
    characters = np.frombuffer(normalize_text(text).encode("utf-32-le"), np.uint32).astype(np.uint64)
    characters = np.pad(characters, (0, max(0, NGRAM_CHARS - len(characters))))
    windows = np.lib.stride_tricks.sliding_window_view(characters, NGRAM_CHARS)
    return np.unique(((windows * _WEIGHTS).sum(axis=1, dtype=np.uint64) >> np.uint64(32)).astype(np.uint32))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """The size of the intersection of two sets divided by that of their union; the sets are arrays without repeats."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)

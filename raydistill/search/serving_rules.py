"""Which serving configurations of a checkpoint are worth scoring and timing, as pure functions.

Two rules skip combinations that no budget would select:

1. By speed. For a shape and a number of beams, an engine variant is skipped if another variant is at least as exact and
   at least as fast (`undominated_variants`).
2. By score. All remaining variants are scored with the checkpoint's own decoding. The fastest variant that is not
   inferior to the most exact one makes slower variants unnecessary: these are not scored with other decodings, unless
   a decoding has no other variant (`configs_to_score`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from raydistill.config.serving import EngineVariant, ServingConfig
from raydistill.evaluation.metrics import paired_bootstrap

# A less exact variant must save at least this share of the time of a more exact one: first-pass times are rough.
MIN_SAVING = 0.05
# A variant is not inferior if the lower end of the paired 95 % interval of (variant - most exact variant) is above
# minus this number of points.
MAX_INFERIORITY = 0.3

# Per-row statistics of a configuration; None if the checkpoint was not scored with that configuration.
RowsOf = Callable[[ServingConfig], np.ndarray | None]


def undominated_variants(times: Mapping[EngineVariant, float]) -> list[EngineVariant]:
    """The variants that no other variant dominates, fastest first.

    Args:
        times: Milliseconds of each variant, for one shape and one number of beams.
    """

    def is_dominated(variant: EngineVariant) -> bool:
        return any(
            other != variant and other.is_as_exact_as(variant) and times[other] * (1 - MIN_SAVING) <= times[variant]
            for other in times
        )

    return sorted((variant for variant in times if not is_dominated(variant)), key=lambda variant: times[variant])


def configs_to_score(
    decodings: Sequence[ServingConfig],
    variants: Mapping[int, Sequence[EngineVariant]],
    rows_of: RowsOf,
    metric: str,
) -> list[ServingConfig]:
    """The configurations to score a checkpoint with, given the scores that exist.

    While a score with the checkpoint's own decoding is missing, only configurations with that decoding are returned.

    Args:
        decodings: The checkpoint's own decoding, then the others; their precision and shortlist are ignored.
        variants: By number of beams, the variants that are not dominated, fastest first.
        rows_of: Per-row statistics of the scores that exist.
        metric: Name of the main score.
    """
    own, *others = decodings
    fastest_first = variants[own.beams]
    first = [own.with_variant(variant) for variant in sorted(fastest_first, key=lambda variant: variant.exactness)]
    rows = {config.variant: rows_of(config) for config in first}
    if any(array is None for array in rows.values()):
        return first
    most_exact = rows[first[0].variant]
    assert most_exact is not None
    fast_enough = []
    for variant in fastest_first:
        fast_enough.append(variant)
        if variant == first[0].variant or _is_not_inferior(metric, rows[variant], most_exact):
            break
    configs = list(first)
    for decoding in others:
        kept = sorted(variants[decoding.beams], key=lambda variant: variant.exactness)
        # A noisy first pass may have kept none of `fast_enough` for this number of beams. The decoding is then scored
        # with all its variants.
        wanted = [variant for variant in kept if variant in fast_enough] or kept
        configs += [decoding.with_variant(variant) for variant in wanted]
    return configs


def _is_not_inferior(metric: str, rows: np.ndarray | None, most_exact: np.ndarray) -> bool:
    """Whether the paired interval of the difference rows - most_exact lies above `-MAX_INFERIORITY`."""
    assert rows is not None
    if rows.shape != most_exact.shape or rows.dtype != most_exact.dtype:
        return False  # scored on other rows
    if np.array_equal(rows, most_exact):
        return True
    key = _RowsKey(rows.tobytes(), most_exact.tobytes(), rows.dtype.str, rows.shape)
    return _lower_end(metric, key) > -MAX_INFERIORITY


class _RowsKey(NamedTuple):
    """Two arrays of per-row statistics, as the key of a cache."""

    rows: bytes
    most_exact: bytes
    dtype: str
    shape: tuple[int, ...]


@lru_cache(maxsize=1024)
def _lower_end(metric: str, key: _RowsKey) -> float:
    """Lower end of the paired interval, in points.

    The end is cached, because the rules read the same pair of scores for every state.
    """
    rows, most_exact = (np.frombuffer(part, key.dtype).reshape(key.shape) for part in (key.rows, key.most_exact))
    return paired_bootstrap(metric, rows, most_exact).low

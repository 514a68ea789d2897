"""Which serving configurations are scored: dominated variants, and variants that a faster one makes unnecessary."""

import numpy as np

from raydistill.config.serving import EngineVariant, ServingConfig
from raydistill.search.serving_rules import configs_to_score, undominated_variants

FP32, INT8 = EngineVariant("fp32", "off"), EngineVariant("int8", "off")
FP32_SHORT, INT8_SHORT = EngineVariant("fp32", 4000), EngineVariant("int8", 4000)
OWN, GREEDY = (ServingConfig(beams=beams, length_penalty=1.0) for beams in (4, 1))
VARIANTS = [INT8_SHORT, FP32_SHORT, INT8, FP32]  # the fastest first


def test_a_variant_is_skipped_if_a_more_exact_one_is_as_fast() -> None:
    times = {FP32: 100.0, INT8: 60.0, FP32_SHORT: 80.0, INT8_SHORT: 40.0}
    assert undominated_variants(times) == [INT8_SHORT, INT8, FP32_SHORT, FP32]
    assert undominated_variants({**times, INT8: 99.0}) == [INT8_SHORT, FP32_SHORT, FP32]  # within 5 %
    assert undominated_variants({**times, INT8_SHORT: 61.0}) == [INT8, FP32_SHORT, FP32]
    # int8 with the whole vocabulary and fp32 with a list do not dominate each other
    assert undominated_variants({INT8: 60.0, FP32_SHORT: 60.0}) == [INT8, FP32_SHORT]


def wanted(rows: dict[EngineVariant, np.ndarray]) -> list[tuple[int, EngineVariant]]:
    def rows_of(config: ServingConfig) -> np.ndarray | None:
        return rows.get(config.variant) if config.beams == OWN.beams else None

    configs = configs_to_score([OWN, GREEDY], {4: VARIANTS, 1: VARIANTS}, rows_of, "rouge2")
    return [(config.beams, config.variant) for config in configs]


def test_other_decodings_are_scored_with_the_fastest_variant_that_is_not_inferior() -> None:
    """400 rows with a difference of standard deviation 1: the interval is 0.1 points to either side."""
    base = np.linspace(0, 40, 400)
    noise = np.where(np.arange(400) % 2 == 0, 1.0, -1.0)
    own = [(4, variant) for variant in (FP32, FP32_SHORT, INT8, INT8_SHORT)]  # the most exact first
    assert wanted({}) == own
    assert wanted({FP32: base, INT8: base}) == own  # two scores are missing

    def differing_by(points: dict[EngineVariant, float]) -> dict[EngineVariant, np.ndarray]:
        return {variant: base + points.get(variant, 0.0) + noise * (variant != FP32) for variant in VARIANTS}

    assert wanted(differing_by({})) == [*own, (1, INT8_SHORT)]
    # 0.25 points lower, of which the interval reaches 0.35: inferior; the next variant by speed is not
    lower = {INT8_SHORT: -0.25}
    assert wanted(differing_by(lower)) == [*own, (1, FP32_SHORT), (1, INT8_SHORT)]
    # Nothing but the most exact variant is good enough: everything is scored
    lower = dict.fromkeys((INT8_SHORT, FP32_SHORT, INT8), -5.0)
    assert wanted(differing_by(lower)) == [*own, *((1, variant) for variant in (FP32, FP32_SHORT, INT8, INT8_SHORT))]


def test_a_variant_that_is_dominated_with_other_beams_is_not_scored_with_them() -> None:
    base = np.linspace(0, 40, 400)
    variants = {4: VARIANTS, 1: [INT8_SHORT, FP32]}
    configs = configs_to_score([OWN, GREEDY], variants, lambda config: base, "rouge2")
    assert [config.variant for config in configs if config.beams == 1] == [INT8_SHORT]


def test_each_decoding_is_scored_with_at_least_one_variant() -> None:
    """The first pass found no fast variant with one beam, as a noisy machine may have it."""
    base = np.linspace(0, 40, 400)
    configs = configs_to_score([OWN, GREEDY], {4: VARIANTS, 1: [FP32]}, lambda config: base, "rouge2")
    assert [config.variant for config in configs if config.beams == 1] == [FP32]

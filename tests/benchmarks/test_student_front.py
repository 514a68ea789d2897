"""Equal training time and the comparison at equal latency of benchmarks.student_front."""

from benchmarks.student_front import (
    RECIPES,
    Measurements,
    ShapeTiming,
    StudentRecipe,
    StudentScore,
    as_markdown,
    comparisons,
    is_as_fast,
    steps_of_equal_time,
)

OLD = StudentRecipe("6-1", 5e-4, "6-1", version=1)
NEW = StudentRecipe("2-2", 2e-3, "6-1")
PRUNED = StudentRecipe("2-2", 2e-3, "6-1", ffn=0.25)
TWIN = StudentRecipe("6-1", 4e-3, "6-1")
LONGER = StudentRecipe("3-3", 2e-3, "6-3")


def test_steps_follow_from_the_median_ratio_of_the_times_of_a_step():
    # 100 over 200, 50 over 125 and 300 over 600 milliseconds: the median ratio is 0.5, whatever the machine's speed.
    times = {OLD.name: [100.0, 50.0, 300.0], NEW.name: [200.0, 125.0, 600.0]}
    assert steps_of_equal_time(times, [OLD, NEW], 681) == {OLD.name: 681, NEW.name: 340}


def entry(recipe: StudentRecipe, beams: int, *validation: float | None) -> StudentScore:
    test = tuple(None if value is None else value - 2 for value in validation)
    return StudentScore(recipe=recipe.name, precision="fp32", beams=beams, validation=validation, test=test)


def timing(shape: str, beams: int, interval: tuple[float, float] | None) -> ShapeTiming:
    ratio = None if interval is None else sum(interval) / 2
    key = {"shape": shape, "beams": beams, "precision": "fp32", "baseline": "6-1"}
    return ShapeTiming(**key, ratio=ratio, interval=interval, stop_reason="bounds_cleared")


SCORES = [
    entry(OLD, 4, 17.0, 18.0),
    entry(OLD, 1, 15.0, 16.0),
    entry(NEW, 4, 34.0, 35.0),  # slower
    entry(NEW, 1, 33.0, 34.0),
    entry(PRUNED, 4, 33.5, 34.5),  # not certain
    entry(PRUNED, 1, 32.0, None),  # a run failed
    entry(LONGER, 1, 35.0, 36.0),  # trained for longer than version 1's 6-1
]
TIMINGS = [
    timing("2-2", 4, (1.1, 1.2)),
    timing("2-2", 1, (0.7, 0.8)),
    timing("2-2-ffn0.25", 4, (0.9, 1.05)),
    timing("2-2-ffn0.25", 1, (0.6, 0.7)),
    timing("3-3", 1, (0.4, 0.5)),
]
MEASURED = Measurements(SCORES, TIMINGS, [OLD, NEW, PRUNED, LONGER])


def test_the_best_student_is_chosen_by_validation_among_those_that_are_certainly_not_slower():
    assert MEASURED.best_at_latency("6-1", "fp32") == (SCORES[0], SCORES[3])
    assert MEASURED.best_at_latency("6-1", "fp32", beams=4) == (SCORES[0], None)


def test_a_student_of_the_same_shape_and_beams_is_as_fast_without_a_timing():
    twin = entry(TWIN, 4, 32.0, 33.0)
    assert is_as_fast(twin, "6-1", "6-1", [])
    assert not is_as_fast(twin, "6-1", "6-3", [])
    assert not is_as_fast(entry(TWIN, 2, 32.0), "6-1", "6-1", [])
    measured = Measurements([*SCORES, twin], TIMINGS, [OLD, NEW, PRUNED, LONGER, TWIN])
    assert measured.best_at_latency("6-1", "fp32", beams=4) == (SCORES[0], twin)


def test_a_candidate_was_trained_for_no_longer():
    assert [TWIN.is_candidate(baseline) for baseline in ("6-1", "6-3")] == [True, True]
    assert [LONGER.is_candidate(baseline) for baseline in ("6-1", "6-3")] == [False, True]
    assert not OLD.is_candidate("6-1")


def test_every_candidate_is_timed_except_the_shape_and_beams_of_the_baseline():
    pairs = [
        (shape, beams) for shape, precision, beams, _ in comparisons([OLD, TWIN, NEW], (1, 4)) if precision == "fp32"
    ]
    assert pairs == [("6-1", 1), ("2-2", 1), ("2-2", 4)]


def test_tables_name_failed_runs():
    scores = [score.model_copy(update={"precision": p}) for p in ("fp32", "int8") for score in SCORES]
    measured = Measurements(scores, TIMINGS, [OLD, NEW, PRUNED])
    scores[:] = [score for score in scores if score.recipe != LONGER.name]
    text = as_markdown(measured, dict.fromkeys((r.name for r in measured.recipes), 681), 16)
    assert f"| 6-1 | fp32 | 15.50 (15.00, 16.00) | any | {NEW.name} | 1 | 31.50 (31.00, 32.00) |" in text
    assert "| 6-1 | fp32 | 15.50 (15.00, 16.00) | 4 | none |" in text
    assert f"| {PRUNED.name} | 681 | int8 | 1 | 32.00 (32.00, failed) | 30.00 (30.00, failed) | 0.0 |" in text
    assert "| 2-2 | fp32 | 4 | 6-1 | 1.15 [1.10, 1.20] |" in text


def test_every_comparison_has_one_student_of_version_1_at_its_learning_rate():
    baselines = [recipe for recipe in RECIPES if recipe.version == 1]
    assert {(recipe.size, recipe.learning_rate) for recipe in baselines} == {
        ("6-1", 5e-4),
        ("6-3", 5e-4),
        ("6-6", 5e-4),
    }
    assert all(recipe.baseline == recipe.size for recipe in baselines)
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)

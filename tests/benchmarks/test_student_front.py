"""Equal training time and the comparison at equal latency of benchmarks.student_front."""

from benchmarks.student_front import (
    RECIPES,
    StudentRecipe,
    StudentScore,
    as_markdown,
    best_at_latency,
    steps_of_equal_time,
)

OLD = StudentRecipe("6-1", 5e-4, "6-1", version=1)
NEW = StudentRecipe("2-2", 2e-3, "6-1")
PRUNED = StudentRecipe("2-2", 2e-3, "6-1", ffn=0.25)


def test_steps_follow_from_the_median_ratio_of_the_times_of_a_step():
    # 100 over 200, 50 over 125 and 300 over 600 milliseconds: the median ratio is 0.5, whatever the machine's speed.
    times = {OLD.name: [100.0, 50.0, 300.0], NEW.name: [200.0, 125.0, 600.0]}
    assert steps_of_equal_time(times, [OLD, NEW], 681) == {OLD.name: 681, NEW.name: 340}


def entry(recipe: StudentRecipe, beams: int, validation: float, interval: tuple[float, float] | None) -> StudentScore:
    ratio = None if interval is None else sum(interval) / 2
    scores = {"validation": (validation, validation + 1), "test": (validation - 2, validation - 1)}
    return StudentScore(recipe=recipe.name, precision="fp32", beams=beams, ratio=ratio, interval=interval, **scores)


def test_the_best_student_is_chosen_by_validation_among_those_that_are_certainly_not_slower():
    scores = [
        entry(OLD, 4, 17.0, None),
        entry(OLD, 1, 15.0, (0.5, 0.6)),
        entry(NEW, 4, 34.0, (1.1, 1.2)),  # slower
        entry(NEW, 1, 33.0, (0.7, 0.8)),
        entry(PRUNED, 4, 33.5, (0.9, 1.05)),  # not certain
        entry(PRUNED, 1, 32.0, (0.6, 0.7)),
    ]
    recipes = [OLD, NEW, PRUNED]
    assert best_at_latency(scores, recipes, "6-1", "fp32") == (scores[0], scores[3])
    assert best_at_latency(scores[:3], recipes, "6-1", "fp32") == (scores[0], None)
    int8 = [score.model_copy(update={"precision": "int8"}) for score in scores]
    text = as_markdown([*scores, *int8], recipes, dict.fromkeys((r.name for r in recipes), 681))
    assert f"| 6-1 | fp32 | 15.50 (15.00, 16.00) | {NEW.name} | 1 | 31.50 (31.00, 32.00) |" in text
    assert f"| {NEW.name} | 681 | int8 | 4 | 34.50 (34.00, 35.00) | 32.50 (32.00, 33.00) | 1.15 [1.10, 1.20] |" in text


def test_every_comparison_has_one_student_of_version_1_at_its_learning_rate():
    baselines = [recipe for recipe in RECIPES if recipe.version == 1]
    assert {(recipe.size, recipe.learning_rate) for recipe in baselines} == {
        ("6-1", 5e-4),
        ("6-3", 5e-4),
        ("6-6", 5e-4),
    }
    assert all(recipe.baseline == recipe.size for recipe in baselines)
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)

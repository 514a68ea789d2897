"""The comparison of rankings by hand."""

from benchmarks.validation_precision import Student, compare_rankings, rotated


def students(*scores: float) -> list[Student]:
    shapes = ["2-3", "2-3", "2-1", "2-1"]
    return [
        Student(str(i), shape, score, 1.0, 1.0) for i, (shape, score) in enumerate(zip(shapes, scores, strict=True))
    ]


def test_agreement_by_hand() -> None:
    # Ranks 4 3 2 1 against 3 4 2 1: one of six pairs is exchanged, so that tau is (5 - 1) / 6,
    # and Spearman's rho is 1 - 6 * (1 + 1) / (4 * 15)
    result = compare_rankings(students(70, 69.5, 50, 45), students(69.8, 69.9, 50.5, 45))
    assert round(result.kendall[0], 6) == round(4 / 6, 6)
    assert round(result.spearman[0], 6) == 0.8
    assert result.largest_loss == 0.5, "the variant prefers the student with 69.5"
    assert round(result.largest_difference, 6) == 0.5
    assert round(result.mean_difference, 6) == round((-0.2 + 0.4 + 0.5) / 4, 6)
    assert result.kendall[1] <= result.kendall[0] <= result.kendall[2]


def test_equal_ranks_agree_fully() -> None:
    result = compare_rankings(students(4, 3, 2, 1), students(8, 6, 4, 2))
    assert (result.spearman[0], result.kendall[0], result.largest_loss) == (1, 1, 0)


def test_another_variant_is_first_for_each_student():
    orders = [rotated(["a", "b", "c"], number) for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]

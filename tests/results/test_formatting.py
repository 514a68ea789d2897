"""Numbers and intervals as text."""

from raydistill.results.formatting import (
    describe_split,
    format_count,
    format_interval,
    format_number,
    format_score,
)


def test_numbers_have_fixed_decimals_and_a_mark_if_missing() -> None:
    assert format_number(2.345, 1) == "2.3"
    assert format_number(0.5, 2, sign=True) == "+0.50"
    assert format_number(-0.5, 2, sign=True) == "-0.50"
    assert (format_number(None, 2), format_number(None, 2, missing="")) == ("-", "")


def test_a_noun_has_a_plural_unless_the_count_is_one() -> None:
    assert [format_count(n, "trial") for n in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]


def test_a_score_is_followed_by_its_interval() -> None:
    assert format_interval((-1, 2.5), sign=True) == "[-1.00, +2.50]"
    assert format_score(10, (9, 11)) == "10.00 [9.00, 11.00]"
    assert format_score(10, None) == "10.00"
    assert format_score(None, (9, 11)) == "-"


def test_the_rows_of_the_choice_are_described() -> None:
    assert [describe_split(split) for split in ("validation", "selection", "test")] == [
        "validation",
        "the selection rows",
        "test",
    ]

"""Suggestions for mistyped names."""

from raydistill.core.suggestions import closest_name


def test_closest_name_is_the_most_similar_of_the_known_names():
    assert closest_name("sweeep", ["status", "sweep", "shrink"]) == "sweep"
    assert closest_name("sweeep", {"sweep": 1, "status": 2}) == "sweep"


def test_no_name_is_closest_if_none_is_similar_enough():
    """The ratio of "abcd" and "abxy" is 2 * 2 / (4 + 4) = 0.5, two common characters of eight."""
    assert closest_name("abcd", ["abxy"]) is None
    assert closest_name("abcd", ["abxy"], cutoff=0.5) == "abxy"
    assert closest_name("abcd", []) is None

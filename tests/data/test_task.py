"""The guess of a corpus's task."""

import pytest

from raydistill.config.run import Columns
from raydistill.data.corpus import Corpus
from raydistill.data.task import guess_task

ARTICLE = "The council met on Monday to discuss the bridge over the river, and delayed the vote to the spring of 2027."


def corpus(source: str, target: str, columns: tuple[str, str] = ("source", "target")) -> Corpus:
    return Corpus("c", "train", ["1"], [source], [target], Columns(source=columns[0], target=columns[1]))


@pytest.mark.parametrize("columns", [("en", "de"), ("translation.en", "translation.ro"), ("eng_Latn", "deu_Latn")])
def test_columns_that_name_languages_are_a_translation(columns):
    guess = guess_task(corpus("a house", "ein Haus", columns))
    assert guess.is_translation
    assert guess.is_certain
    assert guess.languages == tuple(name.rpartition(".")[2] for name in columns)


def test_texts_of_equal_length_without_common_words_look_like_a_translation():
    guess = guess_task(corpus("two dogs run in the snow", "zwei Hunde rennen im Schnee"))
    assert guess.is_translation
    assert not guess.is_certain
    assert "1.12 times the characters" in guess.reason  # 27 of 24 characters
    assert "0% of its words" in guess.reason


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (ARTICLE, "Bridge vote delayed."),  # short, as a summary
        ("he go to the school", "he goes to the school"),  # as long, and with the words of the source: a correction
    ],
)
def test_other_texts_are_not_a_translation(source, target):
    guess = guess_task(corpus(source, target, ("text", "summary")))
    assert not guess.is_translation
    assert guess.languages is None

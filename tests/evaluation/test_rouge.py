"""ROUGE of any script: rouge-score's numbers for Latin text, hand-worked numbers for other scripts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from raydistill.evaluation.rouge import is_mostly_latin, rouge2_rows, rouge_rows, split_sentences, unicode_tokens

# English and other Latin text, with letters and marks that rouge-score drops
LATIN_WORDS = [
    *("the", "Runs", "running", "cats", "café", "naïve", "Müller's", "Zażółć", "İstanbul", "m²", "β-carotene"),
    *("10,000", "“quoted”", "don't", "—", "…", "N/A", "ﬁnally", "\u212a", "e\u0301tude", "ª", "日"),
]
LATIN_TEXTS = st.lists(st.sampled_from(LATIN_WORDS), max_size=9).map(" ".join)


@settings(deadline=None, max_examples=80)
@given(LATIN_TEXTS, LATIN_TEXTS.map("the {} in the end".format))
def test_latin_text_has_the_numbers_of_rouge_score(prediction: str, reference: str) -> None:
    expected = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, prediction)
    rows = rouge_rows([prediction], [reference])
    for name, score in expected.items():
        assert rows[name].tolist() == [100 * score.fmeasure]
    assert rouge2_rows([prediction], [reference]).tolist() == rows["rouge2"].tolist()


def test_rouge_of_russian_by_hand() -> None:
    # кошка сидит на окне / на окне сидит кошка.: 4 of 4 words; bigrams: only "на окне", 1 of 3 on both sides; the
    # longest common subsequence is "на окне", 2 of 4
    rows = rouge_rows(["Кошка сидит на окне"], ["На окне сидит кошка."])
    assert rows["rouge1"] == pytest.approx([100.0])
    assert rows["rouge2"] == pytest.approx([100 / 3])
    assert rows["rougeL"] == pytest.approx([50.0])


def test_rouge_of_chinese_by_hand() -> None:
    # 我喜欢北京 / 我爱北京: characters 我 北 京 match, 3 of 5 and 3 of 4; bigrams: 北京, 1 of 4 and 1 of 3
    rows = rouge_rows(["我喜欢北京。"], ["我爱北京！"])
    assert rows["rouge1"] == pytest.approx([100 * 2 * 3 / (5 + 4)])
    assert rows["rouge2"] == pytest.approx([100 * 2 * 1 / (4 + 3)])
    assert rows["rougeL"] == pytest.approx([100 * 2 * 3 / (5 + 4)])


def test_rouge_lsum_of_chinese_takes_sentences_in_any_order() -> None:
    rows = rouge_rows(["一二三。四五六。"], ["四五六。一二三。"])
    assert rows["rougeL"] == pytest.approx([50.0])
    assert rows["rougeLsum"] == pytest.approx([100.0])


def test_rouge_of_hindi_and_arabic_by_hand() -> None:
    # Words with vowel signs stay whole: मैं घर जाता हूँ / मैं घर गया shares 2 of 4 and 2 of 3 words
    assert rouge_rows(["मैं घर जाता हूँ।"], ["मैं घर गया।"])["rouge1"] == pytest.approx([100 * 2 * 2 / (4 + 3)])
    # ذهب الولد / ذهب الولد إلى البيت: 2 of 2 and 2 of 4 words
    assert rouge_rows(["ذهب الولد"], ["ذهب الولد إلى البيت؟"])["rouge1"] == pytest.approx([100 * 2 * 2 / (2 + 4)])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Running 5км", ["run", "5", "км"]),
        ("東京タワー２０２４", ["東", "京", "タ", "ワ", "ー", "2024"]),
        ("ภาษาไทย", ["ภ", "า", "ษ", "า", "ไ", "ท", "ย"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("می‌خواهم ۱۲", ["می‌خواهم", "۱۲"]),
        ("서울에서 만나요!", ["서울에서", "만나요"]),
        ("Ёлка\u0301, ЁЛКА\u0301", ["ёлка\u0301", "ёлка\u0301"]),
        ("…—!", []),
    ],
)
def test_tokens_of_any_script(text: str, tokens: list[str]) -> None:
    assert unicode_tokens(text) == tokens


def test_the_reference_decides_the_tokens_of_both_sides() -> None:
    assert is_mostly_latin("β-carotene in 日本")
    assert is_mostly_latin("12 + 3…")
    assert not is_mostly_latin("В городе Paris")
    # An output in another script than the reference has no token in common with the reference
    assert rouge_rows(["кошка"], ["the cat"])["rouge1"].tolist() == [0]
    assert rouge_rows(["the cat"], ["кошка на окне the cat"])["rouge1"] == pytest.approx([100 * 2 * 2 / (2 + 5)])


def test_sentences_of_other_scripts() -> None:
    assert split_sentences("今天下雨。你好吗？好！") == ["今天下雨。", "你好吗？", "好！"]
    assert split_sentences("मैं घर गया। वह आया।") == ["मैं घर गया।", "वह आया।"]

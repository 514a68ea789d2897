"""ROUGE: rouge-score's numbers for text in the Latin script, and Unicode words or characters for other scripts.

rouge-score keeps ASCII letters and digits only, so that every text of another script has a score of 0. A row whose
reference has more letters of other scripts than of the Latin script is tokenised by `unicode_tokens` instead, on both
sides. The reference alone decides, so that all systems are scored with the same tokens.
"""

import unicodedata
from functools import lru_cache
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import regex

from raydistill.config.metric_names import ROUGE_METRICS

# Sentences end with . ! ? or their Arabic and Indic forms and white space, or with the marks of Chinese and Japanese.
_SENTENCE_END = regex.compile(r"(?<=[.!?؟۔।])\s+|(?<=[。！？])\s*(?=\S)")
# Scripts that are written without spaces between words; U+30FC is the mark of long vowels in Japanese.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\u30FC"
_TOKEN = regex.compile(
    rf"""(?V1)
    (?P<ascii> [a-z0-9]+ )  # the tokens of rouge-score
    | [[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*  # a character with its marks
    | [[\p{{L}}\p{{Nd}}]--[\p{{Latin}}{_UNSPACED}]][[\p{{L}}\p{{M}}\p{{Nd}}\u200C\u200D]--[\p{{Latin}}{_UNSPACED}]]*
    """,
    regex.VERBOSE,
)
_LATIN_LETTER = regex.compile(r"[\p{L}&&\p{Latin}]", regex.V1)
_OTHER_LETTER = regex.compile(r"[\p{L}--\p{Latin}]", regex.V1)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text: its lines if it has several, else the parts that end with a mark of a sentence.

    The rule needs no downloaded model. It also splits after abbreviations ("Mr. Smith"), in outputs as
    in references.
    """
    text = text.strip()
    parts = text.splitlines() if "\n" in text else _SENTENCE_END.split(text)
    return [part.strip() for part in parts if part.strip()]


def lead_baseline(source: str, n: int = 1) -> str:
    """Return the first `n` sentences of a text, a common baseline for summarization."""
    return " ".join(split_sentences(source)[:n])


def unicode_tokens(text: str) -> list[str]:
    """Return the tokens of a text of any script, in lower case and in the normal form NFKC.

    A token is a word of ASCII letters and digits, stemmed as rouge-score does; a word of letters, marks and digits of
    another script; or, in scripts without spaces between words (Han, Hiragana, Katakana, Thai, Lao, Khmer, Myanmar), a
    character with its marks. As in rouge-score, Latin letters outside a to z separate tokens.
    """
    matches = _TOKEN.finditer(unicodedata.normalize("NFKC", text).lower())
    return [_stem(match.group()) if match["ascii"] else match.group() for match in matches]


def is_mostly_latin(text: str) -> bool:
    """Return whether a text has at least as many letters of the Latin script as of all other scripts."""
    if text.isascii():
        return True
    return len(_LATIN_LETTER.findall(text)) >= len(_OTHER_LETTER.findall(text))


def rouge_rows(predictions: list[str], references: list[str]) -> dict[str, np.ndarray]:
    """Return F1 x 100 per row of rouge1, rouge2, rougeL and rougeLsum, each [rows]; the corpus score is the mean.

    Computed by Google's rouge-score with Porter stemming, and with the tokens of `unicode_tokens` for rows in another
    script. rougeLsum uses the sentences of `split_sentences`.

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
    rows = np.zeros((len(predictions), len(ROUGE_METRICS)))
    for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        is_latin = is_mostly_latin(reference)
        scores = _scorer(("rouge1", "rouge2", "rougeL"), is_latin).score(reference, prediction)
        summaries = ["\n".join(split_sentences(text)) for text in (reference, prediction)]
        scores |= _scorer(("rougeLsum",), is_latin).score(*summaries)
        rows[i] = [100 * scores[name].fmeasure for name in ROUGE_METRICS]
    return {name: rows[:, i] for i, name in enumerate(ROUGE_METRICS)}


def rouge2_rows(predictions: list[str], references: list[str]) -> np.ndarray:
    """Return ROUGE-2 F1 x 100 per row, [rows]; much faster than `rouge_rows`.

    Raises:
        ValueError: The numbers of predictions and references differ.
    """
    pairs = zip(predictions, references, strict=True)
    scores = [_scorer(("rouge2",), is_mostly_latin(reference)).score(reference, text) for text, reference in pairs]
    return np.array([100 * score["rouge2"].fmeasure for score in scores])


def rouge_signature(metric: str) -> str:
    """Return the settings and the version behind a ROUGE score, in the form of sacrebleu's signatures."""
    tokens = "tok:rouge-score|tok-other-scripts:words-or-characters,nfkc"
    sentences = "sentences:newline,[.!?؟۔।]+space,[。！？]"
    return f"{metric}|nrefs:1|f1:mean|stemmer:porter|{tokens}|{sentences}|version:rouge-score-{version('rouge-score')}"


@lru_cache(16)
def _scorer(names: tuple[str, ...], is_latin: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = _latin_tokenizer() if is_latin else SimpleNamespace(tokenize=lru_cache(20_000)(unicode_tokens))
    return RougeScorer(list(names), tokenizer=tokenizer)


@lru_cache(200_000)
def _stem(word: str) -> str:
    """The Porter stem of a word of more than three letters, as in rouge-score; shorter words stay."""
    return str(_porter_stemmer().stem(word)) if len(word) > 3 else word


@lru_cache(1)
def _porter_stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@lru_cache(1)
def _latin_tokenizer() -> SimpleNamespace:
    """Return rouge-score's tokenizer with caches for stems and texts, since each text is tokenized twice."""
    from rouge_score import tokenize

    stemmer = SimpleNamespace(stem=_stem)
    return SimpleNamespace(tokenize=lru_cache(20_000)(lambda text: tokenize.tokenize(text, stemmer)))

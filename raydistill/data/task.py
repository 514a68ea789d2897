"""Guesses the task of a corpus, translation or summarization, from its columns and texts."""

from dataclasses import dataclass
from statistics import mean, median

from raydistill.config.presets import column_languages
from raydistill.data.corpus import Corpus

MAX_ROWS = 1000
# Characters of a target per character of its source; summaries are shorter.
TRANSLATION_RATIO = (0.25, 4.0)
# Share of the words of a target that its source has too; summaries and corrections of texts share more.
MAX_TRANSLATION_OVERLAP = 0.4


@dataclass(frozen=True)
class TaskGuess:
    """The task of a corpus.

    Attributes:
        is_translation: Whether the task is a translation.
        is_certain: Whether the columns name two languages, or the texts leave no doubt.
        reason: What the guess is based on.
        languages: Source and target language of the columns; None if they name none.
    """

    is_translation: bool
    is_certain: bool
    reason: str
    languages: tuple[str, str] | None = None


def guess_task(corpus: Corpus) -> TaskGuess:
    """The task of a corpus with targets, by the names of its columns, else by 1,000 rows spread over the corpus."""
    if languages := column_languages(corpus.columns):
        return TaskGuess(True, True, f"the columns name the languages {languages[0]} and {languages[1]}", languages)
    step = max(1, len(corpus) // MAX_ROWS)
    pairs = list(zip(corpus.sources[::step], corpus.targets[::step], strict=True))
    ratio = median(len(target) / len(source) for source, target in pairs)
    overlap = mean(_overlap(source, target) for source, target in pairs)
    reason = (
        f"a target has {ratio:.2f} times the characters of its source (median), and {overlap:.0%} of its words occur "
        "in the source"
    )
    low, high = TRANSLATION_RATIO
    is_translation = low <= ratio <= high and overlap < MAX_TRANSLATION_OVERLAP
    return TaskGuess(is_translation, not is_translation, reason)


def _overlap(source: str, target: str) -> float:
    words = set(target.lower().split())
    return len(words & set(source.lower().split())) / len(words)

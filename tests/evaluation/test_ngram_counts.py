"""The private interface of sacrebleu that `evaluation/ngram_counts.py` uses: it exists and returns what is needed.

A failure after an upgrade of sacrebleu names the version that the module is written for.
"""

from importlib.metadata import version
from typing import Any

import pytest
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

from raydistill.evaluation import ngram_counts

CHANGED = (
    f"evaluation/ngram_counts.py is written for sacrebleu {ngram_counts.WRITTEN_FOR}; "
    f"sacrebleu {version('sacrebleu')} is installed"
)


def test_the_installed_sacrebleu_is_the_version_that_the_module_is_written_for() -> None:
    assert version("sacrebleu") == ngram_counts.WRITTEN_FOR, f"{CHANGED}: check what the module uses, then change it"


def test_extract_corpus_statistics() -> None:
    """Output, reference and matches for 1 to 6 characters, then for 1 and 2 words."""
    assert hasattr(CHRF, "_extract_corpus_statistics"), CHANGED
    characters = [2, 3, 2, 1, 2, 1, 0, 1, 0, *[0] * 9]
    assert CHRF()._extract_corpus_statistics(["ab"], [["abc"]]) == [characters], CHANGED
    words = [1, 1, 0, 0, 0, 0]
    assert CHRF(word_order=2)._extract_corpus_statistics(["ab"], [["abc"]]) == [characters + words], CHANGED


@pytest.mark.parametrize("tokenizer", [Tokenizer13a, TokenizerRegexp])
def test_caches_of_tokenizers(tokenizer: Any) -> None:
    text = "a text that no other test tokenizes"
    tokenizer()(text)
    assert tokenizer.__call__.cache_info().currsize > 0, CHANGED
    tokenizer.__call__.cache_clear()
    assert tokenizer.__call__.cache_info().currsize == 0, CHANGED

"""The language of a text, by py3langid: naive Bayes over byte n-grams, with a model in the package."""

from functools import lru_cache
from typing import Any

from raydistill.core.errors import UserError
from raydistill.core.suggestions import closest_name

CACHED_TEXTS = 4096  # the candidates of a row share a source


@lru_cache(maxsize=CACHED_TEXTS)
def detect_language(text: str) -> str:
    """The most likely language of a text, as an ISO 639 code such as "de". Texts of a few words are often mistaken."""
    return str(_identifier().classify(text)[0])


def check_language(code: str) -> None:
    """UserError if a code is none of the languages that `detect_language` returns."""
    codes = sorted(_identifier().nb_classes)
    if code not in codes:
        similar = closest_name(code.lower().split("_")[0], codes, cutoff=0.5)
        hint = f"did you mean {similar!r}? " if similar else ""
        raise UserError(f"curation: no language {code!r}; {hint}known codes: {' '.join(codes)}")


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)

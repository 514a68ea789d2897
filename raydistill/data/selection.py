"""The rows that students are chosen on, apart from the rows of checks, early stopping and search.

The score of a setting that a search selects is biased upwards on the rows of the search. The validation rows are
therefore divided: one part for checks, early stopping and search, another part for the choice of decoding and student,
on which nothing was selected before.
"""

from dataclasses import dataclass, replace

from raydistill.config.run import Dataset
from raydistill.core.errors import UserError
from raydistill.core.hashing import hash_fraction
from raydistill.data.corpus import Corpus, read_corpus, split_names

SELECTION = "selection"


@dataclass(frozen=True)
class ValidationParts:
    """The two parts of a validation corpus, each in the order of the file and with a fingerprint of its own.

    Attributes:
        search: The rows of checks, early stopping and search; its split is "validation".
        selection: The rows of decoding and choice; its split is "selection".
    """

    search: Corpus
    selection: Corpus


def selection_split(dataset: Dataset) -> str:
    """The split of decoding and choice, as `read_part` names it.

    This is "selection", or "validation" if a run keeps no rows for the choice.
    """
    return SELECTION if dataset.selection_split or dataset.selection_share else "validation"


def read_part(dataset: Dataset, split: str) -> Corpus | None:
    """Read "train", "validation", "selection" or "test" of a run; None where there are no such rows.

    "validation" leaves out the rows that `dataset.selection_share` keeps for the choice.

    Raises:
        UserError: The rows cannot be read, or a part of the validation split is empty.
    """
    if split == SELECTION and dataset.selection_split:
        return replace(read_corpus(dataset, dataset.selection_split), split=SELECTION)
    if split == SELECTION and not dataset.selection_share:
        return None
    file_split = "validation" if split == SELECTION else split
    if file_split not in split_names(dataset):
        return None
    corpus = read_corpus(dataset, file_split)
    if file_split != "validation" or not dataset.selection_share:
        return corpus
    parts = divide_validation(corpus, dataset.selection_share)
    return parts.selection if split == SELECTION else parts.search


def divide_validation(corpus: Corpus, share: float) -> ValidationParts:
    """Divide a validation corpus by a hash of each row, so that a row's part does not depend on the other rows.

    The hash is of the row's id. Where the ids are only row numbers, the hash is of source and target.

    Args:
        corpus: The validation split.
        share: The expected share of the selection part, above 0 and below 1.

    Raises:
        UserError: All rows fall into one part.
    """
    has_ids = corpus.columns.id is not None
    keys = corpus.ids if has_ids else map("\0".join, zip(corpus.sources, corpus.targets, strict=True))
    in_selection = [hash_fraction(key) < share for key in keys]
    if all(in_selection) or not any(in_selection):
        raise UserError(
            f"{corpus.name}: {len(corpus)} validation rows are too few for a part for the search and a part for the "
            f"choice with selection_share {share:g}; add rows, or use all rows for both with dataset.selection_share 0"
        )
    selection = _take(corpus, [i for i, chosen in enumerate(in_selection) if chosen])
    return ValidationParts(
        search=_take(corpus, [i for i, chosen in enumerate(in_selection) if not chosen]),
        selection=replace(selection, split=SELECTION),
    )


def _take(corpus: Corpus, rows: list[int]) -> Corpus:
    return replace(
        corpus,
        ids=[corpus.ids[i] for i in rows],
        sources=[corpus.sources[i] for i in rows],
        targets=[corpus.targets[i] for i in rows],
    )

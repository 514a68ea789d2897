"""Training targets from one or more label sources: original targets and label sets, each with a weight."""

from collections.abc import Mapping, Sequence

from raydistill.config.label_sources import LabelSource
from raydistill.core.errors import UserError
from raydistill.core.hashing import hash_fraction
from raydistill.label_sets.label_set import LabelSet


def select_targets(
    ids: list[str], originals: list[str], labels: Sequence[LabelSource], label_sets: Mapping[str, LabelSet]
) -> tuple[list[int], list[str]]:
    """Select the training examples of all label sources, one source after the other.

    `label_sets` maps every source except `original` to its label set. A weight is the number of times that an epoch
    reads the rows of a source: 2 reads every row twice, and 0.5 reads half of the rows. That half depends only on the
    source and the row ids. Rows whose pseudo-label is empty or was dropped by curation are left out of that source.

    Returns:
        The row numbers and the targets of the examples, two lists of equal length.

    Raises:
        UserError: A source has no label set, a row has no pseudo-label, or no row is left.
    """
    rows: list[int] = []
    targets: list[str] = []
    for source, weight in labels:
        if source == "original":
            usable, texts = list(range(len(ids))), originals
        elif source in label_sets:
            usable, texts = _rows_with_pseudo_labels(ids, label_sets[source])
        else:
            raise UserError(f"labels: {source!r} needs a label set; make one with `raydistill pseudolabel`")
        selected = [i for i in usable for _ in range(_repeat_count(source, ids[i], weight))]
        rows += selected
        targets += [texts[i] for i in selected]
    if not rows:
        raise UserError(f"labels: a weight of {min(weight for _, weight in labels)} leaves no row of {len(ids)}")
    return rows, targets


def _rows_with_pseudo_labels(ids: list[str], label_set: LabelSet) -> tuple[list[int], list[str]]:
    """Return the numbers of the rows that have a pseudo-label, and the pseudo-label of every row ("" for none)."""
    missing = [row_id for row_id in ids if row_id not in label_set.targets and row_id not in label_set.dropped_ids]
    if missing:
        raise UserError(
            f"{label_set.folder}: {len(missing)} of {len(ids)} training rows have no pseudo-label "
            f"(first: {missing[0]!r}). The label set was made for other data; make one for this data set with "
            f"`raydistill pseudolabel`"
        )
    texts = [label_set.targets.get(row_id, "") for row_id in ids]
    usable = [i for i, text in enumerate(texts) if text.strip()]
    if not usable:
        raise UserError(
            f"{label_set.folder}: every pseudo-label is empty or was dropped; check the decoding settings of the "
            f"teacher and the curation rules"
        )
    return usable, texts


def _repeat_count(source: str, row_id: str, weight: float) -> int:
    """Return how often an epoch reads a row: the whole part of the weight, plus one for a fraction of all rows.

    The draw depends on the source, so that half of one source and half of another one are different rows.
    """
    whole, fraction = divmod(weight, 1)
    return int(whole) + (hash_fraction(f"{source}\0{row_id}") < fraction)

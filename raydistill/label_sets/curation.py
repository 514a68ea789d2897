"""Curation: which of a teacher's texts become labels. A curated label set is made from a whole one, which stays.

Rules look at words split at white space. The best candidate that passes every rule is the label; a row none of whose
candidates passes is dropped, and counted under the rule that its best one broke first.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock

from raydistill.config.run import Curation, Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import Row
from raydistill.data.streaming import scan, usable_rows
from raydistill.label_sets.label_set import (
    Candidate,
    is_finished,
    label_set_name,
    read_candidates,
    read_label_set,
    read_manifest,
    write_label_set,
)

Score = Callable[[list[str], list[str]], Iterable[float]]  # ROUGE-2 x 100 per row of texts against references
CHUNK_ROWS = 2000


class Tally(Protocol):
    """Scores of texts against references that come in chunks, such as `evaluation.scores.Tally`."""

    metric: str

    def add(self, texts: list[str], references: list[str]) -> None: ...

    def metrics(self) -> dict[str, float]: ...


class Pair(NamedTuple):
    """A row of the data, what the teacher wrote for it, and another teacher's label where agreement is asked for."""

    row: Row
    candidates: list[Candidate]
    other: str


def repetition(text: str) -> float:
    """Share, 0 to 1, of a text's trigrams that stood in it before."""
    grams = _trigrams(text)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copy_rate(text: str, source: str) -> float:
    """Share, 0 to 1, of a text's trigrams that stand in the source."""
    grams = _trigrams(text)
    there = set(_trigrams(source))
    return sum(gram in there for gram in grams) / len(grams) if grams else 0.0


def length_ratio(text: str, original: str) -> float:
    """Words of a text by words of the original."""
    return len(text.split()) / max(1, len(original.split()))


def check_curation(rules: Curation, labelled: bool) -> None:
    """UserError where rules need originals and there are none, or where `agree_with` is no finished label set."""
    if rules.needs_originals and not labelled:
        raise UserError(
            "curation: the data has no targets, and choose: rouge2, min_rouge2 and the length ratios compare with "
            "them; leave these rules out"
        )
    if rules.agree_with is not None:
        read_manifest(Path(rules.agree_with))


def curate(folder: Path, dataset: Dataset, split: str, rules: Curation, score: Score, quality: Tally) -> Path:
    """Make the curated set of a finished label set beside it, unless it is there; returns its folder.

    `quality` measures the labels that are kept, where there are originals. `dataset` and `split` are what the set was
    made for: rows and order are compared. UserError where they differ, as `check_curation`, or where nothing would be
    kept.
    """
    manifest = read_manifest(folder, ["teacher.fingerprint"])
    asked = {**rules.model_dump(mode="json"), "metric": quality.metric}
    if rules.agree_with is not None:
        asked["agree_with"] = read_manifest(Path(rules.agree_with))  # what is in the folder, not where it is
    name = label_set_name(manifest["teacher"]["fingerprint"], folder.name, asked)
    made = folder.with_name(f"{folder.name.rsplit('-', 1)[0]}-curated-{name}")
    with FileLock(made.with_name(f".{made.name}.lock")):
        if not is_finished(made):
            _curate_into(made, folder, dataset, split, rules, score, quality)
    return made


def _curate_into(
    made: Path, folder: Path, dataset: Dataset, split: str, rules: Curation, score: Score, quality: Tally
) -> None:
    """Write the curated set; the caller holds its lock."""
    found = scan(dataset, split)
    check_curation(rules, found.labelled)
    manifest = read_manifest(folder)
    counts: Counter[str] = Counter()
    words = Counter[str]()

    def rows() -> Iterator[tuple[str, list[Candidate] | str]]:
        for pairs in _chunks(_paired(folder, usable_rows(dataset, split, found), rules.agree_with)):
            judged = list(zip(pairs, judge(pairs, rules, score), strict=True))
            kept = [(pair.row, ranked) for pair, (ranked, reason) in judged if not reason]
            counts.update(reason or "kept" for _, (_, reason) in judged)
            words["target"] += sum(len(ranked[0].target.split()) for _, ranked in kept)
            words["original"] += sum(len(row.target.split()) for row, _ in kept)
            if found.labelled:
                quality.add([ranked[0].target for _, ranked in kept], [row.target for row, _ in kept])
            yield from ((pair.row.id, reason or ranked) for pair, (ranked, reason) in judged)
        if not counts["kept"]:
            raise UserError(f"{folder}: these rules keep no row ({dict(counts)}); loosen them")

    def told() -> dict[str, Any]:
        rows = counts.pop("kept")
        return {
            **manifest,
            "rows": rows,
            "target_words_mean": words["target"] / rows,
            "original_words_mean": words["original"] / rows if found.labelled else None,
            "empty": 0,
            "metric": quality.metric,
            "of": folder.name,
            "curation": rules.model_dump(mode="json", exclude_none=True),
            "dropped": dict(counts.most_common()),
            "quality": quality.metrics() if found.labelled else None,
        }

    write_label_set(made, rows(), told)


def judge(pairs: Sequence[Pair], rules: Curation, score: Score) -> list[tuple[list[Candidate], str]]:
    """For each row its candidates, the label first, and the rule for which it is dropped ("" where it is kept)."""
    flat = [(pair, candidate) for pair in pairs for candidate in pair.candidates]
    texts = [candidate.target for _, candidate in flat]
    needed = rules.choose == "rouge2" or rules.min_rouge2 is not None
    rouge = iter(score(texts, [pair.row.target for pair, _ in flat]) if needed else [0.0] * len(flat))
    agreed = rules.min_agreement is not None
    agreement = iter(score(texts, [pair.other for pair, _ in flat]) if agreed else [0.0] * len(flat))
    judged = []
    for pair in pairs:
        facts = [(c, next(rouge), next(agreement)) for c in pair.candidates]
        if rules.choose == "rouge2":
            facts.sort(key=lambda fact: -fact[1])
        reasons = [_broken(rules, c.target, pair.row, near, agrees) for c, near, agrees in facts]
        best = reasons.index("") if "" in reasons else 0
        ranked = [facts[best][0], *(fact[0] for i, fact in enumerate(facts) if i != best)]
        judged.append((ranked, reasons[best]))
    return judged


def agreement(a: Path, b: Path, tally: Tally) -> dict[str, Any]:
    """Two label sets against each other: rows in both and in one only, equal texts, scores of `a` against `b`."""
    ours, theirs = read_label_set(a).targets, read_label_set(b).targets
    both = [row_id for row_id in ours if row_id in theirs]
    if not both:
        raise UserError(f"{a} and {b} have no row id in common: they were made for different data")
    pairs = [(ours[row_id], theirs[row_id]) for row_id in both]
    tally.add([p[0] for p in pairs], [p[1] for p in pairs])
    return {
        "rows": len(both),
        "only_first": len(ours) - len(both),
        "only_second": len(theirs) - len(both),
        "equal": sum(p[0] == p[1] for p in pairs) / len(both),
        **tally.metrics(),
        "words_first": sum(len(p[0].split()) for p in pairs) / len(both),
        "words_second": sum(len(p[1].split()) for p in pairs) / len(both),
    }


def _broken(rules: Curation, text: str, row: Row, rouge2: float, agreement: float) -> str:
    """The first rule that a text breaks, or ""."""
    if not text.strip():
        return "empty"
    ratio = length_ratio(text, row.target)
    checks = (
        ("min_rouge2", lambda limit: rouge2 < limit),
        ("min_length_ratio", lambda limit: ratio < limit),
        ("max_length_ratio", lambda limit: ratio > limit),
        ("max_repetition", lambda limit: repetition(text) > limit),
        ("max_copy_rate", lambda limit: copy_rate(text, row.source) > limit),
        ("min_agreement", lambda limit: agreement < limit),
    )
    for name, breaks in checks:
        limit = getattr(rules, name)
        if limit is not None and breaks(limit):
            return name
    return ""


def _paired(folder: Path, rows: Iterator[Row], agree_with: str | None) -> Iterator[Pair]:
    """The data's rows with their candidates and the other teacher's labels; all stand in the data's order."""
    written = read_candidates(folder)
    others = read_candidates(Path(agree_with)) if agree_with is not None else None
    for row in rows:
        row_id, candidates = next(written, (None, []))
        if row_id != row.id:
            raise UserError(
                f"{folder}: expected row {row.id!r} and found {row_id!r}: this label set was made for other data"
            )
        other = ""
        if others is not None:
            # It may have been made for more rows than these.
            same = next((found for other_id, found in others if other_id == row.id), None)
            if same is None:
                raise UserError(
                    f"{agree_with}: row {row.id!r} has no label there in the data's order: it was made for other data"
                )
            other = same[0].target
        yield Pair(row, candidates, other)


def _chunks(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    chunk: list[Pair] = []
    for pair in pairs:
        chunk.append(pair)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _trigrams(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(words, words[1:], words[2:], strict=False))

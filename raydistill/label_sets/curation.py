"""Curation: derive a label set from a complete one by rules. The complete set remains.

Rules look at words separated by white space, unless they say otherwise. The best candidate that passes every rule
becomes the label. A row without such a candidate is dropped and counted under the first rule that its best candidate
violates.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raydistill.config.run import Curation, Dataset
from raydistill.core import artifact
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.data.corpus import Row
from raydistill.data.streaming import SplitScan, scan_split, usable_rows
from raydistill.evaluation.metrics import ScoreAccumulator
from raydistill.evaluation.ngram_counts import sentence_chrf
from raydistill.evaluation.rouge import rouge2_rows
from raydistill.label_sets.label_set import (
    Candidate,
    label_set_key,
    read_candidates,
    read_label_set,
    read_manifest,
    read_pseudolabel_manifest,
    write_label_set,
)
from raydistill.label_sets.language import check_language, detect_language
from raydistill.label_sets.manifest import PseudolabelManifest

CHUNK_ROWS = 2000  # rows that are scored at a time

# Scores of two lists of texts, a score for each pair.
LossFunction = Callable[[list[str], list[str]], list[float]]


class CurationRow(NamedTuple):
    """A row of the data with its candidates, and the label of another teacher if a rule compares with one."""

    row: Row
    candidates: list[Candidate]
    other_label: str


class Verdict(NamedTuple):
    """The candidates of a row, the chosen label first, and the rule for which the row is dropped ("" if kept)."""

    candidates: list[Candidate]
    violated_rule: str


def trigram_repetition(text: str) -> float:
    """Share of the trigrams of a text, 0 to 1, that repeat an earlier trigram."""
    grams = _trigrams(text)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copy_rate(text: str, source: str) -> float:
    """Share of the trigrams of a text, 0 to 1, that occur in the source."""
    grams = _trigrams(text)
    source_grams = set(_trigrams(source))
    return sum(gram in source_grams for gram in grams) / len(grams) if grams else 0.0


def length_ratio(text: str, original: str) -> float:
    """Words of a text divided by words of the original target."""
    return len(text.split()) / max(1, len(original.split()))


def source_ratio(text: str, source: str) -> float:
    """Characters of a text divided by characters of the source."""
    return len(text.strip()) / max(1, len(source.strip()))


def check_curation(rules: Curation, labelled: bool) -> None:
    """Check rules before any text is generated. `labelled`: whether the data has original targets.

    Raises:
        UserError: Rules compare with original targets and there are none, a language is unknown, `agree_with` is no
            complete label set, or `reverse_model` has no configuration.
    """
    if rules.needs_original_targets and not labelled:
        raise UserError(
            "curation: the data has no targets, and choose: rouge2 or chrf, min_rouge2 and the length ratios compare "
            "with targets; remove these rules"
        )
    for code in (rules.source_language, rules.target_language):
        if code is not None:
            check_language(code)
    if rules.agree_with is not None:
        read_manifest(Path(rules.agree_with))
    if rules.reverse_model is not None:
        from raydistill.models.loading import load_config  # loads torch

        load_config(rules.reverse_model)


def curate(folder: Path, dataset: Dataset, split: str, rules: Curation, metric: str) -> Path:
    """Derive the curated set of a complete label set, unless it exists, next to that set. Returns its folder.

    Args:
        folder: The complete label set.
        dataset: The data that the set was made for, with `split`; ids and their order are compared.
        metric: The metric of the kept labels against the original targets.

    Raises:
        UserError: As `check_curation`, the set was made for other data, or the rules drop every row.
    """
    manifest = read_pseudolabel_manifest(folder)
    settings = {**rules.model_dump(mode="json"), "metric": metric}
    if rules.agree_with is not None:
        other = read_manifest(Path(rules.agree_with))
        # The content and not the path. A set that was written by hand has no key.
        settings["agree_with"] = other.key or other.model_dump(mode="json", exclude={"generation"})
    if rules.reverse_model is not None:
        from raydistill.models.fingerprints import teacher_key

        settings["reverse_model"] = teacher_key(rules.reverse_model)
    key = label_set_key(manifest.teacher.fingerprint, folder.name, settings)
    output_dir = folder.with_name(f"{folder.name.rsplit('-', 1)[0]}-curated-{key}")
    with artifact.lock(output_dir, math.inf, print_progress):
        if not artifact.is_complete(output_dir):
            scan = scan_split(dataset, split)
            check_curation(rules, scan.labelled)
            rows = _join_candidates(folder, usable_rows(dataset, split, scan), rules.agree_with)
            stats = _CurationStats(folder, manifest, rules, metric, scan)
            _write_curated_set(output_dir, rows, stats, key, _reverse_losses(rules, manifest))
    return output_dir


def _reverse_losses(rules: Curation, manifest: PseudolabelManifest) -> LossFunction | None:
    """The function that scores (labels, sources) by the reverse model of the rules; None without one."""
    if rules.reverse_model is None:
        return None
    from raydistill.models.reverse_model import ReverseModel

    languages = (manifest.languages[0], manifest.languages[1]) if manifest.languages else None
    return ReverseModel(rules.reverse_model, languages).losses


class _CurationStats:
    """Counts and scores of a curation, collected while its rows are written."""

    def __init__(
        self, folder: Path, manifest: PseudolabelManifest, rules: Curation, metric: str, scan: SplitScan
    ) -> None:
        self.folder, self.rules = folder, rules
        self._source_manifest, self._labelled = manifest, scan.labelled
        self._rows_by_rule: Counter[str] = Counter()  # "" counts the kept rows
        self._target_words = self._original_words = 0
        self._scores = ScoreAccumulator(metric)

    def add(self, rows: Sequence[CurationRow], verdicts: Sequence[Verdict]) -> None:
        """Count a chunk of rows."""
        kept = [
            (verdict.candidates[0].target, pair.row)
            for pair, verdict in zip(rows, verdicts, strict=True)
            if not verdict.violated_rule
        ]
        self._rows_by_rule.update(verdict.violated_rule for verdict in verdicts)
        self._target_words += sum(len(label.split()) for label, _ in kept)
        self._original_words += sum(len(row.target.split()) for _, row in kept)
        if self._labelled:
            labels = [label for label, _ in kept]
            self._scores.add(labels, [row.target for _, row in kept], [row.source for _, row in kept])

    @property
    def dropped(self) -> dict[str, int]:
        """The number of dropped rows by rule, most frequent first."""
        return {rule: count for rule, count in self._rows_by_rule.most_common() if rule}

    @property
    def num_kept(self) -> int:
        """The number of rows that have a label."""
        return self._rows_by_rule[""]

    def manifest(self, key: str) -> PseudolabelManifest:
        """The manifest of the curated set with a content key, once all rows are counted."""
        return self._source_manifest.model_copy(
            update={
                "key": key,
                "rows": self.num_kept,
                "target_words_mean": self._target_words / self.num_kept,
                "original_words_mean": self._original_words / self.num_kept if self._labelled else None,
                "empty": 0,
                "metric": self._scores.metric,
                "source_label_set": self.folder.name,
                "curation": self.rules.model_dump(mode="json", exclude_none=True),
                "dropped": self.dropped,
                "quality": self._scores.metrics() if self._labelled else None,
            }
        )


def _write_curated_set(
    output_dir: Path,
    rows: Iterator[CurationRow],
    stats: _CurationStats,
    key: str,
    reverse_losses: LossFunction | None,
) -> None:
    """Write the curated set. The caller holds its lock."""

    def iter_label_rows() -> Iterator[tuple[str, list[Candidate] | str]]:
        while chunk := list(islice(rows, CHUNK_ROWS)):
            verdicts = apply_rules(chunk, stats.rules, reverse_losses)
            stats.add(chunk, verdicts)
            for pair, verdict in zip(chunk, verdicts, strict=True):
                yield pair.row.id, verdict.violated_rule or verdict.candidates
        if not stats.num_kept:
            raise UserError(f"{stats.folder}: the curation rules drop every row ({stats.dropped}); relax them")

    write_label_set(output_dir, iter_label_rows(), lambda: stats.manifest(key))


def apply_rules(
    rows: Sequence[CurationRow], rules: Curation, reverse_losses: LossFunction | None = None
) -> list[Verdict]:
    """Choose the label of each row, or the rule for which the row is dropped.

    Args:
        rows: Rows with their candidates.
        rules: The rules.
        reverse_losses: Scores (labels, sources) by the reverse model, if the rules have one.
    """
    flat = [(pair, candidate.target) for pair in rows for candidate in pair.candidates]
    originals = [(text, pair.row.target) for pair, text in flat]
    needs_rouge = rules.choose == "rouge2" or rules.min_rouge2 is not None
    rouge2 = iter(_score_pairs(originals, rouge2_rows if needs_rouge else None))
    chrf = iter(_score_pairs(originals, sentence_chrf if rules.choose == "chrf" else None))
    others = [(text, pair.other_label) for pair, text in flat]
    agreement = iter(_score_pairs(others, rouge2_rows if rules.min_agreement is not None else None))
    reverse = iter(_score_pairs([(text, pair.row.source) for pair, text in flat], reverse_losses))
    verdicts = []
    for pair in rows:
        scored = [
            _ScoredCandidate(c, next(rouge2), next(chrf), next(agreement), next(reverse)) for c in pair.candidates
        ]
        if rules.choose != "score":
            scored.sort(key=lambda entry: -getattr(entry, rules.choose))
        violated = [_first_violated_rule(rules, entry, pair.row) for entry in scored]
        best = violated.index("") if "" in violated else 0
        candidates = [scored[best].candidate, *(entry.candidate for i, entry in enumerate(scored) if i != best)]
        verdicts.append(Verdict(candidates, violated[best]))
    return verdicts


class _ScoredCandidate(NamedTuple):
    """A candidate with its similarities: ROUGE-2 and chrF to the original, ROUGE-2 to another teacher's label.

    `reverse_loss` is the cross-entropy of the source given the candidate, in nats per token.
    """

    candidate: Candidate
    rouge2: float
    chrf: float
    agreement: float
    reverse_loss: float


def _score_pairs(
    pairs: list[tuple[str, str]], metric: LossFunction | Callable[[list[str], list[str]], np.ndarray] | None
) -> list[float]:
    """Scores of (text, reference) pairs; zeros if no rule needs them."""
    if metric is None:
        return [0.0] * len(pairs)
    return list(map(float, metric([text for text, _ in pairs], [reference for _, reference in pairs])))


def compare_label_sets(first: Path, second: Path, metric: str) -> dict[str, float]:
    """Compare the labels of two sets of the same data, with `second` as the reference.

    Returns:
        The scores of `metric`; `rows` in both sets, `only_first`, `only_second`; `equal`, the share of equal labels;
        `words_first` and `words_second`, words per label.

    Raises:
        UserError: A set cannot be read, or the sets have no row id in common.
    """
    first_targets, second_targets = read_label_set(first).targets, read_label_set(second).targets
    common = [row_id for row_id in first_targets if row_id in second_targets]
    if not common:
        raise UserError(f"{first} and {second} have no row id in common: they were made for different data")
    first_texts = [first_targets[row_id] for row_id in common]
    second_texts = [second_targets[row_id] for row_id in common]
    scores = ScoreAccumulator(metric)
    scores.add(first_texts, second_texts)
    return {
        "rows": len(common),
        "only_first": len(first_targets) - len(common),
        "only_second": len(second_targets) - len(common),
        "equal": sum(a == b for a, b in zip(first_texts, second_texts, strict=True)) / len(common),
        **scores.metrics(),
        "words_first": sum(len(text.split()) for text in first_texts) / len(common),
        "words_second": sum(len(text.split()) for text in second_texts) / len(common),
    }


def _first_violated_rule(rules: Curation, entry: _ScoredCandidate, row: Row) -> str:
    """The first rule that a candidate violates, or ""."""
    text, score = entry.candidate
    if not text.strip():
        return "empty"
    ratio, ratio_to_source = length_ratio(text, row.target), source_ratio(text, row.source)
    checks = (
        ("min_score", lambda limit: score < limit),
        ("min_rouge2", lambda limit: entry.rouge2 < limit),
        ("min_length_ratio", lambda limit: ratio < limit),
        ("max_length_ratio", lambda limit: ratio > limit),
        ("min_source_ratio", lambda limit: ratio_to_source < limit),
        ("max_source_ratio", lambda limit: ratio_to_source > limit),
        ("max_repetition", lambda limit: trigram_repetition(text) > limit),
        ("max_copy_rate", lambda limit: copy_rate(text, row.source) > limit),
        ("min_agreement", lambda limit: entry.agreement < limit),
        ("source_language", lambda code: detect_language(row.source) != code),
        ("target_language", lambda code: detect_language(text) != code),
        ("max_reverse_loss", lambda limit: entry.reverse_loss > limit),
    )
    for name, is_violated in checks:
        limit = getattr(rules, name)
        if limit is not None and is_violated(limit):
            return name
    return ""


def _join_candidates(folder: Path, rows: Iterator[Row], agree_with: str | None) -> Iterator[CurationRow]:
    """Yield the rows of the data with their candidates and the labels of the other teacher, all in data order."""
    written = read_candidates(folder)
    others = read_candidates(Path(agree_with)) if agree_with is not None else None
    for row in rows:
        row_id, candidates = next(written, (None, []))
        if row_id != row.id:
            raise UserError(
                f"{folder}: expected row {row.id!r}, got {row_id!r}: this label set was made for other data"
            )
        other_label = ""
        if others is not None:
            # The other set may have more rows than the data.
            other_candidates = next((ranked for other_id, ranked in others if other_id == row.id), None)
            if other_candidates is None:
                raise UserError(
                    f"{agree_with}: no label for row {row.id!r} in the order of the data: this label set was made for "
                    f"other data"
                )
            other_label = other_candidates[0].target
        yield CurationRow(row, candidates, other_label)


def _trigrams(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(words, words[1:], words[2:], strict=False))

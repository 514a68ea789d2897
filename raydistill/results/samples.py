"""Outputs of several systems on the same rows, for the page: texts, scores per row, and histograms."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from pydantic import BaseModel, ConfigDict

from raydistill.config.metric_names import TRANSLATION_METRICS
from raydistill.evaluation.metrics import repeated_bigrams, row_scores
from raydistill.results.formatting import format_count
from raydistill.results.outputs import TextRow, outputs_filename, read_outputs, read_texts, texts_filename
from raydistill.results.pareto import pareto_front
from raydistill.results.records import Trial, read_row_statistics, rows_filename
from raydistill.results.selection import Selection, make_candidates
from raydistill.results.tables import metric_name

MAX_PAGE_CHARACTERS = 3_000_000  # of all texts on the page
NUM_LENGTH_BINS = 12
REPETITION_EDGES = (0.0, 1e-9, 0.05, 0.1, 0.2, 0.5, 1.0)
REPETITION_LABELS = ["none", "to 5 %", "to 10 %", "to 20 %", "to 50 %", "to 100 %"]


class System(BaseModel):
    """The outputs of a system and their scores, one of each per row."""

    model_config = ConfigDict(frozen=True)

    key: str
    label: str
    outputs: list[str]
    scores: list[float]


class Histogram(BaseModel):
    """A histogram of several systems: by key, the share of the rows in each bin. "reference" is the references' key."""

    model_config = ConfigDict(frozen=True)

    title: str
    labels: list[str]
    shares: dict[str, list[float]]


class Samples(BaseModel):
    """Outputs side by side.

    Attributes:
        metric_name: The score of the rows, for readers.
        note: What rows these are.
        rows: The rows that the page shows.
        systems: The system that the others are compared with, then the others.
        histograms: Histograms over all rows with known outputs, also over rows that the page does not show.
    """

    model_config = ConfigDict(frozen=True)

    metric_name: str
    note: str
    rows: list[TextRow]
    systems: list[System]
    histograms: list[Histogram]


def make_samples(metric: str, split: str, rows: Sequence[TextRow], systems: Sequence[System]) -> Samples:
    """The samples of a page, without rows for which the page has no room.

    If the texts are longer than `MAX_PAGE_CHARACTERS`, the rows with the largest regressions are kept, of whichever
    system.

    Args:
        metric: Name of the score.
        split: The rows, for readers.
        rows: All rows.
        systems: The system that the others are compared with, then the others; each with an output of every row.
    """
    kept = _rows_that_fit(rows, systems)
    shown = "" if len(kept) == len(rows) else f", of which the {len(kept):,} with the largest regressions are shown"
    name = metric_name(metric)
    score = f"{'sentence ' if metric in TRANSLATION_METRICS else ''}{name}"
    note = (
        f"The outputs of {systems[0].label} and of the selected model side by side, on "
        f"{format_count(len(rows), 'row')} of {split}{shown}. Words that differ are marked. Numbers are the {score} of "
        f"a row. The histograms include all these rows."
    )
    texts = {"reference": [row.reference for row in rows], **{system.key: system.outputs for system in systems}}
    return Samples(
        metric_name=name,
        note=note,
        rows=[rows[i] for i in kept],
        systems=[_select_rows(system, kept) for system in systems],
        histograms=[_length_histogram(texts), _repetition_histogram(texts)],
    )


def read_samples(selection: Selection) -> Samples | None:
    """The outputs of the teacher and of the students that are chosen or on the front of any cost.

    None before finalists are served, and if outputs were not kept.

    Raises:
        UserError: A file of texts is damaged.
    """
    rows = read_texts(selection.sweep / texts_filename(selection.split))
    if rows is None or selection.session is None:
        return None
    baseline = selection.session.baseline
    sweep, metric, split = selection.sweep, selection.metric, selection.split
    statistics = read_row_statistics(sweep / rows_filename(split, baseline), split)
    outputs = read_outputs(sweep / outputs_filename(split, baseline))
    systems = [_make_system("teacher", "teacher", metric, statistics, outputs)]
    for student in _students_to_read(selection):
        assert student.serving is not None
        outputs = read_outputs(student.folder / outputs_filename(split, student.serving))
        systems.append(_make_system(student.key, student.label, metric, student.row_statistics(), outputs))
    usable = [system for system in systems if system and len(system.outputs) == len(system.scores) == len(rows)]
    if len(usable) < 2 or usable[0].key != "teacher":
        return None
    return make_samples(metric, f"the {split} split", rows, usable)


def make_system(key: str, label: str, metric: str, statistics: np.ndarray, outputs: Sequence[str]) -> System:
    """A system from its outputs and the per-row statistics of a metric; the outputs belong to the first rows."""
    scores = row_scores(metric, statistics[: len(outputs)])
    return System(key=key, label=label, outputs=list(outputs), scores=[round(float(score), 2) for score in scores])


def _make_system(
    key: str, label: str, metric: str, statistics: np.ndarray | None, outputs: list[str] | None
) -> System | None:
    return None if statistics is None or outputs is None else make_system(key, label, metric, statistics, outputs)


def _students_to_read(selection: Selection) -> list[Trial]:
    """The served students that are chosen, then the served students on the front of any cost."""
    candidates = make_candidates(selection.students, selection.metric)
    costs = {cost for candidate in candidates for cost in candidate.costs}
    keys = [key for key in selection.chosen_keys.values() if key]
    keys += [candidate.key for cost in sorted(costs) for candidate in pareto_front(candidates, cost)]
    students = [selection.student(key) for key in dict.fromkeys(keys)]
    return [student for student in students if student.serving]


def _rows_that_fit(rows: Sequence[TextRow], systems: Sequence[System]) -> list[int]:
    """The indices of the rows for which the page has room, in their order."""
    sizes = [
        len(row.source) + len(row.reference) + sum(len(system.outputs[i]) for system in systems)
        for i, row in enumerate(rows)
    ]
    if sum(sizes) <= MAX_PAGE_CHARACTERS:
        return list(range(len(rows)))
    baseline, *others = systems
    changes = [min(system.scores[i] - baseline.scores[i] for system in others) for i in range(len(rows))]
    kept, total = [], 0
    for i in np.argsort(changes, kind="stable"):
        total += sizes[i]
        if total > MAX_PAGE_CHARACTERS:
            break
        kept.append(int(i))
    return sorted(kept)


def _select_rows(system: System, kept: Sequence[int]) -> System:
    update = {"outputs": [system.outputs[i] for i in kept], "scores": [system.scores[i] for i in kept]}
    return system.model_copy(update=update)


def _length_histogram(texts: dict[str, list[str]]) -> Histogram:
    lengths = {key: [len(text.split()) for text in outputs] for key, outputs in texts.items()}
    longest = max((length for values in lengths.values() for length in values), default=0)
    width = max(1, -(-(longest + 1) // NUM_LENGTH_BINS))
    edges = [width * i for i in range(longest // width + 2)]
    labels = [f"{low}-{high - 1}" if width > 1 else str(low) for low, high in pairwise(edges)]
    shares = {key: _shares(values, edges) for key, values in lengths.items()}
    return Histogram(title="Words per output", labels=labels, shares=shares)


def _repetition_histogram(texts: dict[str, list[str]]) -> Histogram:
    shares = {key: _shares(_each(repeated_bigrams, outputs), REPETITION_EDGES) for key, outputs in texts.items()}
    return Histogram(title="Share of repeated pairs of words per output", labels=REPETITION_LABELS, shares=shares)


def _each(function: Callable[[str], float], outputs: Sequence[str]) -> list[float]:
    return [function(text) for text in outputs]


def _shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """The share of the values in each bin; the last bin includes its upper edge."""
    counts, _ = np.histogram(values, edges)
    return [round(float(share), 4) for share in counts / max(1, len(values))]

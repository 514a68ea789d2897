"""Whether validations in int8, and with a shortlist, rank finished students as validations in fp32 do.

    python -m benchmarks.validation_precision outputs/sweeps/NAME/trials/*/best --data DATA --rows 200

All students have one teacher. Rank correlations of fewer than 20 students have wide intervals.

Every student is scored on the same validation rows by each variant of the engine. The variants are compared with fp32
over the whole vocabulary by Spearman's and Kendall's rank correlation (tau-b) over the students, with 95 % bootstrap
intervals (percentiles; students are resampled; resamples of equal scores have no rank), and by what a search would
lose: the best score of a shape in fp32 minus the score in fp32 of the student that the variant calls the best of the
shape.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.common import BenchmarkResult, architecture_key, describe_machine
from raydistill.config.metric_names import MetricChoice
from raydistill.config.presets import resolve_metrics
from raydistill.config.run import Dataset, Decoding
from raydistill.core.console import print_progress
from raydistill.data.corpus import Corpus
from raydistill.evaluation.scoring import evaluate
from raydistill.inference import shortlist
from raydistill.inference.decoding import EngineOptions, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.models import loading, tokenization
from raydistill.models.tokenization import resolve_max_tokens
from raydistill.results.tables import markdown_table
from raydistill.training.tokenized_data import read_split

RESAMPLES = 2000


@dataclass(frozen=True)
class Student:
    """A finished student as one variant scores it.

    Attributes:
        name: Name of the student's folder.
        shape: Its architecture.
        score: Its score on the validation rows.
        seconds: Seconds of conversion, loading and decoding, as in a validation during training.
        cpu_seconds: The same, of processor time of the process.
    """

    name: str
    shape: str
    score: float
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Agreement:
    """How a variant ranks the students, compared with the baseline.

    Attributes:
        spearman: Rank correlation, with the lower and the upper end of its interval.
        kendall: Tau-b, with the lower and the upper end of its interval.
        largest_loss: What a search loses at most by the variant's choice within a shape, in points.
        largest_difference: Largest difference of a student's scores, in points.
        mean_difference: Mean of variant minus baseline, in points.
    """

    spearman: tuple[float, float, float]
    kendall: tuple[float, float, float]
    largest_loss: float
    largest_difference: float
    mean_difference: float


def compare_rankings(baseline: Sequence[Student], variant: Sequence[Student]) -> Agreement:
    """Compare the scores of the same students, in the same order."""
    x, y = (np.array([student.score for student in students]) for students in (baseline, variant))
    shapes = {student.shape for student in baseline}
    losses = []
    for shape in shapes:
        members = [i for i, student in enumerate(baseline) if student.shape == shape]
        losses.append(max(x[members]) - x[max(members, key=lambda i: y[i])])
    return Agreement(
        spearman=_with_interval(lambda a, b: float(stats.spearmanr(a, b).statistic), x, y),
        kendall=_with_interval(lambda a, b: float(stats.kendalltau(a, b).statistic), x, y),
        largest_loss=float(max(losses)),
        largest_difference=float(np.abs(y - x).max()),
        mean_difference=float((y - x).mean()),
    )


def _with_interval(
    correlation: Callable[[np.ndarray, np.ndarray], float], x: np.ndarray, y: np.ndarray
) -> tuple[float, float, float]:
    rng = np.random.default_rng(0)
    resamples = (rng.integers(len(x), size=len(x)) for _ in range(RESAMPLES))
    values = [correlation(x[rows], y[rows]) for rows in resamples if min(np.ptp(x[rows]), np.ptp(y[rows])) > 0]
    low, high = np.quantile(values, [0.025, 0.975])
    return correlation(x, y), float(low), float(high)


def score_student(checkpoint: Path, precision: str, map_path: Path | None, task: "Task") -> Student:
    """Score a checkpoint as a validation during training does: convert, load, decode."""
    config = loading.load_config(checkpoint)
    started, cpu_started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        options = EngineOptions(cache_dir=Path(scratch), allow_fallback=False, precision=precision, shortlist=map_path)
        engine = open_engine(checkpoint, "ctranslate2", options)
        beam = resolve_decoding(Decoding(beams=task.beams), engine.generation_config, None, task.max_target_tokens)
        result = evaluate(
            engine, task.corpus, MetricChoice(task.metric), beam, max_source_tokens=task.max_source_tokens
        )
    return Student(
        name=checkpoint.parent.name if checkpoint.name == "best" else checkpoint.name,
        shape=architecture_key(config),
        score=result.scores.metrics[task.metric],
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )


def rotated(names: list[str], number: int) -> list[str]:
    """The names, beginning with another name for each number, so that no variant is always the first to read files."""
    start = number % len(names)
    return names[start:] + names[:start]


@dataclass(frozen=True)
class Task:
    """The validation rows and how they are decoded."""

    corpus: Corpus
    metric: str
    beams: int
    max_source_tokens: int
    max_target_tokens: int


def write_fixed_map(checkpoint: Path, targets: list[str], size: int, max_tokens: int, path: Path) -> None:
    """Write the map of the most used tokens of the training targets."""
    tokenizer, config = tokenization.load_tokenizer(checkpoint), loading.load_config(checkpoint)
    rows = tokenization.tokenize_targets(tokenizer, targets, max_tokens)
    candidates = shortlist.fixed_shortlist(rows, size, shortlist.kept_tokens(tokenizer, config))
    shortlist.write_map(path, candidates, tokenization.tokens_by_id(tokenizer))


def run(options: argparse.Namespace, scratch: Path) -> tuple[Any, str]:
    """Score all students with all variants; return the figures and the Markdown."""
    dataset = Dataset(name=options.data, validation_rows=options.rows)
    corpus, train = read_split(dataset, "validation"), read_split(dataset, "train")
    if corpus is None or train is None:
        raise SystemExit(f"{options.data} needs a train and a validation split")
    metric = resolve_metrics(Dataset(name=options.data), options.metric).deciding
    config = loading.load_config(options.students[0])
    task = Task(
        corpus,
        metric,
        options.beams,
        max_source_tokens=resolve_max_tokens("max_source_tokens", dataset, None, config),
        max_target_tokens=resolve_max_tokens("max_target_tokens", dataset, None, config),
    )
    map_path = scratch / "map.txt"
    variants: dict[str, tuple[str, Path | None]] = {
        "fp32": ("fp32", None),
        "int8": ("int8", None),
        f"int8, shortlist {options.shortlist}": ("int8", map_path),
    }
    scored: dict[str, list[Student]] = {name: [] for name in variants}
    for number, checkpoint in enumerate(options.students):
        # A student with a trimmed vocabulary has its own token ids
        write_fixed_map(checkpoint, list(train.targets), options.shortlist, task.max_target_tokens, map_path)
        for name in rotated(list(variants), number):
            scored[name].append(score_student(checkpoint, *variants[name], task))
        row = ", ".join(f"{name} {students[-1].score:.2f}" for name, students in scored.items())
        print_progress(f"{scored['fp32'][-1].name}: {row}")
    baseline, *others = scored
    agreements = {name: compare_rankings(scored[baseline], scored[name]) for name in others}
    data = {name: [vars(student) for student in students] for name, students in scored.items()}
    text = (
        f"{len(options.students)} students, {len(corpus)} validation rows of {Path(options.data).name}, "
        f'{options.beams} beams, {metric}. Intervals: 95 %, bootstrap over the students. "Loss": the best score in '
        f"fp32 of a shape minus the score in fp32 of the student that the variant calls the best of the shape, the "
        f"largest over the shapes. Seconds: median per student, conversion and loading included."
    )
    return data, "\n\n".join([text, _agreement_table(scored, agreements), _score_table(scored)])


def _agreement_table(scored: dict[str, list[Student]], agreements: dict[str, Agreement]) -> str:
    header = ["variant", "Spearman", "Kendall", "loss", "largest difference", "mean difference", "s", "processor s"]
    rows = []
    for name, students in scored.items():
        seconds = [
            f"{statistics.median(values):.2f}"
            for values in ([s.seconds for s in students], [s.cpu_seconds for s in students])
        ]
        agreement = agreements.get(name)
        if agreement is None:
            rows.append([name, "-", "-", "-", "-", "-", *seconds])
            continue
        correlations = [
            f"{v:.3f} ({low:.3f} to {high:.3f})" for v, low, high in (agreement.spearman, agreement.kendall)
        ]
        points = (agreement.largest_loss, agreement.largest_difference, agreement.mean_difference)
        rows.append([name, *correlations, *(f"{value:.2f}" for value in points), *seconds])
    return markdown_table(header, rows)


def _score_table(scored: dict[str, list[Student]]) -> str:
    rows = [
        [students[0].name, *(f"{student.score:.2f}" for student in students)]
        for students in zip(*scored.values(), strict=True)
    ]
    return markdown_table(["student", *scored], sorted(rows, key=lambda row: -float(row[1])))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", type=Path, nargs="+", help="checkpoint folders of one teacher's students")
    parser.add_argument("--data", required=True, help="the data set: a name or a folder")
    parser.add_argument("--rows", type=int, default=200, help="validation rows; default: 200")
    parser.add_argument("--metric", default="auto", help="a metric; default: that of the data set")
    parser.add_argument("--beams", type=int, default=2, help="default: 2, as in validations")
    parser.add_argument("--shortlist", type=int, default=1000, help="size of the fixed shortlist; default: 1000")
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        data, text = run(options, Path(scratch))
    title = "Ranks of students by validations in int8"
    print(BenchmarkResult("validation_precision", title, text, data, machine).write())


if __name__ == "__main__":
    main()

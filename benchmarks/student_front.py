"""Students of version 1's recipe against students with other shapes and learning rates, after equal training time.

A student of the present version has the training time of a student of version 1: the number of its steps follows from
the time of a step of both, measured in turns. Each student is trained with several seeds, and scored in fp32 and int8
with several numbers of beams.

A student is a candidate at the latency of a student of version 1 if it was trained for no longer, and if it is at least
as fast as version 1's student with four beams in the same precision. A student of the same shape with the same beams
is as fast. All others are timed in pairs, with outputs of fixed length. The best candidate by validation BLEU is
reported with its test BLEU: once of all candidates, and once of the candidates with four beams.

    python -m benchmarks.student_front --teacher TEACHER --data MULTI30K --labels LABEL_SET --minutes 30

The command trains for some minutes and ends; the same command resumes. Once every student is trained, it scores and
times them, on a machine that should do nothing else, and writes benchmarks/results/student_front.md. Scores and timings
are kept in the working folder, so that a killed command resumes there, too. A run that fails with a loss that is not
finite has no score. Without --labels, students are trained on the targets of the data set.
"""

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from benchmarks.common import RESULTS, BenchmarkResult, describe_machine
from benchmarks.fixed_latency import FixedLengths, compare_fixed_lengths, open_checkpoint
from benchmarks.pieces import PartialResults, TrainingTask, train_piece
from raydistill.config.run import Dataset, Decoding, Run, parse_size
from raydistill.core.records import Record
from raydistill.data.corpus import Corpus, read_corpus
from raydistill.evaluation.metrics import score
from raydistill.inference.decoding import Engine, resolve_decoding
from raydistill.results.tables import markdown_table
from raydistill.training.inputs import RunInputs
from raydistill.training.records import read_history

PRECISIONS = ("fp32", "int8")
BASELINE_BEAMS = 4
MAX_TOKENS = 64  # of a source and of a target
PROBE_STEPS, PROBE_ROUNDS, PROBE_ROWS = 20, 3, 8
PROBE_LEARNING_RATE = 1e-5  # with which no probe fails; the time of a step does not depend on it
TIMED_ROWS = 128
MAX_OPEN_ENGINES = 8


@dataclass(frozen=True)
class StudentRecipe:
    """A student and its learning rates.

    Attributes:
        size: encoder and decoder layers.
        learning_rate: the peak learning rate.
        baseline: size of the student of version 1 whose training time it has.
        ffn: share of the feed-forward units of both sides.
        encoder_learning_rate: the rate of a trained encoder; None for `learning_rate`.
        version: 1 for version 1's recipe.
    """

    size: str
    learning_rate: float
    baseline: str
    ffn: float = 1.0
    encoder_learning_rate: float | None = None
    version: int = 2

    @property
    def shape(self) -> str:
        """Layers and units of the student, on which its latency depends."""
        return self.size if self.ffn == 1 else f"{self.size}-ffn{self.ffn:g}"

    @property
    def name(self) -> str:
        """The name of the student in folders and tables."""
        encoder = "" if self.encoder_learning_rate is None else f"-enc{self.encoder_learning_rate:g}"
        return f"v{self.version}-{self.shape}-lr{self.learning_rate:g}{encoder}-as-{self.baseline}"

    def is_candidate(self, baseline: str) -> bool:
        """Whether the student is of the present version and was trained for no longer than a student of version 1.

        Version 1's students have the same steps, so that a student with more decoder layers is trained for longer.
        """
        return self.version == 2 and parse_size(self.baseline)[1] <= parse_size(baseline)[1]


RECIPES = (
    StudentRecipe("6-1", 5e-4, "6-1", version=1),
    StudentRecipe("6-1", 4e-3, "6-1"),
    StudentRecipe("6-2", 1e-3, "6-1"),
    StudentRecipe("3-3", 2e-3, "6-1"),
    StudentRecipe("2-2", 2e-3, "6-1"),
    StudentRecipe("2-2", 2e-3, "6-1", ffn=0.25),
    StudentRecipe("6-3", 5e-4, "6-3", version=1),
    StudentRecipe("6-3", 1e-3, "6-3"),
    StudentRecipe("3-3", 2e-3, "6-3"),
    StudentRecipe("3-3", 2e-3, "6-3", ffn=0.25),
    StudentRecipe("6-6", 5e-4, "6-6", version=1),
    StudentRecipe("6-6", 2e-3, "6-6", ffn=0.25),
)


class StepCounts(Record):
    """WORK/steps.json: the optimiser steps of each student, by the name of its recipe."""

    steps: dict[str, int]


class StudentScore(BaseModel):
    """A student with one decoding.

    Attributes:
        recipe: the name of the recipe.
        precision: "fp32" or "int8".
        beams: the number of beams.
        validation: validation BLEU of each seed; None for a run that failed.
        test: test BLEU of each seed; None for a run that failed.
        output_tokens: mean tokens of the outputs for the test split, over the seeds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    precision: str
    beams: int
    validation: tuple[float | None, ...]
    test: tuple[float | None, ...]
    output_tokens: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether no run failed."""
        return None not in self.validation


class ShapeTiming(BaseModel):
    """The latency of a shape as a share of the latency of version 1's student with four beams in the same precision.

    Attributes:
        shape: `StudentRecipe.shape`.
        beams: the number of beams.
        precision: "fp32" or "int8".
        baseline: size of version 1's student.
        ratio: the share; None if other processes disturbed every pair.
        interval: the 95 % interval of the share; None if too few pairs were undisturbed.
        stop_reason: why the comparison ended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str
    beams: int
    precision: str
    baseline: str
    ratio: float | None
    interval: tuple[float, float] | None
    stop_reason: str

    @property
    def label(self) -> str:
        """The share and its interval."""
        interval = f" [{self.interval[0]:.2f}, {self.interval[1]:.2f}]" if self.interval else " (too few pairs)"
        return self.stop_reason if self.ratio is None else f"{self.ratio:.2f}{interval}"


def make_run(options: argparse.Namespace, recipe: StudentRecipe, steps: int, seed: int) -> Run:
    """The run of a student."""
    ffn = {} if recipe.ffn == 1 else {"encoder_ffn": recipe.ffn, "decoder_ffn": recipe.ffn}
    rows = {"train_rows": options.train_rows, "validation_rows": options.score_rows, "test_rows": options.score_rows}
    return Run.model_validate(
        {
            "name": f"{recipe.name}-seed{seed}",
            "teacher": str(options.teacher.absolute()),
            "dataset": {
                **{"name": str(options.data.absolute()), "max_source_tokens": MAX_TOKENS},
                **{"max_target_tokens": MAX_TOKENS, **rows},
            },
            "method": "pl" if options.labels else "sft",
            "student": {"size": recipe.size, **ffn},
            "loss": {"label_smoothing": 0.1},
            "training": {
                "learning_rate": recipe.learning_rate,
                "encoder_learning_rate": recipe.encoder_learning_rate,
                "batch_size": 64,
                "epochs": 1000,
                "max_steps": steps,
                "warmup_steps": 100,
                "checks_per_epoch": 1,
                "patience": 10_000,
                "dropout": 0.1,
                "seed": seed,
                "threads": options.threads,
            },
            "evaluation": {"metric": "bleu", "validation_beams": 1},
        }
    )


def make_task(options: argparse.Namespace, run: Run, folder: Path) -> TrainingTask:
    """The task of a run: with the label set, and the teacher cache of the working folder."""
    labels = {"pseudo": options.labels} if options.labels else {}
    return TrainingTask(run, folder, RunInputs(label_folders=labels, cache_root=options.work / "cache"))


def measure_steps(options: argparse.Namespace, recipes: Sequence[StudentRecipe]) -> StepCounts:
    """The steps of each student that take as long as the steps of its student of version 1.

    Students are timed in turns, so that slow changes of the machine affect all of them.
    """
    times: dict[str, list[float]] = {recipe.name: [] for recipe in recipes}
    for round_number in range(PROBE_ROUNDS):
        for recipe in recipes:
            run = make_run(options, recipe, min(PROBE_STEPS, options.steps), round_number)
            few = {"validation_rows": PROBE_ROWS, "test_rows": PROBE_ROWS}  # a probe needs no scores
            training = run.training.model_copy(update={"learning_rate": PROBE_LEARNING_RATE})
            dataset = run.dataset.model_copy(update=few)
            run = run.model_copy(update={"dataset": dataset, "training": training})
            folder = options.work / "probes" / run.name
            train_piece([make_task(options, run, folder)], 60)
            times[recipe.name].append(read_history(folder)[-1].numbers["step_ms"])
    return StepCounts(steps=steps_of_equal_time(times, recipes, options.steps))


def steps_of_equal_time(
    times_ms: dict[str, list[float]], recipes: Sequence[StudentRecipe], baseline_steps: int
) -> dict[str, int]:
    """Steps of each student.

    Args:
        times_ms: milliseconds of a step in each round, by the name of the recipe.
        recipes: the students.
        baseline_steps: steps of the students of version 1.
    """
    baselines = {recipe.baseline: recipe.name for recipe in recipes if recipe.version == 1}
    steps = {}
    for recipe in recipes:
        pairs = zip(times_ms[baselines[recipe.baseline]], times_ms[recipe.name], strict=True)
        steps[recipe.name] = round(baseline_steps * statistics.median(ms / own_ms for ms, own_ms in pairs))
    return steps


class StudentEngines:
    """The engines of the trained students, of which some stay open."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._open = functools.lru_cache(maxsize=MAX_OPEN_ENGINES)(self._open_once)

    def get(self, recipe: StudentRecipe, seed: int, precision: str) -> Engine | None:
        """The engine of a student; None if its run failed."""
        return self._open(recipe.name, seed, precision)

    def get_any(self, recipes: Iterable[StudentRecipe], precision: str) -> Engine | None:
        """The engine of the first student that did not fail."""
        engines = (self.get(recipe, seed, precision) for recipe in recipes for seed in range(self._options.seeds))
        return next((engine for engine in engines if engine is not None), None)

    def _open_once(self, name: str, seed: int, precision: str) -> Engine | None:
        folder = self._options.work / "students" / f"{name}-seed{seed}"
        if not (folder / "best").is_dir():
            return None
        return open_checkpoint(folder / "best", precision, self._options.threads, folder)


def score_student(engine: Engine | None, beams: int, corpus: Corpus) -> tuple[float | None, float]:
    """BLEU of a student's outputs, None without an engine, and their mean tokens."""
    if engine is None:
        return None, 0.0
    beam = resolve_decoding(Decoding(beams=beams), engine.generation_config, None, MAX_TOKENS)
    hypotheses = [rows[0] for rows in engine.generate(list(corpus.sources), beam, max_source_tokens=MAX_TOKENS)]
    bleu = score("bleu", [hypothesis.text for hypothesis in hypotheses], list(corpus.targets)).metrics["bleu"]
    return float(bleu), statistics.fmean(hypothesis.num_tokens for hypothesis in hypotheses)


def measure(options: argparse.Namespace, recipes: Sequence[StudentRecipe]) -> "Measurements":
    """Scores of all students and latencies of their shapes; what WORK/measured.json has is not repeated."""
    corpora = {}
    for split in ("validation", "test"):
        dataset = Dataset.model_validate({"name": str(options.data.absolute()), f"{split}_rows": options.score_rows})
        corpora[split] = read_corpus(dataset, split)
    engines = StudentEngines(options)
    scores = measure_scores(options, recipes, engines, corpora)
    lengths = FixedLengths(tuple(corpora["test"].sources[:TIMED_ROWS]), options.tokens, options.seconds)
    return Measurements(scores, measure_timings(options, recipes, engines, lengths), recipes)


def open_results(options: argparse.Namespace) -> tuple[Path, PartialResults]:
    """The file of all scores and timings so far, and its content."""
    path = options.work / "measured.json"
    settings = {name: getattr(options, name) for name in ("score_rows", "seeds", "tokens", "threads")}
    return path, PartialResults.open(path, settings)


def measure_scores(
    options: argparse.Namespace,
    recipes: Sequence[StudentRecipe],
    engines: StudentEngines,
    corpora: dict[str, Corpus],
) -> list[StudentScore]:
    """The scores of every student with every precision and number of beams."""
    path, results = open_results(options)
    scores = []
    for recipe, precision, beams in itertools.product(recipes, PRECISIONS, options.beams):
        part = results.find(recipe=recipe.name, precision=precision, beams=beams)
        if part is None:
            by_seed = [engines.get(recipe, seed, precision) for seed in range(options.seeds)]
            outputs = {split: [score_student(e, beams, corpus) for e in by_seed] for split, corpus in corpora.items()}
            entry = StudentScore(
                recipe=recipe.name,
                precision=precision,
                beams=beams,
                validation=tuple(bleu for bleu, _ in outputs["validation"]),
                test=tuple(bleu for bleu, _ in outputs["test"]),
                output_tokens=statistics.fmean([n for bleu, n in outputs["test"] if bleu is not None] or [0.0]),
            )
            part = entry.model_dump(mode="json")
            results = results.add(path, part)
            print(part, file=sys.stderr)
        scores.append(StudentScore.model_validate(part))
    return scores


def measure_timings(
    options: argparse.Namespace,
    recipes: Sequence[StudentRecipe],
    engines: StudentEngines,
    lengths: FixedLengths,
) -> list[ShapeTiming]:
    """The latency of every shape; without the shapes of which every run failed."""
    path, results = open_results(options)
    timings = []
    for shape, precision, beams, baseline in comparisons(recipes, options.beams):
        part = results.find(shape=shape, precision=precision, beams=beams, baseline=baseline)
        if part is None:
            first = engines.get_any([recipe for recipe in recipes if recipe.shape == baseline], precision)
            own = engines.get_any([recipe for recipe in recipes if recipe.shape == shape], precision)
            if first is None or own is None:
                continue
            timing = compare_fixed_lengths((first, BASELINE_BEAMS), (own, beams), lengths, bounds=(1.0,))
            measured = ShapeTiming(
                shape=shape,
                beams=beams,
                precision=precision,
                baseline=baseline,
                ratio=timing.ratio,
                interval=timing.interval,
                stop_reason=timing.stop_reason,
            )
            part = measured.model_dump(mode="json")
            results = results.add(path, part)
            print(part, file=sys.stderr)
        timings.append(ShapeTiming.model_validate(part))
    return timings


def comparisons(recipes: Sequence[StudentRecipe], beams: Sequence[int]) -> Iterator[tuple[str, str, int, str]]:
    """Shape, precision, beams and baseline of each comparison of a candidate; a shape is not compared with itself."""
    for baseline in dict.fromkeys(recipe.baseline for recipe in recipes):
        shapes = dict.fromkeys(recipe.shape for recipe in recipes if recipe.is_candidate(baseline))
        for shape, precision, count in itertools.product(shapes, PRECISIONS, beams):
            if (shape, count) != (baseline, BASELINE_BEAMS):
                yield shape, precision, count, baseline


def is_as_fast(entry: StudentScore, shape: str, baseline: str, timings: Iterable[ShapeTiming]) -> bool:
    """Whether a student is certainly not slower than version 1's student with four beams.

    This is true for the same shape with the same beams. Otherwise the interval of the ratio must end at 1 or below.
    """
    if (shape, entry.beams) == (baseline, BASELINE_BEAMS):
        return True
    key = (shape, entry.beams, entry.precision, baseline)
    own = [t for t in timings if (t.shape, t.beams, t.precision, t.baseline) == key]
    return any(timing.interval is not None and timing.interval[1] <= 1 for timing in own)


@dataclass(frozen=True)
class Measurements:
    """The scores of all students, the latencies of their shapes, and the recipes."""

    scores: Sequence[StudentScore]
    timings: Sequence[ShapeTiming]
    recipes: Sequence[StudentRecipe]

    def best_at_latency(
        self, baseline: str, precision: str, beams: int | None = None
    ) -> tuple[StudentScore, StudentScore | None]:
        """Version 1's student, and the best candidate that is certainly not slower.

        The best has the highest mean validation BLEU. A recipe of which a run failed is no candidate.

        Args:
            baseline: size of version 1's student.
            precision: the precision of both.
            beams: the beams of the candidates; None for any.
        """
        by_name = {recipe.name: recipe for recipe in self.recipes}
        own = [entry for entry in self.scores if entry.precision == precision]
        [reference] = [
            entry
            for entry in own
            if (by_name[entry.recipe].version, by_name[entry.recipe].size) == (1, baseline)
            and entry.beams == BASELINE_BEAMS
        ]
        fast = [
            entry
            for entry in own
            if by_name[entry.recipe].is_candidate(baseline)
            and entry.is_complete
            and beams in (None, entry.beams)
            and is_as_fast(entry, by_name[entry.recipe].shape, baseline, self.timings)
        ]
        return reference, max(fast, key=lambda entry: statistics.fmean(_known(entry.validation)), default=None)


def as_markdown(measured: Measurements, steps: dict[str, int], tokens: int) -> str:
    """The students at the latencies of version 1's students, then every student, then every latency."""
    rows = []
    for baseline in dict.fromkeys(recipe.baseline for recipe in measured.recipes):
        for precision, beams in itertools.product(PRECISIONS, (None, BASELINE_BEAMS)):
            reference, best = measured.best_at_latency(baseline, precision, beams)
            chosen = ["none", "", ""] if best is None else [best.recipe, str(best.beams), _mean(best.test)]
            rows.append([baseline, precision, _mean(reference.test), str(beams or "any"), *chosen])
    header = ["latency of version 1's", "precision", "its test BLEU", "beams allowed", "best student", "beams"]
    text = markdown_table([*header, "test BLEU"], rows)
    header = ["student", "steps", "precision", "beams", "validation BLEU", "test BLEU", "tokens of an output"]
    cells = [
        [
            *(entry.recipe, str(steps[entry.recipe]), entry.precision, str(entry.beams)),
            *(_mean(entry.validation), _mean(entry.test), f"{entry.output_tokens:.1f}"),
        ]
        for entry in measured.scores
    ]
    header_of_latencies = ["shape", "precision", "beams", f"over version 1's with {BASELINE_BEAMS} beams", "latency"]
    latencies = [[t.shape, t.precision, str(t.beams), t.baseline, t.label] for t in measured.timings]
    note = f"Latencies: batches of 32 rows, {tokens} source and {tokens} output tokens, in pairs, 95 % intervals."
    return "\n\n".join([text, markdown_table(header, cells), note, markdown_table(header_of_latencies, latencies)])


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> str:
    """The mean over the seeds that did not fail, and the values of the seeds."""
    by_seed = ", ".join("failed" if value is None else f"{value:.2f}" for value in values)
    known = _known(values)
    return f"{statistics.fmean(known):.2f} ({by_seed})" if known else f"failed ({by_seed})"


def main() -> None:
    """Run the command line."""
    options = _parse_arguments()
    torch.set_num_threads(options.threads)
    recipes = [recipe for recipe in RECIPES if recipe.baseline in options.baselines]
    path = options.work / "steps.json"
    counts = StepCounts.read_if_present(path)
    if counts is None:
        counts = measure_steps(options, recipes)
        counts.write(path)
    tasks = []
    for seed in range(options.seeds):
        for recipe in recipes:
            run = make_run(options, recipe, counts.steps[recipe.name], seed)
            tasks.append(make_task(options, run, options.work / "students" / run.name))
    if left := train_piece(tasks, options.minutes):
        print(f"{left} of {len(tasks)} students are not trained yet; the same command resumes")
        return
    machine = describe_machine()
    measured = measure(options, recipes)
    data: dict[str, Any] = {
        "steps": counts.steps,
        "scores": [entry.model_dump() for entry in measured.scores],
        "timings": [entry.model_dump() for entry in measured.timings],
    }
    text = as_markdown(measured, counts.steps, options.tokens)
    title = "Students at the latency of version 1's, after equal training time"
    print(BenchmarkResult("student_front", title, text, data, machine).write(options.results))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher's folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data set")
    parser.add_argument("--labels", type=Path, help="the folder of the teacher's label set of the training split")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time of this call; default: 30")
    parser.add_argument("--baselines", nargs="+", default=["6-1", "6-3"], help="default: 6-1 6-3; also 6-6")
    parser.add_argument("--steps", type=int, default=681, help="steps of version 1's students; default: 681")
    parser.add_argument("--train-rows", type=int, help="default: all")
    parser.add_argument("--score-rows", type=int, default=1000, help="rows of validation and of test; default: 1000")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: 3")
    parser.add_argument("--threads", type=int, default=1, help="threads of training and decoding; default: 1")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4; 4 is needed")
    parser.add_argument("--tokens", type=int, default=16, help="source and output tokens of a timed row; default: 16")
    parser.add_argument("--seconds", type=float, default=90.0, help="longest time of a comparison; default: 90")
    parser.add_argument("--work", type=Path, default=Path("outputs/student_front"), help="folder of the students")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: benchmarks/results")
    options = parser.parse_args()
    if BASELINE_BEAMS not in options.beams:
        parser.error(f"--beams needs {BASELINE_BEAMS}, with which version 1's students are scored")
    return options


if __name__ == "__main__":
    main()

"""Students of version 1's recipe against students with other shapes and learning rates, after equal training time.

A student of the present version has the training time of the student of version 1 that it is compared with: the number
of its steps follows from the time of a step of both, measured in turns. Each student is trained with several seeds, and
scored in fp32 and int8 with one and four beams. A student counts if it is at least as fast as version 1's student with
four beams in the same precision, by paired timings. The best by validation BLEU is reported with its test BLEU.

    python -m benchmarks.student_front --teacher TEACHER --data MULTI30K --labels LABEL_SET --minutes 30

The command trains for some minutes and ends; the same command resumes. Once every student is trained, it scores and
times them, on a machine that should do nothing else, and writes benchmarks/results/student_front.md. Without --labels,
students are trained on the targets of the data set.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from benchmarks.common import RESULTS, BenchmarkResult, describe_machine
from benchmarks.pieces import TrainingTask, train_piece
from benchmarks.shortlist import MAX_TOKENS, Decode, compare_speed, open_decode
from raydistill.config.run import Dataset, Run
from raydistill.core.records import Record
from raydistill.data.corpus import read_corpus
from raydistill.evaluation.metrics import score
from raydistill.results.tables import markdown_table
from raydistill.training.inputs import RunInputs
from raydistill.training.records import read_history

PRECISIONS, BEAMS = ("fp32", "int8"), (1, 4)
BASELINE_BEAMS = 4
PROBE_STEPS, PROBE_ROUNDS, PROBE_ROWS = 20, 3, 8
TIMED_ROWS = 128
MAX_OPEN_ENGINES = 8


@dataclass(frozen=True)
class StudentRecipe:
    """A student and its learning rates.

    Attributes:
        size: encoder and decoder layers.
        learning_rate: the peak learning rate.
        baseline: size of the student of version 1 that it is compared with.
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
    def name(self) -> str:
        """The name of the student in folders and tables."""
        ffn = "" if self.ffn == 1 else f"-ffn{self.ffn:g}"
        return f"v{self.version}-{self.size}{ffn}-lr{self.learning_rate:g}-as-{self.baseline}"


RECIPES = (
    StudentRecipe("6-1", 5e-4, "6-1", version=1),
    StudentRecipe("6-1", 4e-3, "6-1"),
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
        validation: validation BLEU of each seed.
        test: test BLEU of each seed.
        ratio: latency over that of version 1's student with four beams in the same precision; None for that student
            itself, and where no pair was undisturbed.
        interval: the 95 % interval of the ratio.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    precision: str
    beams: int
    validation: tuple[float, ...]
    test: tuple[float, ...]
    ratio: float | None = None
    interval: tuple[float, float] | None = None


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
            run = run.model_copy(update={"dataset": run.dataset.model_copy(update=few)})
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


def measure(options: argparse.Namespace, recipes: Sequence[StudentRecipe]) -> list[StudentScore]:
    """Scores and paired latencies of all students."""
    corpora = {}
    for split in ("validation", "test"):
        dataset = Dataset.model_validate({"name": str(options.data.absolute()), f"{split}_rows": options.score_rows})
        corpora[split] = read_corpus(dataset, split)
    timed = list(corpora["test"].sources)[:TIMED_ROWS]
    batches = [timed[i : i + 32] for i in range(0, len(timed), 32)]

    @functools.lru_cache(maxsize=MAX_OPEN_ENGINES)
    def open_student(name: str, seed: int, precision: str) -> Callable[[int], Decode]:
        folder = options.work / "students" / f"{name}-seed{seed}"
        return open_decode(folder / "best", precision, None, options, folder)

    def bleu(decode: Decode, split: str) -> float:
        sources = list(corpora[split].sources)
        texts = [text for i in range(0, len(sources), 32) for text in decode(sources[i : i + 32])]
        return float(score("bleu", texts, list(corpora[split].targets)).metrics["bleu"])

    baselines = {recipe.baseline: recipe.name for recipe in recipes if recipe.version == 1}
    scores = []
    for recipe in recipes:
        for precision in PRECISIONS:
            for beams in BEAMS:
                decodes = [open_student(recipe.name, seed, precision)(beams) for seed in range(options.seeds)]
                entry = StudentScore(
                    recipe=recipe.name,
                    precision=precision,
                    beams=beams,
                    validation=tuple(bleu(decode, "validation") for decode in decodes),
                    test=tuple(bleu(decode, "test") for decode in decodes),
                )
                if (recipe.version, beams) != (1, BASELINE_BEAMS):
                    baseline = open_student(baselines[recipe.baseline], 0, precision)(BASELINE_BEAMS)
                    speedup = compare_speed(baseline, decodes[0], batches, options.seconds)
                    ratio = None if speedup.factor is None else 1 / speedup.factor
                    ends = speedup.interval and (1 / speedup.interval[1], 1 / speedup.interval[0])
                    entry = entry.model_copy(update={"ratio": ratio, "interval": ends})
                scores.append(entry)
                print(entry.model_dump_json(), file=sys.stderr)
    return scores


def best_at_latency(
    scores: Iterable[StudentScore], recipes: Sequence[StudentRecipe], baseline: str, precision: str
) -> tuple[StudentScore, StudentScore | None]:
    """Version 1's student, and the best student of the present version that is certainly not slower.

    The best has the highest mean validation BLEU; its interval must end at 1 or below.
    """
    by_name = {recipe.name: recipe for recipe in recipes}
    own = [s for s in scores if s.precision == precision and by_name[s.recipe].baseline == baseline]
    [reference] = [s for s in own if by_name[s.recipe].version == 1 and s.beams == BASELINE_BEAMS]
    fast = [s for s in own if by_name[s.recipe].version == 2 and s.interval and s.interval[1] <= 1]
    return reference, max(fast, key=lambda s: statistics.fmean(s.validation), default=None)


def as_markdown(scores: Sequence[StudentScore], recipes: Sequence[StudentRecipe], steps: dict[str, int]) -> str:
    """The students at the latencies of version 1's students, then every student."""
    rows = []
    for baseline in dict.fromkeys(recipe.baseline for recipe in recipes):
        for precision in PRECISIONS:
            reference, best = best_at_latency(scores, recipes, baseline, precision)
            chosen = ["none", "", ""] if best is None else [best.recipe, str(best.beams), _mean(best.test)]
            rows.append([baseline, precision, _mean(reference.test), *chosen])
    header = ["latency of version 1's", "precision", "its test BLEU", "best student", "beams", "test BLEU"]
    text = markdown_table(header, rows)
    header = ["student", "steps", "precision", "beams", "validation BLEU", "test BLEU", "latency ratio"]
    cells = [
        [s.recipe, str(steps[s.recipe]), s.precision, str(s.beams), _mean(s.validation), _mean(s.test), _ratio(s)]
        for s in scores
    ]
    return f"{text}\n\n{markdown_table(header, cells)}"


def _mean(values: Sequence[float]) -> str:
    """The mean over seeds, and the values of the seeds."""
    return f"{statistics.fmean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"


def _ratio(entry: StudentScore) -> str:
    if entry.ratio is None:
        return "-"
    return f"{entry.ratio:.2f}" + (f" [{entry.interval[0]:.2f}, {entry.interval[1]:.2f}]" if entry.interval else "")


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
    scores = measure(options, recipes)
    data: dict[str, Any] = {"steps": counts.steps, "scores": [entry.model_dump() for entry in scores]}
    text = as_markdown(scores, recipes, counts.steps)
    title = "Students at the latency of version 1's, after equal training time"
    print(BenchmarkResult("student_front", title, text, data, machine).write(options.results))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher's folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data set")
    parser.add_argument("--labels", type=Path, help="the folder of the teacher's label set of the training split")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time of this call; default: 30")
    parser.add_argument("--baselines", nargs="+", default=["6-1", "6-3", "6-6"], help="default: 6-1 6-3 6-6")
    parser.add_argument("--steps", type=int, default=681, help="steps of version 1's students; default: 681")
    parser.add_argument("--train-rows", type=int, help="default: all")
    parser.add_argument("--score-rows", type=int, default=1000, help="rows of validation and of test; default: 1000")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: 3")
    parser.add_argument("--threads", type=int, default=1, help="threads of training and decoding; default: 1")
    parser.add_argument("--seconds", type=float, default=20.0, help="longest time of a comparison; default: 20")
    parser.add_argument("--work", type=Path, default=Path("outputs/student_front"), help="folder of the students")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()

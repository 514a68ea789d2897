"""Trains every combination of a space of choices, without Ray, and writes the grid that `search_efficiency` replays.

The command trains for some minutes and ends at the end of a run; the same command resumes, and writes the grid when
every run is trained. The cost is the number of parameters, because latencies would depend on the load of the machine.

The checkpoint of each validation with a new best score is kept until its run is finished. All of them are then scored
on the test split, outside the recorded device time: replays judge a trial that is stopped early by the test score of
its best checkpoint. A run whose outputs repeat far more than the teacher's counts as failed, as in a sweep.

    raydistill train demo
    python -m benchmarks.train_grid benchmarks/spaces/search_shapes.yaml --minutes 5

A space with the method pl needs the label set of the teacher, which `raydistill pseudolabel` writes:

    raydistill pseudolabel --teacher ../shared/teachers/multi30k-marian-6-6 --dataset ../shared/data/multi30k_en_de
    python -m benchmarks.train_grid benchmarks/spaces/grid_multi30k.yaml --labels LABEL_SET --minutes 30
"""

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT
from benchmarks.pieces import TrainingTask, train_piece
from benchmarks.search_efficiency import Grid, judge_by_one_split, record_trial
from raydistill.config.corners import iter_corners
from raydistill.config.run import Run
from raydistill.config.space import Space, make_run, read_space
from raydistill.core.records import Record
from raydistill.evaluation.scoring import evaluate
from raydistill.inference.decoding import EngineOptions, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.models.teacher import open_teacher
from raydistill.results.records import read_trials
from raydistill.search.study import trial_key
from raydistill.training.inputs import RunInputs
from raydistill.training.teacher_record import TeacherScores
from raydistill.training.teacher_scores import score_teacher
from raydistill.training.tokenized_data import load_tokenized_data

GRIDS = ROOT / "benchmarks" / "grids"
TEST_FILE = "checkpoint_scores.json"
TEACHER_FILE = "teacher.json"


class CheckpointScores(Record):
    """The test scores of the checkpoints of a run, by step; of each checkpoint that was the best when validated."""

    scores: dict[int, float]


def make_tasks(
    space: Space, folder: Path, labels: Path | None = None, teacher_repetition: float | None = None
) -> list[TrainingTask]:
    """A task for each combination of the space, in folder/trials."""
    tasks = []
    for number, params in enumerate(iter_corners(space.run)):
        run = make_run(space, params, space.name)
        inputs = RunInputs(
            label_folders={"pseudo": labels} if labels else {},
            cache_root=folder / "cache",
            number=number,
            params=params,
            teacher_repetition=teacher_repetition,
        )
        tasks.append(TrainingTask(run, folder / "trials" / trial_key(run), inputs))
    return tasks


def with_test_rows(run: Run, test_rows: int | None) -> Run:
    """The run with another number of test rows; None for all."""
    return run.model_copy(update={"dataset": run.dataset.model_copy(update={"test_rows": test_rows})})


def read_teacher_scores(space: Space, folder: Path, test_rows: int | None) -> TeacherScores:
    """The teacher's scores with the decoding of the space, from folder/teacher.json after the first call."""
    path = folder / TEACHER_FILE
    scores = TeacherScores.read_if_present(path)
    if scores is None:
        [task, *_] = make_tasks(space, folder)
        scores, _ = score_teacher(with_test_rows(task.run, test_rows), "cpu", 1)
        scores.write(path)
    return scores


def checkpoints_of(trial: Path) -> Path:
    """The folder of the checkpoints that are kept of a trial in folder/trials/KEY, as folder/checkpoints/KEY/STEP."""
    return trial.parents[1] / "checkpoints" / trial.name


def keep_best_checkpoint(metrics: dict[str, Any], trial: Path | None) -> None:
    """A report callback: keep the checkpoint of a validation if it is the best so far, as links to its files."""
    assert trial is not None
    checkpoint, kept = trial / f"checkpoint-{metrics['step']}", checkpoints_of(trial) / str(metrics["step"])
    if checkpoint.is_dir():  # otherwise an earlier checkpoint is better, and this one is deleted
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(checkpoint, kept, copy_function=os.link)


def score_checkpoints(task: TrainingTask, test_rows: int | None) -> None:
    """Score the kept checkpoints of a finished run on the test split, with the run's decoding, and delete them."""
    run, folder = with_test_rows(task.run, test_rows), checkpoints_of(task.folder)
    assert run.teacher is not None
    teacher = open_teacher(run.teacher, run.dataset)
    data = load_tokenized_data(run, teacher.preset, teacher.tokenizer, teacher.model.config)
    preset = teacher.preset.decoding if teacher.preset else None
    scores = {}
    for checkpoint in folder.glob("*") if "test" in data.corpora else []:
        options = EngineOptions(languages=teacher.languages, cache_dir=folder.parent / ".conversions")
        engine = open_engine(checkpoint, run.evaluation.engine, options)
        beam = resolve_decoding(run.decoding, engine.generation_config, preset, data.max_target_tokens)
        result = evaluate(engine, data.corpora["test"], data.metrics, beam, max_source_tokens=data.max_source_tokens)
        scores[int(checkpoint.name)] = result.scores.metrics[data.metric]
    CheckpointScores(scores=scores).write(task.folder / TEST_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.parent / ".conversions", ignore_errors=True)


def train_and_score(tasks: Sequence[TrainingTask], minutes: float, score: Callable[[TrainingTask], None]) -> int:
    """Train the tasks in their order and score their checkpoints, until `minutes` have passed at the end of a run.

    No run is interrupted, because a run that resumes would be charged another start-up.

    Returns:
        The number of tasks that still have no test scores.
    """
    deadline = time.monotonic() + 60 * minutes
    for task in tasks:
        if (task.folder / TEST_FILE).is_file():
            continue
        if time.monotonic() >= deadline:
            break
        train_piece([task], math.inf, keep_best_checkpoint)
        score(task)
    return sum(not (task.folder / TEST_FILE).is_file() for task in tasks)


def make_grid(space: Space, folder: Path, test_rows: int | None = None) -> Grid:
    """The grid of the trained runs below `folder`.

    The reference point is half the teacher's score, on the split by which searches are judged, and the teacher's
    parameters in millions. A failed run has no score, and the teacher's parameters as its cost, which the replays do
    not read.
    """
    [run, *_] = [task.run for task in make_tasks(space, folder)]
    teacher = read_teacher_scores(space, folder, test_rows)
    assert run.teacher is not None
    teacher_cost = sum(p.numel() for p in open_teacher(run.teacher, run.dataset).model.parameters()) / 1e6
    recorded = {}
    for trial in read_trials(folder):
        tested = CheckpointScores.read_if_present(trial.folder / TEST_FILE)
        cost, scores = trial.metrics.get("params_m", teacher_cost), tested.scores if tested else None
        recorded[trial.key] = record_trial(trial, teacher.metric, cost, teacher.repetition, scores)
    trials = judge_by_one_split(recorded)
    by_test = teacher.test is not None and any(trial.test_scores for trial in trials.values())
    teacher_scores = teacher.test.metrics if teacher.test and by_test else teacher.metrics
    return Grid(
        name=space.name,
        space=space,
        reference=(teacher_scores[teacher.metric] / 2, teacher_cost),
        pass_seconds=0.0,
        trials=trials,
    )


def main() -> None:
    """Run the command line."""
    options = _parse_arguments()
    torch.set_num_threads(1)
    space = read_space(options.space)
    if space.search.cost != "params_m":
        raise SystemExit(
            f"{options.space}: search.cost is {space.search.cost}; a grid that is trained here has params_m"
        )
    folder = options.work / space.name
    teacher = read_teacher_scores(space, folder, options.test_rows)
    tasks = make_tasks(space, folder, options.labels, teacher.repetition)
    if options.labels is None and any(task.run.method == "pl" for task in tasks):
        raise SystemExit(f"{options.space}: the method pl needs --labels")
    if left := train_and_score(tasks, options.minutes, lambda task: score_checkpoints(task, options.test_rows)):
        print(f"{left} runs are not trained yet; the same command resumes")
        return
    path = options.output or GRIDS / f"{space.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(space, folder, options.test_rows)
    grid.write(path)
    print(path)
    if grid.judged_by == "validation":
        print(f"{path}: the data set has no test split; searches will be judged by validation scores", file=sys.stderr)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", type=Path, help="the space file, with choices only")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of this call; default: 5")
    parser.add_argument("--labels", type=Path, help="the folder of the teacher's label set of the training split")
    parser.add_argument("--test-rows", type=int, help="test rows that checkpoints are scored on; default: all")
    parser.add_argument("--work", type=Path, default=Path("outputs/grids"), help="folder of the runs")
    parser.add_argument("--output", type=Path, help="file of the grid; default: benchmarks/grids/NAME.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

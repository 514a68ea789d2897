"""Trains every combination of a space of choices, without Ray, and writes the grid that `search_efficiency` replays.

The command trains for some minutes and ends; the same command resumes, and writes the grid when every run is trained.
The cost is the number of parameters, because latencies would depend on the load of the machine.

    raydistill train demo
    python -m benchmarks.train_grid benchmarks/spaces/search_shapes.yaml --minutes 5
"""

import argparse
from pathlib import Path

import torch

from benchmarks.common import ROOT
from benchmarks.pieces import TrainingTask, train_piece
from benchmarks.search_efficiency import Grid, record_trial
from raydistill.config.corners import iter_corners
from raydistill.config.space import Space, make_run, read_space
from raydistill.models.teacher import open_teacher
from raydistill.results.records import read_trials
from raydistill.search.study import trial_key
from raydistill.training.inputs import RunInputs
from raydistill.training.teacher_scores import score_teacher

GRIDS = ROOT / "benchmarks" / "grids"


def make_tasks(space: Space, folder: Path) -> list[TrainingTask]:
    """A task for each combination of the space, in folder/trials."""
    tasks = []
    for number, params in enumerate(iter_corners(space.run)):
        run = make_run(space, params, space.name)
        inputs = RunInputs(cache_root=folder / "cache", number=number, params=params)
        tasks.append(TrainingTask(run, folder / "trials" / trial_key(run), inputs))
    return tasks


def make_grid(space: Space, folder: Path) -> Grid:
    """The grid of the trained runs below `folder`.

    The reference point is half the teacher's score and the teacher's parameters in millions. A failed run has no score,
    and the teacher's parameters as its cost, which the replays do not read.
    """
    [run, *_] = [task.run for task in make_tasks(space, folder)]
    scores, _ = score_teacher(run, "cpu", 1)
    assert run.teacher is not None
    teacher_cost = sum(p.numel() for p in open_teacher(run.teacher, run.dataset).model.parameters()) / 1e6
    trials = {
        trial.key: record_trial(trial, scores.metric, trial.metrics.get("params_m", teacher_cost), scores.repetition)
        for trial in read_trials(folder)
    }
    return Grid(
        name=space.name,
        space=space,
        reference=(scores.metrics[scores.metric] / 2, teacher_cost),
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
    if left := train_piece(make_tasks(space, folder), options.minutes):
        print(f"{left} runs are not trained yet; the same command resumes")
        return
    path = options.output or GRIDS / f"{space.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    make_grid(space, folder).write(path)
    print(path)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", type=Path, help="the space file, with choices only")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of this call; default: 5")
    parser.add_argument("--work", type=Path, default=Path("outputs/grids"), help="folder of the runs")
    parser.add_argument("--output", type=Path, help="file of the grid; default: benchmarks/grids/NAME.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

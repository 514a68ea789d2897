"""Device-time that this search needs to the hypervolume of random full-length search, replayed over a trained grid.

A sweep with `sampler: grid` and `stopping: off` trains every combination once and keeps every validation. Searches are
then replayed over it, one trial at a time: what a search proposes is looked up instead of trained, and it is charged
the device-time that it took, up to the validation at which it was stopped.

    raydistill sweep benchmarks/spaces/search_demo.yaml
    python -m benchmarks.search_efficiency outputs/sweeps/search_demo --seeds 100
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import describe_machine, write_result
from raydistill.cluster.search import StudySearch
from raydistill.config.console import progress
from raydistill.config.space import Space, read_space
from raydistill.results.figures import markdown_table
from raydistill.results.records import Trial, curve, read_sweep, read_trials
from raydistill.results.stopping import Curve, falls_behind

SHARES = (0.9, 0.95, 0.99)  # of the whole grid's hypervolume; fixed before the first replay
MAIN = 0.95


@dataclass(frozen=True)
class Recorded:
    """A trained trial: its curve with device-seconds at each validation, and what it came to in the end.

    `finish` are the device-seconds after the last validation, in which the best checkpoint was scored.
    """

    size: str
    curve: Curve
    seconds: tuple[float, ...]
    finish: float
    score: float
    latency: float


@dataclass(frozen=True)
class Point:
    """A replayed trial that is over: device-seconds of the search up to its end, and what it found."""

    seconds: float
    score: float
    latency: float


def recorded(trial: Trial, metric: str) -> Recorded:
    """A trial of the grid."""
    training = trial.run_config()["training"]
    devices = training["workers"] * training["threads"]
    seconds = tuple(float(line["time_s"]) * devices for line in trial.history())
    finish = trial.metrics["gpu_hours"] * 3600 - seconds[-1]
    score = trial.score(metric)
    assert score is not None
    return Recorded(trial.size, curve(trial), seconds, finish, score, trial.metrics["latency_ms"])


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that (score, latency) points dominate, up to the reference: a score below, a latency above them."""
    area, best = 0.0, reference[0]
    for score, latency in sorted(points, key=lambda point: (point[1], -point[0])):
        if latency < reference[1] and score > best:
            area += (score - best) * (reference[1] - latency)
            best = score
    return area


def cut(trial: Recorded, rivals: Sequence[Curve], search: Any) -> tuple[int, float, float]:
    """How many validations a trial gets to do, and the device-seconds and the score that this comes to."""
    for done in range(1, len(trial.curve)):
        if search.stops_early and falls_behind(trial.curve[:done], rivals, search.grace, search.reduction):
            score = max(score for _, score in trial.curve[:done])
            return done, trial.seconds[done - 1] + trial.finish, score
    return len(trial.curve), trial.seconds[-1] + trial.finish, trial.score


def replay(space: Space, grid: dict[str, Recorded]) -> list[Point]:
    """One search over the grid, to the end of the grid or of the search's ideas."""
    points: list[Point] = []
    seen: list[tuple[str, Curve]] = []
    seconds = 0.0
    with tempfile.TemporaryDirectory(prefix="raydistill-replay-") as folder:
        searcher = StudySearch(space, Path(folder))
        while len(points) < len(grid):
            proposal = searcher.suggest(str(len(points)))
            if not isinstance(proposal, dict):
                break
            trial = grid[proposal["key"]]
            rivals = [other for size, other in seen if size == trial.size]
            done, took, score = cut(trial, rivals, space.search)
            seconds += took
            seen.append((trial.size, trial.curve[:done]))
            points.append(Point(seconds, score, trial.latency))
            report = {"finished": True, "status": "done", "score": score, "latency_ms": trial.latency}
            searcher.on_trial_complete(str(len(points) - 1), report)
    return points


def seconds_to(points: Sequence[Point], target: float, reference: tuple[float, float]) -> float | None:
    """Device-seconds until a search's hypervolume has reached `target`; None where it never does."""
    for n in range(1, len(points) + 1):
        if hypervolume([(p.score, p.latency) for p in points[:n]], reference) >= target:
            return points[n - 1].seconds
    return None


def compare(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the medians, with its 95 % interval over the seeds (both resampled)."""
    rng = np.random.default_rng(0)
    draws = [np.median(rng.choice(np.asarray(values), (2000, len(values))), axis=1) for values in (ours, theirs)]
    low, high = np.percentile(draws[0] / draws[1], [2.5, 97.5])
    return statistics.median(ours) / statistics.median(theirs), float(low), float(high)


SEARCHES = {
    "this search": {"sampler": "tpe", "stopping": "per_shape"},
    "TPE, full length": {"sampler": "tpe", "stopping": "off"},
    "random, stopped per shape": {"sampler": "random", "stopping": "per_shape"},
    "random, full length": {"sampler": "random", "stopping": "off"},
}
BASELINE = "random, full length"


def replay_all(space: Space, grid: dict[str, Recorded], seeds: int) -> dict[str, list[list[Point]]]:
    """Every search with every seed."""
    found: dict[str, list[list[Point]]] = {}
    for name, changes in SEARCHES.items():
        searches = [space.search.model_copy(update={**changes, "seed": n, "trials": len(grid)}) for n in range(seeds)]
        found[name] = [replay(space.model_copy(update={"search": s, "points": []}), grid) for s in searches]
        progress(f"{name}: {seeds} replays")
    return found


def rows_of(
    found: dict[str, list[list[Point]]], share: float, target: float, reference: tuple[float, float]
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The table's rows, and the same with more digits, for one share of the grid's hypervolume."""
    reached = {name: [seconds_to(points, target, reference) for points in runs] for name, runs in found.items()}
    times = {
        name: [points[-1].seconds if t is None else t for t, points in zip(reached[name], runs, strict=True)]
        for name, runs in found.items()
    }
    rows, data = [], []
    for name, values in times.items():
        ratio, low, high = compare(values, times[BASELINE])
        quartiles = " / ".join(f"{q:.0f}" for q in np.percentile(values, [25, 50, 75]))
        there = f"{sum(t is not None for t in reached[name])} of {len(values)}"
        mark = f"{share:.0%}{' (main)' if share == MAIN else ''}"
        rows.append([mark, name, quartiles, f"{ratio:.2f} [{low:.2f}, {high:.2f}]", there])
        data.append({"share": share, "search": name, "seconds": values, "ratio": [ratio, low, high]})
    return rows, data


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("sweep", type=Path, help="folder of the finished grid sweep")
    parser.add_argument("--seeds", type=int, default=100)
    arguments = parser.parse_args()
    machine = describe_machine()
    info = read_sweep(arguments.sweep)
    teacher, metric = info["teacher"], info["metric"]
    grid = {t.key: recorded(t, metric) for t in read_trials(arguments.sweep) if t.status == "done"}
    reference = (teacher["metrics"][metric] / 2, teacher["costs"]["latency_ms"])
    whole = hypervolume([(t.score, t.latency) for t in grid.values()], reference)
    found = replay_all(read_space(arguments.sweep / "space.yaml"), grid, arguments.seeds)
    parts = [rows_of(found, share, share * whole, reference) for share in SHARES]
    header = ["of the grid's hypervolume", "search", "device-seconds (quartiles)", "of random's", "got there"]
    text = (
        f"Grid: {arguments.sweep.name}, {len(grid)} trials of {len({t.size for t in grid.values()})} shapes, "
        f"{sum(t.seconds[-1] + t.finish for t in grid.values()):.0f} device-seconds in all. {arguments.seeds} seeds. "
        f"Reference point: half the teacher's score ({reference[0]:.2f}) and its latency ({reference[1]:.1f} ms). A "
        f"replay that never gets there is charged all that it ran.\n\n"
        + markdown_table(header, [row for rows, _ in parts for row in rows])
    )
    place = write_result(
        "search_efficiency", "Search efficiency", text, [d for _, data in parts for d in data], machine
    )
    print(place.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

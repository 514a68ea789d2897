"""Device-time that this search needs to the hypervolume of random full-length search, replayed over a trained grid.

A sweep with `sampler: grid` and `stopping: off` trains every combination once and keeps every validation. Searches are
then replayed over it, one trial at a time: what a search proposes is looked up instead of trained, and it is charged
the device-time that it took, up to the validation at which it was stopped. `--live SEED` also carries out one pair of
real sweeps, this search and random full-length search, in fresh homes.

    raydistill sweep benchmarks/spaces/search_demo.yaml
    python -m benchmarks.search_efficiency outputs/sweeps/search_demo --seeds 300 --live 0
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from optuna.storages import InMemoryStorage

from benchmarks.common import describe_machine, write_result
from raydistill.config.presets import DEMO_TEACHER_RUN
from raydistill.config.space import Search, Space, read_space
from raydistill.core.console import print_progress
from raydistill.results.records import Trial, read_sweep, read_trials
from raydistill.results.tables import markdown_table
from raydistill.search.early_stopping import Curve, should_stop_early, validation_curve, warmup_share
from raydistill.search.study import SweepStudy
from raydistill.training.run import collapse_reason

SHARES = (0.9, 0.95, 0.99)  # of the whole grid's hypervolume; fixed before the first replay
MAIN = 0.95
SEARCHES = {
    "this search": {"sampler": "tpe", "stopping": "per_shape"},
    "TPE, full length": {"sampler": "tpe", "stopping": "off"},
    "random, stopped per shape": {"sampler": "random", "stopping": "per_shape"},
    "random, full length": {"sampler": "random", "stopping": "off"},
}
# The product's own: a grid that stopped nothing made no use of those in its file, which may be of an earlier release.
RUNGS = Search().model_dump(include={"grace", "reduction"})
OURS, BASELINE = "this search", "random, full length"


@dataclass(frozen=True)
class Recorded:
    """A trained trial: its curve, device-seconds from its start to the end of each validation, what it came to.

    `finish` are the device-seconds after the last validation, in which the best checkpoint was scored on validation and
    test; `judged` is the part of them for validation, which is all that a stopped trial is scored on. `score` is None
    for a trial that failed. `collapsed` says of each validation whether the outputs then would count as a failure.
    `warmup_share` is a share of the steps.
    """

    size: str
    curve: Curve
    seconds: tuple[float, ...]
    finish: float
    judged: float
    score: float | None
    latency: float
    collapsed: tuple[bool, ...]
    warm_up: float = 0.0

    @property
    def whole(self) -> float:
        """Device-seconds of the trial at full length."""
        return (self.seconds[-1] if self.seconds else 0.0) + self.finish


@dataclass(frozen=True)
class Point:
    """A trial that is over: device-seconds of the search up to its end, and what it found."""

    seconds: float
    score: float
    latency: float


def recorded(trial: Trial, metric: str, latency: float, repetition: float | None = None) -> Recorded:
    """A trial that is over, charged with its start-up, training, validations and final scoring.

    `repetition` is the teacher's, which failures are told by.
    """
    seconds = tuple(3600 * line["gpu_hours"] for line in trial.history())
    finish = 3600 * trial.metrics["gpu_hours"] - (seconds[-1] if seconds else 0.0)
    score = trial.score(metric) if trial.scored else None
    rows = {split: len(kept) for split in ("validation", "test") if (kept := trial.row_statistics(split)) is not None}
    judged = finish * rows["validation"] / sum(rows.values()) if rows else finish
    collapsed = tuple(bool(collapse_reason(line.get("repetition", 0.0), repetition)) for line in trial.history())
    return Recorded(
        trial.size, validation_curve(trial), seconds, finish, judged, score, latency, collapsed, warmup_share(trial)
    )


def read_grid(sweep: Path) -> dict[str, Recorded]:
    """The trials of a sweep that are over, by key, in the order in which they were begun."""
    info = read_sweep(sweep)
    latency = {size: costs["latency_ms"] for size, costs in info["shape_costs"].items()}
    over = [trial for trial in read_trials(sweep) if trial.status != "running"]
    repetition = info["teacher"]["repetition"]
    return {t.key: recorded(t, info["metric"], latency[t.size], repetition) for t in over}


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that (score, latency) points dominate, up to the reference: a score below, a latency above them."""
    area, best = 0.0, reference[0]
    for score, latency in sorted(points, key=lambda point: (point[1], -point[0])):
        if latency < reference[1] and score > best:
            area += (score - best) * (reference[1] - latency)
            best = score
    return area


def cut(trial: Recorded, rivals: Sequence[Curve], search: Any) -> tuple[int, float, float | None]:
    """How many validations a trial gets to do, and the device-seconds and the score that this comes to.

    A trial that is stopped is charged the full one's scoring on validation, by its share of the rows that were scored.
    Whether it failed is told by its best validation up to then, as the product does.
    """
    if search.stops_early:
        grace = max(search.grace, trial.warm_up)
        for done in range(1, len(trial.seconds)):
            if should_stop_early(trial.curve[:done], rivals, grace, search.reduction):
                scores = [score for _, score in trial.curve[:done]]
                best = scores.index(max(scores))
                return done, trial.seconds[done - 1] + trial.judged, None if trial.collapsed[best] else scores[best]
    return len(trial.curve), trial.whole, trial.score


def replay(
    space: Space,
    grid: dict[str, Recorded],
    enough: Callable[[Sequence[Point]], bool] = lambda points: False,
) -> list[Point]:
    """One search over the grid, until what it found is `enough`, or to the end of the grid or of the search's ideas."""
    points: list[Point] = []
    seen: list[tuple[str, Curve]] = []
    seconds = 0.0
    with tempfile.TemporaryDirectory(prefix="raydistill-replay-") as folder:
        study = SweepStudy(space, Path(folder), storage=InMemoryStorage())
        for number in map(str, range(len(grid))):
            proposal = study.propose(number)
            if proposal is None:
                break
            trial = grid[proposal.key]
            rivals = [other for size, other in seen if size == trial.size]
            done, took, score = cut(trial, rivals, space.search)
            seconds += took
            report: dict[str, Any] = {"finished": True, "status": "failed"}
            if score is not None:
                seen.append((trial.size, trial.curve[:done]))
                points.append(Point(seconds, score, trial.latency))
                report |= {"status": "done", "score": score, "latency_ms": trial.latency}
            study.report(number, report)
            if enough(points):
                break
    return points


def seconds_to(points: Sequence[Point], target: float, reference: tuple[float, float]) -> float:
    """Device-seconds until a search's hypervolume has reached `target`; infinite where it never does."""
    for n in range(1, len(points) + 1):
        if hypervolume([(p.score, p.latency) for p in points[:n]], reference) >= target:
            return points[n - 1].seconds
    return math.inf


def compare(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the medians, with its 95 % interval over the seeds (both resampled).

    Infinite where half of ours never got there; 0 where half of theirs did not.
    """
    rng = np.random.default_rng(0)
    draws = [np.median(rng.choice(np.asarray(values), (2000, len(values))), axis=1) for values in (ours, theirs)]
    low, high = np.percentile(_ratio(*draws), [2.5, 97.5], method="inverted_cdf")
    return float(_ratio(np.median(ours), np.median(theirs))), float(low), float(high)


def _ratio(ours: Any, theirs: Any) -> Any:
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(ours), np.inf, ours / theirs)


def replay_all(
    space: Space, grid: dict[str, Recorded], seeds: int, enough: Callable[[Sequence[Point]], bool]
) -> dict[str, list[list[Point]]]:
    """Every search with every seed, each until it has found `enough`."""
    found: dict[str, list[list[Point]]] = {}
    for name, changes in SEARCHES.items():
        asked = {**changes, **RUNGS, "trials": len(grid)}
        searches = [space.search.model_copy(update={**asked, "seed": n}) for n in range(seeds)]
        found[name] = [replay(space.model_copy(update={"search": s, "points": []}), grid, enough) for s in searches]
        print_progress(f"{name}: {seeds} replays")
    return found


def rows_of(
    found: dict[str, list[list[Point]]], share: float, target: float, reference: tuple[float, float], passes: float
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The table's rows, and the same with more digits, for one share of the grid's hypervolume.

    `passes` are the device-seconds of the teacher's passes, which every search needs alike before its first trial.
    """
    times = {name: [seconds_to(points, target, reference) for points in runs] for name, runs in found.items()}
    rows, data = [], []
    for name, values in times.items():
        alone = compare(values, times[BASELINE])
        whole = compare([t + passes for t in values], [t + passes for t in times[BASELINE]])
        quartiles = " / ".join(_shown(q, 0) for q in np.percentile(values, [25, 50, 75], method="inverted_cdf"))
        there = sum(map(math.isfinite, values)) / len(values)
        mark = f"{share:.0%}{' (main)' if share == MAIN else ''}"
        rows.append([mark, name, quartiles, _with_interval(alone), _with_interval(whole), f"{there:.0%}"])
        data.append(
            {
                **{"share": share, "search": name, "got_there": there, "seconds": _finite(values)},
                **{"ratio": _finite(alone), "ratio_with_passes": _finite(whole)},
            }
        )
    return rows, data


def _shown(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "never"


def _with_interval(found: tuple[float, float, float]) -> str:
    ratio, low, high = (_shown(value, 2) for value in found)
    return f"{ratio} [{low}, {high}]"


def _finite(values: Iterable[float]) -> list[float | None]:
    """As JSON has it: null for what is infinite."""
    return [value if math.isfinite(value) else None for value in values]


def live(sweep: Path, seed: int, trials: int) -> dict[str, list[Point]]:
    """This search and random full-length search as real sweeps over the grid's space, each in a fresh home.

    One trial at a time, as in the replays. The shapes' latencies are the grid's, so that hypervolumes compare.
    """
    found = {}
    for name in (OURS, BASELINE):
        with tempfile.TemporaryDirectory(prefix="raydistill-live-") as folder:
            place = Path(folder)
            _furnish(place, sweep.absolute().parents[1])
            changes = {**SEARCHES[name], **RUNGS, "seed": seed, "trials": trials, "concurrent": 1}
            settings = [f"search.{key}={json.dumps(value)}" for key, value in changes.items()]
            settings += ["points=[]", "budgets={}", "tracking_uri=null"]
            command = [sys.executable, "-m", "raydistill.sweep", str(sweep / "space.yaml")]
            command += [part for setting in settings for part in ("--set", setting)]
            subprocess.run(command, env={**os.environ, "RAYDISTILL_HOME": folder}, stdout=sys.stderr, check=True)
            seconds, points = 0.0, []
            for trial in read_grid(place / "sweeps" / sweep.name).values():
                seconds += trial.whole
                score = -math.inf if trial.score is None else trial.score  # a failed one has its price and no more
                points.append(Point(seconds, score, trial.latency))
            found[name] = points
    return found


def _furnish(place: Path, home: Path) -> None:
    """A fresh home with nothing but the demo's teacher, where the grid had it, and the measured latencies."""
    shutil.copy(home / "latency.json", place)
    if (teacher := home / "runs" / DEMO_TEACHER_RUN).is_dir():
        shutil.copytree(teacher, place / "runs" / DEMO_TEACHER_RUN)


def live_rows(
    found: dict[str, list[Point]], whole: float, reference: tuple[float, float]
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The live pair's table, and the same with more digits."""
    rows, data = [], []
    for name, points in found.items():
        times = [seconds_to(points, share * whole, reference) for share in SHARES]
        reached = hypervolume([(p.score, p.latency) for p in points], reference) / whole
        rows.append(
            [name, str(len(points)), f"{points[-1].seconds:.0f}", f"{reached:.1%}", *(_shown(t, 0) for t in times)]
        )
        each = [_finite((p.seconds, p.score, p.latency)) for p in points]
        data.append({"live": name, "points": each, "reached": reached, "seconds": _finite(times)})
    return rows, data


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("sweep", type=Path, help="folder of the finished grid sweep")
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--live", type=int, metavar="SEED", help="also carry out one pair of real sweeps")
    parser.add_argument("--live-trials", type=int, help="how many trials each has; default: a third of the grid")
    options = parser.parse_args()
    if any(trial.status == "stopped" for trial in read_trials(options.sweep)):
        parser.error(f"{options.sweep}: some of its trials were stopped early; train a grid with stopping: off")
    machine = describe_machine()
    info, grid = read_sweep(options.sweep), read_grid(options.sweep)
    passes = 3600 * float(info["teacher_gpu_hours"])
    reference = (info["teacher"]["metrics"][info["metric"]] / 2, info["teacher"]["costs"]["latency_ms"])
    whole = hypervolume([(t.score, t.latency) for t in grid.values() if t.score is not None], reference)
    found = replay_all(
        read_space(options.sweep / "space.yaml"),
        grid,
        options.seeds,
        lambda points: hypervolume([(p.score, p.latency) for p in points], reference) >= max(SHARES) * whole,
    )
    parts = [rows_of(found, share, share * whole, reference, passes) for share in SHARES]
    header = ["of the grid's hypervolume", "search", "device-seconds (quartiles)", "of random's"]
    header += ["with the teacher's passes", "got there"]
    text = about(options, grid, reference, passes) + markdown_table(header, [row for rows, _ in parts for row in rows])
    data = [d for _, part in parts for d in part]
    if options.live is not None:
        pair = live(options.sweep, options.live, options.live_trials or len(grid) // 3)
        rows, more = live_rows(pair, whole, reference)
        header = ["live", "trials", "device-seconds in all", "of the grid's hypervolume"]
        text += "\n\n" + markdown_table([*header, *(f"device-seconds to {share:.0%}" for share in SHARES)], rows)
        data += more
    place = write_result("search_efficiency", "Search efficiency", text, data, machine)
    print(place.read_text(encoding="utf-8"))


def about(options: argparse.Namespace, grid: dict[str, Recorded], reference: tuple[float, float], passes: float) -> str:
    """What the figures are of."""
    failed = sum(trial.score is None for trial in grid.values())
    return (
        f"Grid: {options.sweep.name}, {len(grid)} trials ({failed} failed) of {len({t.size for t in grid.values()})} "
        f"shapes, {sum(t.whole for t in grid.values()):.0f} device-seconds in all, start-up, validations and final "
        f"scoring counted; the teacher's passes took {passes:.0f}, the same for every search. {options.seeds} seeds. "
        f"Reference point: half the teacher's score ({reference[0]:.2f}) and its latency ({reference[1]:.1f} ms). A "
        f"stopped trial is charged the full one's scoring on validation, and none on test. Trials are compared from "
        f"{RUNGS['grace']:.3g} of their steps on, and the better 1/{RUNGS['reduction']} goes on. A replay that never "
        f"gets there counts as infinitely long.\n\n"
    )


if __name__ == "__main__":
    main()

"""Device time that the search needs to reach a share of a grid's hypervolume, compared with random searches.

Every combination of a grid is trained once to its end, and every validation is recorded. Searches are then replayed
over the records, one trial at a time: a proposal is looked up instead of trained, and costs the device time of the
recorded trial up to the validation at which the search stops it. Each search is compared with random proposals and
full-length trials, with random proposals and the same early stopping, with ASHA and with the median stopping rule.

Searches decide by validation scores, and are judged by test scores. The file that `benchmarks.train_grid` writes has
the test score of the best checkpoint at every validation:

    python -m benchmarks.train_grid benchmarks/spaces/grid_multi30k.yaml --minutes 30    # repeat until the file exists
    python -m benchmarks.search_efficiency benchmarks/grids/grid_multi30k.json --seeds 300 --suffix grid_multi30k

A grid can also be the folder of a sweep with `sampler: grid` and `stopping: off`, which has the test scores of finished
trials only. A stopped trial then adds nothing to the hypervolume of a search. `--live SEED` also runs one pair of real
sweeps in empty homes: this search, and random proposals with the same early stopping.

    raydistill sweep benchmarks/spaces/search_demo.yaml
    python -m benchmarks.search_efficiency outputs/sweeps/search_demo --seeds 300 --live 0

`--candidates` also replays the methods that the search does not use: `benchmarks.numeric_study` and a comparison of
each trial with all cheaper trials.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.common import BenchmarkResult, describe_machine
from benchmarks.numeric_study import MultivariateStudy, NumericStudy
from benchmarks.stopping_rules import StoppingRule, stops_by_asha, stops_by_median, stops_per_rung
from raydistill.config.presets import DEMO_TEACHER_RUN
from raydistill.config.space import Search, Space, read_space
from raydistill.core.console import print_progress
from raydistill.core.records import Record
from raydistill.results.records import Trial, read_trials
from raydistill.results.sweep_record import read_sweep
from raydistill.results.tables import markdown_table
from raydistill.search.early_stopping import Curve, validation_curve, warmup_share
from raydistill.search.study import SweepStudy
from raydistill.training.run import collapse_reason

SHARES = (0.9, 0.95, 0.99)  # of the grid's hypervolume; chosen before the first replay
MAIN_SHARE = 0.95
# The current defaults: the grid's space file may be of an earlier release, and the grid did not use its values.
STOPPING_SETTINGS = Search().model_dump(include={"grace", "reduction"})
OURS, BASELINE = "this search", "random with the same stopping"
# The searches that all searches are compared with, the main one first
BASELINES = (BASELINE, "random with ASHA", "random with median stopping", "random, full length")
MAX_RATIO = 0.5  # that was asked for: device time of this search over the baseline's, to `MAIN_SHARE`
MAX_COST_RATIO = 1.05  # of the cost of a peer over that of the trial, where trials of other shapes are peers


@dataclass(frozen=True)
class RecordedTrial:
    """A trained trial of the grid.

    Attributes:
        size: the student's size.
        curve: progress and score of each validation.
        seconds: device-seconds from the start to the end of each validation.
        scoring_seconds: device-seconds after the last validation, in which the best checkpoint is scored on validation
            and test.
        validation_scoring_seconds: the part of `scoring_seconds` for validation, which a stopped trial needs too.
        score: the final score; None for a failed trial.
        cost: what the search minimises of the student's shape, such as the latency.
        collapsed: for each validation, whether the outputs would count as a failure.
        warmup: the share of the steps that are warm-up.
        test_scores: for each validation, the test score of the best checkpoint until then; None where it was not
            measured. Empty if searches are judged by validation scores.
    """

    size: str
    curve: Curve
    seconds: tuple[float, ...]
    scoring_seconds: float
    validation_scoring_seconds: float
    score: float | None
    cost: float
    collapsed: tuple[bool, ...]
    warmup: float = 0.0
    test_scores: tuple[float | None, ...] = ()

    @property
    def total_seconds(self) -> float:
        """Device-seconds of the whole trial."""
        return (self.seconds[-1] if self.seconds else 0.0) + self.scoring_seconds

    @property
    def has_final_test_score(self) -> bool:
        """Whether the test score of the finished trial is known."""
        return bool(self.test_scores) and self.test_scores[-1] is not None

    def judged_score(self, num_validations: int, score: float | None) -> float | None:
        """The score by which a search is judged after some validations of the trial.

        Args:
            num_validations: the validations until the end of the trial.
            score: the validation score of the trial; None for a failed trial.

        Returns:
            The test score, or `score` if the grid has no test scores; None for a trial that adds nothing.
        """
        if score is None or not self.test_scores:
            return score
        return self.test_scores[min(num_validations, len(self.test_scores)) - 1]


@dataclass(frozen=True)
class SearchPoint:
    """A finished trial of a search: device-seconds of the search until its end, the score it is judged by, its cost."""

    seconds: float
    score: float
    cost: float


PeerRule = Callable[[RecordedTrial, RecordedTrial], bool]  # whether the first trial is compared with the second


def is_any_trial(_trial: RecordedTrial, _other: RecordedTrial) -> bool:
    """All trials are peers, as in the published rules of early stopping."""
    return True


def has_same_shape(trial: RecordedTrial, other: RecordedTrial) -> bool:
    """The rule of the search: trials of one shape are peers."""
    return trial.size == other.size


def is_not_more_expensive(trial: RecordedTrial, other: RecordedTrial) -> bool:
    """A trial is compared with the trials of about its cost or less, which its student has to surpass for the front."""
    return other.cost <= MAX_COST_RATIO * trial.cost


@dataclass(frozen=True)
class SearchMethod:
    """A method of search.

    Attributes:
        sampler: the sampler of the space.
        stopping: the early stopping of the space.
        study: the study that proposes trials.
        is_peer: which trials a trial is compared with.
        stops: the rule of early stopping, unless `stopping` is "off".
    """

    sampler: str
    stopping: str
    study: type[SweepStudy] = SweepStudy
    is_peer: PeerRule = has_same_shape
    stops: StoppingRule = stops_per_rung

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `search` in the space."""
        return {"sampler": self.sampler, "stopping": self.stopping}


SEARCHES = {
    OURS: SearchMethod("tpe", "per_shape"),
    "TPE, full length": SearchMethod("tpe", "off"),
    BASELINE: SearchMethod("random", "per_shape"),
    "random with ASHA": SearchMethod("random", "per_shape", is_peer=is_any_trial, stops=stops_by_asha),
    "random with median stopping": SearchMethod("random", "per_shape", is_peer=is_any_trial, stops=stops_by_median),
    "random, full length": SearchMethod("random", "off"),
}
CANDIDATES = {
    "TPE over numbers": SearchMethod("tpe", "per_shape", study=NumericStudy),
    "multivariate TPE over numbers": SearchMethod("tpe", "per_shape", study=MultivariateStudy),
    "this search, compared with cheaper trials": SearchMethod("tpe", "per_shape", is_peer=is_not_more_expensive),
    "multivariate TPE over numbers, compared with cheaper trials": SearchMethod(
        "tpe", "per_shape", study=MultivariateStudy, is_peer=is_not_more_expensive
    ),
}


class Grid(Record):
    """The file of a grid.

    Attributes:
        name: name of the space.
        space: the space, with choices only.
        reference: score and cost of the reference point.
        pass_seconds: device-seconds of the teacher's passes.
        trials: the trials by key, in the order of their start.
    """

    name: str
    space: Space
    reference: tuple[float, float]
    pass_seconds: float
    trials: dict[str, RecordedTrial]

    @property
    def target(self) -> "Target":
        """The hypervolume of all trials, and the reference point."""
        judged = ((t.judged_score(len(t.curve), t.score), t.cost) for t in self.trials.values())
        points = [(score, cost) for score, cost in judged if score is not None]
        return Target(hypervolume(points, self.reference), self.reference, self.pass_seconds)

    @property
    def judged_by(self) -> Literal["test", "validation"]:
        """The split of the scores by which searches are judged."""
        return "test" if any(trial.test_scores for trial in self.trials.values()) else "validation"

    @property
    def has_every_test_score(self) -> bool:
        """Whether the test scores of trials that are stopped early are known."""
        return not any(None in trial.test_scores for trial in self.trials.values() if trial.score is not None)


def record_trial(
    trial: Trial,
    metric: str,
    cost: float,
    teacher_repetition: float | None = None,
    test_scores: Mapping[int, float] | None = None,
) -> RecordedTrial:
    """Convert a finished trial, with the device time of start-up, training, validations and final scoring.

    Args:
        trial: the trial.
        metric: the main metric.
        cost: what the search minimises of the student's shape.
        teacher_repetition: the repetition in the teacher's outputs, with which a student's is compared.
        test_scores: test scores of checkpoints by step, of each that was the best when it was validated. By default,
            the trial's own test score is known at its last validation.
    """
    history = trial.history()
    seconds = tuple(3600 * line.device_hours for line in history)
    scoring_seconds = 3600 * trial.metrics["device_hours"] - (seconds[-1] if seconds else 0.0)
    rows = {
        split: len(values) for split in ("validation", "test") if (values := trial.row_statistics(split)) is not None
    }
    validation_share = rows["validation"] / sum(rows.values()) if rows else 1.0
    return RecordedTrial(
        size=trial.size,
        curve=validation_curve(trial, history),
        seconds=seconds,
        scoring_seconds=scoring_seconds,
        validation_scoring_seconds=scoring_seconds * validation_share,
        score=trial.score(metric) if trial.scored else None,
        cost=cost,
        collapsed=tuple(bool(collapse_reason(line.repetition or 0.0, teacher_repetition)) for line in history),
        warmup=warmup_share(trial, history),
        test_scores=_scores_by_validation(trial, metric, [line.step for line in history], test_scores),
    )


def _scores_by_validation(
    trial: Trial, metric: str, steps: Sequence[int], test_scores: Mapping[int, float] | None
) -> tuple[float | None, ...]:
    """The test score of the best checkpoint at each validation; see `record_trial`."""
    if test_scores is None:
        final = (trial.test or {}).get(metric) if trial.status == "done" else None
        return (*(None for _ in steps[1:]), final)
    best = [[step for step in sorted(test_scores) if step <= validated] for validated in steps]
    return tuple(test_scores[earlier[-1]] if earlier else None for earlier in best)


def judge_by_one_split(trials: Mapping[str, RecordedTrial]) -> dict[str, RecordedTrial]:
    """The trials; without their test scores if the final test score of a finished trial is not known."""
    if all(trial.has_final_test_score for trial in trials.values() if trial.score is not None):
        return dict(trials)
    return _without_test_scores(trials)


def _without_test_scores(trials: Mapping[str, RecordedTrial]) -> dict[str, RecordedTrial]:
    return {key: replace(trial, test_scores=()) for key, trial in trials.items()}


def read_grid(sweep: Path) -> dict[str, RecordedTrial]:
    """The finished trials of a sweep, by key, in the order of their start."""
    record = read_sweep(sweep)
    costs = {size: costs[record.cost] for size, costs in record.shapes.costs.items()}
    finished = [trial for trial in read_trials(sweep) if trial.status != "running"]
    repetition = record.teacher.repetition
    return {t.key: record_trial(t, record.metric, costs[t.size], repetition) for t in finished}


def open_grid(path: Path) -> Grid:
    """The grid of a file, or of the folder of a finished sweep.

    The reference point of a sweep is half the teacher's score, on the split by which searches are judged, and the
    teacher's cost.
    """
    if path.is_file():
        return Grid.read(path)
    record = read_sweep(path)
    teacher = record.teacher
    trials = judge_by_one_split(read_grid(path)) if teacher.test else _without_test_scores(read_grid(path))
    by_test = teacher.test is not None and any(trial.test_scores for trial in trials.values())
    teacher_scores = teacher.test.metrics if teacher.test and by_test else teacher.metrics
    return Grid(
        name=path.name,
        space=read_space(path / "space.yaml"),
        reference=(teacher_scores[record.metric] / 2, teacher.costs[record.cost]),
        pass_seconds=3600 * teacher.passes.total_hours,
        trials=trials,
    )


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that (score, cost) points dominate, bounded by a reference point of low score and high cost."""
    area, best_score = 0.0, reference[0]
    for score, cost in sorted(points, key=lambda point: (point[1], -point[0])):
        if cost < reference[1] and score > best_score:
            area += (score - best_score) * (reference[1] - cost)
            best_score = score
    return area


def points_hypervolume(points: Sequence[SearchPoint], reference: tuple[float, float]) -> float:
    """`hypervolume` of a search's points."""
    return hypervolume([(point.score, point.cost) for point in points], reference)


def truncate_trial(
    trial: RecordedTrial, peer_curves: Sequence[Curve], search: Any, stops: StoppingRule = stops_per_rung
) -> tuple[int, float, float | None]:
    """Apply early stopping to a recorded trial.

    A stopped trial costs the whole trial's scoring on validation, in proportion to the rows. As in the product, a trial
    has failed if the outputs of its best validation had collapsed.

    Returns:
        The number of validations, the device-seconds and the validation score; the score is None for a failed trial.
    """
    if search.stops_early:
        grace = max(search.grace, trial.warmup)
        for count in range(1, len(trial.seconds)):
            if stops(trial.curve[:count], peer_curves, grace, search.reduction):
                scores = [score for _, score in trial.curve[:count]]
                best = scores.index(max(scores))
                seconds = trial.seconds[count - 1] + trial.validation_scoring_seconds
                return count, seconds, None if trial.collapsed[best] else scores[best]
    return len(trial.curve), trial.total_seconds, trial.score


def replay(
    space: Space,
    grid: dict[str, RecordedTrial],
    is_enough: Callable[[Sequence[SearchPoint]], bool] = lambda points: False,
    method: SearchMethod | None = None,
) -> list[SearchPoint]:
    """Replay one search over the grid until `is_enough(points)`, or until the search or the grid is exhausted."""
    method = method or SearchMethod(space.search.sampler, space.search.stopping)
    points: list[SearchPoint] = []
    curves: list[tuple[RecordedTrial, Curve]] = []
    total_seconds = 0.0
    with tempfile.TemporaryDirectory(prefix="raydistill-replay-") as folder:
        study = method.study(space, Path(folder))
        for trial_id in map(str, range(len(grid))):
            proposal = study.propose(trial_id)
            if proposal is None:
                break
            trial = grid[proposal.key]
            peer_curves = [curve for other, curve in curves if method.is_peer(trial, other)]
            num_validations, seconds, score = truncate_trial(trial, peer_curves, space.search, method.stops)
            total_seconds += seconds
            report: dict[str, Any] = {"finished": True, "status": "failed"}
            if score is not None:
                curves.append((trial, trial.curve[:num_validations]))
                judged = trial.judged_score(num_validations, score)
                points += [] if judged is None else [SearchPoint(total_seconds, judged, trial.cost)]
                report |= {"status": "done", "score": score, space.search.cost: trial.cost}
            study.report(trial_id, report)
            if is_enough(points):
                break
    return points


def seconds_to(points: Sequence[SearchPoint], target: float, reference: tuple[float, float]) -> float:
    """Device-seconds until a search's hypervolume reaches `target`; infinity if it never does."""
    for count in range(1, len(points) + 1):
        if points_hypervolume(points[:count], reference) >= target:
            return points[count - 1].seconds
    return math.inf


def ratio_of_medians(ours: Sequence[float], baseline: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the medians over seeds, with its 95 % bootstrap interval (2,000 draws, both sides resampled).

    The ratio is infinite if half of ours are infinite, and 0 if half of the baseline's are.
    """
    rng = np.random.default_rng(0)
    draws = [np.median(rng.choice(np.asarray(values), (2000, len(values))), axis=1) for values in (ours, baseline)]
    low, high = np.percentile(_ratio(*draws), [2.5, 97.5], method="inverted_cdf")
    return float(_ratio(np.median(ours), np.median(baseline))), float(low), float(high)


def _ratio(ours: Any, baseline: Any) -> Any:
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(ours), np.inf, ours / baseline)


def replay_all(
    grid: Grid, methods: Mapping[str, SearchMethod], seeds: int, is_enough: Callable[[Sequence[SearchPoint]], bool]
) -> dict[str, list[list[SearchPoint]]]:
    """Replay each method with every seed, each until `is_enough(points)`."""
    space, trials = grid.space, grid.trials
    replays: dict[str, list[list[SearchPoint]]] = {}
    for name, method in methods.items():
        settings = {**method.settings, **STOPPING_SETTINGS, "trials": len(trials)}
        searches = [space.search.model_copy(update={**settings, "seed": seed}) for seed in range(seeds)]
        spaces = [space.model_copy(update={"search": search, "points": []}) for search in searches]
        replays[name] = [replay(seeded_space, trials, is_enough, method) for seeded_space in spaces]
        print_progress(f"{name}: {seeds} replays")
    return replays


@dataclass(frozen=True)
class Target:
    """The scale on which searches are compared.

    Attributes:
        grid_hypervolume: the hypervolume of all trials of the grid.
        reference: score and cost of the reference point.
        pass_seconds: device-seconds of the teacher's passes, which every search needs before its first trial.
    """

    grid_hypervolume: float
    reference: tuple[float, float]
    pass_seconds: float


def compare_searches(
    replays: dict[str, list[list[SearchPoint]]], share: float, target: Target
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Compare the device time until the searches reach a share of the grid's hypervolume.

    Returns:
        The rows of the table, and a record with all digits for each row.
    """
    hypervolume_target = share * target.grid_hypervolume
    times = {
        name: [seconds_to(points, hypervolume_target, target.reference) for points in runs]
        for name, runs in replays.items()
    }
    with_passes = {name: [seconds + target.pass_seconds for seconds in values] for name, values in times.items()}
    rows, records = [], []
    for name, values in times.items():
        ratios = {baseline: ratio_of_medians(values, times[baseline]) for baseline in BASELINES}
        ratio_with_passes = ratio_of_medians(with_passes[name], with_passes[BASELINE])
        quartiles = np.percentile(values, [25, 50, 75], method="inverted_cdf")
        reached = sum(map(math.isfinite, values)) / len(values)
        rows.append(
            [
                f"{share:.0%}{' (main)' if share == MAIN_SHARE else ''}",
                name,
                " / ".join(_format_number(value, 0) for value in quartiles),
                *map(_format_interval, ratios.values()),
                _format_interval(ratio_with_passes),
                f"{reached:.0%}",
            ]
        )
        records.append(
            {
                "share": share,
                "search": name,
                "reached": reached,
                "seconds": _finite_or_none(values),
                "ratios": {baseline: _finite_or_none(ratio) for baseline, ratio in ratios.items()},
                "ratio_with_passes": _finite_or_none(ratio_with_passes),
            }
        )
    return rows, records


def _format_number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "never"


def _format_interval(ratio: tuple[float, float, float]) -> str:
    value, low, high = (_format_number(number, 2) for number in ratio)
    return f"{value} [{low}, {high}]"


def _finite_or_none(values: Iterable[float]) -> list[float | None]:
    """The values for JSON, with None for infinity."""
    return [value if math.isfinite(value) else None for value in values]


def run_live_sweeps(sweep: Path, seed: int, trials: int) -> dict[str, list[SearchPoint]]:
    """Run this search and the baseline as real sweeps over the grid's space, each in an empty home.

    Trials run one at a time, as in the replays. Points have the costs of the grid, so that hypervolumes are
    comparable: the live sweeps time the shapes at another time. A trial that failed, or that has no test score where
    the grid is judged by test scores, costs time and adds nothing.
    """
    points_by_search = {}
    grid = open_grid(sweep)
    costs = {trial.size: trial.cost for trial in grid.trials.values()}
    for name in (OURS, BASELINE):
        with tempfile.TemporaryDirectory(prefix="raydistill-live-") as folder:
            home = Path(folder)
            _copy_teacher(sweep.absolute().parents[1], home)
            changes = {**SEARCHES[name].settings, **STOPPING_SETTINGS, "seed": seed, "trials": trials, "concurrent": 1}
            settings = [f"search.{key}={json.dumps(value)}" for key, value in changes.items()]
            settings += ["points=[]", "budgets={}", "tracking_uri=null"]
            command = [sys.executable, "-m", "raydistill.sweep", str(sweep / "space.yaml")]
            command += [part for setting in settings for part in ("--set", setting)]
            subprocess.run(command, env={**os.environ, "RAYDISTILL_HOME": folder}, stdout=sys.stderr, check=True)
            seconds, points = 0.0, []
            live = read_grid(home / "sweeps" / sweep.name)
            for trial in (live if grid.judged_by == "test" else _without_test_scores(live)).values():
                seconds += trial.total_seconds
                score = trial.judged_score(len(trial.curve), trial.score)
                points.append(SearchPoint(seconds, -math.inf if score is None else score, costs[trial.size]))
            points_by_search[name] = points
    return points_by_search


def _copy_teacher(grid_home: Path, home: Path) -> None:
    """Copy the demo's teacher to an empty home, if the grid used it."""
    if (teacher := grid_home / "runs" / DEMO_TEACHER_RUN).is_dir():
        shutil.copytree(teacher, home / "runs" / DEMO_TEACHER_RUN)


def live_rows(
    points_by_search: dict[str, list[SearchPoint]], target: Target
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The table rows of the live sweeps, and a record with all digits for each row."""
    rows, records = [], []
    for name, points in points_by_search.items():
        times = [seconds_to(points, share * target.grid_hypervolume, target.reference) for share in SHARES]
        reached = points_hypervolume(points, target.reference) / target.grid_hypervolume
        total = f"{points[-1].seconds:.0f}"
        rows.append([name, str(len(points)), total, f"{reached:.1%}", *(_format_number(t, 0) for t in times)])
        values = [_finite_or_none((point.seconds, point.score, point.cost)) for point in points]
        records.append({"live": name, "points": values, "reached": reached, "seconds": _finite_or_none(times)})
    return rows, records


def main() -> None:
    """Run the command line."""
    options = _parse_arguments()
    machine = describe_machine()
    grid = open_grid(options.grid)
    target = grid.target
    enough = max(SHARES) * target.grid_hypervolume
    methods = {**(CANDIDATES if options.candidates else {}), **SEARCHES}
    replays = replay_all(
        grid, methods, options.seeds, lambda points: points_hypervolume(points, target.reference) >= enough
    )
    rows, records = [], []
    for share in SHARES:
        share_rows, share_records = compare_searches(replays, share, target)
        rows += share_rows
        records += share_records
    header = ["share of the grid's hypervolume", "search", "device-seconds (quartiles)"]
    header += [
        *(f"ratio to {name}" for name in BASELINES),
        f"ratio to {BASELINE}, with the teacher's passes",
        "reached",
    ]
    text = f"{describe_grid(grid, options.seeds)}{describe_main_ratios(records)}\n\n{markdown_table(header, rows)}"
    if options.live is not None:
        live = run_live_sweeps(options.grid, options.live, options.live_trials or len(grid.trials) // 3)
        rows, live_records = live_rows(live, target)
        header = ["live", "trials", "device-seconds in total", "share of the grid's hypervolume"]
        text += "\n\n" + markdown_table([*header, *(f"device-seconds to {share:.0%}" for share in SHARES)], rows)
        records += live_records
    path = BenchmarkResult("search_efficiency", "Search efficiency", text, records, machine, options.suffix).write()
    print(path.read_text(encoding="utf-8"))


def describe_main_ratios(records: Sequence[Mapping[str, Any]]) -> str:
    """A sentence for each baseline: the ratio of this search to `MAIN_SHARE`, and the ratio that was asked for."""
    [ratios] = [r["ratios"] for r in records if (r["search"], r["share"]) == (OURS, MAIN_SHARE)]
    lines = []
    for baseline, values in ratios.items():
        bound = f"; at most {MAX_RATIO} was asked for" if baseline == BASELINE else ""
        ratio, low, high = (math.inf if value is None else value for value in values)
        lines.append(f"- {OURS} over {baseline}: {_format_interval((ratio, low, high))}{bound}")
    return f"Device-seconds to {MAIN_SHARE:.0%} of the grid's hypervolume:\n\n" + "\n".join(lines)


def describe_judgement(grid: Grid) -> str:
    """Sentences about the scores by which searches are judged, with a warning where they are not test scores."""
    if grid.judged_by == "validation":
        return (
            "**Searches are judged by validation scores**, by which they also decide, because the grid has no test "
            "scores of all finished trials; train a grid with `benchmarks.train_grid`."
        )
    if grid.has_every_test_score:
        return "Searches decide by validation scores and are judged by the test scores of the best checkpoints."
    return (
        "Searches decide by validation scores and are judged by test scores. The grid has no test scores of trials "
        "that are stopped early, so that these add nothing to a search's hypervolume."
    )


def describe_grid(grid: Grid, seeds: int) -> str:
    """A paragraph about the grid and how trials are judged and charged."""
    target, trials = grid.target, grid.trials.values()
    failed = sum(trial.score is None for trial in trials)
    score, cost = target.reference
    return (
        f"Grid: {grid.name}, {len(trials)} trials ({failed} failed) of {len({t.size for t in trials})} shapes, "
        f"{sum(t.total_seconds for t in trials):.0f} device-seconds in total with start-up, validations and final "
        f"scoring; the teacher's passes took {target.pass_seconds:.0f}, the same for every search. {seeds} seeds. "
        f"{describe_judgement(grid)} "
        f"Reference point: half the teacher's score ({score:.2f}) and the teacher's {grid.space.search.cost} "
        f"({cost:.4g}). A stopped trial costs the whole trial's scoring on validation, and none on test. Trials are "
        f"compared after {STOPPING_SETTINGS['grace']:.3g} of their steps, and the better "
        f"1/{STOPPING_SETTINGS['reduction']} of a shape continue. ASHA and the median rule compare trials of all "
        f"shapes from this share of the steps on (benchmarks/stopping_rules.py). A replay that never reaches the share "
        f"counts as infinitely long. A ratio to a search of which half of the replays never reach the share is 0.\n\n"
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="folder of a finished sweep over a grid, or the file of a grid")
    parser.add_argument("--seeds", type=int, default=300, help="replays per search; default: 300")
    parser.add_argument("--live", type=int, metavar="SEED", help="also run one pair of real sweeps with this seed")
    parser.add_argument("--live-trials", type=int, help="trials of each real sweep; default: a third of the grid")
    parser.add_argument("--candidates", action="store_true", help="also replay methods that the search does not use")
    parser.add_argument("--suffix", default="", help="suffix of the names of the result files")
    options = parser.parse_args()
    if options.live is not None and not options.grid.is_dir():
        parser.error("--live needs the folder of a sweep")
    if options.grid.is_dir() and any(trial.status == "stopped" for trial in read_trials(options.grid)):
        parser.error(f"{options.grid}: some trials were stopped early; train a grid with stopping: off")
    return options


if __name__ == "__main__":
    main()

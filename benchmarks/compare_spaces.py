"""The hypervolumes of a search of a larger space and of version 1's space, after equal device-time.

Both sides are finished sweeps of one teacher and one data set. For several seeds, name as many sweeps on both sides:
equal positions are pairs.

    raydistill sweep benchmarks/spaces/multi30k_version1.yaml
    raydistill sweep search_spaces/multi30k.yaml --set search.trials=60 --set search.max_device_hours=HOURS
    python -m benchmarks.compare_spaces --larger outputs/sweeps/multi30k --version1 outputs/sweeps/multi30k_version1

HOURS is the device-time of version 1's sweep, which `--hours` prints. For another seed, add
`--set name=multi30k-1 --set run.training.seed=1 --set search.seed=1` to the larger space's command, and the first two
settings, with the other name, to version 1's.

How the two sides are compared:

- Device-time: version 1's sweep counts as a whole, with the teacher's passes. Of the larger space's sweep, the trials
  count in the order of proposals as long as the device-hours of its passes and trials are not more.
- Scores: the test score of each trial with the run's own decoding, which the sweep measured. A failed trial adds
  nothing. A stopped trial has no test score and adds nothing.
- Latencies: of each shape as a share of the teacher's latency, all in one session of this script on one machine, with
  the beams of the teacher's scores in fp32. Source and output lengths are fixed to the means of the training data, so
  that a student that writes repetitions is not slower. The timings stay in the working folder, and a killed command
  resumes. Run on a machine that does nothing else.
- Reference point: half the teacher's test score, and the teacher's latency. A second column has a score of 0 instead.
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, BenchmarkResult, describe_machine
from benchmarks.fixed_latency import FixedLengths, compare_fixed_lengths, open_checkpoint
from benchmarks.pieces import PartialResults
from benchmarks.search_efficiency import hypervolume
from raydistill.data.corpus import read_corpus
from raydistill.models.loading import locate_checkpoint
from raydistill.results.records import Trial, read_trials
from raydistill.results.sweep_record import SweepRecord, read_sweep
from raydistill.results.tables import markdown_table

MIN_GAIN = 0.15  # that was asked for
TIMED_ROWS = 128


@dataclass(frozen=True)
class ScoredTrial:
    """A finished trial.

    Attributes:
        size: the student's size.
        test: the test score; None for a trial that failed or was stopped.
        hours: the device-hours.
    """

    size: str
    test: float | None
    hours: float


@dataclass(frozen=True)
class SweepSide:
    """A sweep as a side of the comparison.

    Attributes:
        name: the sweep's folder.
        pass_hours: device-hours of the teacher's passes.
        trials: the finished trials in the order of proposals.
        teacher_test: the teacher's test score.
    """

    name: str
    pass_hours: float
    trials: tuple[ScoredTrial, ...]
    teacher_test: float

    @property
    def hours(self) -> float:
        """Device-hours of the whole sweep."""
        return self.pass_hours + sum(trial.hours for trial in self.trials)

    def within(self, hours: float) -> tuple[ScoredTrial, ...]:
        """The first trials that end within some device-hours of the sweep."""
        used, count = self.pass_hours, 0
        for trial in self.trials:
            used += trial.hours
            if used > hours * (1 + 1e-9):
                break
            count += 1
        return self.trials[:count]


def read_side(sweep: Path) -> SweepSide:
    """Read a sweep.

    Raises:
        SystemExit: the teacher has no test score.
    """
    record = read_sweep(sweep)
    if record.teacher.test is None:
        raise SystemExit(f"{sweep}: the data set has no test split")
    finished = [trial for trial in read_trials(sweep) if trial.status != "running"]
    return SweepSide(
        name=sweep.name,
        pass_hours=record.teacher.passes.total_hours,
        trials=tuple(
            ScoredTrial(trial.size, (trial.test or {}).get(record.metric), trial.device_hours) for trial in finished
        ),
        teacher_test=record.teacher.test.metrics[record.metric],
    )


def front_hypervolume(trials: Iterable[ScoredTrial], latencies: dict[str, float], lowest_score: float) -> float:
    """The area that the test scores dominate over the shares of the teacher's latency.

    Args:
        trials: the trials.
        latencies: by size, the latency as a share of the teacher's.
        lowest_score: the score of the reference point, whose latency is the teacher's.
    """
    points = [(trial.test, latencies[trial.size]) for trial in trials if trial.test is not None]
    return hypervolume(points, (lowest_score, 1.0))


def compare_pair(larger: SweepSide, first: SweepSide, latencies: dict[str, float]) -> dict[str, Any]:
    """The hypervolumes of both sides after the device-time of version 1's sweep, and the gains of the larger space.

    A gain is the ratio of the hypervolumes minus 1; None if version 1's hypervolume is 0.
    """
    hours = first.hours
    counted = larger.within(hours)
    result: dict[str, Any] = {"larger": larger.name, "version1": first.name, "hours": hours}
    result |= {"larger_hours": larger.pass_hours + sum(trial.hours for trial in counted), "trials": len(counted)}
    for name, lowest in (("half", first.teacher_test / 2), ("zero", 0.0)):
        areas = [front_hypervolume(trials, latencies, lowest) for trials in (counted, first.trials)]
        gain = areas[0] / areas[1] - 1 if areas[1] else None
        result |= {f"{name}_larger": areas[0], f"{name}_version1": areas[1], f"{name}_gain": gain}
    return result


def shape_checkpoints(sweeps: Sequence[Path]) -> dict[str, Path]:
    """A checkpoint of each size with a test score."""
    checkpoints: dict[str, Path] = {}
    for sweep in sweeps:
        for trial in read_trials(sweep):
            if trial.checkpoint is not None and trial.test:
                checkpoints.setdefault(trial.size, trial.checkpoint)
    return checkpoints


def time_shapes(options: argparse.Namespace, sweeps: Sequence[Path]) -> list[dict[str, Any]]:
    """Time each size in pairs with the teacher; sizes that the working folder has are not timed again."""
    record = read_sweep(sweeps[0])
    teacher, run = record.teacher, _first_trial(sweeps[0]).run_config()
    path = options.work / "latencies.json"
    settings = {"teacher": teacher.key, "tokens": teacher.output_tokens, "beams": teacher.beams}
    results = PartialResults.open(path, {**settings, "threads": options.threads})
    texts = tuple(read_corpus(run.dataset, "test").sources[:TIMED_ROWS])
    lengths = FixedLengths(texts, teacher.output_tokens, options.seconds)
    location = Path(locate_checkpoint(teacher.name, run.dataset.name))
    baseline = open_checkpoint(location, "fp32", options.threads, options.work)
    timings = []
    for size, checkpoint in shape_checkpoints(sweeps).items():
        part = results.find(size=size)
        if part is None:
            engine = open_checkpoint(checkpoint, "fp32", options.threads, options.work)
            timing = compare_fixed_lengths((baseline, teacher.beams), (engine, teacher.beams), lengths)
            part = {"size": size, "ratio": timing.best_ratio, "interval": timing.interval}
            part |= {"stop_reason": timing.stop_reason}
            results = results.add(path, part)
        timings.append(part)
    return timings


def _first_trial(sweep: Path) -> Trial:
    return read_trials(sweep)[0]


def check_comparable(records: Sequence[SweepRecord]) -> None:
    """Refuse sweeps of different teachers, test rows, metrics or decodings."""
    for record in records[1:]:
        for name in ("key", "metric", "decoding", "signature"):
            if getattr(record.teacher, name) != getattr(records[0].teacher, name):
                raise SystemExit(f"{record.name} and {records[0].name} differ in the teacher's {name}")
        if record.teacher.data.get("test") != records[0].teacher.data.get("test"):
            raise SystemExit(f"{record.name} and {records[0].name} have different test rows")


def as_markdown(pairs: Sequence[dict[str, Any]], timings: Sequence[dict[str, Any]], teacher_test: float) -> str:
    """The gains of each pair and their mean, the latencies, and how scores and latencies were taken."""
    rows = [
        [
            *(pair["larger"], pair["version1"], f"{pair['hours']:.3f}", f"{pair['larger_hours']:.3f}"),
            *(str(pair["trials"]), f"{pair['half_larger']:.3f}", f"{pair['half_version1']:.3f}"),
            *(_percent(pair["half_gain"]), _percent(pair["zero_gain"])),
        ]
        for pair in pairs
    ]
    header = ["larger space", "version 1's space", "device-hours", "of the larger space", "trials of the larger space"]
    header += ["hypervolume", "version 1's", "gain", "gain, reference score 0"]
    known = [pair["half_gain"] for pair in pairs if pair["half_gain"] is not None]
    mean = f"Mean gain of {len(known)}: {_percent(statistics.fmean(known))}; " if known else ""
    cells = [[t["size"], f"{t['ratio']:.3f}", _interval(t["interval"]), t["stop_reason"]] for t in timings]
    note = (
        "Test scores: of each trial with the run's own decoding; trials that failed or were stopped add nothing. "
        "Latencies: shares of the teacher's latency for batches of 32 rows, with the teacher's beams in fp32, source "
        "and output lengths fixed, in pairs with the teacher, all on this machine. Reference point: half the teacher's "
        f"test score ({teacher_test / 2:.2f}) and the teacher's latency."
    )
    latencies = markdown_table(["size", "latency over the teacher's", "95 % interval", "end of the comparison"], cells)
    return f"{mean}at least +{MIN_GAIN:.0%} was asked for.\n\n{markdown_table(header, rows)}\n\n{note}\n\n{latencies}"


def _percent(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:+.1%}"


def _interval(interval: Sequence[float] | None) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "-"


def main() -> None:
    """Run the command line."""
    options = _parse_arguments()
    first = [read_side(sweep) for sweep in options.version1]
    if options.hours:
        for side in first:
            print(f"{side.name}: {side.hours:.4f} device-hours")
        return
    machine = describe_machine()
    sweeps = [*options.larger, *options.version1]
    check_comparable([read_sweep(sweep) for sweep in sweeps])
    timings = time_shapes(options, sweeps)
    latencies = {timing["size"]: timing["ratio"] for timing in timings}
    larger = [read_side(sweep) for sweep in options.larger]
    pairs = [compare_pair(*sides, latencies) for sides in zip(larger, first, strict=True)]
    text = as_markdown(pairs, timings, first[0].teacher_test)
    title = "A larger space and version 1's space after equal device-time"
    data = {"pairs": pairs, "latencies": timings}
    print(BenchmarkResult("compare_spaces", title, text, data, machine).write(options.results))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--larger", type=Path, nargs="+", default=[], help="folders of sweeps of the larger space")
    parser.add_argument(
        "--version1", type=Path, nargs="+", required=True, help="folders of sweeps of version 1's space"
    )
    parser.add_argument("--hours", action="store_true", help="only print the device-hours of version 1's sweeps")
    parser.add_argument("--threads", type=int, default=1, help="threads of the timed engines; default: 1")
    parser.add_argument("--seconds", type=float, default=90.0, help="longest time of a comparison; default: 90")
    parser.add_argument("--work", type=Path, default=Path("outputs/compare_spaces"), help="folder of the timings")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: benchmarks/results")
    options = parser.parse_args()
    if not options.hours and len(options.larger) != len(options.version1):
        parser.error("name as many sweeps of the larger space as of version 1's")
    return options


if __name__ == "__main__":
    main()

"""How often a comparison of two latencies is wrong: pairs in alternation, and separate medians of 7 calls.

Calls are simulated, because the true ratio of real calls is not known. The code under test is the product's:
`compare_pairs` takes simulated pairs. Every noise is simulated 2,000 times at each true ratio.

    python -m benchmarks.paired_latency
"""

import argparse
import itertools
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from benchmarks.common import BenchmarkResult, describe_machine
from raydistill.core.console import print_progress
from raydistill.core.machine import available_cores
from raydistill.evaluation.paired_latency import Decision, Pair, StoppingRule, compare_pairs
from raydistill.results.tables import markdown_table

BOUND = 0.5
RATIOS = (0.9, 0.97, 1.0, 1.03, 1.1)  # true ratios as multiples of the bound
BASELINE_SECONDS = 0.2
SEPARATE_CALLS = 7  # a quickstart's validation set has 7 batches of 32 rows
RULE = StoppingRule(max_seconds=120.0)
HORIZON_SECONDS = 600.0  # of the simulated machine
TICK_SECONDS = 0.01  # resolution of the system's CPU times


@dataclass(frozen=True)
class Noise:
    """What disturbs the calls of a simulated machine.

    Attributes:
        jitter: Standard deviation of the logarithm of a call's time.
        spikes_per_s: Rate of spikes, each of which adds 20 ms or more (Pareto, exponent 1.5) to a call.
        drift: Amplitude of a slow wave in the logarithm of all times (periods of one to five minutes), plus a random
            walk that grows to the same size over ten minutes.
        busy_share: Share of the time in which another process runs, for 8 seconds on average.
        wander: Standard deviation of a part of the logarithm that lasts for 5 seconds and differs between baseline and
            student. The ratio itself then changes with time, which the interval assumes not to happen.
    """

    jitter: float
    spikes_per_s: float = 0.0
    drift: float = 0.0
    busy_share: float = 0.0
    wander: float = 0.0


NOISES = {
    "jitter 10 %": Noise(0.10),
    "jitter 20 %": Noise(0.20),
    "jitter 10 %, spikes": Noise(0.10, spikes_per_s=0.3),
    "jitter 10 %, drift": Noise(0.10, drift=0.15),
    "jitter 10 %, another process 40 % of the time": Noise(0.10, busy_share=0.4),
    "jitter 15 %, spikes, drift, another process": Noise(0.15, spikes_per_s=0.3, drift=0.15, busy_share=0.4),
}
OUTSIDE_ASSUMPTIONS = {"jitter 10 %, and the ratio itself changes by 3 % every 5 seconds": Noise(0.10, wander=0.02)}


class Machine:
    """A simulated machine: the times of calls at given moments, and the load by another process.

    The other process slows the calls down by 30 to 100 %, and the student by up to 15 % more or less than the baseline.
    """

    def __init__(self, noise: Noise, rng: np.random.Generator) -> None:
        self._noise, self._rng = noise, rng
        grid = np.linspace(0, HORIZON_SECONDS, 601)
        wave = np.sin(2 * np.pi * (grid / rng.uniform(60, 300) + rng.uniform()))
        walk = np.cumsum(rng.normal(0, 1 / np.sqrt(grid.size), grid.size))
        self._grid, self._drift = grid, noise.drift * (wave + walk)
        self._wander = [self._slow_noise() if noise.wander else np.zeros_like(grid) for _ in range(2)]
        self._edges = self._busy_edges()
        self._slowdown = rng.uniform(0.3, 1.0)
        self._student_factor = np.exp(rng.uniform(-0.15, 0.15))

    def call_seconds(self, starts: np.ndarray, typical: float, student: bool) -> np.ndarray:
        """The durations of calls that start at these moments; `typical` is the median without noise."""
        noise, rng = self._noise, self._rng
        slow = np.interp(starts, self._grid, self._drift + self._wander[student])
        seconds = typical * np.exp(slow + rng.normal(0, noise.jitter, starts.size))
        spikes = rng.random(starts.size) < noise.spikes_per_s * typical
        seconds += spikes * 0.02 * (1 + rng.pareto(1.5, starts.size))
        slowed = (1 + self._slowdown) * (self._student_factor if student else 1.0) - 1
        return seconds * (1 + slowed * self.busy_seconds(starts, starts + seconds) / seconds)

    def busy_seconds(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """How long the other process ran between two moments."""
        if self._edges.size == 0:
            return np.zeros_like(starts)
        # Before every second edge the process runs, so that the time it has run grows only between an even edge and
        # the next.
        ran = np.concatenate([[0.0], np.cumsum(np.diff(self._edges) * (np.arange(self._edges.size - 1) % 2 == 0))])
        return np.interp(ends, self._edges, ran) - np.interp(starts, self._edges, ran)

    def background_cores(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The measured load, in ticks: the other process keeps a core busy, and services keep 5 % of one busy."""
        busy = self.busy_seconds(starts, ends) + 0.05 * (ends - starts)
        ticks = busy / TICK_SECONDS + self._rng.uniform(-1, 1, starts.size)
        return np.maximum(0.0, np.round(ticks)) * TICK_SECONDS / (ends - starts)

    def _slow_noise(self) -> np.ndarray:
        """An autoregressive process with a memory of 5 seconds."""
        memory = np.exp(-(self._grid[1] - self._grid[0]) / 5)
        steps = self._rng.normal(0, self._noise.wander, self._grid.size)
        steps[1:] *= np.sqrt(1 - memory**2)
        return np.array(list(itertools.accumulate(steps, lambda state, step: memory * state + step)))

    def _busy_edges(self) -> np.ndarray:
        """Moments at which the other process starts (even positions) and ends (odd positions)."""
        share = self._noise.busy_share
        if share == 0:
            return np.array([])
        busy, idle = 8.0, 8.0 * (1 - share) / share
        count = int(4 * HORIZON_SECONDS / busy) + 2
        gaps = np.ravel([self._rng.exponential(idle, count), self._rng.exponential(busy, count)], order="F")
        # The first process may have started before the simulation.
        return np.cumsum(gaps) - self._rng.uniform(0, idle + busy)


def simulate_pairs(machine: Machine, ratio: float) -> Iterator[Pair]:
    """Pairs of one call each, in alternating order, from the start of the machine's time."""
    student_seconds = BASELINE_SECONDS * ratio
    count = int(HORIZON_SECONDS / 2 / (BASELINE_SECONDS + student_seconds))
    starts = np.arange(count) * (BASELINE_SECONDS + student_seconds)
    student_first = np.arange(count) % 2 == 1
    baseline = machine.call_seconds(starts + student_first * student_seconds, BASELINE_SECONDS, student=False)
    student = machine.call_seconds(starts + ~student_first * BASELINE_SECONDS, student_seconds, student=True)
    seconds = baseline + student
    cores = machine.background_cores(starts, starts + seconds)
    rows = zip((1000 * baseline).tolist(), (1000 * student).tolist(), seconds.tolist(), cores.tolist(), strict=True)
    for baseline_ms, student_ms, duration, load in rows:
        yield Pair(baseline_ms=(baseline_ms,), student_ms=(student_ms,), seconds=duration, background_cores=load)


def separate_medians(machine: Machine, ratio: float, calls: int, rng: np.random.Generator) -> float:
    """The ratio of two medians: the student is timed half a minute to five minutes after the baseline."""
    medians = []
    for student, start in ((False, rng.uniform(0, 60)), (True, rng.uniform(90, 360))):
        typical = BASELINE_SECONDS * (ratio if student else 1.0)
        starts = start + typical * np.arange(calls)
        medians.append(float(np.median(machine.call_seconds(starts, typical, student=student))))
    return medians[1] / medians[0]


@dataclass(frozen=True)
class Run:
    """One simulated comparison: the result of the pairs, and the ratios of separate medians."""

    decision: Decision
    interval: tuple[float, float] | None
    pairs: int
    dropped_pairs: int
    seconds: float
    separate_ratio: float
    equal_calls_ratio: float


def simulate_run(noise: Noise, ratio: float, seed: int, rule: StoppingRule = RULE) -> Run:
    """Compare a student of this true ratio with its baseline in three ways, each on the same simulated machine."""
    rng = np.random.default_rng(seed)
    machine = Machine(noise, rng)
    timing = compare_pairs(simulate_pairs(machine, ratio), [BOUND], rule)
    return Run(
        decision=timing.decided(BOUND),
        interval=timing.interval,
        pairs=len(timing.pairs),
        dropped_pairs=timing.dropped_pairs,
        seconds=sum(pair.seconds for pair in timing.pairs),
        separate_ratio=separate_medians(machine, ratio, SEPARATE_CALLS, rng),
        equal_calls_ratio=separate_medians(machine, ratio, len(timing.pairs), rng),
    )


@dataclass(frozen=True)
class Rates:
    """Shares of simulated runs at one noise and one true ratio.

    Attributes:
        ratio: The true ratio as a multiple of the bound.
        covered: Runs whose interval covers the true ratio, of the runs with an interval.
        wrong: Runs that decide for the wrong side; at a ratio of exactly the bound, runs that decide at all.
        undecided: Runs that do not decide.
        separate_wrong: Runs in which two separate medians of 7 calls are on the wrong side. They always decide, so that
            all runs are wrong at a ratio of exactly the bound.
        equal_calls_wrong: The same with as many calls of each side as the pairs had.
        pairs: Median number of pairs.
        dropped: Mean share of pairs that were dropped.
        seconds: Median duration.
    """

    ratio: float
    covered: float
    wrong: float
    undecided: float
    separate_wrong: float
    equal_calls_wrong: float
    pairs: float
    dropped: float
    seconds: float


def measure_rates(noise: Noise, multiple: float, seeds: range, rule: StoppingRule = RULE) -> Rates:
    """Simulate a run per seed at a true ratio of `multiple` times the bound."""
    ratio = BOUND * multiple
    right = "undecided" if multiple == 1 else "below" if multiple < 1 else "above"
    outcomes = [simulate_run(noise, ratio, seed, rule) for seed in seeds]
    intervals = [run.interval for run in outcomes if run.interval is not None]
    return Rates(
        ratio=multiple,
        covered=_share(lower <= ratio <= upper for lower, upper in intervals),
        wrong=_share(run.decision not in (right, "undecided") for run in outcomes),
        undecided=_share(run.decision == "undecided" for run in outcomes),
        separate_wrong=_share((run.separate_ratio - BOUND) * (multiple - 1) <= 0 for run in outcomes),
        equal_calls_wrong=_share((run.equal_calls_ratio - BOUND) * (multiple - 1) <= 0 for run in outcomes),
        pairs=statistics.median(run.pairs for run in outcomes),
        dropped=statistics.fmean(run.dropped_pairs / run.pairs for run in outcomes),
        seconds=statistics.median(run.seconds for run in outcomes),
    )


def _share(values: Iterable[bool]) -> float:
    """The share of values that are true."""
    return statistics.fmean(map(float, values))


def rates_table(rates: dict[str, list[Rates]]) -> str:
    """The rates of each noise as Markdown tables, and the worst rates in a sentence."""
    header = ["true ratio / bound", "interval covers", "wrong", "undecided", "pairs", "dropped", "seconds"]
    header += [f"wrong: medians of {SEPARATE_CALLS} calls", "wrong: medians of as many calls as pairs"]
    parts = []
    for name, rows in rates.items():
        cells = [
            [
                f"{row.ratio:g}",
                *(f"{share:.1%}" for share in (row.covered, row.wrong, row.undecided)),
                *(f"{row.pairs:.0f}", f"{row.dropped:.0%}", f"{row.seconds:.0f}"),
                *(
                    f"{share:.1%}" if row.ratio != 1 else "always"
                    for share in (row.separate_wrong, row.equal_calls_wrong)
                ),
            ]
            for row in rows
        ]
        parts.append(f"## {name}\n\n{markdown_table(header, cells)}")
    every = [row for name, rows in rates.items() if name not in OUTSIDE_ASSUMPTIONS for row in rows]
    worst = (
        f"Worst of all tables but the last: interval covers {min(row.covered for row in every):.1%}, wrong decisions "
        f"of pairs {max(row.wrong for row in every):.1%}, of medians of {SEPARATE_CALLS} calls "
        f"{max(row.separate_wrong for row in every if row.ratio != 1):.1%} (true ratio not the bound)."
    )
    return "\n\n".join([worst, *parts])


def main() -> None:
    """Simulate all noises at all ratios and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000, help="simulated runs per noise and ratio")
    runs = parser.parse_args().runs
    machine = describe_machine()
    rates: dict[str, list[Rates]] = {}
    with ProcessPoolExecutor(len(available_cores())) as pool:
        for name, noise in {**NOISES, **OUTSIDE_ASSUMPTIONS}.items():
            rates[name] = list(pool.map(partial(measure_rates, noise, seeds=range(runs)), RATIOS))
            print_progress(f"paired latency: {name} done")
    text = (
        f"{runs} simulated runs per row. A typical call of the baseline takes {1000 * BASELINE_SECONDS:.0f} ms; the "
        f"bound is {BOUND:.0%} of that. Pairs end after {RULE.max_seconds:.0f} s at the latest; the columns of pairs "
        "and seconds are medians. At a true ratio of exactly the bound, every decision counts as wrong. Separate "
        "medians: the student is timed half a minute to five minutes after the baseline on the same simulated machine, "
        "and no call is dropped."
    )
    data = {name: [asdict(row) for row in rows] for name, rows in rates.items()}
    title = "Latency in pairs and in separate medians"
    print(BenchmarkResult("paired_latency", title, f"{text} {rates_table(rates)}", data, machine).write())


if __name__ == "__main__":
    main()

"""At which disk rate a training step waits for a teacher cache that is larger than the memory.

    python -m benchmarks.cold_cache                            # BART-large's shape, about 3 minutes and 1 GB of disk
    python -m benchmarks.cold_cache --rows 64 --steps 10 --rates 1 --step-ms 20

The product's reader and prefetcher deliver the batches of a store of random states, and a step of the GPU is replaced
by sleeping. The disk is simulated: its transfers are queued in the order of the requests, at a rate in GB/s, and no
row stays in memory. A read waits until its row is transferred; rows that were requested ahead may be there already.
With the rate `disk`, the files are read from the disk of the cache itself: they are dropped from the page cache before
each measurement, which ends before any row is read a second time. Its steps are therefore at most those of an epoch;
more --rows allow more. The cache must not lie on a file system in memory: the column "GB/s read" shows such a mistake.
The share of the time in which a step waits is compared with and without reading ahead, and with the bound of the
arithmetic: the share of the time that the bytes of a step need beyond the step itself.
"""

import argparse
import math
import os
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.common import BenchmarkResult, describe_machine
from raydistill.config.run import Loss, Training
from raydistill.core.console import print_progress
from raydistill.data.batching import Examples
from raydistill.results.tables import markdown_table
from raydistill.teacher_cache import reader, store
from raydistill.teacher_cache.layout import CacheDtypes, CacheLayout
from raydistill.teacher_cache.reader import RaggedArray, open_decoder_states, open_encoder_states
from raydistill.teacher_cache.storage_dtypes import NUMPY_DTYPES, stored_width, vector_bytes
from raydistill.training import optimizer_step
from raydistill.training.distillation import DistillationStep
from raydistill.training.optimizer_step import OptimizerStep
from raydistill.training.prefetch import prefetch

DISK = "disk"


@dataclass
class SimulatedDisk:
    """A disk that transfers rows in the order of the requests; times are those of the monotonic clock.

    Attributes:
        bytes_per_second: The rate of the disk.
        free_at: When the last requested transfer ends.
        ready_at: When each requested row is transferred, by array and row.
    """

    bytes_per_second: float
    free_at: float = 0.0
    ready_at: dict[tuple[int, int], float] = field(default_factory=dict)

    def request(self, array: int, row: int, num_bytes: int) -> None:
        """Queue the transfer of a row, unless it is queued already."""
        if (array, row) not in self.ready_at:
            self.free_at = max(self.free_at, time.monotonic()) + num_bytes / self.bytes_per_second
            self.ready_at[array, row] = self.free_at

    def wait(self, array: int, rows: Sequence[int]) -> None:
        """Wait until all requested rows are transferred, and forget the rows."""
        ready_at = max((self.ready_at.pop((array, row)) for row in rows), default=0.0)
        time.sleep(max(0.0, ready_at - time.monotonic()))


class ThrottledArray:
    """A `RaggedArray` on a simulated disk."""

    def __init__(self, array: RaggedArray, disk: SimulatedDisk, number: int) -> None:
        self._array, self._disk, self._number = array, disk, number
        self.parts = array.parts
        self._vector_bytes = vector_bytes(array.parts[0].dtype, array.parts[0].width)

    def read_ahead(self, rows: Iterable[int]) -> None:
        """See `RaggedArray.read_ahead`."""
        for row in rows:
            self._disk.request(self._number, row, int(self._array.lengths[row]) * self._vector_bytes)

    def read_flat(self, rows: Sequence[int]) -> Tensor:
        """See `RaggedArray.read_flat`."""
        self._transfer(rows)
        return self._array.read_flat(rows)

    def read_padded(self, rows: Sequence[int]) -> Tensor:
        """See `RaggedArray.read_padded`."""
        self._transfer(rows)
        return self._array.read_padded(rows)

    def _transfer(self, rows: Sequence[int]) -> None:
        self.read_ahead(rows)
        self._disk.wait(self._number, list(dict.fromkeys(rows)))


@dataclass(frozen=True)
class Measurement:
    """The time of steps of `step_ms` that read `mb_per_step` from a disk of a rate.

    `waiting` is the share of the time in which a step waits, `bound` the share that the bytes need at least, and
    `steps` the number of measured steps.
    """

    precision: str
    rate: str
    step_ms: float
    read_ahead: bool
    mb_per_step: float
    steps: int
    ms_per_step: float
    waiting: float
    bound: float

    @property
    def gbps(self) -> float:
        """The rate at which the steps read, in GB/s."""
        return self.mb_per_step / self.ms_per_step


def write_store(layout: CacheLayout) -> None:
    """Write a complete cache of random states."""
    generator = np.random.default_rng(0)
    dtype = layout.dtypes.storage
    width = stored_width(dtype, layout.width)
    layout.prepare()
    for array in layout.array_sizes:
        is_encoder = array == layout.encoder_array
        for number, rows in enumerate(layout.parts):
            lengths = (
                [len(layout.sources[row]) for row in rows]
                if is_encoder
                else [len(layout.label_sets[0][0].targets[i]) for i in layout.examples_in_part(number, array.parent)]
            )
            shape = (sum(lengths), width)
            values = generator.integers(-127, 127, shape, dtype=np.int8).astype(NUMPY_DTYPES[dtype])
            store.write_part_time(array, number, 0.0)
            store.write_part(array, number, values)
    layout.finish()


def make_step(layout: CacheLayout, examples: Examples, disk: SimulatedDisk | None, batch: int) -> OptimizerStep:
    """A KD step that reads the store; it has no models, since only its inputs are read."""
    encoder: Any = open_encoder_states(layout)
    decoder: dict[int, Any] = dict(open_decoder_states(layout))
    if disk is not None:
        encoder = ThrottledArray(encoder, disk, -1)
        decoder = {layer: ThrottledArray(array, disk, layer) for layer, array in decoder.items()}
    nothing: Any = None
    distillation = DistillationStep(
        nothing, None, examples, "kd", Loss(), None, True, True, cached_encoder_states=encoder,
        cached_decoder_states=decoder,
    )  # fmt: skip
    return OptimizerStep(distillation, Training(batch_size=batch), nothing)


def drop_page_cache(layout: CacheLayout) -> None:
    """Drop the files of a store from the page cache, in which mapped files would stay."""
    reader.map_part.cache_clear()
    for path in layout.root.rglob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measured_steps(options: argparse.Namespace, rate: str) -> int:
    """The steps of a measurement after the first one; from the disk itself, at most those that read no row twice.

    Raises:
        SystemExit: The store has too few rows for two steps.
    """
    per_epoch = math.ceil(options.rows / options.batch)
    steps = options.steps if rate != DISK else min(options.steps, per_epoch - 1)
    if steps < 1:
        raise SystemExit(f"--rows {options.rows}: two steps of the disk need more than {options.batch} rows")
    return steps


def measure(
    layout: CacheLayout, examples: Examples, options: argparse.Namespace, rate: str, step_ms: float, ahead: bool
) -> Measurement:
    """Take steps that sleep, with inputs from the store."""
    disk = None if rate == DISK else SimulatedDisk(float(rate) * 1e9)
    if disk is None:
        drop_page_cache(layout)
    step = make_step(layout, examples, disk, options.batch)
    optimizer_step.READ_AHEAD_STEPS = options.read_ahead if ahead else 0
    if not ahead and disk is None:
        RaggedArray.read_ahead = lambda self, rows: None  # type: ignore[method-assign]
    steps = measured_steps(options, rate)
    mb_per_step = sum(layout.array_sizes.values()) / len(examples) * options.batch / 1e6
    with prefetch(step.iter_inputs(0, steps + 1)) as inputs:
        next(inputs)  # the start is not measured
        waited, started = inputs.wait_seconds, time.monotonic()
        for _ in range(steps):
            next(inputs)
            time.sleep(step_ms / 1000)
        seconds = time.monotonic() - started
        waited = inputs.wait_seconds - waited
    needed_ms = 0.0 if disk is None else 1000 * mb_per_step * 1e6 / disk.bytes_per_second
    bound = max(0.0, 1 - step_ms / needed_ms) if needed_ms else 0.0
    ms_per_step = 1000 * seconds / steps
    return Measurement(
        layout.dtypes.storage, rate, step_ms, ahead, mb_per_step, steps, ms_per_step, waited / seconds, bound
    )


def run(options: argparse.Namespace) -> None:
    """Measure every combination, and write benchmarks/results/cold_cache.md."""
    machine = describe_machine()
    draw = random.Random(0)
    lengths = [draw.randint(options.source // 2, options.source * 3 // 2) for _ in range(options.rows)]
    targets = [[5] * options.target for _ in range(options.rows)]
    examples = Examples([[5] * length for length in lengths], targets, list(range(options.rows)))
    read_ahead = RaggedArray.read_ahead
    results = []
    with tempfile.TemporaryDirectory(dir=options.cache_root) as root:
        for precision in options.precisions:
            layout = CacheLayout(
                Path(root), "random", examples, options.width, True, [(examples, [3, 7, 11])], CacheDtypes(precision)
            )
            write_store(layout)
            for rate in options.rates:
                for step_ms in options.step_ms:
                    for ahead in (False, True):
                        RaggedArray.read_ahead = read_ahead  # type: ignore[method-assign]
                        results.append(measure(layout, examples, options, rate, step_ms, ahead))
                        print_progress(str(results[-1]))
    title = "Waiting for a teacher cache that is larger than the memory"
    data = [asdict(result) for result in results]
    BenchmarkResult("cold_cache", title, as_markdown(results), data, machine).write()


def as_markdown(results: list[Measurement]) -> str:
    """A table with a row per precision, rate and step."""
    header = [
        *("precision", "GB/s", "step, ms", "MB per step", "read ahead", "steps", "ms per step", "GB/s read"),
        *("waiting", "least by the bytes"),
    ]
    rows = [
        [
            *(result.precision, result.rate, f"{result.step_ms:g}", f"{result.mb_per_step:.1f}"),
            *("yes" if result.read_ahead else "no", str(result.steps), f"{result.ms_per_step:.1f}"),
            *(f"{result.gbps:.2f}", f"{result.waiting:.1%}"),
            "" if result.rate == DISK else f"{result.bound:.1%}",
        ]
        for result in results
    ]
    return markdown_table(header, rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["0.5", "1", "3", DISK], help="GB/s, or disk")
    parser.add_argument("--step-ms", nargs="+", type=float, default=[20, 50, 100], help="duration of a step")
    parser.add_argument("--precisions", nargs="+", choices=["int8", "bf16"], default=["int8", "bf16"])
    parser.add_argument("--rows", type=int, default=1024, help="rows of the store; default: 1024")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step; default: 64")
    parser.add_argument("--source", type=int, default=400, help="mean source tokens; default: 400")
    parser.add_argument("--target", type=int, default=25, help="target tokens; default: 25")
    parser.add_argument("--width", type=int, default=1024, help="width of the states; default: 1024")
    parser.add_argument("--steps", type=int, default=50, help="steps per measurement; default: 50; see above")
    parser.add_argument("--read-ahead", type=int, default=8, help="steps that are read ahead; default: 8")
    parser.add_argument("--cache-root", help="folder for the store; default: the system's for temporary files")
    run(parser.parse_args())


if __name__ == "__main__":
    main()

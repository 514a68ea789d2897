"""Jobs without Ray: their batches and their exclusive tasks run in the process of the test.

For tests of what a job writes, reuses or refuses. Other tests show that Ray's workers write the same files.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raydistill.cluster.actor_pool import BatchFunction, BatchStats
from raydistill.jobs import pseudolabel, run_inputs, teacher_cache


def run_batches_here(
    batch_numbers: Iterable[int],
    make_function: Callable[[], BatchFunction],
    *,
    on_done: Callable[[BatchStats], None],
    **_: Any,
) -> None:
    """`run_batches` with a single actor, which is this process."""
    run_batch = make_function()
    for number in batch_numbers:
        on_done({"batch": number, **run_batch(number)})


def run_exclusive_here(function: Callable[..., Any], *arguments: Any, device: str, **_: Any) -> Any:
    """`run_exclusive` in this process, with one thread."""
    return function(*arguments, device, 1)


@contextmanager
def local_jobs(home: Path) -> Iterator[None]:
    """Context with a RAYDISTILL_HOME in which label jobs, and jobs for the teacher cache, use no Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDISTILL_HOME", str(home))
        patch.setenv("OMP_NUM_THREADS", "1")  # the jobs set the variable
        patch.setattr(pseudolabel, "max_actors", lambda device, threads: 1)
        for job in (pseudolabel, teacher_cache):
            patch.setattr(job, "run_batches", run_batches_here)
        for job in (pseudolabel, teacher_cache, run_inputs):
            patch.setattr(job, "run_exclusive", run_exclusive_here)
        yield

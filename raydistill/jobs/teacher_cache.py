"""The teacher's pass over a training split as a Ray Data job: decide what is kept, make what is missing, record it."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.cluster.actor_pool import Facts, run_batches
from raydistill.cluster.exclusive import alone
from raydistill.config.run import Run
from raydistill.core.console import progress
from raydistill.data.batching import Examples
from raydistill.jobs.pseudolabel import Also
from raydistill.teacher_cache import store
from raydistill.teacher_cache.builder import Pass
from raydistill.teacher_cache.policy import Costs, Keep, choose, measure, pass_for
from raydistill.training.inputs import MadeLabels, folders_of, read_by

FREE_SHARE = 0.9


@dataclass(frozen=True)
class Cached:
    """What a pass came to: the bytes kept, and by array of a store the device-seconds that it once took."""

    bytes: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Want:
    """Runs on one training split that may read the teacher's states, and the label sets that they train on.

    `computed` is what `precision: auto` came to on the workers; this process may have no such device.
    """

    runs: list[Run]
    labels: MadeLabels
    root: Path
    device: str
    computed: str | None = None

    def work(self, keep: Keep) -> Pass:
        """What these runs read, where runs of `auto` keep `keep`."""
        modes = [
            (run, keep if run.training.teacher_cache == "auto" else run.training.teacher_cache) for run in self.runs
        ]
        examples, key, config, computed = _read(self)
        return pass_for(modes, examples, key, config, self.root, computed)

    def reads(self) -> list[Path]:
        """What is read of the home: the teacher and the label sets, as far as they lie there."""
        labels = [Path(folder) for made in self.labels.values() for folder in made.values()]
        return [*labels, *{place for run in self.runs for place in read_by(run)}]

    def __hash__(self) -> int:
        return hash((str(self.runs), str(self.labels), self.root, self.device, self.computed))


def group_of(run: Run) -> str:
    """Runs of one group may read one pass: the same teacher, pairs and numbers."""
    about = (run.teacher, run.dataset.model_dump(mode="json"), run.training.precision, run.training.cache_precision)
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]


def teacher_pass(want: Want, keep: Keep) -> Cached:
    """Make what the runs read of the teacher, unless it is there; `keep` is what `decide` came to."""
    work = want.work(keep)
    with work.lock():
        known(work)
        if work.unfinished():
            sync.fetch(*work.arrays)  # the parts that an earlier pass made, wherever
            work.begin()
            sync.keep(*stores_of(work))
            _make(want, keep, work)
            finish(work)
    return Cached(sum(work.arrays.values()), work.device_seconds)


def decide(want: Want, epochs: float) -> tuple[Keep, str]:
    """What `auto` keeps for these runs, and why; `epochs`: over all trials."""
    if all(run.training.teacher_cache != "auto" for run in want.runs):
        return "full", "as the runs ask"
    whole = want.work("full")
    known(whole)
    if not whole.unfinished():
        return "full", "it is there already"
    costs = alone(measured, want, device=want.device, reads=want.reads())
    keep, why = choose(whole, costs, room(whole), epochs)
    progress(f"teacher cache: {keep}: {why}")
    return keep, why


@contextmanager
def encoder_beside(want: Want, epochs: float) -> Iterator[Callable[[], Also] | None]:
    """A block in which the pass that labels a split also makes the encoder states that the runs will read.

    Gives `also` for the label job: the actor that has labelled batch n makes part n of the encoder's store. What is
    left over (labels that were there already, more parts than batches) `teacher_pass` makes later.
    """
    bare = Want([sources_only(run) for run in want.runs], {}, want.root, want.device, want.computed)
    work = bare.work("encoder")
    known(work)
    if not work.unfinished() or decide(bare, epochs)[0] == "off":
        yield None
        return
    with work.lock():
        sync.fetch(*work.arrays)
        work.begin()
        sync.keep(*stores_of(work))

        def also() -> Also:
            part = maker(bare, "encoder")()
            count = len(bare.work("encoder").parts)

            def make(number: int, ids: list[str], sources: list[str], labels: list[str]) -> None:
                if number < count:
                    part(number)

            return make

        yield also
        sync.fetch(*work.arrays)
        if not work.missing():
            finish(work)


def sources_only(run: Run) -> Run:
    """The run as one that reads nothing but encoder states: what can be known of it before there are labels."""
    return run.model_copy(update={"method": "sft", "labels": "original"})


def room(work: Pass) -> float:
    """Bytes that the stores may take: the runs' own bound, and what is free and used by them already."""
    work.root.mkdir(parents=True, exist_ok=True)
    there = sum(work.arrays.values()) - work.missing_bytes()
    free = FREE_SHARE * shutil.disk_usage(work.root).free + there
    return free if work.most is None else min(free, work.most)


def auto_precision(device: str, threads: int) -> str:
    """What `precision: auto` comes to on the hardware that this runs on; to be called `alone`."""
    from raydistill.config.run import Training
    from raydistill.training.loop import precision
    from raydistill.training.workers import Worker

    return "fp32" if precision(Training(precision="auto"), Worker(device=device)) is None else "bf16"


def measured(want: Want, device: str, threads: int) -> Costs:
    """`measure` with the teacher loaded; to be called `alone`."""
    return measure(want.work("full"), _teacher(want, device))


def _make(want: Want, keep: Keep, work: Pass) -> None:
    """Make the missing parts in actors that hold the teacher."""
    missing = work.missing()
    total, done, last = len(missing), 0, time.monotonic()
    progress(f"teacher cache: {total} parts to make, {work.missing_bytes() / 1e6:.0f} MB, under {want.root}")

    def on_done(facts: Facts) -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last > 5:
            progress(f"  {done}/{total} parts")
            last = time.monotonic()

    sync.keep(*want.reads())
    run_batches(missing, maker(want, keep), device=want.device, on_done=on_done)
    sync.fetch(*work.arrays)


def stores_of(work: Pass) -> list[Path]:
    """The folders of the stores that a pass has to leave."""
    return sorted({array.parent for array in work.arrays})


def known(work: Pass) -> None:
    """Learn from the storage which of a pass's arrays are whole: not their parts, which may be many gigabytes."""
    sync.fetch(*stores_of(work), names=["about.json", "manifest.json"])


def finish(work: Pass) -> None:
    """`Pass.finish`, kept in the storage too; the parts are here."""
    work.finish()
    sync.keep(*work.arrays)


def maker(want: Want, keep: Keep) -> Callable[[], Callable[[int], Facts]]:
    """What an actor needs to make parts: called there, it loads the teacher and reads the texts."""

    def make() -> Callable[[int], Facts]:
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)
        sync.fetch(*want.reads())
        teacher, work = _teacher(want, want.device), want.work(keep)
        known(work)

        def part(number: int) -> Facts:
            files = [store.part_path(array, number) for array in work.arrays]
            files += [path.with_suffix(".json") for path in files]
            sync.fetch(*files)
            with torch.inference_mode():
                facts = work.make(teacher, number)
            sync.keep(*files)
            return facts

        return part

    return make


def _teacher(want: Want, device: str) -> Any:
    import torch

    from raydistill.training.tokenized_data import open_teacher

    run = want.runs[0]
    assert run.teacher is not None
    return torch.nn.Module.to(open_teacher(run.teacher, run.dataset).model, device)


@lru_cache(maxsize=2)
def _read(want: Want) -> tuple[dict[str, Examples], str, Any, str]:
    """The examples by label set, the teacher's key and configuration, and its numbers; keeps no weights."""
    from raydistill.config.presets import teacher_preset
    from raydistill.models.loading import languages_of, load_config, load_tokenizer, locate, teacher_key
    from raydistill.training.loop import precision
    from raydistill.training.tokenized_data import load_material, make_examples
    from raydistill.training.workers import Worker

    run = want.runs[0]
    assert run.teacher is not None
    where = locate(run.teacher, run.dataset.name)
    preset = teacher_preset(run.teacher, run.dataset.name)
    config, tokenizer = load_config(where), load_tokenizer(where, languages_of(run.teacher, run.dataset))
    material = load_material(run, preset, tokenizer, config)
    examples: dict[str, Examples] = {}
    for each in want.runs:
        if each.label_key not in examples:
            examples[each.label_key] = make_examples(each, material, tokenizer, folders_of(want.labels, each))
    worker = Worker(device=want.device, computed=want.computed)
    computed = "fp32" if precision(run.training, worker) is None else "bf16"
    return examples, teacher_key(where), config, computed

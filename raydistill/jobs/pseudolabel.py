"""Pseudo-labels as a Ray Data job: the teacher's beam search over a split, in planned batches, each done once.

The split is read row by row, checked and fingerprinted; the plan (data/plan.py) is made once and kept; actors label
planned batches and leave a file each (cluster/planned.py); the files are put together, window by window, into a label
set (data/labels.py). Run again after any death, the job goes on from the files that are there.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from raydistill.cluster import sync
from raydistill.cluster.actor_pool import BatchStats, max_actors, run_batches
from raydistill.config.presets import resolve_metric, teacher_preset
from raydistill.config.run import Dataset, Decoding, PseudoLabeling
from raydistill.core.console import ProgressBar, print_progress
from raydistill.core.errors import UserError
from raydistill.core.files import corrupt_file_error, read_json, write_atomic
from raydistill.data.readers import known_extension
from raydistill.data.streaming import SplitScan, scan_split, usable_rows
from raydistill.evaluation.metrics import ScoreAccumulator, rouge2_rows
from raydistill.jobs.label_outputs import batch_output_path, is_batch_complete, merge_outputs, write_batch_output
from raydistill.label_sets.batch_plan import BATCH_CHARS, BatchPlan, make_plan, open_plan
from raydistill.label_sets.curation import check_curation, curate
from raydistill.label_sets.label_set import is_complete, label_set_key, read_manifest

if TYPE_CHECKING:  # it loads torch
    from raydistill.inference.decoding import Engine

NUM_CALIBRATION_ROWS = 4
# A GPU takes as many rows at once as fill it; a CPU core is fastest with few.
GPU_BATCH_CHARS = 4 * BATCH_CHARS
CHARS_PER_TOKEN = 5  # roughly, to know how much of a long source the teacher reads
CPU_BATCH_SIZES = {"ctranslate2": 32, "transformers": 16}
GPU_BATCH_SIZE = 128
# Part of a label set's key. One more whenever an engine, with the same settings, comes to write other texts.
DECODING_VERSION = 2

# What opens the teacher in an actor; called as model.generate.open_engine is.
EngineFactory = Callable[..., "Engine"]


@dataclass(frozen=True)
class LabelJob:
    """What to label, by whom, how."""

    teacher: str
    dataset: Dataset
    split: str = "train"
    decoding: Decoding = field(default_factory=Decoding)
    engine: Literal["auto", "ctranslate2", "transformers"] = "auto"
    pseudo: PseudoLabeling = field(default_factory=PseudoLabeling)
    metric: Literal["auto", "rouge2", "bleu"] = "auto"
    threads: int = 1
    batch_chars: int | None = None
    allow_fallback: bool = True


def pseudolabel(
    job: LabelJob,
    root: Path,
    device: str = "cpu",
    verbose: bool = True,
    engine_factory: EngineFactory | None = None,
) -> Path:
    """Label every row of the split; returns the label set's folder under `root`. Finished work is not done again.

    Where `job.pseudo.curation` has rules, the folder is that of the curated set, and the whole one stands beside it.
    `engine_factory` is there for measuring the job itself (benchmarks/scaling.py); the default is `open_engine`.
    """
    found = scan_split(job.dataset, job.split)
    about = describe_job(job, found)
    rules = job.pseudo.curation
    check_curation(rules, found.labelled)
    root = root.absolute()  # Ray's workers have working folders of their own
    folder = root / f"{_slug(job.dataset.name)}-{_slug(job.split)}-{_label_set_key(job, about, found, device)}"
    root.mkdir(parents=True, exist_ok=True)
    with _label_set_lock(root / f".{folder.name}.lock", folder):
        _build_label_set(job, about, found, folder, device, verbose, engine_factory)
    if rules == type(rules)():
        return folder
    made = curate(
        folder,
        job.dataset,
        job.split,
        rules,
        rouge2_rows,
        ScoreAccumulator(resolve_metric(job.dataset.name, job.metric)),
    )
    sync.push(made)
    return made


def _label_set_key(job: LabelJob, description: dict[str, Any], scan_result: SplitScan, device: str) -> str:
    """What decides about the texts: the teacher's weights and settings, the data, and how it is decoded.

    Two engines, or one with another precision, do not always write the same text.
    """
    how = {
        **description["decoding"],
        "n_best": job.pseudo.n_best,
        "engine": job.engine,
        "device": device,
        "precision": job.pseudo.precision,
        "settings": description["teacher"]["settings"],
        "languages": description["languages"],
        "search": DECODING_VERSION,
    }
    return label_set_key(description["teacher"]["fingerprint"], scan_result.fingerprint, how)


@contextmanager
def _label_set_lock(path: Path, folder: Path) -> Iterator[None]:
    """Hold a label set's lock; says so where another command has it, and waits."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print_progress(f"pseudo-labels: another command is making {folder.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def describe_job(job: LabelJob, scan_result: SplitScan) -> dict[str, Any]:
    """Teacher, data and decoding as the manifest holds them, without loading the model."""
    from raydistill.inference.decoding import resolve_decoding
    from raydistill.models.loading import (
        load_config,
        load_generation_config,
        locate_checkpoint,
        resolve_languages,
        resolve_max_tokens,
    )

    preset = teacher_preset(job.teacher, job.dataset.name)
    where = locate_checkpoint(job.teacher, job.dataset.name)
    where = str(Path(where).absolute()) if Path(where).is_dir() else where
    config = load_config(where)
    target = resolve_max_tokens("max_target_tokens", job.dataset, preset, config)
    beam = resolve_decoding(job.decoding, load_generation_config(where), preset.decoding if preset else None, target)
    if job.pseudo.n_best > beam.beams:
        raise UserError(
            f"{job.pseudo.n_best} candidates per row need as many beams, and the teacher's are {beam.beams}: "
            f"give --beams"
        )
    return {
        "teacher": {"name": job.teacher, "where": where, **_teacher_fingerprints(where)},
        "data": {
            "name": job.dataset.name,
            "split": job.split,
            "fingerprint": scan_result.fingerprint,
            "skipped": scan_result.skipped,
            "dataset": job.dataset.model_dump(mode="json", exclude_defaults=True),
        },
        "decoding": {
            **asdict(beam),
            "max_source_tokens": resolve_max_tokens("max_source_tokens", job.dataset, preset, config),
        },
        "n_best": job.pseudo.n_best,
        "languages": resolve_languages(job.teacher, job.dataset),
    }


def _teacher_fingerprints(checkpoint: str) -> dict[str, str]:
    """Fingerprints of the weights and of configuration and tokenizer; the commit, of a teacher from the hub."""
    from raydistill.models.hub import hub_commit
    from raydistill.models.loading import settings_fingerprint, weights_fingerprint

    known = hub_commit(checkpoint)
    found = {"fingerprint": weights_fingerprint(checkpoint), "settings": settings_fingerprint(checkpoint)}
    return {**found, "commit": known} if known else found


def _build_label_set(
    job: LabelJob,
    description: dict[str, Any],
    scan_result: SplitScan,
    folder: Path,
    device: str,
    verbose: bool,
    engine_factory: EngineFactory | None,
) -> None:
    """Go on with the label set in `folder`; the caller holds its lock."""
    work = folder.with_name(f".{folder.name}.work")
    sync.pull(folder, work)
    if is_complete(folder):
        if not job.allow_fallback and (why := read_manifest(folder).get("engine_why")):
            raise UserError(f"{folder}: is finished, but not by CTranslate2: {why}")
        shutil.rmtree(work, ignore_errors=True)  # of a job that was killed after its last step but one
        if verbose:
            print_progress(f"pseudo-labels: {scan_result.rows} rows are there already: {folder}")
        return
    plan = open_plan(work / "plan")
    if plan is None:
        chars = job.batch_chars or (GPU_BATCH_CHARS if device == "cuda" else BATCH_CHARS)
        read = CHARS_PER_TOKEN * description["decoding"]["max_source_tokens"]
        rows = usable_rows(job.dataset, job.split, scan_result)
        plan = make_plan(rows, work / "plan", batch_chars=chars, max_source_chars=read)
        sync.push(work / "plan")
    (work / "out").mkdir(exist_ok=True)
    missing = [n for n in range(len(plan)) if not is_batch_complete(batch_output_path(work, n))]
    if verbose and len(missing) < len(plan):
        print_progress(f"pseudo-labels: going on; {len(plan) - len(missing)} of {len(plan)} batches are done")
    if missing:
        _label_batches(job, description, plan, work, missing, device, verbose, engine_factory)
        sync.pull(work)
    merge_outputs(plan, work, folder, description, scan_result, resolve_metric(job.dataset.name, job.metric))
    sync.push(folder)
    sync.delete(work)
    shutil.rmtree(work, ignore_errors=True)


def _label_batches(
    job: LabelJob,
    description: dict[str, Any],
    plan: BatchPlan,
    work_dir: Path,
    batch_numbers: list[int],
    device: str,
    verbose: bool,
    engine_factory: EngineFactory | None,
) -> None:
    """Run the missing batches through one actor per GPU, or per `job.threads` CPUs, and tell how far it is."""
    total, todo = sum(plan.rows), sum(plan.rows[n] for n in batch_numbers)
    chars = sum(plan.chars[n] for n in batch_numbers)
    done = {"rows": total - todo, "tokens": 0}
    started = time.monotonic()
    if verbose:
        actors = min(max_actors(device, job.threads), len(batch_numbers))
        print_progress(
            f"pseudo-labels: {todo} rows to label in {len(batch_numbers)} batches, {actors} teachers at work"
        )
    bar = ProgressBar("pseudo-labels", sum(plan.chars), sum(plan.chars) - chars) if verbose else None

    def on_done(facts: BatchStats) -> None:
        done["rows"] += int(facts["rows"])
        done["tokens"] += int(facts["tokens"])
        if bar is not None:
            seconds = time.monotonic() - started
            rates = f"{(done['rows'] - total + todo) / seconds:.1f} rows/s, {done['tokens'] / seconds:.0f} tokens/s"
            bar.advance(plan.chars[int(facts["batch"])], f"{done['rows']}/{total} rows, {rates}")

    where = Path(description["teacher"]["where"])
    sync.push(where)

    def labeller() -> Callable[[int], BatchStats]:
        sync.pull(where, work_dir / "plan", work_dir / "engine.json")
        return Labeller(job, description, plan, work_dir, device, engine_factory)

    try:
        run_batches(batch_numbers, labeller, device=device, threads=job.threads, on_done=on_done)
    finally:
        if bar is not None:
            bar.close()


class Labeller:
    """One teacher on one device or CPU share: labels planned batches and leaves a file for each."""

    def __init__(
        self,
        job: LabelJob,
        description: dict[str, Any],
        plan: BatchPlan,
        work_dir: Path,
        device: str,
        engine_factory: EngineFactory | None = None,
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = str(job.threads)
        from raydistill.inference.decoding import BeamSearchParams, CalibrationRows
        from raydistill.inference.engines import open_engine

        decoding = dict(description["decoding"])
        if _teacher_fingerprints(description["teacher"]["where"]).items() - description["teacher"].items():
            raise UserError(
                f"{description['teacher']['where']}: the teacher has changed since the job began; run it again"
            )
        self.max_source_tokens = decoding.pop("max_source_tokens")
        self.beam = BeamSearchParams(**decoding)
        self.plan, self.work_dir, self.n_best = plan, work_dir, job.pseudo.n_best
        self.threads = job.threads
        middle = plan.read_batch(len(plan) // 2)["sources"]
        said: list[str] = []
        self.engine = (engine_factory or open_engine)(
            description["teacher"]["where"],
            job.engine,
            device=device,
            threads=job.threads,
            precision=job.pseudo.precision,
            languages=description["languages"],
            cache_dir=work_dir.parent / ".engines",
            allow_fallback=job.allow_fallback,
            log=said.append,
            calibration=CalibrationRows(tuple(middle[:NUM_CALIBRATION_ROWS]), self.beam, self.max_source_tokens),
        )
        self.engine_name = f"{self.engine.name} {self.engine.precision}"
        self.batch_size = GPU_BATCH_SIZE if device == "cuda" else CPU_BATCH_SIZES[self.engine.name]
        _check_same_engine(work_dir, self.engine_name, [line for line in said if "using transformers" in line])

    def __call__(self, batch_number: int) -> BatchStats:
        """Label one planned batch and write its file."""
        batch = self.plan.read_batch(batch_number)
        started = time.monotonic()
        found = self.engine.generate(
            batch["sources"],
            self.beam,
            max_source_tokens=self.max_source_tokens,
            batch_size=self.batch_size,
            n_best=self.n_best,
        )
        seconds = time.monotonic() - started
        targets = [[h.text.strip() for h in hypotheses] for hypotheses in found]
        scores = [[float(h.score) for h in hypotheses] for hypotheses in found]
        columns = {"id": batch["ids"], "targets": targets, "scores": scores}
        write_batch_output(self.work_dir, batch_number, columns, self.engine_name, seconds * self._num_devices)
        tokens = sum(hypotheses[0].tokens for hypotheses in found)
        return {"rows": len(found), "tokens": tokens, "seconds": seconds}

    @property
    def _num_devices(self) -> int:
        """What it holds: a GPU, or CPU cores."""
        return self.threads if self.engine.device == "cpu" else 1


def _check_same_engine(work_dir: Path, engine: str, fallback_messages: list[str]) -> None:
    """All batches of a set are written by one engine: the first actor says which, and the others agree.

    UserError where a job is taken up on a machine that opens another one.
    """
    place = work_dir / "engine.json"
    with FileLock(work_dir / ".engine.lock"):
        sync.pull(place)
        if not place.is_file():
            write_atomic(place, json.dumps({"engine": engine, "why": " ".join(fallback_messages)}).encode())
            sync.push(place)
        with corrupt_file_error(place):
            begun = read_json(place)["engine"]
    if begun != engine:
        raise UserError(
            f"{work_dir}: the batches so far were written by {begun}, and this machine opens {engine}: texts of two "
            f"engines "
            f"are not mixed. Go on where {begun} can be opened, or delete the folder to begin anew"
        )


def _slug(name: str) -> str:
    """A data set's name as a folder's: "my_texts.jsonl.gz" is my-texts."""
    stem = Path(name).name.removesuffix(known_extension(Path(name)) or "")
    return "".join(c if c.isalnum() else "-" for c in stem)

"""Pseudo-labels as a Ray Data job: beam search of a teacher over a data split, each planned batch exactly once.

The split is read row by row, checked and fingerprinted. The batch plan (label_sets/batch_plan.py) is written once.
Actors label planned batches and write a file for each (cluster/actor_pool.py). The files are merged, window by window,
into a label set (label_sets/label_set.py). A job that was killed resumes with the missing batches.
"""

import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raydistill.cluster import snapshots, sync
from raydistill.cluster.actor_pool import BatchStats, max_actors, run_batches
from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.presets import resolve_metrics, teacher_preset
from raydistill.config.run import Curation, Dataset, Decoding, PseudoLabeling
from raydistill.core import artifact
from raydistill.core.console import ProgressBar, print_progress
from raydistill.core.errors import UserError
from raydistill.core.last_error import record_error
from raydistill.data.readers import known_extension
from raydistill.data.streaming import SplitScan, scan_split, usable_rows
from raydistill.jobs.label_outputs import (
    EngineRecord,
    LabelStats,
    batch_output_path,
    check_same_engine,
    count_batch,
    engine_path,
    is_batch_complete,
    merge_outputs,
    write_batch_output,
)
from raydistill.label_sets.batch_plan import BATCH_CHARS, BatchPlan, make_plan, open_plan
from raydistill.label_sets.curation import check_curation, curate
from raydistill.label_sets.label_set import label_set_key, read_pseudolabel_manifest
from raydistill.label_sets.manifest import DataRecord, LabelDescription, TeacherRecord

if TYPE_CHECKING:  # these modules load torch
    from raydistill.inference.decoding import BeamSearchParams, Engine

NUM_CALIBRATION_ROWS = 4
GPU_BATCH_CHARS = 4 * BATCH_CHARS
CHARS_PER_TOKEN = 5  # approximately, to estimate how much of a long source the teacher reads
# Rows in a generation batch: as many as fill a GPU, few on a CPU core.
CPU_BATCH_SIZES = {"ctranslate2": 32, "transformers": 16}
GPU_BATCH_SIZE = 128
# Part of the key of a label set. Raise it when an engine writes other texts with the same settings.
DECODING_VERSION = 3

# Opens the teacher in an actor, with the parameters of inference.engines.open_engine.
EngineFactory = Callable[..., "Engine"]


@dataclass(frozen=True)
class LabelJob:
    """The settings of a pseudo-label job: teacher, data, decoding, engine.

    `sources` are the rows to label if these are no split of `dataset`, such as extra sources; `dataset` then gives the
    settings of the teacher, such as languages and lengths. `threads` are CPUs per teacher. `batch_chars` are source
    characters of a planned batch, None for a default by device. Without `allow_fallback`, a model that CTranslate2
    cannot run is an error. Without `allow_repetitive`, labels of which most repeat themselves are an error.
    """

    teacher: str
    dataset: Dataset
    split: str = "train"
    decoding: Decoding = field(default_factory=Decoding)
    engine: Literal["auto", "ctranslate2", "transformers"] = "auto"
    pseudo: PseudoLabeling = field(default_factory=PseudoLabeling)
    metric: str = "auto"
    threads: int = 1
    batch_chars: int | None = None
    allow_fallback: bool = True
    allow_repetitive: bool = False
    sources: Dataset | None = None

    @property
    def rows(self) -> Dataset:
        """The data set whose split is labelled."""
        return self.sources or self.dataset

    def resolve_metric(self, scan: SplitScan) -> str:
        """The metric of the labels against the original targets of the scanned split."""
        columns = None if self.sources else scan.columns  # texts without targets have no columns of a translation
        return resolve_metrics(self.dataset, self.metric, columns=columns).deciding


@dataclass(frozen=True)
class LabelTask:
    """A job with everything that its actors need: what the texts depend on, and where they go.

    `metric`: the metric of the labels against the original targets; None if the data has none.
    """

    job: LabelJob
    description: LabelDescription
    folder: Path
    device: str
    verbose: bool = True
    engine_factory: EngineFactory | None = None
    metric: str | None = None

    @property
    def work_dir(self) -> Path:
        """The folder of the plan and of the outputs of batches."""
        return self.folder.with_name(f".{self.folder.name}.work")

    @property
    def plan_dir(self) -> Path:
        """The folder of the batch plan."""
        return self.work_dir / "plan"

    @property
    def languages(self) -> tuple[str, str] | None:
        """Source and target language, for teachers that need them."""
        languages = self.description.languages
        return (languages[0], languages[1]) if languages else None

    @property
    def teacher_path(self) -> Path:
        """The folder of the teacher, or its name on the hub as a path."""
        return Path(self.description.teacher.path)


def pseudolabel(
    job: LabelJob, root: Path, device: str = "cpu", verbose: bool = True, engine_factory: EngineFactory | None = None
) -> Path:
    """Label every row of a split, and return the folder of the label set under `root`. Finished work is not repeated.

    If `job.pseudo.curation` has rules, the curated set is returned; the complete set remains next to the curated one.
    `engine_factory` replaces `open_engine` in benchmarks.

    Raises:
        UserError: Settings, teacher, data or finished outputs cannot be used.
    """
    scan = scan_split(job.rows, job.split)
    description = describe_job(job, scan)
    rules = job.pseudo.curation
    check_curation(rules, scan.labelled)
    root = root.absolute()  # Ray's workers have other working directories
    description = description.model_copy(update={"key": _label_set_key(job, description, device)})
    folder = root / f"{_slug(job.rows.name)}-{_slug(job.split)}-{description.key}"
    metric = job.resolve_metric(scan) if scan.labelled else None
    task = LabelTask(job, description, folder, device, verbose, engine_factory, metric)
    with artifact.lock(folder, math.inf, print_progress), record_error(task.work_dir):
        build_label_set(task, scan)
    if rules == type(rules)():  # no rules
        return folder
    return _curate(replace(job, metric=job.resolve_metric(scan)), folder, rules, device)


def _curate(job: LabelJob, folder: Path, rules: Curation, device: str) -> Path:
    """Derive the curated set of a complete label set; a reverse model runs on a worker, which may have a GPU."""
    if rules.reverse_model is None:
        return curate_and_save(job, folder, rules, device, 1)
    model = Path(rules.reverse_model)
    if model.is_dir():  # Ray's workers have other working directories
        rules = rules.model_copy(update={"reverse_model": str(model.absolute())})
    inputs = [folder, model.absolute(), *([Path(job.sources.name).parent] if job.sources else [])]
    curated: Path = run_exclusive(curate_and_save, job, folder, rules, device=device, input_paths=inputs)
    snapshots.pull(curated)
    return curated


def curate_and_save(job: LabelJob, folder: Path, rules: Curation, device: str, threads: int) -> Path:
    """Derive the curated set by the metric of the job, and copy it to the storage; for `run_exclusive`."""
    curated = curate(folder, job.rows, job.split, rules, job.metric)
    snapshots.save(curated)
    return curated


def _label_set_key(job: LabelJob, description: LabelDescription, device: str) -> str:
    """The content key: a hash of teacher, data, decoding, engine and precision.

    Two engines, or one engine with two precisions, do not always write the same text.
    """
    settings = {
        **description.decoding,
        "n_best": job.pseudo.n_best,
        "engine": job.engine,
        "device": device,
        "precision": job.pseudo.precision,
        "settings": description.teacher.settings,
        "languages": description.languages,
        "source_prefix": description.source_prefix,
        "search": DECODING_VERSION,
    }
    return label_set_key(description.teacher.fingerprint, description.data.fingerprint, settings)


def describe_job(job: LabelJob, scan: SplitScan) -> LabelDescription:
    """Describe teacher, data and decoding, without loading the model.

    Raises:
        UserError: The teacher cannot be used, or `n_best` is larger than the number of beams.
    """
    from raydistill.inference.decoding import resolve_decoding
    from raydistill.models.loading import load_config, locate_checkpoint
    from raydistill.models.tokenization import load_target_generation_config, resolve_languages, resolve_max_tokens

    preset = teacher_preset(job.teacher, job.dataset.name)
    checkpoint = locate_checkpoint(job.teacher, job.dataset.name)
    checkpoint = str(Path(checkpoint).absolute()) if Path(checkpoint).is_dir() else checkpoint
    config = load_config(checkpoint)
    max_target_tokens = resolve_max_tokens("max_target_tokens", job.dataset, preset, config)
    languages = resolve_languages(job.teacher, job.dataset)
    generation_config = load_target_generation_config(checkpoint, languages, job.dataset.source_prefix)
    beam = resolve_decoding(job.decoding, generation_config, preset.decoding if preset else None, max_target_tokens)
    if job.pseudo.n_best > beam.beams:
        raise UserError(
            f"{job.pseudo.n_best} candidates per row need as many beams, and the teacher has {beam.beams}; set --beams"
        )
    max_source_tokens = resolve_max_tokens("max_source_tokens", job.dataset, preset, config)
    return LabelDescription(
        teacher=TeacherRecord(name=job.teacher, path=checkpoint, **_teacher_fingerprints(checkpoint)),
        data=DataRecord(
            name=job.rows.name,
            split=job.split,
            fingerprint=scan.fingerprint,
            skipped=scan.skipped,
            dataset=job.rows.model_dump(mode="json", exclude_defaults=True),
        ),
        decoding={**asdict(beam), "max_source_tokens": max_source_tokens},
        n_best=job.pseudo.n_best,
        languages=list(languages) if languages else None,
        source_prefix=job.dataset.source_prefix,
    )


def beam_search_params(description: LabelDescription) -> "tuple[BeamSearchParams, int]":
    """The beam search of a described job, and the maximum number of source tokens."""
    from raydistill.inference.decoding import BeamSearchParams

    decoding = dict(description.decoding)
    max_source_tokens = decoding.pop("max_source_tokens")
    return BeamSearchParams(**decoding), max_source_tokens


def _teacher_fingerprints(checkpoint: str) -> dict[str, str]:
    """Fingerprints of the weights, and of configuration and tokenizer; the commit of a checkpoint from the hub."""
    from raydistill.models.fingerprints import settings_fingerprint, weights_fingerprint
    from raydistill.models.hub import hub_commit

    commit = hub_commit(checkpoint)
    fingerprints = {"fingerprint": weights_fingerprint(checkpoint), "settings": settings_fingerprint(checkpoint)}
    return {**fingerprints, "commit": commit} if commit else fingerprints


def build_label_set(task: LabelTask, scan: SplitScan) -> None:
    """Build or resume the label set of a task. The caller holds its lock.

    Machines that share no folder share no lock. There the claim lasts until the outputs are deleted, so that a job that
    was cut off neither replaces the set of its successor nor deletes its successor's outputs.

    Raises:
        TransientError: A job on another machine has taken over.
    """
    folder, work_dir = task.folder, task.work_dir
    snapshots.pull(folder)
    is_stored = artifact.is_complete(folder) and snapshots.is_saved(folder)
    # A stored set does not change any more, and two jobs that only read the set do not exclude each other
    with nullcontext() if is_stored else snapshots.writer(folder):
        if artifact.is_complete(folder):
            _check_complete_set(task, scan)
        else:
            _label_and_merge(task, scan)
        # Also for a complete set: the job that completed the set may have been killed before these steps
        snapshots.save(folder)
        sync.delete(work_dir)
        shutil.rmtree(work_dir, ignore_errors=True)


def _check_complete_set(task: LabelTask, scan: SplitScan) -> None:
    """UserError if the settings do not allow the engine of a complete label set."""
    folder = task.folder
    if not task.job.allow_fallback and (reason := read_pseudolabel_manifest(folder).engine_fallback_reason):
        raise UserError(f"{folder}: complete, but written without CTranslate2: {reason}; allow this with --fallback")
    if task.verbose:
        print_progress(f"pseudo-labels: already complete ({scan.rows} rows): {folder}")


def _label_and_merge(task: LabelTask, scan: SplitScan) -> None:
    """Label the missing batches, and merge the outputs of all batches into the label set.

    Raises:
        TransientError: A job on another machine has taken over.
    """
    work_dir = task.work_dir
    sync.pull(work_dir)
    plan = open_plan(task.plan_dir) or _make_plan(task, scan)
    (work_dir / "out").mkdir(exist_ok=True)
    missing = [n for n in range(len(plan)) if not is_batch_complete(batch_output_path(work_dir, n))]
    if task.verbose and len(missing) < len(plan):
        num_finished = len(plan) - len(missing)
        print_progress(f"pseudo-labels: resuming, {num_finished} of {len(plan)} batches finished")
    if missing:
        label_batches(task, plan, missing)
        sync.pull(work_dir)
        snapshots.check_claim(task.folder)  # a successor that is finished has deleted the outputs
    stats = LabelStats(task.job.resolve_metric(scan), scan.labelled)
    merge_outputs(plan, work_dir, task.folder, task.description, stats, task.job.allow_repetitive)


def _make_plan(task: LabelTask, scan: SplitScan) -> BatchPlan:
    """Plan the batches of a task and copy the plan to the storage."""
    job = task.job
    batch_chars = job.batch_chars or (GPU_BATCH_CHARS if task.device == "cuda" else BATCH_CHARS)
    max_source_chars = CHARS_PER_TOKEN * task.description.decoding["max_source_tokens"]
    rows = usable_rows(job.rows, job.split, scan)
    plan = make_plan(rows, task.plan_dir, batch_chars=batch_chars, max_source_chars=max_source_chars)
    sync.push(task.plan_dir)
    return plan


def label_batches(task: LabelTask, plan: BatchPlan, batch_numbers: list[int]) -> None:
    """Label the missing batches, with an actor per GPU or per `job.threads` CPUs, and print the progress."""
    progress = _LabelProgress(plan, batch_numbers) if task.verbose else None
    if task.verbose:
        rows = sum(plan.batch_rows[n] for n in batch_numbers)
        actors = min(max_actors(task.device, task.job.threads), len(batch_numbers))
        print_progress(f"pseudo-labels: {rows} rows to label in {len(batch_numbers)} batches by {actors} teachers")
    snapshots.save(task.teacher_path)

    def make_labeller() -> Callable[[int], BatchStats]:
        snapshots.pull(task.teacher_path)
        sync.pull(task.plan_dir, engine_path(task.work_dir))
        return Labeller(task, plan)

    # Machines that share no folder share no lock, so a single actor records the engine before the others start
    first = 1 if sync.open_storage() and not engine_path(task.work_dir).is_file() else 0
    try:
        on_done = progress.advance if progress else lambda stats: None
        for numbers in (batch_numbers[:first], batch_numbers[first:]):
            if numbers:
                run_batches(numbers, make_labeller, device=task.device, threads=task.job.threads, on_done=on_done)
    finally:
        if progress:
            progress.close()


class _LabelProgress:
    """A progress bar over source characters, with rows and tokens per second since the start."""

    def __init__(self, plan: BatchPlan, batch_numbers: list[int]) -> None:
        self._batch_chars = plan.batch_chars
        self._total_rows, self._rows, self._tokens = sum(plan.batch_rows), 0, 0
        self._finished_rows = self._total_rows - sum(plan.batch_rows[n] for n in batch_numbers)
        self._started = time.monotonic()
        total_chars = sum(plan.batch_chars)
        missing_chars = sum(plan.batch_chars[n] for n in batch_numbers)
        self._bar = ProgressBar("pseudo-labels", total_chars, total_chars - missing_chars)

    def advance(self, stats: BatchStats) -> None:
        """Count a finished batch."""
        self._rows += int(stats["rows"])
        self._tokens += int(stats["tokens"])
        seconds = time.monotonic() - self._started
        rates = f"{self._rows / seconds:.1f} rows/s, {self._tokens / seconds:.0f} tokens/s"
        finished = f"{self._finished_rows + self._rows}/{self._total_rows} rows"
        self._bar.advance(self._batch_chars[int(stats["batch"])], f"{finished}, {rates}")

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


class Labeller:
    """A teacher on a GPU or on a share of the CPUs: labels and scores planned batches and writes the output of each."""

    def __init__(self, task: LabelTask, plan: BatchPlan) -> None:
        job, teacher = task.job, task.description.teacher
        os.environ["OMP_NUM_THREADS"] = str(job.threads)
        from raydistill.inference.decoding import CalibrationRows, EngineOptions, engine_label
        from raydistill.inference.engines import FALLBACK_NOTICE, open_engine

        if any(getattr(teacher, name) != value for name, value in _teacher_fingerprints(teacher.path).items()):
            raise UserError(f"{teacher.path}: the teacher changed since the job started; run the command again")
        self._beam, self._max_source_tokens = beam_search_params(task.description)
        self._plan, self._work_dir, self._n_best, self._threads = plan, task.work_dir, job.pseudo.n_best, job.threads
        self._metric = task.metric
        sources = plan.read_batch(len(plan) // 2)["sources"][:NUM_CALIBRATION_ROWS]
        messages: list[str] = []
        self._engine = (task.engine_factory or open_engine)(
            teacher.path,
            job.engine,
            EngineOptions(
                device=task.device,
                threads=job.threads,
                precision=job.pseudo.precision,
                languages=task.languages,
                source_prefix=task.description.source_prefix,
                allow_fallback=job.allow_fallback,
            ),
            log=messages.append,
            calibration=CalibrationRows(tuple(sources), self._beam, self._max_source_tokens),
        )
        self._engine_name = engine_label(self._engine)
        self._batch_size = GPU_BATCH_SIZE if task.device == "cuda" else CPU_BATCH_SIZES[self._engine.name]
        fallback_reason = " ".join(line for line in messages if FALLBACK_NOTICE in line)
        engine = EngineRecord(engine=self._engine_name, fallback_reason=fallback_reason)
        check_same_engine(task.work_dir, engine)

    def __call__(self, batch_number: int) -> BatchStats:
        """Label and score a planned batch, write its output, and return the numbers of rows and of output tokens."""
        batch = self._plan.read_batch(batch_number)
        started = time.monotonic()
        outputs = self._engine.generate(
            batch["sources"],
            self._beam,
            max_source_tokens=self._max_source_tokens,
            batch_size=self._batch_size,
            n_best=self._n_best,
        )
        device_seconds = (time.monotonic() - started) * self._num_devices
        columns = {
            "id": batch["ids"],
            "targets": [[h.text.strip() for h in hypotheses] for hypotheses in outputs],
            "scores": [[float(h.score) for h in hypotheses] for hypotheses in outputs],
        }
        labels = [targets[0] for targets in columns["targets"]]
        counts = count_batch(labels, batch, self._metric, engine=self._engine_name, device_seconds=device_seconds)
        write_batch_output(self._work_dir, batch_number, columns, counts)
        return {"rows": len(outputs), "tokens": sum(hypotheses[0].num_tokens for hypotheses in outputs)}

    @property
    def _num_devices(self) -> int:
        """1 for a GPU, otherwise the number of CPU threads."""
        return self._threads if self._engine.device == "cpu" else 1


def _slug(name: str) -> str:
    """The name of a data set as part of a folder name: "my_texts.jsonl.gz" becomes my-texts."""
    stem = Path(name).name.removesuffix(known_extension(Path(name)) or "")
    return "".join(c if c.isalnum() else "-" for c in stem)

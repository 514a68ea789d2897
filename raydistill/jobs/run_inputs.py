"""Creates the inputs that runs share, before the first run starts: label sets and the teacher cache."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from raydistill.cluster import snapshots
from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.label_sources import parse_labels
from raydistill.config.run import Dataset, Decoding, Run
from raydistill.core.paths import raydistill_home
from raydistill.core.records import Record
from raydistill.data.extra import ensure_extra, extra_dataset, read_extra_manifest
from raydistill.jobs.pseudolabel import LabelJob, pseudolabel
from raydistill.jobs.teacher_cache import (
    CacheRequest,
    build_teacher_cache,
    cache_group_key,
    resolve_auto_precision,
    resolve_cache_mode,
)
from raydistill.label_sets.label_set import read_manifest
from raydistill.results.sweep_record import ExtraSourcesRecord, LabelSetScores
from raydistill.teacher_cache.policy import CacheMode
from raydistill.training.inputs import (
    EXTRA_SOURCES,
    LabelFolders,
    RunInputs,
    extra_labels,
    input_paths,
    run_label_folders,
)


class CacheDecision(BaseModel):
    """The decision about the teacher cache of runs that share a pass, and what the pass took.

    Attributes:
        mode: What the runs read from the cache.
        reason: Why, as printed.
        bytes: Size of the stores.
        device_seconds: By array, the device-seconds of the pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: CacheMode
    reason: str
    bytes: int = 0
    device_seconds: dict[str, float] = Field(default_factory=dict)


class CacheDecisions(Record):
    """The content of cache.json. A resumed sweep keeps these decisions.

    Attributes:
        precision: The resolved value of `precision: auto` on the workers; None if no run needs it.
        groups: Decisions by the runs' `cache_group_key`.
    """

    precision: str | None = None
    groups: dict[str, CacheDecision] = Field(default_factory=dict)

    def with_group(self, name: str, decision: CacheDecision) -> "CacheDecisions":
        """These decisions with a new decision for a group."""
        return self.model_copy(update={"groups": {**self.groups, name: decision}})


@dataclass(frozen=True)
class PreparedCache:
    """The teacher cache of some runs.

    Attributes:
        root: The folder of all stores.
        modes: The resolved values of `teacher_cache: auto`, by the runs' `cache_group_key`.
        compute_dtype: The resolved value of `precision: auto` on the workers; None if no run needs it.
        store_hours: Device-hours by array of a store. Another sweep may read the same stores.
    """

    root: Path | None = None
    modes: dict[str, CacheMode] = field(default_factory=dict)
    compute_dtype: str | None = None
    store_hours: dict[str, float] = field(default_factory=dict)

    @property
    def store_folders(self) -> tuple[Path, ...]:
        """The folders of the stores."""
        return tuple(sorted({self.root / store.partition("/")[0] for store in self.store_hours})) if self.root else ()

    def mode_for(self, run: Run) -> CacheMode:
        """The resolved value of `teacher_cache: auto` in a run."""
        return self.modes.get(cache_group_key(run), "off")


@dataclass(frozen=True)
class SharedInputs:
    """The inputs that runs share.

    Attributes:
        label_folders: Folders of the label sets that teachers wrote, by `label_key` and source.
        label_hours: Device-hours of every label set that is trained on, by `label_key` and name.
        cache: The teacher cache.
        extra: The folder of the extra sources; None for none.
    """

    label_folders: LabelFolders = field(default_factory=dict)
    label_hours: dict[str, dict[str, float]] = field(default_factory=dict)
    cache: PreparedCache = PreparedCache()
    extra: Path | None = None

    def for_run(self, run: Run) -> RunInputs:
        """The inputs of one of the runs."""
        return RunInputs(
            label_folders=run_label_folders(self.label_folders, run),
            cache_root=self.cache.root,
            cache_mode=self.cache.mode_for(run),
            compute_dtype=self.cache.compute_dtype,
            store_folders=self.cache.store_folders,
        )


def prepare_run_inputs(run: Run, device: str, folder: Path) -> RunInputs:
    """Create the inputs of a run that is not part of a sweep; `folder` is the run's."""
    if run.teacher is None:
        return RunInputs()
    extra = ensure_extra_sources([run])
    return prepare_shared_inputs([run], device, folder / "cache.json", run.training.epochs, extra).for_run(run)


def prepare_shared_inputs(
    runs: list[Run], device: str, record_path: Path, total_epochs: float, extra: Path | None = None
) -> SharedInputs:
    """Create the label sets and the parts of the teacher cache that some runs need and that are missing.

    Args:
        runs: Runs with a teacher.
        device: "cpu" or "cuda".
        record_path: The file that records how the cache was decided, so that a resumed sweep keeps the decision.
        total_epochs: Training epochs over all trials.
        extra: The result of `ensure_extra_sources`.
    """
    snapshots.save(*{path for run in runs for path in input_paths(run)})
    compute_dtype = _resolve_compute_dtype(runs, device, record_path)
    label_folders, label_hours = make_label_sets(runs, device, extra)
    cache = _make_teacher_cache(runs, label_folders, device, record_path, total_epochs, compute_dtype)
    return SharedInputs(label_folders, label_hours, cache, extra)


def describe_extra_sources(folder: Path | None) -> ExtraSourcesRecord | None:
    """What a sweep records of its extra sources; None for none."""
    if folder is None:
        return None
    manifest = read_extra_manifest(folder)
    return ExtraSourcesRecord(folder=folder.name, name=manifest.name, rows=manifest.rows, dropped=manifest.dropped)


def describe_label_sets(runs: list[Run], label_folders: LabelFolders) -> dict[str, LabelSetScores]:
    """Teacher, rows and scores against the original targets of every label set that is trained on, by name."""
    descriptions = {}
    for run in runs:
        chosen = [part.folder for part in parse_labels(run.resolved_labels) if part.folder]
        written = [path for source, path in label_folders[run.label_key].items() if source != EXTRA_SOURCES]
        for folder in [*written, *chosen]:
            manifest = read_manifest(Path(folder))
            descriptions[Path(folder).name] = LabelSetScores(
                teacher=manifest.teacher_name, rows=manifest.rows, quality=manifest.quality
            )
    return descriptions


def _resolve_compute_dtype(runs: list[Run], device: str, record_path: Path) -> str | None:
    """The resolved value of `precision: auto` on the workers; None if no run that reads the cache sets it.

    A worker determines the dtype, since this machine may have no GPU. The dtype is recorded, since the stores' keys
    contain it.
    """
    if not any(run.training.precision == "auto" for group in _group_runs(runs).values() for run in group):
        return None
    decisions = _read_decisions(record_path)
    if decisions.precision is None:
        precision = run_exclusive(resolve_auto_precision, device=device)
        decisions = decisions.model_copy(update={"precision": precision})
        decisions.write(record_path)
    return decisions.precision


def ensure_extra_sources(runs: list[Run]) -> Path | None:
    """Make the extra sources of the runs, as many rows as any of them reads; None if no run trains on any.

    All runs name the same extra sources.

    Raises:
        UserError: As `data.extra.ensure_extra`.
    """
    readers = [run for run in runs if run.reads_extra]
    if not readers:
        return None
    pseudo = readers[0].pseudo
    assert pseudo.extra is not None
    row_counts = [run.pseudo.extra_rows for run in readers]
    max_rows = None if None in row_counts else max(count for count in row_counts if count is not None)
    folder = ensure_extra(
        readers[0].dataset,
        pseudo.extra,
        raydistill_home() / "extra",
        max_rows=max_rows,
        overlap=pseudo.extra_overlap,
    )
    snapshots.save(folder)
    return folder


def make_label_sets(
    runs: list[Run], device: str, extra: Path | None = None
) -> tuple[LabelFolders, dict[str, dict[str, float]]]:
    """Folders of the label sets that teachers wrote, and device-hours of all label sets; both by `label_key`.

    A curated set counts as the set that it was derived from, since curation needs no pass of the teacher. Of the label
    set of the extra sources, the share that a run reads is counted.

    Args:
        runs: Runs with a teacher.
        device: "cpu" or "cuda".
        extra: The folder of the extra sources, which all runs get.
    """
    total_rows = read_extra_manifest(extra).rows if extra else 0
    label_folders: LabelFolders = {}
    hours: dict[str, dict[str, float]] = {}
    for run in runs:
        if run.label_key in hours:
            continue
        parts = parse_labels(run.resolved_labels)
        written = {part.spec: _make_label_set(run, part.other_teacher, device) for part in parts if part.is_pseudo}
        own_hours = hours[run.label_key] = _label_hours([*written.values(), *[p.folder for p in parts if p.folder]])
        if extra and run.reads_extra:
            sources = extra_dataset(extra)
            added = {
                extra_labels(part.spec): _make_label_set(run, part.other_teacher, device, sources)
                for part in parts
                if part.is_pseudo
            }
            share = min(total_rows, run.pseudo.extra_rows or total_rows) / total_rows
            own_hours |= {name: share * value for name, value in _label_hours(added.values()).items()}
            written |= added
        label_folders[run.label_key] = {**written, EXTRA_SOURCES: str(extra)} if extra else written
    return label_folders, hours


def _label_hours(folders: Iterable[str]) -> dict[str, float]:
    """Device-hours of label sets by name; a curated set counts under the name of the complete set."""
    manifests = {folder: read_manifest(Path(folder)) for folder in folders}
    return {m.source_label_set or Path(folder).name: m.device_hours for folder, m in manifests.items()}


def _make_label_set(run: Run, other_teacher: str | None, device: str, sources: Dataset | None = None) -> str:
    """The folder of the label set that `label_job` describes."""
    return str(pseudolabel(label_job(run, other_teacher, sources), raydistill_home() / "labels", device))


def label_job(run: Run, other_teacher: str | None = None, sources: Dataset | None = None) -> LabelJob:
    """The label job of the run's teacher, or of another teacher with its own decoding and prefix.

    `sources` are the rows to label, if these are not the training split.
    """
    teacher, decoding, dataset = run.teacher, run.decoding, run.dataset
    if other_teacher:
        teacher, decoding = other_teacher, Decoding()
        dataset = dataset.model_copy(update={"source_prefix": None})
    assert teacher is not None
    return LabelJob(
        teacher,
        dataset,
        decoding=decoding,
        engine=run.evaluation.engine,
        pseudo=run.pseudo if sources is None else run.pseudo.without_references(),
        metric=run.evaluation.metric,
        allow_repetitive=run.evaluation.allow_repetitive_teacher,
        sources=sources,
    )


def _make_teacher_cache(
    runs: list[Run],
    label_folders: LabelFolders,
    device: str,
    record_path: Path,
    total_epochs: float,
    compute_dtype: str | None,
) -> PreparedCache:
    """Build the missing parts of the teacher cache that the runs share.

    Each decision is recorded before the teacher's pass, and the costs of the pass after it.
    """
    root = raydistill_home() / "cache"
    decisions = _read_decisions(record_path)
    run_groups = _group_runs(runs)
    for name, group in run_groups.items():
        request = CacheRequest(group, label_folders, root, device, compute_dtype)
        if name not in decisions.groups:
            mode, reason = resolve_cache_mode(request, total_epochs)
            decisions = decisions.with_group(name, CacheDecision(mode=mode, reason=reason))
            decisions.write(record_path)
        decision = decisions.groups[name]
        stats = build_teacher_cache(request, decision.mode)
        update = {"bytes": stats.bytes, "device_seconds": stats.device_seconds}
        decisions = decisions.with_group(name, decision.model_copy(update=update))
        decisions.write(record_path)
    entries = {name: decisions.groups[name] for name in run_groups}
    hours = {store: seconds / 3600 for entry in entries.values() for store, seconds in entry.device_seconds.items()}
    return PreparedCache(root, {name: entry.mode for name, entry in entries.items()}, compute_dtype, hours)


def _read_decisions(path: Path) -> CacheDecisions:
    """The earlier decisions; none if there is no file."""
    return CacheDecisions.read_if_present(path) or CacheDecisions()


def _group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that can share a pass of the teacher, by `cache_group_key`; without the runs that read no cache."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.teacher is not None and run.training.teacher_cache != "off":
            groups.setdefault(cache_group_key(run), []).append(run)
    return groups

"""Output files of a pseudo-label job, one per planned batch, and the label set that is merged from them."""

import platform
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.config.metric_names import is_own_metric
from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.core.files import atomic_path, corrupt_file_error
from raydistill.core.records import Record
from raydistill.evaluation.metrics import ScoreAccumulator, is_repetitive
from raydistill.label_sets.batch_plan import BatchPlan
from raydistill.label_sets.label_set import Candidate, write_label_set
from raydistill.label_sets.manifest import LabelDescription, PseudolabelManifest
from raydistill.training.records import check_teacher_repetition

LOCK_TIMEOUT_S = 600.0  # a process holds the lock for one download and one upload of a small file


class EngineRecord(Record):
    """The engine of all batches of a label set, and why CTranslate2 was not used ("" if it was)."""

    engine: str
    fallback_reason: str


def check_same_engine(work_dir: Path, engine: EngineRecord) -> None:
    """Record the engine of a label set, or compare with the recorded one: a set has texts of one engine only.

    Raises:
        UserError: The batches so far were written by another engine.
        LockHeld: The lock of the record was not acquired within `LOCK_TIMEOUT_S`.
    """
    path = engine_path(work_dir)
    with artifact.lock(path, LOCK_TIMEOUT_S):
        sync.pull(path)
        recorded = EngineRecord.read_if_present(path)
        if recorded is None:
            recorded = engine
            engine.write(path)
        sync.push(path)  # also if an actor was killed between the two steps
    if recorded.engine != engine.engine:
        raise UserError(
            f"{work_dir}: the batches so far were written by {recorded.engine}, and this machine opens "
            f"{engine.engine}: engines cannot be mixed in one label set. Resume on a machine that opens "
            f"{recorded.engine}, or delete the folder to start again"
        )


def engine_path(work_dir: Path) -> Path:
    """The file that names the engine of a label set."""
    return work_dir / "engine.json"


def batch_output_path(work_dir: Path, batch_number: int) -> Path:
    """The output file of a planned batch."""
    return work_dir / "out" / f"batch-{batch_number:06d}.parquet"


def write_batch_output(
    work_dir: Path, batch_number: int, columns: dict[str, list[Any]], engine: str, device_seconds: float
) -> None:
    """Write the output of a batch and copy it to the storage.

    Args:
        columns: `id`, and per row the lists `targets` and `scores` of its candidates, best first.
        engine: Name and precision of the engine.
        device_seconds: Generation time, multiplied by the number of devices or CPU threads.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {"engine": engine, "device_seconds": str(device_seconds), "host": platform.node()}
    path = batch_output_path(work_dir, batch_number)
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), temporary)
    sync.push(path)


def is_batch_complete(path: Path) -> bool:
    """Whether the output of a batch is complete. A truncated file, left by a power failure, is deleted.

    Raises:
        OSError: The file cannot be read at the moment.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowInvalid) as error:
        if getattr(error, "errno", None) is not None:  # a disk error does not show that the file is truncated
            raise
        path.unlink()
        return False
    return True


class LabelStats:
    """Counts and scores of the labels of a job, collected while its outputs are merged."""

    def __init__(self, metric: str, labelled: bool) -> None:
        self.device_seconds = 0.0
        self.rows_per_host: Counter[str] = Counter()
        self._labelled = labelled  # whether the data has original targets
        self._rows = self._empty = self._repetitive = self._target_words = self._original_words = 0
        self._scores = ScoreAccumulator(metric)

    @property
    def repetition_rate(self) -> float:
        """The share of the labels that repeat themselves."""
        return self._repetitive / max(1, self._rows)

    @property
    def needs_sources(self) -> bool:
        """Whether the metric may read the source texts, as users' metrics do."""
        return self._labelled and is_own_metric(self._scores.metric)

    def add(self, labels: list[str], originals: list[str], sources: list[str] | None = None) -> None:
        """Count labels and the original targets of the same rows; `sources` are theirs if `needs_sources`."""
        self._rows += len(labels)
        self._empty += sum(not text.strip() for text in labels)
        self._repetitive += sum(map(is_repetitive, labels))
        self._target_words += sum(len(text.split()) for text in labels)
        self._original_words += sum(len(text.split()) for text in originals)
        if self._labelled:
            self._scores.add(labels, originals, sources)

    def manifest(self, description: LabelDescription, engine: EngineRecord) -> PseudolabelManifest:
        """The manifest of the label set, once all rows are counted."""
        return PseudolabelManifest(
            **description.model_dump(exclude_unset=True),
            rows=self._rows,
            empty=self._empty,
            metric=self._scores.metric,
            engine=engine.engine,
            engine_fallback_reason=engine.fallback_reason,
            device_hours=self.device_seconds / 3600,
            hosts=dict(sorted(self.rows_per_host.items())),
            quality=self._scores.metrics() if self._labelled else None,
            target_words_mean=self._target_words / self._rows,
            original_words_mean=self._original_words / self._rows if self._labelled else None,
        )


def merge_outputs(
    plan: BatchPlan,
    work_dir: Path,
    folder: Path,
    description: LabelDescription,
    stats: LabelStats,
    allow_repetitive: bool,
) -> None:
    """Merge the outputs of all batches, in the order of the data, into the label set in `folder`.

    Raises:
        UserError: The outputs do not match the plan, or most of them repeat themselves and that is not allowed. The
            outputs remain, so that the same command with the permission generates no text again.
    """

    def finish() -> PseudolabelManifest:
        check_teacher_repetition(description.teacher.name, stats.repetition_rate, allow_repetitive)
        return stats.manifest(description, EngineRecord.read(engine_path(work_dir)))

    # A generator per window, so that a window is freed before the next one is read.
    rows = chain.from_iterable(_iter_window(plan, work_dir, window, stats) for window in range(plan.num_windows))
    write_label_set(folder, rows, finish)


def _iter_window(
    plan: BatchPlan, work_dir: Path, window: int, stats: LabelStats
) -> Iterator[tuple[str, list[Candidate]]]:
    """Yield the id and the candidates of the rows of a window, in the order of the data."""
    planned = plan.read_targets(window)
    candidates = read_window_outputs(plan, work_dir, window, stats)
    if candidates.keys() != {row_id for row_id, _ in planned} or len(candidates) != len(planned):
        raise UserError(
            f"{work_dir}: the outputs do not match the batch plan; delete the folder and run the same command again"
        )
    sources = [source for _, source in plan.read_sources(window)] if stats.needs_sources else None
    stats.add([candidates[row_id][0].target for row_id, _ in planned], [target for _, target in planned], sources)
    yield from ((row_id, candidates.pop(row_id)) for row_id, _ in planned)


def read_window_outputs(plan: BatchPlan, work_dir: Path, window: int, stats: LabelStats) -> dict[str, list[Candidate]]:
    """Read the candidates of the rows of a window by id, and add device-seconds and hosts to `stats`.

    Raises:
        UserError: An output is damaged, a row was labelled twice, or two engines wrote the outputs.
    """
    import pyarrow.parquet as pq

    candidates: dict[str, list[Candidate]] = {}
    engine = EngineRecord.read(engine_path(work_dir)).engine
    for number in plan.batches_in_window(window):
        path = batch_output_path(work_dir, number)
        with corrupt_file_error(path, f"Delete {path} to have this batch labelled again"):
            table = pq.read_table(path)
            metadata = table.schema.metadata
            if metadata[b"engine"].decode() != engine:
                raise UserError(
                    f"{work_dir}: two engines wrote the outputs; delete the folder and run the same command again"
                )
            stats.device_seconds += float(metadata[b"device_seconds"])
            stats.rows_per_host[metadata[b"host"].decode()] += len(table)
            columns = (table[name].to_pylist() for name in ("id", "targets", "scores"))
            for row_id, targets, scores in zip(*columns, strict=True):
                if row_id in candidates:
                    raise UserError(
                        f"{work_dir}: row {row_id!r} was labelled twice; delete the folder and run the same command "
                        f"again"
                    )
                candidates[row_id] = [Candidate(*pair) for pair in zip(targets, scores, strict=True)]
    return candidates

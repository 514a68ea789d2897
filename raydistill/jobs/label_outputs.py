"""Output files of a pseudo-label job, one per planned batch, and the label set that is merged from them."""

import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from raydistill.cluster import sync
from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.core.files import atomic_path, corrupt_file_error
from raydistill.core.records import Record
from raydistill.evaluation.metrics import ScoreAccumulator, is_repetitive, signature
from raydistill.label_sets.batch_plan import BatchPlan
from raydistill.label_sets.label_set import part_schema, write_label_tables
from raydistill.label_sets.manifest import LabelDescription, PseudolabelManifest
from raydistill.training.records import check_teacher_repetition

COUNTS = "raydistill.counts"  # key of the metadata of an output
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


class BatchCounts(BaseModel):
    """What the manifest of a label set counts and scores, of the labels of a batch; in the metadata of its output.

    Attributes:
        engine: Name and precision of the engine.
        host: The machine that labelled the batch.
        device_seconds: Generation time, multiplied by the number of devices or CPU threads.
        rows: Number of labels.
        empty: Number of labels without text.
        repetitive: Number of labels that repeat themselves.
        target_words: Words of the labels.
        original_words: Words of the original targets.
        signature: How the labels were scored, with the version of the metric; empty if the data has no targets.
        score_sums: Sums over the rows of what `ScoreAccumulator` accumulates; empty if the data has no targets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    host: str
    device_seconds: float
    rows: int
    empty: int
    repetitive: int
    target_words: int
    original_words: int
    signature: str
    score_sums: dict[str, float | list[float]]


def count_batch(
    labels: list[str], batch: Mapping[str, list[str]], metric: str | None, *, engine: str, device_seconds: float
) -> BatchCounts:
    """Count and score the labels of a batch.

    Args:
        labels: The best candidate of each row.
        batch: The planned batch, with the original target and the source of each row in `targets` and `sources`.
        metric: The metric of the labels against the original targets; None if the data has no targets.
        engine: Name and precision of the engine.
        device_seconds: Generation time, multiplied by the number of devices or CPU threads.
    """
    originals = batch["targets"]
    scores = ScoreAccumulator(metric or "")
    if metric is not None:
        scores.add(labels, originals, batch["sources"])
    return BatchCounts(
        engine=engine,
        host=platform.node(),
        device_seconds=device_seconds,
        rows=len(labels),
        empty=sum(not text.strip() for text in labels),
        repetitive=sum(map(is_repetitive, labels)),
        target_words=sum(len(text.split()) for text in labels),
        original_words=sum(len(text.split()) for text in originals),
        signature=signature(metric) if metric is not None else "",
        score_sums={name: total.tolist() for name, total in scores.sums.items()},
    )


def write_batch_output(work_dir: Path, batch_number: int, columns: dict[str, list[Any]], counts: BatchCounts) -> None:
    """Write the output of a batch and copy it to the storage.

    Args:
        columns: `id`, and per row the lists `targets` and `scores` of its candidates, best first.
        counts: Counts and scores of the labels.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = batch_output_path(work_dir, batch_number)
    with atomic_path(path) as temporary:
        table = pa.table(columns, schema=_output_schema())
        pq.write_table(table.replace_schema_metadata({COUNTS: counts.model_dump_json()}), temporary)
    sync.push(path)


def _output_schema() -> Any:
    import pyarrow as pa

    return pa.schema([("id", pa.string()), ("targets", pa.list_(pa.string())), ("scores", pa.list_(pa.float64()))])


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
    """Counts and scores of the labels of a job, added up over its batches."""

    def __init__(self, metric: str, labelled: bool) -> None:
        self.metric = metric
        self.signature = signature(metric) if labelled else ""
        self._labelled = labelled  # whether the data has original targets
        self._device_seconds = 0.0
        self._rows_per_host: Counter[str] = Counter()
        self._rows = self._empty = self._repetitive = self._target_words = self._original_words = 0
        self._scores = ScoreAccumulator(metric)

    @property
    def repetition_rate(self) -> float:
        """The share of the labels that repeat themselves."""
        return self._repetitive / max(1, self._rows)

    def add(self, counts: BatchCounts) -> None:
        """Add the counts of a batch."""
        self._rows += counts.rows
        self._empty += counts.empty
        self._repetitive += counts.repetitive
        self._target_words += counts.target_words
        self._original_words += counts.original_words
        self._device_seconds += counts.device_seconds
        self._rows_per_host[counts.host] += counts.rows
        self._scores.merge(counts.rows, counts.score_sums)

    def manifest(self, description: LabelDescription, engine: EngineRecord) -> PseudolabelManifest:
        """The manifest of the label set, once all batches are added."""
        return PseudolabelManifest(
            **description.model_dump(exclude_unset=True),
            rows=self._rows,
            empty=self._empty,
            metric=self.metric,
            engine=engine.engine,
            engine_fallback_reason=engine.fallback_reason,
            device_hours=self._device_seconds / 3600,
            hosts=dict(sorted(self._rows_per_host.items())),
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

    The actors have counted and scored the labels, and no text becomes a Python object here. The exception are batches
    that an earlier command scored with another metric, or with another version of the metric: these are scored again.

    Raises:
        UserError: The outputs do not match the plan, an output is damaged, two engines wrote the outputs, or most
            labels repeat themselves and that is not allowed. The outputs remain, so that the same command with the
            permission generates no text again.
    """
    engine = EngineRecord.read(engine_path(work_dir))

    def finish() -> PseudolabelManifest:
        check_teacher_repetition(description.teacher.name, stats.repetition_rate, allow_repetitive)
        return stats.manifest(description, engine)

    tables = (_merge_window(plan, work_dir, window, engine.engine, stats) for window in range(plan.num_windows))
    write_label_tables(folder, tables, finish)


def _merge_window(plan: BatchPlan, work_dir: Path, window: int, engine: str, stats: LabelStats) -> Any:
    """The lines of the rows of a window, in the order of the data, as a pyarrow table of `part_schema`."""
    import pyarrow as pa

    ids, order = plan.read_order(window)
    outputs = {number: _read_output(batch_output_path(work_dir, number)) for number in plan.batches_in_window(window)}
    if any(counts.engine != engine for _, counts in outputs.values()):
        raise UserError(f"{work_dir}: two engines wrote the outputs; delete the folder and run the same command again")
    rows = pa.concat_tables([table for table, _ in outputs.values()])
    # The ids of a plan differ, so that equal ids also mean that no row is missing or was labelled twice
    if not rows["id"].combine_chunks().equals(ids):
        raise UserError(
            f"{work_dir}: the outputs do not match the batch plan; delete the folder and run the same command again"
        )
    for number, (table, counts) in outputs.items():
        is_current = counts.signature == stats.signature
        stats.add(counts if is_current else _score_again(table, plan.read_batch(number), counts, stats.metric))
    return _candidate_lines(rows.take(pa.array(order)))


def _score_again(table: Any, batch: Mapping[str, list[str]], counts: BatchCounts, metric: str) -> BatchCounts:
    """Count and score the labels in the output of a planned batch."""
    labels = [targets[0] for targets in table["targets"].to_pylist()]
    engine, device_seconds = counts.engine, counts.device_seconds
    scored = count_batch(labels, batch, metric, engine=engine, device_seconds=device_seconds)
    return scored.model_copy(update={"host": counts.host})


def _read_output(path: Path) -> tuple[Any, BatchCounts]:
    """Read the rows and the counts of the output of a batch.

    Raises:
        UserError: The output is damaged.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with corrupt_file_error(path, f"Delete {path} to have this batch labelled again"):
        stored = pq.read_table(path)
        counts = BatchCounts.model_validate_json((stored.schema.metadata or {})[COUNTS.encode()])
        table = stored.cast(_output_schema())
        num_candidates = [pc.list_value_length(table[name]).combine_chunks() for name in ("targets", "scores")]
        if counts.rows != len(table) or not num_candidates[0].equals(num_candidates[1]):
            raise ValueError("the columns have different lengths")
        if 0 in num_candidates[0].to_numpy(zero_copy_only=False):
            raise ValueError("a row has no candidate")
        return table, counts


def _candidate_lines(rows: Any) -> Any:
    """A line for each candidate of rows of `_output_schema`, as a pyarrow table of `part_schema`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = rows.combine_chunks()
    counts = pc.list_value_length(rows["targets"]).to_numpy()
    first_lines = np.cumsum(counts) - counts
    columns = {
        "id": rows["id"].take(pa.array(np.repeat(np.arange(len(rows)), counts))),
        "target": pc.list_flatten(rows["targets"]),
        "rank": pa.array(np.arange(counts.sum()) - np.repeat(first_lines, counts), pa.int32()),
        "score": pc.list_flatten(rows["scores"]),
    }
    return pa.table(columns, schema=part_schema())

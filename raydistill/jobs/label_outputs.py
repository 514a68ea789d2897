"""What a pseudo-label job's actors leave, a file for each planned batch, and the label set made of these files."""

import io
import platform
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from raydistill.cluster import sync
from raydistill.core.errors import UserError
from raydistill.core.files import corrupt_file_error, read_json, write_atomic
from raydistill.data.streaming import SplitScan
from raydistill.evaluation.metrics import ScoreAccumulator
from raydistill.label_sets.batch_plan import BatchPlan
from raydistill.label_sets.label_set import Candidate, write_label_set


def batch_output_path(work_dir: Path, batch_number: int) -> Path:
    """The file of a planned batch in the job's folder."""
    return work_dir / "out" / f"batch-{batch_number:06d}.parquet"


def write_batch_output(
    work_dir: Path, batch_number: int, columns: dict[str, list[Any]], engine: str, device_seconds: float
) -> None:
    """A labelled batch: its rows' `id`, `targets` and `scores`, and by what, where and in what time it was labelled."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {"engine": engine, "device_seconds": str(device_seconds), "host": platform.node()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(about), buffer)
    write_atomic(batch_output_path(work_dir, batch_number), buffer.getvalue())
    sync.push(batch_output_path(work_dir, batch_number))


def merge_outputs(
    plan: BatchPlan, work_dir: Path, folder: Path, description: dict[str, Any], scan_result: SplitScan, metric: str
) -> None:
    """Put the batches' outputs in the data's order, check that every row is there once, write the label set."""
    tally = ScoreAccumulator(metric)
    sums = {"empty": 0.0, "words": 0.0, "original_words": 0.0, "device_seconds": 0.0}
    hosts: Counter[str] = Counter()

    def window_rows(window: int) -> Iterator[tuple[str, list[Candidate]]]:
        planned = plan.read_targets(window)
        written = read_window_outputs(plan, work_dir, window, sums, hosts)
        if written.keys() != {row_id for row_id, _ in planned} or len(written) != len(planned):
            raise UserError(f"{work_dir}: its rows are not those that were planned; delete the folder and run again")
        best = [written[row_id][0].target for row_id, _ in planned]
        originals = [target for _, target in planned]
        sums["empty"] += sum(not text.strip() for text in best)
        sums["words"] += sum(len(text.split()) for text in best)
        sums["original_words"] += sum(len(text.split()) for text in originals)
        if scan_result.labelled:
            tally.add(best, originals)
        yield from ((row_id, written.pop(row_id)) for row_id, _ in planned)

    # A generator for each window, so that what it held is gone before the next one is read.
    rows = chain.from_iterable(window_rows(window) for window in range(len(plan.windows)))

    def manifest() -> dict[str, Any]:
        engine = read_json(work_dir / "engine.json")
        return {
            **description,
            "rows": scan_result.rows,
            "empty": int(sums["empty"]),
            "metric": metric,
            "engine": engine["engine"],
            "engine_why": engine["why"],
            "device_hours": sums["device_seconds"] / 3600,
            "hosts": dict(sorted(hosts.items())),
            "quality": tally.metrics() if scan_result.labelled else None,
            "target_words_mean": sums["words"] / scan_result.rows,
            "original_words_mean": sums["original_words"] / scan_result.rows if scan_result.labelled else None,
        }

    write_label_set(folder, rows, manifest)


def read_window_outputs(
    plan: BatchPlan, work_dir: Path, window: int, totals: dict[str, float], rows_per_host: Counter[str]
) -> dict[str, list[Candidate]]:
    """The candidates of a window's rows by id; UserError where a row was labelled twice, or by two engines.

    Adds the device-seconds to `totals`, and the rows to the `rows_per_host` that labelled them.
    """
    import pyarrow.parquet as pq

    written: dict[str, list[Candidate]] = {}
    engine = read_json(work_dir / "engine.json")["engine"]
    for number in plan.batches_in_window(window):
        path = batch_output_path(work_dir, number)
        with corrupt_file_error(path, f"Delete {path} to have this batch labelled again"):
            table = pq.read_table(path)
            told = table.schema.metadata
            if told[b"engine"].decode() != engine:
                raise UserError(f"{work_dir}: was written by two engines; delete the folder and run again")
            totals["device_seconds"] += float(told[b"device_seconds"])
            rows_per_host[told.get(b"host", b"unknown").decode()] += len(
                table
            )  # unknown: of a release that did not write it
            columns = (table[name].to_pylist() for name in ("id", "targets", "scores"))
            for row_id, targets, scores in zip(*columns, strict=True):
                if row_id in written:
                    raise UserError(f"{work_dir}: row {row_id!r} was labelled twice; delete the folder and run again")
                written[row_id] = [Candidate(*pair) for pair in zip(targets, scores, strict=True)]
    return written


def is_batch_complete(path: Path) -> bool:
    """Whether a batch's file is there and whole: a machine that lost its power may leave one that is not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowInvalid) as error:
        if getattr(error, "errno", None) is not None:  # the disk's own: nothing is known of the file
            raise
        path.unlink()
        return False
    return True

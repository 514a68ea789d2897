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
from raydistill.core.files import damage_told, read_json, write_atomic
from raydistill.data.streaming import Scan
from raydistill.evaluation.metrics import Tally
from raydistill.label_sets.batch_plan import Plan
from raydistill.label_sets.label_set import Candidate, write_label_set


def output_of(work: Path, number: int) -> Path:
    """The file of a planned batch in the job's folder."""
    return work / "out" / f"batch-{number:06d}.parquet"


def write_output(work: Path, number: int, columns: dict[str, list[Any]], engine: str, device_seconds: float) -> None:
    """A labelled batch: its rows' `id`, `targets` and `scores`, and by what, where and in what time it was labelled."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {"engine": engine, "device_seconds": str(device_seconds), "host": platform.node()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(about), buffer)
    write_atomic(output_of(work, number), buffer.getvalue())
    sync.keep(output_of(work, number))


def compact(plan: Plan, work: Path, folder: Path, about: dict[str, Any], found: Scan, metric: str) -> None:
    """Put the batches' outputs in the data's order, check that every row is there once, write the label set."""
    tally = Tally(metric)
    sums = {"empty": 0.0, "words": 0.0, "original_words": 0.0, "device_seconds": 0.0}
    hosts: Counter[str] = Counter()

    def window_rows(window: int) -> Iterator[tuple[str, list[Candidate]]]:
        planned = plan.read_targets(window)
        written = read_outputs(plan, work, window, sums, hosts)
        if written.keys() != {row_id for row_id, _ in planned} or len(written) != len(planned):
            raise UserError(f"{work}: its rows are not those that were planned; delete the folder and run again")
        best = [written[row_id][0].target for row_id, _ in planned]
        originals = [target for _, target in planned]
        sums["empty"] += sum(not text.strip() for text in best)
        sums["words"] += sum(len(text.split()) for text in best)
        sums["original_words"] += sum(len(text.split()) for text in originals)
        if found.labelled:
            tally.add(best, originals)
        yield from ((row_id, written.pop(row_id)) for row_id, _ in planned)

    # A generator for each window, so that what it held is gone before the next one is read.
    rows = chain.from_iterable(window_rows(window) for window in range(len(plan.windows)))

    def manifest() -> dict[str, Any]:
        engine = read_json(work / "engine.json")
        return {
            **about,
            "rows": found.rows,
            "empty": int(sums["empty"]),
            "metric": metric,
            "engine": engine["engine"],
            "engine_why": engine["why"],
            "device_hours": sums["device_seconds"] / 3600,
            "hosts": dict(sorted(hosts.items())),
            "quality": tally.metrics() if found.labelled else None,
            "target_words_mean": sums["words"] / found.rows,
            "original_words_mean": sums["original_words"] / found.rows if found.labelled else None,
        }

    write_label_set(folder, rows, manifest)


def read_outputs(
    plan: Plan, work: Path, window: int, sums: dict[str, float], hosts: Counter[str]
) -> dict[str, list[Candidate]]:
    """The candidates of a window's rows by id; UserError where a row was labelled twice, or by two engines.

    Adds the device-seconds to `sums`, and the rows to the `hosts` that labelled them.
    """
    import pyarrow.parquet as pq

    written: dict[str, list[Candidate]] = {}
    engine = read_json(work / "engine.json")["engine"]
    for number in plan.batches_of(window):
        path = output_of(work, number)
        with damage_told(path, f"Delete {path} to have this batch labelled again"):
            table = pq.read_table(path)
            told = table.schema.metadata
            if told[b"engine"].decode() != engine:
                raise UserError(f"{work}: was written by two engines; delete the folder and run again")
            sums["device_seconds"] += float(told[b"device_seconds"])
            hosts[told.get(b"host", b"unknown").decode()] += len(table)  # unknown: of a release that did not write it
            columns = (table[name].to_pylist() for name in ("id", "targets", "scores"))
            for row_id, targets, scores in zip(*columns, strict=True):
                if row_id in written:
                    raise UserError(f"{work}: row {row_id!r} was labelled twice; delete the folder and run again")
                written[row_id] = [Candidate(*pair) for pair in zip(targets, scores, strict=True)]
    return written


def is_done(output: Path) -> bool:
    """Whether a batch's file is there and whole: a machine that lost its power may leave one that is not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(output)
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowInvalid) as error:
        if getattr(error, "errno", None) is not None:  # the disk's own: nothing is known of the file
            raise
        output.unlink()
        return False
    return True

"""A table of timings that an interrupted benchmark resumes from: each timing with all of its conditions."""

import hashlib
import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from raydistill.core import artifact
from raydistill.core.records import Record
from raydistill.evaluation.latency import Hardware, Timing, engine_version
from raydistill.inference.decoding import Workload

LOCK_TIMEOUT_S = 60.0  # a process holds the lock of the table while it replaces the file


class LatencyRow(Record):
    """A timing with its conditions (`measurement_key`), the name of the machine and the time (UTC)."""

    timing: Timing
    host: str
    measured_at: datetime
    measurement: dict[str, str | int]


class LatencyTable(Record):
    """The table of timings, latency.json: rows by `entry_name`."""

    remedy: ClassVar[str | None] = "Delete latency.json and run the command again to measure the latencies"
    timings: dict[str, LatencyRow] = Field(default_factory=dict)


def measurement_key(
    machine: Hardware, architecture: str, engine: str, precision: str, workload: Workload
) -> dict[str, Any]:
    """Return all conditions of a measurement, including the version of the engine's library."""
    return {
        **machine,
        "architecture": architecture,
        "engine": f"{engine} {engine_version(engine)}",
        "precision": precision,
        **asdict(workload),
    }


def entry_name(measurement: dict[str, Any]) -> str:
    """Return the name of a table entry: size and engine for people, and a digest of all conditions."""
    digest = hashlib.sha256(json.dumps(measurement, sort_keys=True).encode()).hexdigest()
    return f"{measurement['architecture'].split(' d_model')[0]} {measurement['engine'].split()[0]} {digest[:12]}"


def lookup(table: Path, measurement: dict[str, Any]) -> Timing | None:
    """Return the timing stored under these conditions, or None if there is none.

    Raises:
        UserError: The table is damaged or was written by another version of raydistill.
    """
    row = _read_table(table).timings.get(entry_name(measurement))
    return row.timing if row else None


def record(table: Path, measurement: dict[str, Any], timing: Timing) -> None:
    """Store a timing with its conditions, the name of the machine and the time (UTC).

    Several processes may store timings at the same time; the file is replaced as a whole.

    Raises:
        LockHeld: The lock of the table was not acquired within `LOCK_TIMEOUT_S`.
        UserError: The table is damaged or was written by another version of raydistill.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    row = LatencyRow(timing=timing, host=platform.node(), measured_at=now, measurement=measurement)
    with artifact.lock(table, LOCK_TIMEOUT_S):
        LatencyTable(timings={**_read_table(table).timings, entry_name(measurement): row}).write(table)


def _read_table(table: Path) -> LatencyTable:
    return LatencyTable.read_if_present(table) or LatencyTable()

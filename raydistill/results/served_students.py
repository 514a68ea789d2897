"""Finalists and the teacher as they serve, an entry per decoding: SWEEP/served.json, SWEEP/trials/KEY/served.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from raydistill.core.files import corrupt_file_error, read_json
from raydistill.results.pareto import pool_latency
from raydistill.results.records import Trial, decoding_key, parse_interval, parse_test_scores, to_floats

SERVED_FILE = "served.json"
# What a shape and its decoding decide, whatever the weights.
SHAPE_METRICS = ("latency_ms", "latency_ms_b1", "peak_mb", "speedup")


def read_served(folder: Path) -> list[dict[str, Any]]:
    """What a folder's served.json tells: an entry per machine and way of decoding, the checkpoint's own first."""
    if not (folder / SERVED_FILE).is_file():
        return []
    served = read_json(folder / SERVED_FILE)
    with corrupt_file_error(folder / SERVED_FILE, "Delete this file to have it made again"):
        of_all: dict[str, Any] = {name: served[name] for name in ("engine", "hardware") if name in served}
        return [{**of_all, **one} for one in served["decodings"]]


def expand_by_serving(trials: list[Trial], teacher: dict[str, Any]) -> list[Trial]:
    """A student for every trial and way of decoding that was served where the teacher was, as `load_served_teacher`
    tells.

    Milliseconds are the median over the students of the same shape, beams and engine; where that is not a student's
    own, `latency_ms_own` is. `speedup` is over the teacher with its own decoding, `speedup_same_decoding` over the
    teacher with the student's.
    """
    students, alike = [], []
    for trial in trials:
        if trial.scored:
            with corrupt_file_error(trial.folder / SERVED_FILE):
                entries = [one for one in read_served(trial.folder) if _served_on(one, teacher.get("hardware"))]
                students += [_with_serving(trial, one, i == 0) for i, one in enumerate(entries)]
                alike += [_latency_group(trial.size, one) for one in entries]
    costs = pool_latency([student.metrics for student in students], alike)
    return [_with_pooled_latency(student, shared, teacher) for student, shared in zip(students, costs, strict=True)]


def impute_served_timing(trials: list[Trial], students: list[Trial]) -> list[Trial]:
    """The scored trials that are none of the served `students`, each with the times of the student of its size.

    Of the first one's own decoding. Their own times are of fixed lengths, which beside times on real rows would make
    them look fast. A trial of a size that was not served is left out.
    """
    known = {student.folder for student in students}
    clocks = {student.size: student for student in reversed(students)}
    return [
        replace(
            trial,
            metrics={**trial.metrics, **{k: v for k, v in clocks[trial.size].metrics.items() if k in SHAPE_METRICS}},
            measured=f"{clocks[trial.size].measured}, on {clocks[trial.size].label}",
        )
        for trial in trials
        if trial.scored and trial.folder not in known and trial.size in clocks
    ]


def load_served_teacher(sweep: Path, sweep_record: dict[str, Any]) -> dict[str, Any]:
    """The teacher's record; with its costs on real rows where they were measured, of its own decoding.

    Its milliseconds, too, are the median over its decodings with the same beams.
    Then also the `hardware` that the sweep is judged by, and by way of decoding the costs (`served`).
    """
    teacher = dict(sweep_record.get("teacher") or {})
    if (sweep / SERVED_FILE).is_file():
        with corrupt_file_error(sweep / SERVED_FILE):
            hardware = read_json(sweep / SERVED_FILE).get("hardware")
            entries = [one for one in read_served(sweep) if _served_on(one, hardware)]
            costs = pool_latency(
                [to_floats(e["costs"]) for e in entries], [_latency_group("teacher", e) for e in entries]
            )
            here = dict(zip(map(decoding_key, entries), costs, strict=True))
        teacher["costs"] = {**(teacher.get("costs") or {}), **next(iter(here.values()), {})}
        teacher |= {"hardware": hardware, "served": here}
    return teacher


def _served_on(entry: dict[str, Any], hardware: dict[str, Any] | None) -> bool:
    return hardware is None or entry.get("hardware", hardware) == hardware


def _describe_setup(entry: dict[str, Any]) -> str:
    """Such as "ctranslate2 fp32, AMD EPYC, 2 threads"."""
    hardware = entry.get("hardware") or {}
    threads = f"{hardware['threads']} threads" if hardware.get("kind") == "cpu" else None
    return ", ".join(str(part) for part in (entry.get("engine"), hardware.get("name"), threads) if part)


def _latency_group(size: str, entry: dict[str, Any]) -> tuple[str, int, str, str]:
    """What decides how fast a student is served; the length penalty only says how long its texts become."""
    return size, int(entry["beams"]), str(entry.get("engine")), str(entry.get("version"))


def _with_serving(trial: Trial, entry: dict[str, Any], is_default: bool) -> Trial:
    """A trial with one of its decodings, timed by itself; its `is_default` comes first."""
    decoding = {"beams": int(entry["beams"]), "length_penalty": float(entry["length_penalty"])}
    return replace(
        trial,
        key=f"{trial.key} {decoding_key(decoding)}",
        metrics={**trial.metrics, **to_floats(entry["metrics"]), **to_floats(entry["costs"])},
        interval=parse_interval(entry["interval"]),
        test=parse_test_scores(entry.get("test")) or (trial.test if is_default else None),
        decoding=decoding,
        measured=_describe_setup(entry),
    )


def _with_pooled_latency(student: Trial, metrics: dict[str, float], teacher: dict[str, Any]) -> Trial:
    """A student with the costs of its clock, and the speed-ups that follow from them."""
    same = (teacher.get("served") or {}).get(decoding_key(student.decoding or {}), {})
    over = {"speedup": teacher.get("costs") or {}, "speedup_same_decoding": same}
    with corrupt_file_error(student.folder / SERVED_FILE):
        speedups = {k: v["latency_ms"] / metrics["latency_ms"] for k, v in over.items() if v.get("latency_ms")}
    own = student.metrics.get("latency_ms")
    apart = {"latency_ms_own": own} if own is not None and own != metrics["latency_ms"] else {}
    return replace(student, metrics={**metrics, **apart, **speedups})

"""Served students and the served teacher: one entry per serving configuration, read from served.json.

SWEEP/served.json holds the entries of the teacher, SWEEP/trials/KEY/served.json the entries of a finalist.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from raydistill.core.files import corrupt_file_error, read_json
from raydistill.results.pareto import pool_latency
from raydistill.results.records import Trial, decoding_key, parse_interval, parse_test_scores, to_floats

SERVED_FILE = "served.json"
# Metrics that depend on the shape and the decoding of a student and not on its weights.
SHAPE_METRICS = ("latency_ms", "latency_ms_b1", "peak_mb", "speedup")


def read_served(folder: Path) -> list[dict[str, Any]]:
    """The entries of a folder's served.json, one per machine and decoding, the checkpoint's own decoding first.

    Each entry also holds the file's `engine` and `hardware`. The list is empty if there is no such file.

    Raises:
        UserError: The file is damaged.
    """
    if not (folder / SERVED_FILE).is_file():
        return []
    served = read_json(folder / SERVED_FILE)
    with corrupt_file_error(folder / SERVED_FILE, "Delete this file and run the command again to measure again"):
        common: dict[str, Any] = {name: served[name] for name in ("engine", "hardware") if name in served}
        return [{**common, **entry} for entry in served["decodings"]]


def expand_by_serving(trials: list[Trial], teacher: dict[str, Any]) -> list[Trial]:
    """One student per scored trial and decoding, limited to measurements on the teacher's hardware.

    Latencies are medians over the students of equal shape, beams and engine; where the median differs from the
    student's own measurement, the latter is kept as `latency_ms_unpooled`. `speedup` compares with the teacher under
    its own decoding, `speedup_same_decoding` with the teacher under the student's decoding.

    Args:
        trials: All trials of a sweep.
        teacher: The teacher's record from `load_served_teacher`.
    """
    students, groups = [], []
    for trial in trials:
        if trial.scored:
            with corrupt_file_error(trial.folder / SERVED_FILE):
                entries = [entry for entry in read_served(trial.folder) if _served_on(entry, teacher.get("hardware"))]
                students += [_with_serving(trial, entry, i == 0) for i, entry in enumerate(entries)]
                groups += [_latency_group(trial.size, entry) for entry in entries]
    pooled_metrics = pool_latency([student.metrics for student in students], groups)
    return [
        _with_pooled_latency(student, metrics, teacher)
        for student, metrics in zip(students, pooled_metrics, strict=True)
    ]


def impute_served_timing(trials: list[Trial], students: list[Trial]) -> list[Trial]:
    """The scored trials that were not served, each with the timings of the first served student of its size.

    A trial's own timings are for fixed output lengths and are not comparable with timings on real rows. Trials of a
    size that was not served are left out.
    """
    served_folders = {student.folder for student in students}
    first_by_size = {student.size: student for student in reversed(students)}
    imputed = []
    for trial in trials:
        if not trial.scored or trial.folder in served_folders or trial.size not in first_by_size:
            continue
        source = first_by_size[trial.size]
        timings = {name: value for name, value in source.metrics.items() if name in SHAPE_METRICS}
        measured = f"{source.measured_with}, on {source.label}"
        imputed.append(replace(trial, metrics={**trial.metrics, **timings}, measured_with=measured))
    return imputed


def load_served_teacher(sweep: Path, sweep_record: dict[str, Any]) -> dict[str, Any]:
    """The teacher's record from sweep.json, with its costs as served where these were measured.

    Latencies are medians over the teacher's decodings with the same number of beams. Once the teacher was served, the
    record also holds the `hardware` whose timings count and, under `served`, the costs by decoding.
    """
    teacher = dict(sweep_record.get("teacher") or {})
    if (sweep / SERVED_FILE).is_file():
        with corrupt_file_error(sweep / SERVED_FILE):
            hardware = read_json(sweep / SERVED_FILE).get("hardware")
            entries = [entry for entry in read_served(sweep) if _served_on(entry, hardware)]
            groups = [_latency_group("teacher", entry) for entry in entries]
            costs = pool_latency([to_floats(entry["costs"]) for entry in entries], groups)
            costs_by_decoding = dict(zip(map(decoding_key, entries), costs, strict=True))
        teacher["costs"] = {**(teacher.get("costs") or {}), **next(iter(costs_by_decoding.values()), {})}
        teacher |= {"hardware": hardware, "served": costs_by_decoding}
    return teacher


def _served_on(entry: dict[str, Any], hardware: dict[str, Any] | None) -> bool:
    return hardware is None or entry.get("hardware", hardware) == hardware


def _describe_setup(entry: dict[str, Any]) -> str:
    """Engine, machine and threads, such as "ctranslate2 fp32, AMD EPYC, 2 threads"."""
    hardware = entry.get("hardware") or {}
    threads = f"{hardware['threads']} threads" if hardware.get("kind") == "cpu" else None
    return ", ".join(str(part) for part in (entry.get("engine"), hardware.get("name"), threads) if part)


def _latency_group(size: str, entry: dict[str, Any]) -> tuple[str, int, str, str]:
    """The properties that determine latency; the length penalty affects only the length of the outputs."""
    return size, int(entry["beams"]), str(entry.get("engine")), str(entry.get("version"))


def _with_serving(trial: Trial, entry: dict[str, Any], is_default: bool) -> Trial:
    """The trial with the scores and costs of one served decoding.

    `is_default` marks the checkpoint's own decoding, for which the trial's test scores hold too.
    """
    decoding = {"beams": int(entry["beams"]), "length_penalty": float(entry["length_penalty"])}
    return replace(
        trial,
        key=f"{trial.key} {decoding_key(decoding)}",
        metrics={**trial.metrics, **to_floats(entry["metrics"]), **to_floats(entry["costs"])},
        interval=parse_interval(entry["interval"]),
        test=parse_test_scores(entry.get("test")) or (trial.test if is_default else None),
        decoding=decoding,
        measured_with=_describe_setup(entry),
    )


def _with_pooled_latency(student: Trial, metrics: dict[str, float], teacher: dict[str, Any]) -> Trial:
    """The student with pooled latencies and the speed-ups computed from them."""
    teacher_same_decoding = (teacher.get("served") or {}).get(decoding_key(student.decoding or {}), {})
    baselines = {"speedup": teacher.get("costs") or {}, "speedup_same_decoding": teacher_same_decoding}
    with corrupt_file_error(student.folder / SERVED_FILE):
        speedups = {
            name: costs["latency_ms"] / metrics["latency_ms"]
            for name, costs in baselines.items()
            if costs.get("latency_ms")
        }
    own = student.metrics.get("latency_ms")
    unpooled = {"latency_ms_unpooled": own} if own is not None and own != metrics["latency_ms"] else {}
    return replace(student, metrics={**metrics, **unpooled, **speedups})

"""Finalists and the teacher as they serve, an entry per decoding: SWEEP/served.json, SWEEP/trials/KEY/served.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from raydistill.core.files import damage_told, read_json
from raydistill.results.pareto import on_one_clock
from raydistill.results.records import Trial, decoding_name, ends_of, numbers_of, tested

SERVED = "served.json"
# What a shape and its decoding decide, whatever the weights.
OF_THE_SHAPE = ("latency_ms", "latency_ms_b1", "peak_mb", "speedup")


def served_in(folder: Path) -> list[dict[str, Any]]:
    """What a folder's served.json tells: an entry per machine and way of decoding, the checkpoint's own first."""
    if not (folder / SERVED).is_file():
        return []
    served = read_json(folder / SERVED)
    with damage_told(folder / SERVED, "Delete this file to have it made again"):
        of_all: dict[str, Any] = {name: served[name] for name in ("engine", "hardware") if name in served}
        return [{**of_all, **one} for one in served["decodings"]]


def as_served(trials: list[Trial], teacher: dict[str, Any]) -> list[Trial]:
    """A student for every trial and way of decoding that was served where the teacher was, as `served_teacher` tells.

    Milliseconds are the median over the students of the same shape, beams and engine; where that is not a student's
    own, `latency_ms_own` is. `speedup` is over the teacher with its own decoding, `speedup_same_decoding` over the
    teacher with the student's.
    """
    students, alike = [], []
    for trial in trials:
        if trial.scored:
            with damage_told(trial.folder / SERVED):
                entries = [one for one in served_in(trial.folder) if _served_at(one, teacher.get("hardware"))]
                students += [_as_served(trial, one, i == 0) for i, one in enumerate(entries)]
                alike += [_clock(trial.size, one) for one in entries]
    costs = on_one_clock([student.metrics for student in students], alike)
    return [_on_its_clock(student, shared, teacher) for student, shared in zip(students, costs, strict=True)]


def timed_alike(trials: list[Trial], students: list[Trial]) -> list[Trial]:
    """The scored trials that are none of the served `students`, each with the times of the student of its size.

    Of the first one's own decoding. Their own times are of fixed lengths, which beside times on real rows would make
    them look fast. A trial of a size that was not served is left out.
    """
    known = {student.folder for student in students}
    clocks = {student.size: student for student in reversed(students)}
    return [
        replace(
            trial,
            metrics={**trial.metrics, **{k: v for k, v in clocks[trial.size].metrics.items() if k in OF_THE_SHAPE}},
            measured=f"{clocks[trial.size].measured}, on {clocks[trial.size].label}",
        )
        for trial in trials
        if trial.scored and trial.folder not in known and trial.size in clocks
    ]


def served_teacher(sweep: Path, info: dict[str, Any]) -> dict[str, Any]:
    """The teacher's record; with its costs on real rows where they were measured, of its own decoding.

    Its milliseconds, too, are the median over its decodings with the same beams.
    Then also the `hardware` that the sweep is judged by, and by way of decoding the costs (`served`).
    """
    teacher = dict(info.get("teacher") or {})
    if (sweep / SERVED).is_file():
        with damage_told(sweep / SERVED):
            hardware = read_json(sweep / SERVED).get("hardware")
            entries = [one for one in served_in(sweep) if _served_at(one, hardware)]
            costs = on_one_clock([numbers_of(e["costs"]) for e in entries], [_clock("teacher", e) for e in entries])
            here = dict(zip(map(decoding_name, entries), costs, strict=True))
        teacher["costs"] = {**(teacher.get("costs") or {}), **next(iter(here.values()), {})}
        teacher |= {"hardware": hardware, "served": here}
    return teacher


def _served_at(entry: dict[str, Any], hardware: dict[str, Any] | None) -> bool:
    return hardware is None or entry.get("hardware", hardware) == hardware


def _measured(entry: dict[str, Any]) -> str:
    """Such as "ctranslate2 fp32, AMD EPYC, 2 threads"."""
    hardware = entry.get("hardware") or {}
    threads = f"{hardware['threads']} threads" if hardware.get("kind") == "cpu" else None
    return ", ".join(str(part) for part in (entry.get("engine"), hardware.get("name"), threads) if part)


def _clock(size: str, entry: dict[str, Any]) -> tuple[str, int, str, str]:
    """What decides how fast a student is served; the length penalty only says how long its texts become."""
    return size, int(entry["beams"]), str(entry.get("engine")), str(entry.get("version"))


def _as_served(trial: Trial, one: dict[str, Any], own: bool) -> Trial:
    """A trial with one of its decodings, timed by itself; its `own` comes first."""
    decoding = {"beams": int(one["beams"]), "length_penalty": float(one["length_penalty"])}
    return replace(
        trial,
        key=f"{trial.key} {decoding_name(decoding)}",
        metrics={**trial.metrics, **numbers_of(one["metrics"]), **numbers_of(one["costs"])},
        interval=ends_of(one["interval"]),
        test=tested(one.get("test")) or (trial.test if own else None),
        decoding=decoding,
        measured=_measured(one),
    )


def _on_its_clock(student: Trial, metrics: dict[str, float], teacher: dict[str, Any]) -> Trial:
    """A student with the costs of its clock, and the speed-ups that follow from them."""
    same = (teacher.get("served") or {}).get(decoding_name(student.decoding or {}), {})
    over = {"speedup": teacher.get("costs") or {}, "speedup_same_decoding": same}
    with damage_told(student.folder / SERVED):
        speedups = {k: v["latency_ms"] / metrics["latency_ms"] for k, v in over.items() if v.get("latency_ms")}
    own = student.metrics.get("latency_ms")
    apart = {"latency_ms_own": own} if own is not None and own != metrics["latency_ms"] else {}
    return replace(student, metrics={**metrics, **apart, **speedups})

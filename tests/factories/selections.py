"""Trials and selections built in memory, without a sweep's folder."""

from pathlib import Path
from typing import Any

from raydistill.results.pareto import Candidate, Choice
from raydistill.results.records import Trial
from raydistill.results.selection import Selection
from tests.factories.sweeps import sweep_record, sweep_teacher


def make_finished_trial(key: str, number: int, size: str, method: str, score: float, latency_ms: float) -> Trial:
    """A finished trial whose 95 % interval is one point to either side of its score."""
    return Trial(
        key,
        Path(key),
        "done",
        number=number,
        method=method,
        size=size,
        copied_layers={"encoder": [0, 1], "decoder": [0, 5]},
        metrics={"rouge2": score, "latency_ms": latency_ms, "speedup": 2.0, "params_m": 12.34},
        interval=(score - 1, score + 1),
        test={"rouge2": score - 0.5, "interval": [score - 1.5, score + 0.5]},
    )


def make_selection(
    trials: list[Trial],
    front_keys: tuple[str, ...] = (),
    chosen: dict[str, str] | None = None,
    teacher: dict[str, Any] | None = None,
    **fields: Any,
) -> Selection:
    """A selection of these trials by latency; `chosen` maps budgets to trial keys, `teacher` replaces its fields."""
    choices = {
        name: Choice(Candidate(key, 0.0, None, {}), None, [], {}, reason="") for name, key in (chosen or {}).items()
    }
    record = sweep_record(sweep_teacher(**(teacher or {})))
    defaults: dict[str, Any] = {"cost": "latency_ms", "record": record, "teacher": record.teacher}
    defaults |= {"sweep": Path("sweep"), "bounds": {}, "students": [t for t in trials if t.scored]}
    return Selection(**{**defaults, **fields}, trials=trials, front_keys=list(front_keys), choices=choices)

"""Tables of results as pandas data frames, for the Python interface."""

from typing import TYPE_CHECKING, Any

from raydistill.config.space import COST_METRICS
from raydistill.results.records import Trial
from raydistill.results.selection import Selection

if TYPE_CHECKING:
    import pandas as pd


def students_frame(selection: Selection) -> "pd.DataFrame":
    """One row per student: what it is, scores with intervals, reported scores, costs, and what it was chosen for.

    Intervals are of 95 %. Students are finalists as served, or trials before any is served. Costs have the names of
    budgets; `speedup` compares with the teacher as it is served today.
    """
    import pandas as pd

    rows = [_student_row(selection, student) for student in selection.students]
    return pd.DataFrame(rows).dropna(axis="columns", how="all")


def _student_row(selection: Selection, student: Trial) -> dict[str, Any]:
    metric = selection.metric
    low, high = student.interval or (None, None)
    test = student.test or {}
    test_low, test_high = test.get("interval") or (None, None)
    speedups = ("speedup", "speedup_same_serving")
    return {
        "key": student.key,
        "trial": student.number,
        "method": student.method,
        "size": student.size,
        "labels": student.labels,
        "serving": student.serving.label if student.serving else None,
        metric: student.score(metric),
        f"{metric}_low": low,
        f"{metric}_high": high,
        f"test_{metric}": test.get(metric),
        f"test_{metric}_low": test_low,
        f"test_{metric}_high": test_high,
        **{name: student.metrics.get(name) for name in selection.metrics.reported},
        **{name: student.metrics.get(name) for name in (*COST_METRICS, *speedups)},
        "on_front": student.key in selection.front_keys,
        "chosen_for": ", ".join(selection.budgets_of(student.key)),
    }

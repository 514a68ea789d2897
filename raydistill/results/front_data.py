"""What the page's script needs to draw the front and to choose within any bounds, computed here as far as possible.

The script applies the rule of `results.pareto.choose`: it selects, compares and sorts, and looks the intervals of the
differences up.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from raydistill.config.space import COST_METRICS, LOWER_BOUNDED
from raydistill.core.paths import raydistill_home
from raydistill.evaluation.metrics import compare_pairs
from raydistill.results.formatting import describe_split, format_interval, format_number, format_score
from raydistill.results.pareto import COST_UNITS, Candidate
from raydistill.results.plots import COST_AXIS_LABELS, marker_id
from raydistill.results.records import Trial
from raydistill.results.selection import Selection, make_candidates
from raydistill.results.tables import join_scores, metric_name

Facts = list[tuple[str, str]]


class CostAxis(BaseModel):
    """A cost that can be bounded: its name for readers, and whether its bounds are lower bounds."""

    model_config = ConfigDict(frozen=True)

    label: str
    is_lower_bound: bool


class PageCandidate(BaseModel):
    """A student that can be chosen: what the rule reads, and the facts that are shown of a choice."""

    model_config = ConfigDict(frozen=True)

    key: str
    label: str
    score: float
    costs: dict[str, float]
    facts: Facts


class Marker(BaseModel):
    """A marker on the front."""

    model_config = ConfigDict(frozen=True)

    key: str
    id: str
    method: str
    size: str
    score: float
    interval: tuple[float, float] | None
    test: float | None
    costs: dict[str, float]
    budgets: list[str]


class TeacherMarker(BaseModel):
    """The teacher on the front."""

    model_config = ConfigDict(frozen=True)

    score: float | None
    costs: dict[str, float]


class FrontData(BaseModel):
    """The front, and all that the choice depends on.

    Attributes:
        name: Name of the sweep.
        metric_name, split: The score, for readers.
        cost: The cost of the front.
        tolerance: Points that a cheaper student may be worse.
        costs: The costs that were measured.
        budgets: Resolved bounds by budget.
        candidates: The students.
        comparisons: By key of a student and key of another student with a score that is not higher: the difference
            (other - student) and its 95 % interval, of students that were scored on the same rows.
        markers: The markers, also of students that cannot be chosen.
        teacher: The teacher.
        sizes: The sizes of the markers.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    metric_name: str
    split: str
    cost: str
    tolerance: float
    costs: dict[str, CostAxis]
    budgets: dict[str, dict[str, float]]
    candidates: list[PageCandidate]
    comparisons: dict[str, dict[str, tuple[float, float, float]]]
    markers: list[Marker]
    teacher: TeacherMarker
    sizes: list[str]


def make_front_data(selection: Selection) -> FrontData:
    """The data of a sweep's front."""
    metric = selection.metric
    candidates = make_candidates(selection.students, metric)
    markers = [_make_marker(selection, trial) for trial in selection.plotted_trials if trial.score(metric) is not None]
    measured = {cost for marker in markers for cost in marker.costs}
    return FrontData(
        name=selection.name,
        metric_name=metric_name(metric),
        split=describe_split(selection.split),
        cost=selection.cost,
        tolerance=selection.record.tolerance,
        costs={
            name: CostAxis(label=COST_AXIS_LABELS[name], is_lower_bound=name in LOWER_BOUNDED)
            for name in COST_METRICS
            if name in measured
        },
        budgets={name: bounds for name, bounds in selection.bounds.items() if bounds},
        candidates=[
            PageCandidate(
                key=candidate.key,
                label=candidate.label,
                score=candidate.score,
                costs=candidate.costs,
                facts=student_facts(selection, selection.student(candidate.key)),
            )
            for candidate in candidates
        ],
        comparisons=_make_comparisons(metric, candidates),
        markers=markers,
        teacher=TeacherMarker(
            score=selection.teacher.metrics.get(metric),
            costs={name: cost for name, cost in selection.teacher.costs.items() if name in measured},
        ),
        sizes=list(dict.fromkeys(marker.size for marker in markers)),
    )


def student_facts(selection: Selection, student: Trial) -> Facts:
    """What a reader compares choices by: scores, latency, speed-ups, size, and the path of the export."""
    metric, costs = selection.metric, student.metrics
    name, test = metric_name(metric), student.test or {}
    facts = [(f"{name} on {describe_split(student.split)}", format_score(student.score(metric), student.interval))]
    if metric in test:
        facts.append((f"{name} on test", format_score(test[metric], test.get("interval"))))
    if reported := selection.metrics.reported:
        names = f"{' / '.join(map(metric_name, reported))} on {describe_split(student.split)}"
        facts.append((names, join_scores([costs.get(name) for name in reported])))
    facts += [
        (label, _format_latency(costs, cost))
        for label, cost in (("latency, batch of 32", "latency_ms"), ("latency, one row", "latency_ms_b1"))
        if cost in costs
    ]
    if "rows_per_s" in costs:
        facts.append(("throughput", f"{costs['rows_per_s']:.1f} {COST_UNITS['rows_per_s']}"))
    if "speedup" in costs:
        facts.append(("speed-up over the teacher", _format_speedups(costs)))
    sizes = [
        f"{costs[cost]:,.1f} {unit}"
        for cost, unit in (("params_m", "M parameters"), ("memory_mb", "MB of weights"), ("peak_mb", "MB at peak"))
        if cost in costs
    ]
    facts.append(("size", ", ".join(sizes) or "not measured"))
    if student.serving:
        facts.append(("served with", student.serving.label))
    if student.key in selection.chosen_keys.values():
        facts.append(("export", _relative_to_home(selection.export_folder(student.key))))
    return facts


def _relative_to_home(path: Path) -> str:
    """A path below RAYDISTILL_HOME without that folder, since the page may be read on another machine."""
    home = raydistill_home().absolute()
    return str(path.relative_to(home)) if path.is_relative_to(home) else "/".join(path.parts[-3:])


def _format_latency(costs: dict[str, float], cost: str) -> str:
    text = f"{format_number(costs[cost], 1)} ms"
    if f"{cost}_low" not in costs:
        return text
    return f"{text} {format_interval((costs[f'{cost}_low'], costs[f'{cost}_high']))}"


def _format_speedups(costs: dict[str, float]) -> str:
    text = f"{costs['speedup']:.2f}x (as the teacher is served today)"
    same = costs.get("speedup_same_serving")
    return text if same is None else f"{text}, {same:.2f}x (the teacher served like the student)"


def _make_marker(selection: Selection, trial: Trial) -> Marker:
    score = trial.score(selection.metric)
    assert score is not None
    return Marker(
        key=trial.key,
        id=marker_id(trial.key),
        method=trial.method,
        size=trial.size,
        score=score,
        interval=trial.interval,
        test=(trial.test or {}).get(selection.metric),
        costs={name: float(trial.metrics[name]) for name in COST_METRICS if trial.metrics.get(name) is not None},
        budgets=selection.budgets_of(trial.key),
    )


def _make_comparisons(metric: str, candidates: Sequence[Candidate]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """The differences (other - student) by keys of the student and of the other, within each number of rows."""
    groups: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.rows is not None and len(candidate.rows):
            groups.setdefault(len(candidate.rows), []).append(candidate)
    comparisons: dict[str, dict[str, tuple[float, float, float]]] = {}
    for group in groups.values():
        runs = [[c.rows, *c.other_seeds] for c in group if c.rows is not None]
        indices = range(len(group))
        pairs = [(i, j) for j in indices for i in indices if i != j and group[i].score <= group[j].score]
        for (i, j), comparison in compare_pairs(metric, runs, pairs).items():
            values = (comparison.difference, comparison.low, comparison.high)
            comparisons.setdefault(group[j].key, {})[group[i].key] = values
    return comparisons

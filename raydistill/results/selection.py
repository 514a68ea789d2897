"""A whole sweep with its Pareto front and the choice for each budget."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from raydistill.config.metric_names import MetricChoice
from raydistill.config.serving import ThroughputSetting
from raydistill.config.space import COST_METRICS
from raydistill.core.errors import UserError
from raydistill.results.pareto import Candidate, Choice, choose, pareto_front, resolve_bounds, resolve_budgets
from raydistill.results.records import Trial, read_trials
from raydistill.results.served_students import (
    expand_by_serving,
    impute_served_timing,
    read_served,
    with_interval_over_seeds,
)
from raydistill.results.serving_latency import TEACHER_SHAPE, LatencySession, read_session
from raydistill.results.sweep_record import SweepRecord, SweepTeacher, read_sweep


@dataclass(frozen=True)
class Selection:
    """A sweep's trials, its Pareto front and the choice for each budget.

    `sweep` is the folder, `record` its sweep.json, `metric` the main score and `cost` the cost of the front.
    Front and choices are computed from `students`: the finalists as served, one per serving configuration, or every
    scored trial if none is served yet. `front_keys` are keys of students. `teacher` is the record's teacher with costs
    that were measured like the students'. `bounds` are the resolved bounds by budget. `session` has the timings of
    served students.
    """

    sweep: Path
    record: SweepRecord
    teacher: SweepTeacher
    cost: str
    trials: list[Trial]
    students: list[Trial]
    front_keys: list[str]
    bounds: dict[str, dict[str, float]]
    choices: dict[str, Choice]
    session: LatencySession | None = None

    @property
    def name(self) -> str:
        """The name of the sweep."""
        return self.record.name

    @property
    def metric(self) -> str:
        """The main metric."""
        return self.record.metric

    @property
    def metrics(self) -> MetricChoice:
        """The main metric, and the metrics that are reported next to it."""
        return self.record.teacher.metric_choice

    @property
    def chosen_keys(self) -> dict[str, str | None]:
        """The key of the chosen student by budget; None if no student fits."""
        return {name: choice.best.key if choice.best else None for name, choice in self.choices.items()}

    @property
    def has_served_students(self) -> bool:
        """Whether `students` are finalists as served."""
        return any(student.serving for student in self.students)

    @property
    def split(self) -> str:
        """The rows that the students are scored and chosen on."""
        return self.students[0].split if self.students else "validation"

    @property
    def plotted_trials(self) -> list[Trial]:
        """The students, and the trials that were not served with comparable timings.

        Trials whose scores are of other rows than the students' are left out.
        """
        others = impute_served_timing(self.trials, self.students) if self.has_served_students else []
        return [*self.students, *(trial for trial in others if trial.split == self.split)]

    def student(self, key: str) -> Trial:
        """The student with this key."""
        return next(student for student in self.students if student.key == key)

    def budgets_of(self, key: str) -> list[str]:
        """The budgets for which the student with this key was chosen."""
        return [name for name, chosen in self.chosen_keys.items() if chosen == key]

    def measured_with(self, student: Trial) -> str:
        """The engine and machine of a student's timings.

        Before a student is served, its shape is timed with untrained weights at fixed output lengths.
        """
        engine = self.record.shapes.engines.get(student.size, f"{self.teacher.engine} {self.teacher.precision}")
        predicted = ", predicted" if student.size in self.record.shapes.predicted else ""
        return student.measured_with or f"{engine}, untrained, at the corpus's mean lengths{predicted}"

    def throughput_setting(self, student: Trial) -> ThroughputSetting | None:
        """The threads and batches with which a student decodes the most rows per second; None if not measured."""
        if self.session is None or student.serving is None:
            return None
        measured = self.session.throughput(student.size, student.serving)
        return measured.setting if measured else None

    def export_folder(self, key: str) -> Path:
        """The folder to which the student with this key is exported."""
        return self.sweep / "exports" / key.replace(" ", "-")

    def trial_key(self, key: str) -> str:
        """The key of the trial whose checkpoint the student with this key uses."""
        return self.student(key).folder.name


def load_selection(sweep: Path, tolerance: float | None = None) -> Selection:
    """Read a sweep and compute its front by the space's cost and the choice for each stored budget.

    Args:
        sweep: The sweep's folder.
        tolerance: Replaces the recorded tolerance.

    Raises:
        UserError: The folder holds no sweep, or one of its files is damaged.
    """
    record = read_sweep(sweep)
    if tolerance is not None:
        record = record.model_copy(update={"tolerance": tolerance})
    trials = read_trials(sweep)
    session = read_session(sweep)
    students = expand_by_serving(trials, session)
    teacher = _served_teacher(sweep, record.teacher, session) if students and session else record.teacher
    students = [with_interval_over_seeds(student, record.metric) for student in students]
    students = students or [trial for trial in trials if trial.scored]
    candidates = make_candidates(students, record.metric)
    bounds: dict[str, dict[str, float]] = {}
    choices: dict[str, Choice] = {}
    for name, budget in record.budgets.items():
        try:
            bounds[name] = resolve_bounds(budget, teacher.costs)
            choices[name] = choose_within(candidates, bounds[name], record.metric, record.tolerance)
        except UserError as error:  # a percentage of a cost that is not measured on the teacher (yet)
            bounds[name] = {}
            choices[name] = Choice(None, None, [], {}, str(error))
    return Selection(
        sweep=sweep,
        record=record,
        teacher=teacher,
        cost=record.cost,
        trials=trials,
        students=students,
        front_keys=[c.key for c in pareto_front(candidates, record.cost)],
        bounds=bounds,
        choices=choices,
        session=session if any(student.serving for student in students) else None,
    )


def _served_teacher(sweep: Path, teacher: SweepTeacher, session: LatencySession) -> SweepTeacher:
    """The teacher with the costs of the session, and with its score on the rows that served students are scored on."""
    costs = {**teacher.costs, **session.costs(TEACHER_SHAPE, session.baseline)}
    served = read_served(sweep)
    entry = served.find(session.baseline) if served else None
    if entry is None:
        return teacher.model_copy(update={"costs": costs})
    metrics = {**teacher.metrics, **entry.metrics}
    return teacher.model_copy(update={"costs": costs, "metrics": metrics, "interval": entry.interval})


def choose_within(candidates: list[Candidate], bounds: dict[str, float], metric: str, tolerance: float) -> Choice:
    """`choose`; the reason also names bounds that the accuracy of a latency leaves undecided.

    A bound that lies within the interval of a latency is undecided. An undecided bound counts as met if the median is
    within the bound, because `choose` compares medians.
    """
    choice = choose(candidates, bounds, metric, tolerance)
    if choice.best is None:
        return choice
    undecided = []
    for cost, (low, high) in choice.best.intervals.items():
        bound = bounds.get(cost, math.inf)
        if low < bound < high:
            undecided.append(
                f"{cost} is {choice.best.costs[cost]:.4g}, within the bound of {bound:.4g}, which lies within its "
                f"interval [{low:.4g}, {high:.4g}]"
            )
    return replace(choice, reason=f"{choice.reason} Undecided: {'; '.join(undecided)}.") if undecided else choice


def select_finalists(sweep: Path) -> list[Trial]:
    """The trials worth serving, by the measurements of the search: on the front of any cost, or chosen for a budget.

    All costs that can be bounded count, since `raydistill choose` accepts budgets that the space does not name. Bounds
    on costs that are measured on served students only, such as `rows_per_s`, are ignored.
    """
    record, trials = read_sweep(sweep), read_trials(sweep)
    candidates = make_candidates(trials, record.metric)
    keys = {candidate.key for cost in COST_METRICS for candidate in pareto_front(candidates, cost)}
    measured = {cost for candidate in candidates for cost in candidate.costs}
    for bounds in resolve_budgets(record.budgets, record.teacher.costs):
        known = {cost: bound for cost, bound in bounds.items() if cost in measured}
        best = choose(candidates, known, record.metric, record.tolerance).best
        keys |= {best.key} if best else set()
    return [trial for trial in trials if trial.key in keys]


def make_candidates(trials: list[Trial], metric: str) -> list[Candidate]:
    """The scored trials, or students as served, as candidates for a budget."""
    candidates = []
    for trial in trials:
        score = trial.score(metric)
        if trial.scored and score is not None:
            costs = {k: float(trial.metrics[k]) for k in COST_METRICS if trial.metrics.get(k) is not None}
            intervals = {
                cost: (trial.metrics[f"{cost}_low"], trial.metrics[f"{cost}_high"])
                for cost in costs
                if trial.serving and {f"{cost}_low", f"{cost}_high"} <= trial.metrics.keys()
            }
            rows = trial.row_statistics()
            candidate = Candidate(trial.key, float(score), rows, costs, trial.label, intervals)
            candidates.append(replace(candidate, other_seeds=_other_seeds(trial, rows)))
    return candidates


def _other_seeds(student: Trial, rows: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """The per-row statistics of a student's repeats; empty for a trial that is not served."""
    if rows is None or not student.serving:
        return ()
    others = [repeat.row_statistics() for repeat in student.repeats]
    return tuple(own for own in others if own is not None and len(own) == len(rows))

"""A sweep read as a whole and judged: the front by cost, the finalists, the choice for each budget."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.loader import read_yaml
from raydistill.config.space import BOUNDED
from raydistill.core.errors import UserError
from raydistill.core.files import damage_told
from raydistill.results.pareto import Candidate, Choice, absolute_bounds, choose, front, known_bounds
from raydistill.results.records import Trial, read_sweep, read_trials
from raydistill.results.served_students import as_served, served_teacher, timed_alike


@dataclass(frozen=True)
class Outcome:
    """A sweep read as a whole: its trials, the front, and the choice for each budget.

    `students` are what front and choices are made of: the finalists as served, or, before they are, every trial with a
    scored checkpoint. `front` and `chosen` are keys of students. `teacher` has scores and costs measured the same way.
    """

    sweep: Path
    name: str
    metric: str
    cost: str
    info: dict[str, Any]
    teacher: dict[str, Any]
    trials: list[Trial]
    students: list[Trial]
    front: list[str]
    bounds: dict[str, dict[str, float]]
    choices: dict[str, Choice]

    @property
    def chosen(self) -> dict[str, str | None]:
        """The chosen student's key per budget."""
        return {name: choice.best.key if choice.best else None for name, choice in self.choices.items()}

    @property
    def served(self) -> bool:
        """Whether the students are finalists as served."""
        return any(student.decoding for student in self.students)

    @property
    def marks(self) -> list[Trial]:
        """What a picture shows: the students and, on the same clock, the trials that are none of them."""
        return [*self.students, *(timed_alike(self.trials, self.students) if self.served else [])]

    def student(self, key: str) -> Trial:
        """The student of that key."""
        return next(student for student in self.students if student.key == key)

    def measured(self, student: Trial) -> str:
        """With what a student's milliseconds were measured; before it is served, that is its shape at fixed lengths."""
        engine = self.teacher.get("engine")
        return student.measured or (f"{engine}, untrained, at the corpus's mean lengths" if engine else "")

    def trial_of(self, key: str) -> str:
        """The key of the trial whose checkpoint a student is."""
        return self.student(key).folder.name


def outcome(sweep: Path) -> Outcome:
    """Read a sweep and judge it: the front by the space's cost, a choice per stored budget."""
    info = read_sweep(sweep)
    trials = read_trials(sweep)
    space = read_yaml(sweep / "space.yaml")[0] if (sweep / "space.yaml").exists() else {}
    with damage_told(sweep / "space.yaml"):
        cost = (space.get("search") or {}).get("cost", "latency_ms")
        if cost not in BOUNDED:
            raise ValueError(f"search.cost is {cost!r}")
    metric = str(info.get("metric", "rouge2"))
    teacher = served_teacher(sweep, info)
    teacher_costs = teacher.get("costs") or {}
    budgets = info.get("budgets") or space.get("budgets") or {}
    served = as_served(trials, teacher)
    students = served or [trial for trial in trials if trial.scored]
    able = candidates(students, metric)
    bounds: dict[str, dict[str, float]] = {}
    choices: dict[str, Choice] = {}
    for name, budget in budgets.items():
        try:
            bounds[name] = absolute_bounds(budget, teacher_costs)
            choices[name] = choose(able, bounds[name], metric)
        except UserError as error:  # a share of what was not measured on the teacher (yet)
            bounds[name] = {}
            choices[name] = Choice(None, None, [], {}, str(error))
    return Outcome(
        sweep=sweep,
        name=str(info.get("name", sweep.name)),
        metric=metric,
        cost=cost,
        info=info,
        teacher=teacher,
        trials=trials,
        students=students,
        front=[c.key for c in front(able, cost)],
        bounds=bounds,
        choices=choices,
    )


def finalists(sweep: Path) -> list[Trial]:
    """The trials worth serving, by what the search measured: on the front of a cost, or chosen.

    Of every cost that can be bounded, not only of those that the space's budgets bound: `choose` asks for others later.
    """
    info, trials = read_sweep(sweep), read_trials(sweep)
    students = candidates(trials, info["metric"])
    keys = {candidate.key for cost in BOUNDED for candidate in front(students, cost)}
    for bounds in known_bounds(info["budgets"], info["teacher"]["costs"]):
        best = choose(students, bounds, info["metric"]).best
        keys |= {best.key} if best else set()
    return [trial for trial in trials if trial.key in keys]


def candidates(trials: list[Trial], metric: str) -> list[Candidate]:
    """Scored trials, or students as served, as candidates of a budget."""
    found = []
    for trial in trials:
        score = trial.score(metric)
        if trial.scored and score is not None:
            costs = {k: float(trial.metrics[k]) for k in BOUNDED if trial.metrics.get(k) is not None}
            found.append(Candidate(trial.key, float(score), trial.rows(), costs, trial.label))
    return found

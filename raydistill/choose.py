"""`raydistill choose SWEEP --within latency_ms=900`: the best student of a sweep within a budget."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raydistill._app import make_app, run_app
from raydistill.config.space import check_bounds
from raydistill.core.console import print_json, print_progress, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home

if TYPE_CHECKING:
    import pandas as pd

    from raydistill.results.pareto import Candidate, Choice
    from raydistill.results.records import Trial
    from raydistill.results.selection import Selection
    from raydistill.tracking.exported_student import ExportedStudent

app = make_app()


@dataclass(frozen=True)
class BudgetChoice:
    """A budget with its resolved bounds and the choice among the sweep's students."""

    budget: str
    bounds: dict[str, float]
    choice: "Choice"


@dataclass(frozen=True)
class ChosenStudent:
    """The choice for a budget; fields of the student are None if no student fits.

    Attributes:
        budget: The budget's name.
        bounds: The resolved bounds.
        reason: Why the student was chosen, or why none was.
        key: Key of the trial.
        serving: How the student is served.
        size: Encoder and decoder layers, such as "12-3".
        method: "sft", "kd" or "pl".
        split: The rows of the score.
        score: The score that the student was chosen by.
        interval: Its 95 % interval.
        reported: The scores on the same rows that are reported next to it, by metric.
        test: Scores on test, with their "interval".
        costs: Costs by name.
        speedup: Speed-up over the teacher as it is served today.
        speedup_same_serving: Speed-up over the teacher served like the student.
        measured_with: Engine and machine of the timings.
        tolerance: Points that a cheaper student may be worse.
        non_inferior: The cheaper students that are not inferior, cheapest first.
        checkpoint: The exported folder; None if the checkpoint was deleted.
        registered: The registered version in MLflow; None if it was not registered.
    """

    budget: str
    bounds: dict[str, float]
    reason: str
    key: str | None = None
    serving: dict[str, Any] | None = None
    size: str | None = None
    method: str | None = None
    split: str | None = None
    score: float | None = None
    interval: tuple[float, float] | None = None
    reported: dict[str, float | None] | None = None
    test: dict[str, Any] | None = None
    costs: dict[str, float] | None = None
    speedup: float | None = None
    speedup_same_serving: float | None = None
    measured_with: str | None = None
    tolerance: float | None = None
    non_inferior: list[str] | None = None
    checkpoint: str | None = None
    registered: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields for `--json`; of a budget that nothing fits, only budget, bounds, reason and key."""
        fields = asdict(self)
        return fields if self.key else {name: fields[name] for name in ("budget", "bounds", "reason", "key")}


@dataclass(frozen=True)
class Choices:
    """The result of `choose`.

    Attributes:
        sweep: Name of the sweep.
        metric: The main metric.
        students: The choice for each budget.
    """

    sweep: str
    metric: str
    students: list[ChosenStudent]

    def best(self, budget: str) -> "ExportedStudent":
        """The student that was chosen for a budget.

        Raises:
            UserError: There is no choice for this budget, no student fits, or the student's checkpoint was deleted.
        """
        from raydistill.tracking.exported_student import ExportedStudent

        chosen = next((student for student in self.students if student.budget == budget), None)
        if chosen is None:
            raise UserError(f"{budget}: no such budget; known: {', '.join(s.budget for s in self.students)}")
        if chosen.checkpoint is None:
            raise UserError(f"{budget}: {chosen.reason if chosen.key is None else 'the checkpoint was deleted'}")
        return ExportedStudent(str(chosen.key), f"{chosen.size} {chosen.method}", Path(chosen.checkpoint))

    def to_pandas(self) -> "pd.DataFrame":
        """One row per budget, with a column for each reported score and each cost."""
        import pandas as pd

        rows = []
        for student in self.students:
            fields = student.to_json()
            costs, reported = fields.pop("costs", None) or {}, fields.pop("reported", None) or {}
            rows.append({**fields, **reported, **costs})
        return pd.DataFrame(rows)


def choose(
    sweep: str | Path,
    within: Mapping[str, float | str] | None = None,
    *,
    name: str | None = None,
    tolerance: float | None = None,
    register: bool = False,
    echo: Callable[[str], None] | None = None,
) -> Choices:
    """Choose the best student of a sweep within a budget, and export it.

    Args:
        sweep: A sweep's folder, or its name under outputs/sweeps.
        within: Bounds by cost, such as `{"latency_ms": 900, "params_m": "50%"}`; percentages are relative to the
            teacher. By default, the budgets of the space.
        name: Name of the budget; without `within`, one of the space's.
        tolerance: Points that a cheaper student may be worse; by default, the space's.
        register: Whether to register the students in MLflow, with the budget's name as the alias.
        echo: Receives the texts that the command prints; by default nothing is printed.

    Raises:
        UserError: There is no such sweep or budget, or a bound is not valid.
    """
    bounds = check_within(within or {})
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(f"--tolerance {tolerance}: expected a number of points")
    from raydistill.cluster import snapshots
    from raydistill.results.records import find_sweep
    from raydistill.results.selection import load_selection

    snapshots.pull_records(raydistill_home() / "sweeps" / sweep)
    selection = load_selection(find_sweep(str(sweep)), tolerance)
    items = [_choose_within(selection, bounds, name)] if bounds else _stored_choices(selection, name)
    students = [_deliver_choice(selection, item, register, echo or (lambda text: None)) for item in items]
    return Choices(selection.name, selection.metric, students)


@app.command("choose")
def choose_command(
    sweep: Annotated[str, typer.Argument(help="a sweep's folder, or its name under outputs/sweeps")],
    within: Annotated[
        list[str] | None,
        typer.Option(help="KEY=BOUND, such as latency_ms=900 or params_m=50% (of the teacher's); may repeat"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="name of the budget, used as the alias in MLflow; without --within, a stored one")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="points that a cheaper student may be worse; default: the space's")
    ] = None,
    register: Annotated[
        bool | None,
        typer.Option("--register/--no-register", help="register the choice in MLflow; default: unless --json"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Choose the best student of a sweep within a budget, export it and register it in MLflow.

    A cheaper student replaces the one with the highest score if it is not inferior: the lower end of the 95 % interval
    of the difference (paired bootstrap) is above -tolerance. Without `--within`, the budgets of the space are used. The
    student is exported to a folder under the sweep's `exports/`, with its serving configuration and a model card.
    With `--json`, the choice is an answer for programs and is registered only with `--register`.

        raydistill choose my-sweep --within latency_ms=900 --within params_m=300 --name fast
    """
    choices = choose(
        sweep,
        parse_bounds(within or []),
        name=name,
        tolerance=tolerance,
        register=not as_json if register is None else register,
        echo=partial(print_text, as_json=as_json),
    )
    results = [student.to_json() for student in choices.students]
    print_json({"sweep": choices.sweep, "metric": choices.metric, "choices": results}, as_json)
    misses = [f"{student.budget}: {student.reason}" for student in choices.students if student.key is None]
    if misses:
        raise UserError("\n".join(misses))


def parse_bounds(within: list[str]) -> dict[str, float | str]:
    """Parse `KEY=BOUND` texts.

    Raises:
        UserError: A text has no key or bound, names an unknown cost, or bounds a cost twice.
    """
    bounds: dict[str, float | str] = {}
    for text in within:
        key, equals, bound = (part.strip() for part in text.partition("="))
        if not equals or not key or not bound:
            raise UserError(f"--within {text}: expected KEY=BOUND, for example --within latency_ms=900")
        if key in bounds:
            raise UserError(f"--within {text}: {key} is bounded twice")
        bounds |= check_within({key: bound})
    return bounds


def check_within(within: Mapping[str, float | str]) -> dict[str, float | str]:
    """Bounds by cost as numbers and percentages.

    Raises:
        UserError: A cost is unknown, or a bound is not valid.
    """
    bounds: dict[str, float | str] = {}
    for key, bound in within.items():
        try:
            check_bounds("--within", {key: bound})
        except ValueError as error:
            raise UserError(f"--within {key}={bound}: {str(error).removeprefix('budget --within: ')}") from None
        text = str(bound).strip()
        bounds[key] = text if text.endswith("%") else float(text)
    return bounds


def _choose_within(selection: "Selection", requested: dict[str, float | str], name: str | None) -> BudgetChoice:
    """The choice for bounds from the command line; without a name, the budget is named after its bounds."""
    from raydistill.results import pareto
    from raydistill.results.selection import choose_within, make_candidates

    bounds = pareto.resolve_bounds(requested, selection.teacher.costs)
    default_name = "-".join(f"{k}-{b:g}" if isinstance(b, float) else f"{k}-{b}" for k, b in requested.items())
    candidates = make_candidates(selection.students, selection.metric)
    choice = choose_within(candidates, bounds, selection.metric, selection.record.tolerance)
    return BudgetChoice(name or default_name.replace("%", "pct"), bounds, choice)


def _stored_choices(selection: "Selection", name: str | None) -> list[BudgetChoice]:
    """The choices for the sweep's own budgets, or for one of them by name."""
    choices = [
        BudgetChoice(budget, selection.bounds[budget], choice)
        for budget, choice in selection.choices.items()
        if name in (None, budget)
    ]
    if not choices:
        known = ", ".join(selection.choices) or "none"
        request = f"budget {name!r}" if name else "a budget"
        raise UserError(f"{selection.name}: {request} is not stored (known: {known}); give --within latency_ms=900")
    return choices


def _deliver_choice(
    selection: "Selection", item: BudgetChoice, register: bool, echo: Callable[[str], None]
) -> ChosenStudent:
    """Print the choice for a budget, and export and register the student."""
    from raydistill.results.pareto import describe_bounds

    best = item.choice.best
    if best is None:
        echo(f"{item.budget} ({describe_bounds(item.bounds)}): nothing fits")
        return ChosenStudent(item.budget, item.bounds, item.choice.reason)
    trial = selection.student(best.key)
    echo(_format_choice(selection, item, best, trial))
    export_folder = _export_student(selection, best.key, item.budget)
    echo(_format_export(export_folder, trial))
    registered = None
    if register and export_folder:
        registered = _register_student(selection, best.key, item.budget, export_folder, echo)
    return ChosenStudent(
        budget=item.budget,
        bounds=item.bounds,
        reason=item.choice.reason,
        key=trial.folder.name,
        serving=trial.serving.model_dump() if trial.serving else None,
        size=trial.size,
        method=trial.method,
        split=trial.split,
        score=best.score,
        interval=trial.interval,
        reported={name: trial.metrics.get(name) for name in selection.metrics.reported},
        test=trial.test,
        costs=best.costs,
        speedup=trial.metrics.get("speedup"),
        speedup_same_serving=trial.metrics.get("speedup_same_serving"),
        measured_with=selection.measured_with(trial),
        tolerance=selection.record.tolerance,
        non_inferior=[c.label for c in item.choice.non_inferior],
        checkpoint=str(export_folder) if export_folder else None,
        registered=registered,
    )


def _format_choice(selection: "Selection", item: BudgetChoice, best: "Candidate", trial: "Trial") -> str:
    """The chosen student with its scores, costs and the reason, one fact per line."""
    from raydistill.results.formatting import describe_split, format_interval
    from raydistill.results.pareto import COST_UNITS, describe_bounds

    def score_line(split: str, score: float, interval: Any) -> str:
        suffix = f", 95 % interval {format_interval(interval)}" if interval else ""
        return f"  {selection.metric} {score:.2f} on {split}{suffix}"

    lines = [f"{item.budget} ({describe_bounds(item.bounds)}): {best.label}"]
    lines.append(score_line(describe_split(trial.split), best.score, trial.interval))
    if trial.test and selection.metric in trial.test:
        lines.append(score_line("test", trial.test[selection.metric], trial.test.get("interval")))
    lines += [
        f"  {name} {trial.metrics[name]:.2f} on {describe_split(trial.split)} (reported only)"
        for name in selection.metrics.reported
        if name in trial.metrics
    ]
    lines += [f"  {key} {value:.4g} ({COST_UNITS[key]})" for key, value in best.costs.items()]
    if "speedup" in trial.metrics:
        lines.append(f"  {trial.metrics['speedup']:.2f} times the speed of the teacher as it is served today")
    if "speedup_same_serving" in trial.metrics:
        speedup = trial.metrics["speedup_same_serving"]
        lines.append(f"  {speedup:.2f} times the speed of the teacher served the same way")
    lines.append(f"  latencies measured with {selection.measured_with(trial)}")
    lines.append(f"  reason: {item.choice.reason}")
    others = [c for c in item.choice.non_inferior if c is not best]
    if others:
        labels = ", ".join(f"{c.label} {c.score:.2f}" for c in others)
        lines.append(f"  other students that are not inferior: {labels}")
    return "\n".join(lines)


def _format_export(export_folder: Path | None, trial: "Trial") -> str:
    from textwrap import indent

    from raydistill.results.records import repeat_trial_remedy
    from raydistill.tracking.model_card import loading_example

    if export_folder is None:
        return f"  checkpoint: missing: it was deleted. {repeat_trial_remedy(trial.folder)}"
    return f"  checkpoint: {export_folder}\n  to load it:\n{indent(loading_example(str(export_folder)), '    ')}"


def _export_student(selection: "Selection", key: str, budget: str) -> Path | None:
    """The folder of the exported student; None if its checkpoint was deleted."""
    from raydistill.tracking.checkpoints import download_checkpoint
    from raydistill.tracking.export import export_student

    has_checkpoint = download_checkpoint(selection.student(key)).checkpoint is not None
    return export_student(selection, key, budget) if has_checkpoint else None


def _register_student(
    selection: "Selection", key: str, budget: str, export_folder: Path, echo: Callable[[str], None]
) -> dict[str, str] | None:
    """Register the student in MLflow; if the store is unavailable, print a message and return None."""
    from raydistill.core.errors import TransientError
    from raydistill.tracking.mlflow_registry import register_choice
    from raydistill.tracking.mlflow_store import TrackingUnavailable, ui_command

    try:
        registered = register_choice(selection.sweep, key, budget, export_folder)
    except (TrackingUnavailable, TransientError) as error:
        print_progress(f"not registered: {error}. Run the same command again to register")
        return None
    echo(f"  registered: {registered.uri} (version {registered.version}), {registered.url}")
    echo(f"  to open the MLflow UI: {ui_command(selection.record.tracking_uri)}\n")
    return asdict(registered)


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.choose import main as entry

    entry()

"""A sweep's report: table.md, the plots, and front.html, the page on which a team decides what to serve.

The page is one file that loads nothing over the network, so that it works as a local file and as an MLflow artifact.
Its parts are page.html.jinja, page.css and page.js.
"""

from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from raydistill.config.shapes import shape_sort_key
from raydistill.core.files import write_atomic
from raydistill.results.formatting import describe_split, format_interval, format_score
from raydistill.results.front_data import Facts, FrontData, make_front_data, student_facts
from raydistill.results.pareto import describe_bounds
from raydistill.results.plots import marker_id, plot_front, plot_learning_curves
from raydistill.results.records import Trial
from raydistill.results.samples import Samples, read_samples
from raydistill.results.selection import Selection
from raydistill.results.served_students import SERVED_FILE
from raydistill.results.serving_latency import LATENCY_FILE
from raydistill.results.sweep_record import SWEEP_FILE
from raydistill.results.tables import (
    TextTable,
    format_trial_counts,
    label_cost_table,
    markdown_table,
    method_table,
    metric_name,
    result_tables,
)

LAST_WRITTEN = "table.md"  # its modification time shows whether the report is up to date
REPORT_FILES = ("front.png", "curves.png", "front.html", LAST_WRITTEN)
TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class ChoiceCard:
    """The choice for a budget, with texts for readers; `student` is None if nothing fits."""

    budget: str
    bounds: str
    student: str | None
    facts: Facts
    reason: str


@dataclass(frozen=True)
class LearningCurve:
    """The validations of a trial; a point is an epoch, a score, and a loss where it was computed."""

    size: str
    method: str
    label: str
    is_chosen: bool
    is_stopped: bool
    points: list[tuple[float, float, float | None]]


@dataclass(frozen=True)
class PageContent:
    """What a page shows; parts that are empty or None are left out.

    Attributes:
        title: The heading.
        summary: The sentence below the heading.
        header: Names and values at the top.
        metric_name: The score, for readers.
        choices: The choice for each budget.
        front: The front, on which the page's script chooses within other bounds.
        curves: Learning curves.
        samples: Outputs side by side.
        tables: Titles, headers and rows.
        notes: Sentences at the end.
        tooltips: The lines of the tooltip of every marker, by its id.
    """

    title: str
    summary: str
    header: Facts
    metric_name: str
    choices: list[ChoiceCard] = field(default_factory=list)
    front: FrontData | None = None
    curves: list[LearningCurve] = field(default_factory=list)
    samples: Samples | None = None
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tooltips: dict[str, list[str]] = field(default_factory=dict)


def write_report(selection: Selection) -> list[Path]:
    """Write SWEEP/table.md and, once a trial is scored, front.png, curves.png and front.html; returns the paths."""
    files: dict[str, bytes] = {}
    if any(trial.scored for trial in selection.trials):
        files |= {
            "front.png": plot_front(selection),
            "curves.png": plot_learning_curves(selection),
            "front.html": render_page(selection).encode(),
        }
    tables = "\n\n".join(markdown_table(*table) for table in result_tables(selection))
    files[LAST_WRITTEN] = (tables + "\n").encode()
    for name, content in files.items():
        write_atomic(selection.sweep / name, content)
    return [selection.sweep / name for name in files]


def refresh_report(selection: Selection) -> list[Path]:
    """Write the report's files again if a trial finished, a student was served or a choice changed; returns the paths.

    The running trials' new validations alone do not cause an update.
    """
    inputs = [selection.sweep / name for name in (SWEEP_FILE, SERVED_FILE, LATENCY_FILE)]
    inputs += [trial.folder / name for trial in selection.trials for name in ("result.json", SERVED_FILE)]
    latest_ns = max(path.stat().st_mtime_ns for path in inputs if path.is_file())
    last_written = selection.sweep / LAST_WRITTEN
    if last_written.is_file() and last_written.stat().st_mtime_ns > latest_ns:
        return [path for name in REPORT_FILES if (path := selection.sweep / name).is_file()]
    return write_report(selection)


def render_page(selection: Selection) -> str:
    """The page of a sweep; all text from the sweep is escaped."""
    metric, trials = selection.metric, selection.trials
    titles = ("Trials", "Finalists as served, on real rows")
    tables = [(title, *table) for title, table in zip(titles, result_tables(selection), strict=False)]
    costs = method_table(selection)
    if len(costs[1]) > 1:
        tables.append(("Cost of each method", *costs))
    setups = sorted(set(map(selection.measured_with, selection.students)))
    if label_costs := label_cost_table(selection):
        tables.append(("Extra sources", *label_costs))
    content = PageContent(
        title=selection.name,
        summary=f"{format_trial_counts(trials)}.",
        header=_header_facts(selection),
        metric_name=metric_name(metric),
        choices=[_choice_card(selection, budget) for budget in selection.choices],
        front=make_front_data(selection),
        curves=_learning_curves(selection),
        samples=read_samples(selection),
        tables=tables,
        notes=[f"Latencies were measured with {setup}." for setup in setups],
        tooltips=make_tooltips(selection),
    )
    return render(content)


def render_comparison(title: str, summary: str, header: Facts, samples: Samples, table: TextTable) -> str:
    """The page of two checkpoints: their scores in a table, and their outputs side by side."""
    tables = [("Scores", *table)]
    content = PageContent(title, summary, header, samples.metric_name, samples=samples, tables=tables)
    return render(content)


def render(content: PageContent) -> str:
    """The HTML of a page. The content is escaped; style and script are part of the page."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # the rule compares by a budget's first bound
    data = {
        "tooltips": content.tooltips,
        "front": content.front.model_dump() if content.front else None,
        "curves": [asdict(curve) for curve in content.curves],
        "samples": content.samples.model_dump() if content.samples else None,
    }
    fields = {field.name: getattr(content, field.name) for field in dataclass_fields(content)}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        **fields,
        has_curves=any(len(curve.points) > 1 for curve in content.curves),
        data=data,
        style=Markup(TEMPLATE.with_name("page.css").read_text(encoding="utf-8")),
        script=Markup(TEMPLATE.with_name("page.js").read_text(encoding="utf-8")),
    )


def _header_facts(selection: Selection) -> Facts:
    """Teacher, data, machine, date and versions."""
    record, teacher, metric = selection.record, selection.teacher, selection.metric
    score = format_score(teacher.metrics.get(metric), teacher.interval)
    facts = [
        ("teacher", f"{teacher.name} ({teacher.size})"),
        (f"teacher's {metric_name(metric)} on {describe_split(selection.split)}", score),
    ]
    if teacher.test and metric in teacher.test.metrics:
        test = format_score(teacher.test.metrics[metric], teacher.test.interval)
        facts.append((f"teacher's {metric_name(metric)} on test", test))
    names = sorted({trial.run_config().dataset.name for trial in selection.trials})
    counts = ", ".join(f"{rows:,} {split}" for split, rows in teacher.rows.items())
    facts.append(("data", f"{', '.join(names)} ({counts} rows)" if counts else ", ".join(names)))
    if selection.session:
        facts.append(("machine of the latencies", selection.session.describe_machine()))
        facts.append(("timed on", f"{selection.session.started_at:%Y-%m-%d %H:%M} UTC"))
    else:
        machine = teacher.machine
        facts.append(("machine", f"{machine.get('name')}, {machine.get('threads')} threads"))
    facts.append(("page written", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"))
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items()) or "-"))
    facts.append(("tolerance", f"{record.tolerance:g} points"))
    return facts


def _choice_card(selection: Selection, budget: str) -> ChoiceCard:
    choice = selection.choices[budget]
    facts = student_facts(selection, selection.student(choice.best.key)) if choice.best else []
    bounds = describe_bounds(selection.bounds[budget])
    return ChoiceCard(budget, bounds, choice.best.label if choice.best else None, facts, choice.reason)


def _learning_curves(selection: Selection) -> list[LearningCurve]:
    """The validations of each trial, the trials of the largest size first."""
    chosen = {selection.trial_key(key) for key in selection.chosen_keys.values() if key}
    curves = []
    for trial in sorted(selection.trials, key=lambda trial: shape_sort_key(trial.size), reverse=True):
        points = [
            (round(line.epoch, 4), line.numbers.get(selection.metric, line.score), line.val_loss)
            for line in trial.history()
        ]
        if points:
            is_stopped = trial.status == "stopped"
            curve = LearningCurve(trial.size, trial.method, trial.label, trial.key in chosen, is_stopped, points)
            curves.append(curve)
    return curves


def make_tooltips(selection: Selection) -> dict[str, list[str]]:
    """The lines of the tooltip of every marker on the front, by marker id."""
    tooltips = {marker_id(student.key): _student_tooltip(selection, student) for student in selection.plotted_trials}
    teacher = selection.teacher
    score = teacher.metrics.get(selection.metric)
    if score is not None:
        lines = [f"teacher {teacher.name} ({teacher.size})", f"{metric_name(selection.metric)} {score:.2f}"]
        lines += reported_scores(selection, teacher.metrics)
        tooltips["teacher"] = lines + _cost_lines(teacher.costs)
    return tooltips


def reported_scores(selection: Selection, metrics: dict[str, float]) -> list[str]:
    """A line for each score that is reported next to the main score."""
    return [f"{metric_name(name)} {metrics[name]:.2f}" for name in selection.metrics.reported if name in metrics]


def _student_tooltip(selection: Selection, student: Trial) -> list[str]:
    lines = [student.label, f"method {student.method}, labels {student.labels or 'original'}"]
    lines += [f"{side} layers copied: {' '.join(map(str, layers))}" for side, layers in student.copied_layers.items()]
    if student.serving:
        lines.append(student.serving.label)
    if (score := student.score(selection.metric)) is not None:
        interval = f" {format_interval(student.interval)}" if student.interval else ""
        lines.append(f"{metric_name(selection.metric)} {score:.2f}{interval} on {describe_split(student.split)}")
        lines += reported_scores(selection, student.metrics)
    if budgets := selection.budgets_of(student.key):
        lines.append(f"chosen for {', '.join(budgets)}")
    if student.status == "stopped":
        lines.append("stopped early")
    lines += _cost_lines(student.metrics)
    return [*lines, f"measured with {selection.measured_with(student)}"]


def _cost_lines(costs: dict[str, float]) -> list[str]:
    formats = {
        "latency_ms": "{:.1f} ms for a batch of 32",
        "latency_ms_b1": "{:.1f} ms for one row",
        "rows_per_s": "{:.1f} rows per second",
        "params_m": "{:.1f} M parameters",
        "speedup": "{:.2f} times the speed of the teacher",
        "speedup_same_serving": "{:.2f} times the speed of the teacher served the same way",
        "peak_mb": "{:.0f} MB of peak memory",
        "device_hours": "{:.3f} device-hours",
    }
    return [text.format(costs[key]) for key, text in formats.items() if key in costs]

"""A sweep's report: table.md, the plots, and one self-contained HTML page with tooltips on the front's markers.

The page loads nothing over the network, so that it works as a local file and as an MLflow artifact.
"""

from pathlib import Path

import jinja2
from markupsafe import Markup

from raydistill.core.files import write_atomic
from raydistill.results.formatting import describe_split, format_interval
from raydistill.results.plots import marker_id, plot_front, plot_learning_curves
from raydistill.results.records import Trial
from raydistill.results.selection import Selection
from raydistill.results.served_students import SERVED_FILE
from raydistill.results.serving_latency import LATENCY_FILE
from raydistill.results.sweep_record import SWEEP_FILE
from raydistill.results.tables import (
    choices_table,
    format_trial_counts,
    markdown_table,
    method_table,
    metric_name,
    result_tables,
)

LAST_WRITTEN = "table.md"  # its modification time shows whether the report is up to date
REPORT_FILES = ("front.png", "curves.png", "front.html", LAST_WRITTEN)
TEMPLATE = Path(__file__).with_name("page.html.jinja")


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
    """The page's HTML; all text from the sweep is escaped."""
    setups = sorted(set(map(selection.measured_with, selection.students)))
    result_titles = ("Trials", "Finalists as served, on real rows")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=selection.name,
        trial_counts=format_trial_counts(selection.trials),
        front_svg=_svg_element(plot_front(selection, "svg")),
        curves_svg=_svg_element(plot_learning_curves(selection, "svg")),
        summary_tables=[("Choices", *choices_table(selection)), ("Cost of each method", *method_table(selection))],
        result_tables=[(title, *table) for title, table in zip(result_titles, result_tables(selection), strict=False)],
        setups=setups,
        tooltips=make_tooltips(selection),
    )


def make_tooltips(selection: Selection) -> dict[str, list[str]]:
    """The lines of the tooltip of every marker on the front, by marker id."""
    tooltips = {marker_id(student.key): _student_tooltip(selection, student) for student in selection.plotted_trials}
    teacher = selection.teacher
    score = teacher.metrics.get(selection.metric)
    if score is not None:
        lines = [f"teacher {teacher.name} ({teacher.size})", f"{selection.metric} {score:.2f}"]
        tooltips["teacher"] = lines + _cost_lines(teacher.costs)
    return tooltips


def _student_tooltip(selection: Selection, student: Trial) -> list[str]:
    lines = [student.label, f"method {student.method}, labels {student.labels or 'original'}"]
    lines += [f"{side} layers copied: {' '.join(map(str, layers))}" for side, layers in student.copied_layers.items()]
    if student.serving:
        lines.append(student.serving.label)
    if (score := student.score(selection.metric)) is not None:
        interval = f" {format_interval(student.interval)}" if student.interval else ""
        lines.append(f"{metric_name(selection.metric)} {score:.2f}{interval} on {describe_split(student.split)}")
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


def _svg_element(content: bytes) -> Markup:
    """The <svg> element of an SVG file, without the XML prologue, which is not valid inside HTML."""
    text = content.decode()
    return Markup(text[text.index("<svg") :])

"""The Pareto front and the learning curves of a sweep, drawn with matplotlib."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from raydistill.config.shapes import shape_sort_key
from raydistill.results.formatting import describe_split
from raydistill.results.records import Trial
from raydistill.results.selection import Selection
from raydistill.results.sweep_record import SweepTeacher
from raydistill.results.tables import metric_name

ImageFormat = Literal["png", "svg"]
Point = tuple[float, float]

# The Okabe-Ito palette, which is distinguishable with colour vision deficiency
METHOD_COLOURS = {"sft": "#0072B2", "kd": "#D55E00", "pl": "#009E73"}
OTHER_COLOUR = "0.4"
SIZE_MARKERS = "osD^vP<>Xhp*"
PANEL_COLUMNS = 3
# Test scores are for comparison only; nothing is chosen by them.
TEST_STYLE: dict[str, Any] = {"s": 26, "alpha": 0.45, "linewidth": 1.0, "zorder": 1}
COST_AXIS_LABELS = {
    "latency_ms": "Latency of a batch of 32 (ms)",
    "latency_ms_b1": "Latency of one row (ms)",
    "params_m": "Parameters (millions)",
    "memory_mb": "Memory of the weights (MB)",
    "peak_mb": "Memory for a batch of 32 (MB)",
    "device_hours": "Training (device-hours)",
    "rows_per_s": "Rows per second",
}


def plot_front(selection: Selection, image_format: ImageFormat = "png") -> bytes:
    """Draw the scores that students are chosen by, with 95 % intervals, against cost; returns the file's content.

    Colour is the method, marker the size; filled markers are on the front, which is a stepped line. Chosen students
    are ringed and labelled with their budgets, the teacher is a star, and a bound on this cost is a dotted line. The
    test scores of the front, of chosen students and of the teacher are fainter, smaller markers. In an SVG a student's
    marker has the id `marker_id(key)`, the teacher's the id "teacher"; test scores have the same with "test-" before.
    """
    metric, cost = selection.metric, selection.cost
    trials = [t for t in selection.plotted_trials if t.scored and t.score(metric) is not None and cost in t.metrics]
    figure = make_figure(8, 5)
    axes = figure.subplots()
    sizes = sorted({t.size for t in trials}, key=shape_sort_key)
    markers = {size: SIZE_MARKERS[i % len(SIZE_MARKERS)] for i, size in enumerate(sizes)}
    points = {t.key: (t.metrics[cost], float(t.score(metric) or 0)) for t in trials}
    shifted = _offset_methods(trials, points)
    _draw_front(axes, [points[key] for key in selection.front_keys if key in points])
    for t in sorted(trials, key=lambda t: t.key in selection.front_keys):
        _draw_trial(axes, t, shifted[t.key], markers[t.size], t.key in selection.front_keys)
    shown = {*selection.front_keys, *selection.chosen_keys.values()}
    for t in trials:
        if t.key in shown:
            _draw_test_score(axes, t, shifted[t.key][0], markers[t.size], metric)
    _draw_teacher(axes, selection.teacher, metric, cost)
    axes.margins(x=0.12, y=0.14)
    _draw_budgets(axes, selection.bounds, cost)
    _draw_choices(axes, selection.chosen_keys, shifted)
    note = "; methods of equal cost side by side" if shifted != points else ""
    axes.set_xlabel(COST_AXIS_LABELS.get(cost, cost) + note)
    axes.set_ylabel(f"{metric_name(metric)} on {describe_split(selection.split)} (95 % interval)")
    style_axes(axes)
    if selection.name:
        axes.set_title(selection.name, loc="left", fontweight="bold")
    _draw_legend(axes, {t.method for t in trials}, markers)
    return render_figure(figure, image_format)


def plot_learning_curves(selection: Selection, image_format: ImageFormat = "png") -> bytes:
    """Draw validation score by epoch, one panel per size; returns the file's content.

    Colour is the method, chosen trials are thick, and a cross marks a trial that was stopped early.
    """
    from matplotlib.lines import Line2D

    sizes = sorted({trial.size for trial in selection.trials if trial.history()}, key=shape_sort_key, reverse=True)
    rows = max(1, math.ceil(len(sizes) / PANEL_COLUMNS))
    columns = max(1, min(len(sizes), PANEL_COLUMNS))
    figure = make_figure(3.4 * columns + 1, 2.7 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    chosen = {selection.trial_key(key) for key in selection.chosen_keys.values() if key}
    for axes, size in zip(grid.flat, sizes, strict=False):
        for trial in selection.trials:
            if trial.size == size:
                _draw_learning_curve(axes, trial, selection.metric, trial.key in chosen)
        axes.set_title(size or "full", loc="left", fontsize=10)
        style_axes(axes)
    for axes in list(grid.flat)[len(sizes) :]:
        axes.set_axis_off()
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel(f"{metric_name(selection.metric)} on validation", fontsize=9)
    methods = [method for method in METHOD_COLOURS if any(trial.method == method for trial in selection.trials)]
    if methods:
        handles = [Line2D([], [], color=METHOD_COLOURS[method], label=method) for method in methods]
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return render_figure(figure, image_format)


def make_figure(width: float, height: float, dpi: int = 150) -> Any:
    """An empty figure of a size in inches. Without pyplot, which has one backend for the whole process."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def style_axes(axes: Any) -> None:
    """A light grid and no frame at the top and right."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def render_figure(figure: Any, image_format: ImageFormat = "png") -> bytes:
    """A figure as the content of a file: text in an SVG as text, and no ids or metadata that differ between runs."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Software": None} if image_format == "png" else {"Date": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "raydistill"}):
        figure.savefig(buffer, format=image_format, metadata=metadata)
    return buffer.getvalue()


def marker_id(key: str) -> str:
    """The id of a student's marker in an SVG."""
    return "student-" + re.sub(r"[^A-Za-z0-9-]", "_", key)


def _draw_learning_curve(axes: Any, trial: Trial, metric: str, is_chosen: bool) -> None:
    points = [(line.epoch, line.numbers.get(metric, line.score)) for line in trial.history()]
    if not points:
        return
    epochs, scores = zip(*points, strict=True)
    colour = METHOD_COLOURS.get(trial.method, OTHER_COLOUR)
    width, alpha = (2.2, 1.0) if is_chosen else (1.0, 0.6)
    axes.plot(epochs, scores, color=colour, linewidth=width, alpha=alpha, marker=".", markersize=3)
    if trial.status == "stopped":
        axes.plot(epochs[-1], scores[-1], color=colour, marker="x", markersize=6)


def _offset_methods(trials: Sequence[Trial], points: dict[str, Point]) -> dict[str, Point]:
    """Shift the points of methods with equal cost sideways, so that they do not overlap."""
    costs = [x for x, _ in points.values()]
    step = 0.022 * (max(costs) - min(costs)) if costs else 0.0
    shift = {method: (i - 1) * step for i, method in enumerate(METHOD_COLOURS)}
    return {
        t.key: (x + (shift.get(t.method, 0.0) if costs.count(x) > 1 else 0.0), y)
        for t in trials
        for x, y in [points[t.key]]
    }


def _draw_front(axes: Any, points: list[Point]) -> None:
    if points:
        x, y = zip(*sorted(points), strict=True)
        axes.step(x, y, where="post", color="0.35", linewidth=1.2, zorder=1)


def _draw_trial(axes: Any, trial: Trial, position: Point, marker: str, on_front: bool) -> None:
    colour = METHOD_COLOURS.get(trial.method, OTHER_COLOUR)
    if trial.interval:
        low, high = trial.interval
        errors = [[max(0.0, position[1] - low)], [max(0.0, high - position[1])]]
        alpha = 0.7 if on_front else 0.25
        axes.errorbar(*position, yerr=errors, color=colour, alpha=alpha, linewidth=1, capsize=2, zorder=2)
    face = colour if on_front else "white"
    scatter = axes.scatter(*position, marker=marker, s=52, facecolor=face, edgecolor=colour, linewidth=1.3, zorder=3)
    scatter.set_gid(marker_id(trial.key))


def _draw_test_score(axes: Any, trial: Trial, x: float, marker: str, metric: str) -> None:
    score = (trial.test or {}).get(metric)
    if score is not None:
        colour = METHOD_COLOURS.get(trial.method, OTHER_COLOUR)
        scatter = axes.scatter(x, score, marker=marker, facecolor="white", edgecolor=colour, **TEST_STYLE)
        scatter.set_gid(f"test-{marker_id(trial.key)}")


def _draw_teacher(axes: Any, teacher: SweepTeacher, metric: str, cost: str) -> None:
    score, teacher_cost = teacher.metrics.get(metric), teacher.costs.get(cost)
    if score is None:
        return
    axes.axhline(score, color="black", linewidth=0.7, linestyle=(0, (5, 4)), alpha=0.5, zorder=0)
    if teacher_cost is not None:
        axes.scatter(teacher_cost, score, marker="*", s=220, color="black", zorder=4).set_gid("teacher")
        if teacher.test and metric in teacher.test.metrics:
            test = teacher.test.metrics[metric]
            axes.scatter(teacher_cost, test, marker="*", facecolor="white", edgecolor="black", **TEST_STYLE).set_gid(
                "test-teacher"
            )


def _draw_budgets(axes: Any, bounds: dict[str, dict[str, float]], cost: str) -> None:
    left, right = axes.get_xlim()
    margin = 0.3 * (right - left)
    text = {"rotation": 90, "ha": "right", "va": "bottom", "fontsize": 8, "color": "0.35"}
    offset = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
    for name, limits in bounds.items():
        # A bound far outside the points would compress them into a corner
        if cost in limits and left - margin <= limits[cost] <= right + margin:
            axes.axvline(limits[cost], color="0.45", linestyle=":", linewidth=1.2, zorder=0)
            axes.annotate(name, (limits[cost], 0.02), **offset, **text)


def _draw_choices(axes: Any, choices: dict[str, str | None], points: dict[str, Point]) -> None:
    names_by_key: dict[str, list[str]] = {}
    for name, key in choices.items():
        if key in points:
            names_by_key.setdefault(str(key), []).append(name)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    text = {"ha": "right", "va": "bottom", "fontsize": 9, "fontweight": "bold", "zorder": 6, "bbox": box}
    for key, names in names_by_key.items():
        axes.scatter(*points[key], s=190, facecolor="none", edgecolor="black", linewidth=1.4, zorder=5)
        axes.annotate(", ".join(names), points[key], xytext=(-9, 9), textcoords="offset points", **text)


def _draw_legend(axes: Any, methods: set[str], markers: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    def entry(label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="none", label=label, **{"markersize": 7, "color": OTHER_COLOUR, **style})

    ordered = [*(m for m in METHOD_COLOURS if m in methods), *methods - set(METHOD_COLOURS)]
    entries = [entry(method, marker="o", color=METHOD_COLOURS.get(method, OTHER_COLOUR)) for method in ordered]
    entries += [entry(size, marker=marker) for size, marker in markers.items()]
    entries.append(entry("teacher", marker="*", color="black", markersize=12))
    entries.append(Line2D([], [], color="0.35", linewidth=1.2, label="front (filled)"))
    entries.append(entry("test score", marker="o", markersize=5, markerfacecolor="none", alpha=TEST_STYLE["alpha"]))
    entries.append(entry("chosen", marker="o", markersize=11, markerfacecolor="none", color="black"))
    axes.legend(handles=entries, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)

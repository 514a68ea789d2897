"""Learning curves: how the validation score of every trial went, a panel for each shape."""

import math
from typing import Any, Literal

from raydistill.results.records import Trial
from raydistill.results.selection import Selection
from raydistill.results.tables import METHOD_COLOURS, METRIC_NAMES, load_pyplot, render_figure, size_sort_key

PANEL_COLUMNS = 3


def plot_learning_curves(selection: Selection, image_format: Literal["png", "svg"] = "png") -> bytes:
    """Score by epoch: colour is the method; a cross is where a trial was stopped early; the chosen are thick."""
    plt = load_pyplot()
    sizes = sorted({trial.size for trial in selection.trials if trial.history()}, key=size_sort_key, reverse=True)
    rows = max(1, math.ceil(len(sizes) / PANEL_COLUMNS))
    columns = max(1, min(len(sizes), PANEL_COLUMNS))
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns + 1, 2.7 * rows),
        dpi=150,
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    try:
        chosen = {selection.trial_key(key) for key in selection.chosen.values() if key}
        for axes, size in zip(grid.flat, sizes, strict=False):
            for trial in selection.trials:
                if trial.size == size:
                    _draw_learning_curve(axes, trial, selection.metric, trial.key in chosen)
            axes.set_title(size or "full", loc="left", fontsize=10)
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in list(grid.flat)[len(sizes) :]:
            axes.set_axis_off()
        figure.supxlabel("epoch", fontsize=9)
        figure.supylabel(f"{METRIC_NAMES.get(selection.metric, selection.metric)} on validation", fontsize=9)
        methods = [method for method in METHOD_COLOURS if any(trial.method == method for trial in selection.trials)]
        if methods:
            handles = [plt.Line2D([], [], color=METHOD_COLOURS[method], label=method) for method in methods]
            figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
        return render_figure(figure, image_format)
    finally:
        plt.close(figure)


def _draw_learning_curve(axes: Any, trial: Trial, metric: str, is_chosen: bool) -> None:
    points = [(line.get("epoch", 0.0), line.get(metric, line.get("score"))) for line in trial.history()]
    points = [(x, y) for x, y in points if y is not None]
    if not points:
        return
    x, y = zip(*points, strict=True)
    colour = METHOD_COLOURS.get(trial.method, "0.4")
    axes.plot(
        x,
        y,
        color=colour,
        linewidth=2.2 if is_chosen else 1.0,
        alpha=1.0 if is_chosen else 0.6,
        marker=".",
        markersize=3,
    )
    if trial.status == "stopped":
        axes.plot(x[-1], y[-1], color=colour, marker="x", markersize=6)

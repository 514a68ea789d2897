"""Learning curves: how the validation score of every trial went, a panel for each shape."""

import math
from typing import Any, Literal

from raydistill.results.records import Trial
from raydistill.results.selection import Outcome
from raydistill.results.tables import COLOURS, NAMES, depths, picture, pyplot

COLUMNS = 3


def curves_of(found: Outcome, form: Literal["png", "svg"] = "png") -> bytes:
    """Score by epoch: colour is the method; a cross is where a trial was stopped early; the chosen are thick."""
    plt = pyplot()
    sizes = sorted({trial.size for trial in found.trials if trial.history()}, key=depths, reverse=True)
    rows = max(1, math.ceil(len(sizes) / COLUMNS))
    columns = max(1, min(len(sizes), COLUMNS))
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
        chosen = {found.trial_of(key) for key in found.chosen.values() if key}
        for axes, size in zip(grid.flat, sizes, strict=False):
            for trial in found.trials:
                if trial.size == size:
                    _draw(axes, trial, found.metric, trial.key in chosen)
            axes.set_title(size or "full", loc="left", fontsize=10)
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in list(grid.flat)[len(sizes) :]:
            axes.set_axis_off()
        figure.supxlabel("epoch", fontsize=9)
        figure.supylabel(f"{NAMES.get(found.metric, found.metric)} on validation", fontsize=9)
        methods = [method for method in COLOURS if any(trial.method == method for trial in found.trials)]
        if methods:
            handles = [plt.Line2D([], [], color=COLOURS[method], label=method) for method in methods]
            figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
        return picture(figure, form)
    finally:
        plt.close(figure)


def _draw(axes: Any, trial: Trial, metric: str, chosen: bool) -> None:
    points = [(line.get("epoch", 0.0), line.get(metric, line.get("score"))) for line in trial.history()]
    points = [(x, y) for x, y in points if y is not None]
    if not points:
        return
    x, y = zip(*points, strict=True)
    colour = COLOURS.get(trial.method, "0.4")
    axes.plot(
        x, y, color=colour, linewidth=2.2 if chosen else 1.0, alpha=1.0 if chosen else 0.6, marker=".", markersize=3
    )
    if trial.status == "stopped":
        axes.plot(x[-1], y[-1], color=colour, marker="x", markersize=6)

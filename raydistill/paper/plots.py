"""Figures 1 and 2 of the paper from sweeps: score against speed-up, and validation loss by initialisation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raydistill.core.files import write_atomic
from raydistill.paper import published
from raydistill.paper.initialisations import init_name, select_init_comparisons
from raydistill.paper.seed_groups import SeedGroup, best_group, group_by_sweep
from raydistill.results.plots import Point, make_figure, render_figure, style_axes
from raydistill.results.tables import metric_name


def plot_figure_1(path: Path, seed_groups: Sequence[SeedGroup]) -> None:
    """Draw the best student of each size: test score against speed-up, one panel per data set.

    Hollow points are the paper's.
    """
    datasets = list(dict.fromkeys([*(key[2] for key in published.TABLES_6_7), *(g.dataset_name for g in seed_groups)]))
    figure, panels = _make_panels(len(datasets))
    for axes, dataset in zip(panels, datasets, strict=True):
        for teacher, points in _paper_points(dataset).items():
            _draw_line(axes, f"{teacher} (paper)", points, hollow=True)
        for teacher, points in _sweep_points(seed_groups, dataset).items():
            _draw_line(axes, teacher, points, hollow=False)
        metric = next((group.sweep.metric for group in seed_groups if group.dataset_name == dataset), "rouge2")
        axes.set(title=dataset, xlabel="speed-up over the teacher", ylabel=metric_name(metric))
        axes.legend(fontsize=8, frameon=False)
    write_atomic(path, render_figure(figure))


def plot_figure_2(path: Path, seed_groups: Sequence[SeedGroup]) -> bool:
    """Draw validation loss by epoch and initialisation, one panel per sweep, teacher, size and data set.

    Every line is a run. The paper publishes no numbers for its own figure. Returns whether there was anything to draw.
    """
    compared = select_init_comparisons(seed_groups)
    comparisons = [
        (key, sweep.name, groups)
        for key in dict.fromkeys(group.paper_key for group in compared)
        for sweep, groups in group_by_sweep(group for group in compared if group.paper_key == key)
    ]
    if not comparisons:
        return False
    figure, panels = _make_panels(len(comparisons))
    for axes, (key, sweep_name, groups) in zip(panels, comparisons, strict=True):
        for i, group in enumerate(groups):
            _draw_loss_curves(axes, group, f"C{i % 10}")
        axes.set(title=f"{' '.join(key)}\n({sweep_name})", xlabel="epoch", ylabel="validation cross-entropy")
        axes.legend(fontsize=8, frameon=False)
    write_atomic(path, render_figure(figure))
    return True


def _draw_loss_curves(axes: Any, group: SeedGroup, colour: str) -> None:
    """One line per run of the group, with one legend entry."""
    layers = ",".join(map(str, group.decoder_layers)) or "random"
    source = "" if group.decoder_source in ("", "teacher") else f" from {Path(group.decoder_source).name}"
    for i, trial in enumerate(group.completed):
        history = [(line.epoch, line.val_loss) for line in trial.history() if line.val_loss is not None]
        label = f"{init_name(group)} ({layers}){source}" if i == 0 else None
        axes.plot([epoch for epoch, _ in history], [loss for _, loss in history], color=colour, label=label)


def _paper_points(dataset: str) -> dict[str, list[Point]]:
    """The paper's (speed-up, score) by teacher."""
    points: dict[str, list[Point]] = {}
    for (teacher, _, name), row in published.TABLES_6_7.items():
        if name == dataset and row.speedup is not None:
            points.setdefault(teacher, []).append((row.speedup, row.rouge2))
    return points


def _sweep_points(seed_groups: Sequence[SeedGroup], dataset: str) -> dict[str, list[Point]]:
    """The measured (speed-up, score) by teacher and sweep, so that every line is of one recipe."""
    points: dict[str, list[Point]] = {}
    for key in dict.fromkeys(group.paper_key for group in seed_groups if group.dataset_name == dataset):
        for sweep, groups in group_by_sweep(group for group in seed_groups if group.paper_key == key):
            best = best_group(groups)
            speedup = best.mean_metric("speedup") if best else None
            score = best.mean_test_score(sweep.metric) if best else None
            if speedup is not None and score is not None:
                points.setdefault(f"{key[0]} ({sweep.name})", []).append((speedup, score))
    return points


def _draw_line(axes: Any, label: str, points: list[Point], hollow: bool) -> None:
    x, y = zip(*sorted(points), strict=True)
    style = {"linestyle": ":", "markerfacecolor": "white"} if hollow else {"linestyle": "-"}
    axes.plot(x, y, marker="o", label=label, **style)


def _make_panels(count: int) -> tuple[Any, Any]:
    figure = make_figure(5 * count, 4, dpi=120)
    axes = figure.subplots(1, count, squeeze=False)
    for panel in axes[0]:
        style_axes(panel)
    return figure, axes[0]

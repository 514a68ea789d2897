"""The paper's Figures 1 and 2 from sweeps: best score against speed-up, and validation loss by initialisation."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raydistill.core.files import write_atomic
from raydistill.paper import published
from raydistill.paper.initialisations import compared, name_of
from raydistill.paper.settings import Setting, best, by_sweep


def figure_1(path: Path, settings: Sequence[Setting]) -> None:
    """The best student of each size: test score against speed-up, a panel per data set; the paper's points hollow."""
    data = list(dict.fromkeys([*(key[2] for key in published.TABLES_6_7), *(s.place[2] for s in settings)]))
    figure, panels = _panels(len(data))
    for axes, name in zip(panels, data, strict=True):
        for teacher, points in _published(name).items():
            _line(axes, f"{teacher} (paper)", points, hollow=True)
        for teacher, points in _ours(settings, name).items():
            _line(axes, teacher, points, hollow=False)
        metric = next((s.sweep.metric for s in settings if s.place[2] == name), "rouge2")
        axes.set(title=name, xlabel="speed-up over the teacher", ylabel="BLEU" if metric == "bleu" else "ROUGE-2")
        axes.legend(fontsize=8, frameon=False)
    _save(figure, path)


def figure_2(path: Path, settings: Sequence[Setting]) -> bool:
    """Validation loss against epochs by what the decoder started from, a panel per sweep, teacher, size and data.

    A line is a run. Returns whether there was anything to draw: the paper gives no numbers for its own figure.
    """
    wanted = compared(settings)
    groups = [
        (place, sweep.name, mine)
        for place in dict.fromkeys(s.place for s in wanted)
        for sweep, mine in by_sweep(s for s in wanted if s.place == place)
    ]
    if not groups:
        return False
    figure, panels = _panels(len(groups))
    for axes, (place, name, mine) in zip(panels, groups, strict=True):
        for i, setting in enumerate(mine):
            _curves(axes, setting, f"C{i % 10}")
        axes.set(title=f"{' '.join(place)}\n({name})", xlabel="epoch", ylabel="validation cross-entropy")
        axes.legend(fontsize=8, frameon=False)
    _save(figure, path)
    return True


def _curves(axes: Any, setting: Setting, colour: str) -> None:
    """A line for each run of a setting, named once."""
    layers = ",".join(map(str, setting.layers)) or "random"
    other = "" if setting.source in ("", "teacher") else f" from {Path(setting.source).name}"
    for i, trial in enumerate(setting.ended):
        checks = [c for c in trial.history() if "val_loss" in c]
        label = f"{name_of(setting)} ({layers}){other}" if i == 0 else None
        axes.plot([c["epoch"] for c in checks], [c["val_loss"] for c in checks], color=colour, label=label)


def _published(data: str) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for (teacher, _, name), row in published.TABLES_6_7.items():
        if name == data and row.speedup is not None:
            found.setdefault(teacher, []).append((row.speedup, row.rouge2))
    return found


def _ours(settings: Sequence[Setting], data: str) -> dict[str, list[tuple[float, float]]]:
    """A line's points by teacher and sweep: a line is of one recipe."""
    found: dict[str, list[tuple[float, float]]] = {}
    for place in dict.fromkeys(s.place for s in settings if s.place[2] == data):
        for sweep, mine in by_sweep(s for s in settings if s.place == place):
            chosen = best(mine)
            speedup = chosen.measure("speedup") if chosen else None
            score = chosen.test(sweep.metric) if chosen else None
            if speedup is not None and score is not None:
                found.setdefault(f"{place[0]} ({sweep.name})", []).append((speedup, score))
    return found


def _line(axes: Any, label: str, points: list[tuple[float, float]], hollow: bool) -> None:
    x, y = zip(*sorted(points), strict=True)
    style = {"linestyle": ":", "markerfacecolor": "white"} if hollow else {"linestyle": "-"}
    axes.plot(x, y, marker="o", label=label, **style)


def _panels(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(5 * count, 4), dpi=120, layout="constrained", squeeze=False)
    for each in axes[0]:
        each.grid(alpha=0.25, linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)
    write_atomic(path, buffer.getvalue())

"""The front as a picture and the trials as a table, for the terminal, a README and MLflow."""

import io
import re
from collections.abc import Sequence
from typing import Any, Literal

from raydistill.results.pareto import UNITS
from raydistill.results.records import Trial, decoding_label
from raydistill.results.selection import Outcome

# Okabe and Ito's colours, which readers with any colour vision can tell apart
COLOURS = {"sft": "#0072B2", "kd": "#D55E00", "pl": "#009E73"}
MARKERS = "osD^vP<>Xhp*"
NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum", "bleu": "BLEU"}
AXES = {
    "latency_ms": "Latency of a batch of 32 (ms)",
    "latency_ms_b1": "Latency of one row (ms)",
    "params_m": "Parameters (millions)",
    "memory_mb": "Memory of the weights (MB)",
    "peak_mb": "Memory for a batch of 32 (MB)",
    "gpu_hours": "Training (device-hours)",
}


def front_of(found: Outcome, form: Literal["png", "svg"]) -> bytes:
    """The front of a sweep: its students, and paler the trials that are none of them."""
    return front_picture(
        found.marks,
        found.front,
        found.chosen,
        found.teacher,
        found.metric,
        found.cost,
        found.bounds,
        title=found.name,
        form=form,
    )


def front_picture(
    trials: Sequence[Trial],
    front_keys: Sequence[str],
    choices: dict[str, str | None],
    teacher: dict[str, Any] | None,
    metric: str,
    cost: str = "latency_ms",
    bounds: dict[str, dict[str, float]] | None = None,
    title: str = "",
    form: Literal["png", "svg"] = "png",
) -> bytes:
    """Validation score against cost, with 95 % intervals: colour is the method, marker the size.

    The front is a stepped line, the chosen are ringed and named by their budgets, the teacher is a star, and a
    budget that bounds this cost is a dotted line. `choices` maps a budget to a trial's key. In an SVG every student's
    mark has the id `mark_of` its key, and the teacher's "teacher".
    """
    plt = pyplot()
    done = [t for t in trials if t.scored and t.score(metric) is not None and cost in t.metrics]
    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    try:
        sizes = sorted({t.size for t in done}, key=depths)
        markers = {size: MARKERS[i % len(MARKERS)] for i, size in enumerate(sizes)}
        points = {t.key: (t.metrics[cost], float(t.score(metric) or 0)) for t in done}
        _draw_front(axes, [points[key] for key in front_keys if key in points])
        shown = _side_by_side(done, points)
        for t in sorted(done, key=lambda t: t.key in front_keys):
            _draw_trial(axes, t, shown[t.key], markers[t.size], t.key in front_keys)
        _draw_teacher(axes, teacher, metric, cost)
        axes.margins(x=0.12, y=0.14)
        _draw_budgets(axes, bounds or {}, cost)
        _draw_choices(axes, choices, shown)
        axes.set_xlabel(AXES.get(cost, cost) + ("; methods of equal cost side by side" if shown != points else ""))
        axes.set_ylabel(f"{NAMES.get(metric, metric)} on validation (95 % interval)")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if title:
            axes.set_title(title, loc="left", fontweight="bold")
        _legend(axes, {t.method for t in done}, markers, teacher is not None)
        return picture(figure, form)
    finally:
        plt.close(figure)


def pyplot() -> Any:
    """Matplotlib without a screen, with an SVG's text kept as text and its ids the same every time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "raydistill"})
    import matplotlib.pyplot as plt

    return plt


def picture(figure: Any, form: Literal["png", "svg"]) -> bytes:
    """A figure as a file's content, without what would differ from run to run."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, metadata={"Software": None} if form == "png" else {"Date": None})
    return buffer.getvalue()


def depths(size: str) -> tuple[int, ...]:
    """The layers of each side in a size such as "12-3", to sort by."""
    return tuple(int(part) for part in size.split("-") if part.isdigit())


def mark_of(key: str) -> str:
    """The id of a student's mark in an SVG."""
    return "student-" + re.sub(r"[^A-Za-z0-9-]", "_", key)


def results_table(
    trials: Sequence[Trial], front_keys: Sequence[str], choices: dict[str, str | None], metric: str
) -> tuple[list[str], list[list[str]]]:
    """A header and a row per trial: finished ones by cost, then running, then failed with their reason.

    The first column marks the front with `*`; the last names the budgets that a trial was chosen for.
    """
    name = NAMES.get(metric, metric)
    header = ["size", "method", "labels", "decoder from", f"test {name}", f"validation {name}"]
    header += ["ms (batch 32)", "speed-up", "params M", "device h", "trial", "note"]
    if any(_shrunk_encoder(t) for t in trials):
        header.insert(4, "encoder from")
    if any(t.decoding for t in trials):
        header.insert(-1, "decoding")
        header[header.index("speed-up")] = "speed-up (same decoding)"
    order = {"done": 0, "stopped": 0, "running": 1, "failed": 2}
    rows = []
    for t in sorted(trials, key=lambda t: (order[t.status], t.metrics.get("latency_ms", 0.0), t.number or 0)):
        budgets = [budget for budget, key in choices.items() if key == t.key]
        note = ", ".join([*budgets, *([t.status] if t.status != "done" else [])])
        if t.status == "failed":
            note = f"failed: {t.reason.splitlines()[0] if t.reason else 'no reason kept'}"
        test = t.test or {}
        row = [
            f"{t.size or 'full'}{' *' if t.key in front_keys else ''}",
            t.method,
            t.labels or "original",
            _layers(t.copied.get("decoder")),
            _with_interval(test.get(metric), test.get("interval")),
            _with_interval(t.score(metric), t.interval),
            _number(t.metrics.get("latency_ms"), 0),
            _speedups(t),
            _number(t.metrics.get("params_m"), 1),
            _number(t.metrics.get("gpu_hours"), 3),
            _number(t.number, 0),
            note,
        ]
        if "encoder from" in header:
            row.insert(4, _layers(t.copied.get("encoder")) if _shrunk_encoder(t) else "all")
        if "decoding" in header:
            row.insert(-1, decoding_label(t.decoding) if t.decoding else "-")
        rows.append(row)
    return header, rows


def _speedups(trial: Trial) -> str:
    """Over the teacher with its own decoding, and in brackets over the teacher with the student's."""
    own, same = (trial.metrics.get(name) for name in ("speedup", "speedup_same_decoding"))
    return _number(own, 2, "x") + (f" ({_number(same, 2, 'x')})" if same is not None else "")


def result_tables(found: Outcome) -> list[tuple[list[str], list[list[str]]]]:
    """The table of all trials, with the search's own measurements, and that of the finalists as served, if they were.

    Front and choices are marked where they were decided: among the finalists, if they were served.
    """
    if not found.served:
        return [results_table(found.trials, found.front, found.chosen, found.metric)]
    front = {found.trial_of(key) for key in found.front}
    chosen = {name: found.trial_of(key) if key else None for name, key in found.chosen.items()}
    return [
        results_table(found.trials, sorted(front), chosen, found.metric),
        results_table(found.students, found.front, found.chosen, found.metric),
    ]


def count_trials(trials: Sequence[Trial]) -> str:
    """How many trials there are of each status, such as "18 trials: 16 done, 2 failed (2 collapsed)"."""
    collapsed = sum(t.status == "failed" and t.reason.startswith("collapsed") for t in trials)
    failed = f"failed ({collapsed} collapsed)" if collapsed else "failed"
    words = {"done": "done", "stopped": "stopped early", "failed": failed, "running": "not over"}
    counts = {status: sum(t.status == status for t in trials) for status in words}
    parts = [f"{n} {words[status]}" for status, n in counts.items() if n]
    return f"{len(trials)} trials" + (f": {', '.join(parts)}" if parts else "")


def choices_table(found: Outcome, links: dict[str, str] | None = None) -> tuple[list[str], list[list[str]]]:
    """A header and a row per budget: what was chosen, and why; `links` lead to a trial by its key."""
    header = ["budget", "bound", "student", NAMES.get(found.metric, found.metric), "why"]
    rows = []
    for name, choice in found.choices.items():
        bound = ", ".join(f"{k} <= {v:.4g} {UNITS.get(k, '')}".rstrip() for k, v in found.bounds[name].items())
        best = choice.best
        student = best.label if best else "-"
        if best and links and found.trial_of(best.key) in links:
            student = f"[{student}]({links[found.trial_of(best.key)]})"
        rows.append([name, bound, student, _number(best.score if best else None, 2), choice.reason])
    return header, rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars and line ends inside a cell are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines)


def _side_by_side(done: Sequence[Trial], points: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Move methods of one shape, whose cost is the same, a little apart so that each can be seen."""
    costs = [x for x, _ in points.values()]
    step = 0.022 * (max(costs) - min(costs)) if costs else 0.0
    shift = {method: (i - 1) * step for i, method in enumerate(COLOURS)}
    return {
        t.key: (x + (shift.get(t.method, 0.0) if costs.count(x) > 1 else 0.0), y)
        for t in done
        for x, y in [points[t.key]]
    }


def _draw_front(axes: Any, points: list[tuple[float, float]]) -> None:
    if points:
        points = sorted(points)
        x, y = zip(*points, strict=True)
        axes.step(x, y, where="post", color="0.35", linewidth=1.2, zorder=1)


def _draw_trial(axes: Any, trial: Trial, at: tuple[float, float], marker: str, on_front: bool) -> None:
    colour = COLOURS.get(trial.method, "0.4")
    if trial.interval:
        low, high = trial.interval
        spread = [[max(0.0, at[1] - low)], [max(0.0, high - at[1])]]
        alpha = 0.7 if on_front else 0.25
        axes.errorbar(*at, yerr=spread, color=colour, alpha=alpha, linewidth=1, capsize=2, zorder=2)
    face = colour if on_front else "white"
    mark = axes.scatter(*at, marker=marker, s=52, facecolor=face, edgecolor=colour, linewidth=1.3, zorder=3)
    mark.set_gid(mark_of(trial.key))


def _draw_teacher(axes: Any, teacher: dict[str, Any] | None, metric: str, cost: str) -> None:
    score = ((teacher or {}).get("metrics") or {}).get(metric)
    price = ((teacher or {}).get("costs") or {}).get(cost)
    if score is None:
        return
    axes.axhline(score, color="black", linewidth=0.7, linestyle=(0, (5, 4)), alpha=0.5, zorder=0)
    if price is not None:
        axes.scatter(price, score, marker="*", s=220, color="black", zorder=4).set_gid("teacher")


def _draw_budgets(axes: Any, bounds: dict[str, dict[str, float]], cost: str) -> None:
    low, high = axes.get_xlim()
    for name, limits in bounds.items():
        # a bound far outside the points would squeeze them into a corner
        if cost in limits and low - 0.3 * (high - low) <= limits[cost] <= high + 0.3 * (high - low):
            axes.axvline(limits[cost], color="0.45", linestyle=":", linewidth=1.2, zorder=0)
            axes.annotate(
                name,
                (limits[cost], 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(-3, 0),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="bottom",
                fontsize=8,
                color="0.35",
            )


def _draw_choices(axes: Any, choices: dict[str, str | None], points: dict[str, tuple[float, float]]) -> None:
    by_key: dict[str, list[str]] = {}
    for name, key in choices.items():
        if key in points:
            by_key.setdefault(str(key), []).append(name)
    for key, names in by_key.items():
        axes.scatter(*points[key], s=190, facecolor="none", edgecolor="black", linewidth=1.4, zorder=5)
        axes.annotate(
            ", ".join(names),
            points[key],
            xytext=(-9, 9),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
            fontweight="bold",
            zorder=6,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )


def _legend(axes: Any, methods: set[str], markers: dict[str, str], teacher: bool) -> None:
    from matplotlib.lines import Line2D

    def dot(label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="none", label=label, **{"markersize": 7, "color": "0.4", **style})

    entries = [dot(m, marker="o", color=COLOURS.get(m, "0.4")) for m in [*COLOURS, *methods - set(COLOURS)]]
    entries = [entry for entry in entries if entry.get_label() in methods]
    entries += [dot(size, marker=marker) for size, marker in markers.items()]
    if teacher:
        entries.append(dot("teacher", marker="*", color="black", markersize=12))
    entries.append(Line2D([], [], color="0.35", linewidth=1.2, label="front (filled)"))
    entries.append(dot("chosen", marker="o", markersize=11, markerfacecolor="none", color="black"))
    axes.legend(handles=entries, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _shrunk_encoder(trial: Trial) -> bool:
    layers = trial.copied.get("encoder")
    return layers is not None and list(layers) != list(range(len(layers)))


def _layers(layers: Sequence[int] | None) -> str:
    return " ".join(map(str, layers)) if layers else "-"


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else f"{value:.2f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())

"""Tables of a sweep's trials, choices and costs, for the terminal, table.md, front.html and MLflow.

A table is a pair (header, rows) of text cells.
"""

from collections.abc import Callable, Sequence
from statistics import median

from raydistill.config.metric_names import MetricChoice, is_bertscore, parse_bertscore
from raydistill.results.costs import required_passes, shared_pass_hours
from raydistill.results.formatting import format_count, format_number, format_score
from raydistill.results.pareto import COST_UNITS, bound_sign
from raydistill.results.records import Trial, scoring_engines
from raydistill.results.selection import Selection

TextTable = tuple[list[str], list[list[str]]]

METRIC_NAMES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "chrf": "chrF",
    "chrf++": "chrF++",
    "exact_match": "exact match",
}
EXTRA_ROWS_KEY = "pseudo.extra_rows"  # of the values that a search chooses
STATUS_NAMES = {"done": "done", "stopped": "stopped early", "failed": "failed", "running": "running"}
STATUS_ORDER = {"done": 0, "stopped": 0, "running": 1, "failed": 2}


def metric_name(metric: str) -> str:
    """The name of a metric for readers, such as "ROUGE-2"; of a user's metric, the name of its function."""
    if is_bertscore(metric):
        model, layer = parse_bertscore(metric)
        return f"BERTScore ({model.partition('@')[0].rpartition('/')[2]}, layer {layer})"
    return METRIC_NAMES.get(metric, metric.rpartition(":")[2])


def trials_table(
    trials: Sequence[Trial], front_keys: Sequence[str], choices: dict[str, str | None], metrics: MetricChoice
) -> TextTable:
    """One row per trial: finished trials by cost, then running ones, then failed ones with the reason.

    The first column marks the front with `*`; the note names the budgets that a trial was chosen for. The columns for
    encoder layers, serving, seeds and the engine of the scores appear only if some trial needs them.

    Args:
        trials: Trials of a sweep or students as served.
        front_keys: Keys of the trials on the front.
        choices: Key of the chosen trial by budget.
        metrics: The main score, which has columns of its own, and the scores that are reported in one column.
    """
    columns: dict[str, Callable[[Trial], str]] = {
        "size": lambda t: f"{t.size or 'full'}{' *' if t.key in front_keys else ''}",
        "method": lambda t: t.method,
        "labels": lambda t: t.labels or "original",
        "decoder from": lambda t: _format_layers(t.copied_layers.get("decoder")),
    }
    if any(map(_has_shrunk_encoder, trials)):
        columns["encoder from"] = _format_encoder
    metric, name = metrics.deciding, metric_name(metrics.deciding)
    split = trials[0].split if trials else "validation"
    are_served = any(t.serving for t in trials)
    columns |= {
        f"test {name}": lambda t: format_score((t.test or {}).get(metric), (t.test or {}).get("interval")),
        f"{split} {name}": lambda t: format_score(t.score(metric), t.interval),
        **_reported_column(split, metrics.reported),
        "ms (batch 32)": lambda t: format_number(t.metrics.get("latency_ms"), 0),
        "speed-up (teacher served the same way)" if are_served else "speed-up": _format_speedups,
        "params M": lambda t: format_number(t.metrics.get("params_m"), 1),
        "device h": lambda t: format_number(t.metrics.get("device_hours"), 3),
        "trial": lambda t: format_number(t.number, 0),
    }
    if are_served:
        columns["serving"] = lambda t: t.serving.label if t.serving else "-"
        if any(t.repeats for t in trials):
            columns["seeds"] = lambda t: str(t.num_seeds)
    elif len(scoring_engines(trials)) > 1:
        columns["engine"] = lambda t: t.engine or "-"
    columns["note"] = lambda t: _format_note(t, choices)
    ordered = sorted(trials, key=lambda t: (STATUS_ORDER[t.status], t.metrics.get("latency_ms", 0.0), t.number or 0))
    return list(columns), [[cell(trial) for cell in columns.values()] for trial in ordered]


def result_tables(selection: Selection) -> list[TextTable]:
    """The table of all trials with the search's measurements and, once they are served, a table of the finalists.

    Both tables mark the front and the choices, which are finalists once finalists are served.
    """
    chosen = selection.chosen_keys
    if not selection.has_served_students:
        return [trials_table(selection.trials, selection.front_keys, chosen, selection.metrics)]
    front_trials = sorted({selection.trial_key(key) for key in selection.front_keys})
    chosen_trials = {name: selection.trial_key(key) if key else None for name, key in chosen.items()}
    return [
        trials_table(selection.trials, front_trials, chosen_trials, selection.metrics),
        trials_table(selection.students, selection.front_keys, chosen, selection.metrics),
    ]


def _reported_column(split: str, reported: Sequence[str]) -> dict[str, Callable[[Trial], str]]:
    """The column of the reported scores, such as "validation BLEU / chrF"; none if nothing is reported."""
    if not reported:
        return {}
    header = f"{split} {' / '.join(map(metric_name, reported))}"
    return {header: lambda t: join_scores([t.metrics.get(name) for name in reported])}


def join_scores(scores: Sequence[float | None]) -> str:
    """Several scores in one cell, such as "25.00 / 80.00"; "-" if none is known."""
    return " / ".join(format_number(score, 2) for score in scores) if any(s is not None for s in scores) else "-"


def choices_table(selection: Selection, links: dict[str, str] | None = None) -> TextTable:
    """One row per budget with the chosen student and the reason; `links` maps trial keys to URLs."""
    rows = []
    for name, choice in selection.choices.items():
        bounds = selection.bounds[name].items()
        bound = ", ".join(f"{k} {bound_sign(k)} {v:.4g} {COST_UNITS.get(k, '')}".rstrip() for k, v in bounds)
        best = choice.best
        student = best.label if best else "-"
        if best and links and selection.trial_key(best.key) in links:
            student = f"[{student}]({links[selection.trial_key(best.key)]})"
        rows.append([name, bound, student, format_number(best.score if best else None, 2), choice.reason])
    return ["budget", "bound", "student", metric_name(selection.metric), "reason"], rows


def method_table(selection: Selection) -> TextTable:
    """One row per method: its number of trials, their device-hours, and the hours of the teacher passes they need.

    The hours of a trial include the hours of its runs with other seeds.

    The table compares no scores: methods have different numbers of trials, and the best of more trials is higher.
    """
    rows = []
    for method in sorted({trial.method for trial in selection.trials if trial.method}):
        trials = [trial for trial in selection.trials if trial.method == method]
        trial_hours = sum(run.device_hours for trial in trials for run in (trial, *trial.repeats))
        teacher_hours = shared_pass_hours(trials, selection.teacher.passes)
        rows.append([method, str(len(trials)), f"{trial_hours:.3f}", f"{teacher_hours:.3f}"])
    return ["method", "trials", "device h, trials", "device h, teacher"], rows


def label_cost_table(selection: Selection) -> TextTable | None:
    """Score against label cost: one row per number of extra sources; None if the search does not vary that number.

    The score is a median, because the numbers have different numbers of trials, and the best of more trials is higher.
    """
    trials: dict[int | None, list[Trial]] = {}
    for trial in selection.trials:
        if trial.scored and EXTRA_ROWS_KEY in trial.params:
            trials.setdefault(trial.params[EXTRA_ROWS_KEY], []).append(trial)
    rows = []
    for count, group in sorted(trials.items(), key=lambda item: (item[0] is None, item[0])):
        passes = [required_passes(trial, selection.teacher.passes) for trial in group]
        hours = max(sum(p.hours_by_label_set.values()) if p else 0.0 for p in passes)
        scores = [score for trial in group if (score := trial.score(selection.metric)) is not None]
        typical = format_number(median(scores) if scores else None, 2)
        rows.append(["all" if count is None else f"{count:,}", str(len(group)), typical, f"{hours:.3f}"])
    name = metric_name(selection.metric)
    return (["extra rows", "trials", f"{name}, median", "device h, labels"], rows) if rows else None


def format_trial_counts(trials: Sequence[Trial]) -> str:
    """Number of trials by status, such as "18 trials: 16 done, 2 failed (2 collapsed)"."""
    num_collapsed = sum(t.status == "failed" and t.reason.startswith("collapsed") for t in trials)
    parts = []
    for status, name in STATUS_NAMES.items():
        if count := sum(t.status == status for t in trials):
            suffix = f" ({num_collapsed} collapsed)" if status == "failed" and num_collapsed else ""
            parts.append(f"{count} {name}{suffix}")
    return format_count(len(trials), "trial") + (f": {', '.join(parts)}" if parts else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; vertical bars and line breaks inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_escape_cell, line))} |" for line in lines)


def _format_note(trial: Trial, choices: dict[str, str | None]) -> str:
    if trial.status == "failed":
        return f"failed: {trial.reason.splitlines()[0] if trial.reason else 'no reason recorded'}"
    budgets = [budget for budget, key in choices.items() if key == trial.key]
    return ", ".join(budgets + [trial.status] * (trial.status != "done"))


def _format_speedups(trial: Trial) -> str:
    """The speed-up over the teacher as it is served today; in brackets, over the teacher served like the student."""
    own, same = (trial.metrics.get(name) for name in ("speedup", "speedup_same_serving"))
    if own is None:
        return "-"
    return f"{own:.2f}x" + (f" ({same:.2f}x)" if same is not None else "")


def _format_encoder(trial: Trial) -> str:
    return _format_layers(trial.copied_layers.get("encoder")) if _has_shrunk_encoder(trial) else "all"


def _has_shrunk_encoder(trial: Trial) -> bool:
    layers = trial.copied_layers.get("encoder")
    return layers is not None and list(layers) != list(range(len(layers)))


def _format_layers(layers: Sequence[int] | None) -> str:
    return " ".join(map(str, layers)) if layers else "-"


def _escape_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())

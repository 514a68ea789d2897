"""`python -m raydistill.choose SWEEP --within latency_ms=900`: the best checkpoint within a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raydistill._app import make_app, run_app
from raydistill.config.space import check_bounds
from raydistill.core.console import print_json, print_progress, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home

if TYPE_CHECKING:
    from raydistill.results.pareto import Choice
    from raydistill.results.selection import Selection

app = make_app()


@app.command()
def choose(
    sweep: Annotated[str, typer.Argument(help="a sweep's folder, or its name under outputs/sweeps")],
    within: Annotated[
        list[str] | None,
        typer.Option(help="KEY=BOUND, such as latency_ms=900 or params_m=50% (of the teacher's); may repeat"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="name of the budget: the alias in MLflow; or which stored one")
    ] = None,
    register: Annotated[bool, typer.Option(help="register the choice in MLflow")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="the result as JSON on stdout")] = False,
) -> None:
    """The best student of a sweep within a budget, and how to load it; registers it in MLflow.

    Where a cheaper student's score cannot be told from the highest (paired bootstrap, 95 %), the cheaper one is
    taken. Without `--within`, the budgets of the space are used. The student is handed over as a folder under the
    sweep's `exports/`, with its chosen decoding and a model card.

        raydistill choose my-sweep --within latency_ms=900 --within params_m=300 --name fast
    """
    asked = parse_bounds(within or [])
    from raydistill.cluster import sync
    from raydistill.results.records import find_sweep
    from raydistill.results.selection import load_selection

    sync.pull(raydistill_home() / "sweeps" / sweep, patterns=sync.RECORD_PATTERNS)
    folder = find_sweep(sweep)
    found = load_selection(folder)
    budgets = _resolve_choices(found, asked, name)
    results = [_deliver_choice(found, budget, bounds, choice, register, as_json) for budget, bounds, choice in budgets]
    print_json({"sweep": found.name, "metric": found.metric, "choices": results}, as_json)
    misses = [f"{budget}: {choice.reason}" for budget, _, choice in budgets if choice.best is None]
    if misses:
        raise UserError("\n".join(misses))


def parse_bounds(within: list[str]) -> dict[str, float | str]:
    """`KEY=BOUND` texts as bounds; a UserError names what is wrong with one."""
    bounds: dict[str, float | str] = {}
    for text in within:
        key, equals, bound = (part.strip() for part in text.partition("="))
        if not equals or not key or not bound:
            raise UserError(f"--within {text}: expected KEY=BOUND, for example --within latency_ms=900")
        if key in bounds:
            raise UserError(f"--within {text}: {key} is bounded twice")
        try:
            check_bounds("--within", {key: bound})
        except ValueError as error:
            raise UserError(f"--within {text}: {str(error).removeprefix('budget --within: ')}") from None
        bounds[key] = bound if bound.endswith("%") else float(bound)
    return bounds


def _resolve_choices(
    selection: "Selection", requested: dict[str, float | str], name: str | None
) -> "list[tuple[str, dict[str, float], Choice]]":
    from raydistill.results import pareto
    from raydistill.results.selection import make_candidates

    if requested:
        costs = selection.teacher.get("costs") or {}
        bounds = pareto.resolve_bounds(requested, costs)
        label = name or "-".join(
            f"{key}-{bound:g}" if isinstance(bound, float) else f"{key}-{bound}" for key, bound in requested.items()
        ).replace("%", "pct")
        return [
            (
                label,
                bounds,
                pareto.choose(make_candidates(selection.students, selection.metric), bounds, selection.metric),
            )
        ]
    stored = [(n, selection.bounds[n], choice) for n, choice in selection.choices.items() if name in (None, n)]
    if not stored:
        known = ", ".join(selection.choices) or "none"
        wanted = f"budget {name!r}" if name else "a budget"
        raise UserError(f"{selection.name}: {wanted} is not stored (known: {known}); give --within latency_ms=900")
    return stored


def _deliver_choice(
    selection: "Selection", budget: str, bounds: dict[str, float], choice: "Choice", register: bool, as_json: bool
) -> dict[str, Any]:
    """Show one budget's choice, hand it over, register it, and return it for `--json`."""
    from raydistill.results.pareto import COST_UNITS, describe_bounds

    result: dict[str, Any] = {"budget": budget, "bounds": bounds, "reason": choice.reason, "key": None}
    if choice.best is None:
        print_text(f"{budget} ({describe_bounds(bounds)}): nothing fits", as_json)
        return result
    best = choice.best
    trial = selection.student(best.key)
    interval = f", 95 % interval [{trial.interval[0]:.2f}, {trial.interval[1]:.2f}]" if trial.interval else ""
    lines = [f"{budget} ({describe_bounds(bounds)}): {best.label}"]
    lines.append(f"  {selection.metric} {best.score:.2f} on validation{interval}")
    if trial.test and selection.metric in trial.test:
        low_high = trial.test.get("interval")
        on_test = f", 95 % interval [{low_high[0]:.2f}, {low_high[1]:.2f}]" if low_high else ""
        lines.append(f"  {selection.metric} {trial.test[selection.metric]:.2f} on test{on_test}")
    lines += [f"  {key} {value:.4g} ({COST_UNITS[key]})" for key, value in best.costs.items()]
    if "speedup" in trial.metrics:
        lines.append(f"  {trial.metrics['speedup']:.2f} times the teacher's speed")
    if measured := selection.measured_with(trial):
        lines.append(f"  milliseconds with {measured}")
    lines.append(f"  why: {choice.reason}")
    others = [c for c in choice.indistinguishable if c is not best]
    if others:
        lines.append(f"  also not distinguishable: {', '.join(f'{c.label} {c.score:.2f}' for c in others)}")
    print_text("\n".join(lines), as_json)
    place = _export_student(selection, best.key, budget)
    print_text(_loading_example(place) if place else "  checkpoint: missing: it was deleted", as_json)
    result |= {
        "key": trial.folder.name,
        "decoding": trial.decoding,
        "size": trial.size,
        "method": trial.method,
        "score": best.score,
    }
    result |= {"interval": trial.interval, "test": trial.test, "costs": best.costs}
    result |= {"speedup": trial.metrics.get("speedup"), "measured_with": measured or None}
    result |= {"indistinguishable": [c.label for c in choice.indistinguishable]}
    result |= {"checkpoint": str(place) if place else None, "registered": None}
    if register and place:
        result["registered"] = _register_student(selection, best.key, budget, place, as_json)
    return result


def _export_student(selection: "Selection", key: str, budget: str) -> Path | None:
    """The folder to hand over, which decodes as was chosen; None where the checkpoint is gone."""
    from raydistill.tracking.export import export_student

    return export_student(selection, key, budget) if selection.student(key).checkpoint else None


def _loading_example(folder: Path) -> str:
    return (
        f"  checkpoint: {folder}\n"
        "  to load it:\n"
        "    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n"
        f'    tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        f'    model = AutoModelForSeq2SeqLM.from_pretrained("{folder}")'
    )


def _register_student(
    selection: "Selection", key: str, budget: str, export_folder: Path, as_json: bool
) -> dict[str, str] | None:
    """Register in MLflow; a store that is down is said and does not spoil the choice."""
    from dataclasses import asdict

    from raydistill.cluster import sync
    from raydistill.core.errors import TransientError
    from raydistill.tracking.mlflow_registry import register_choice
    from raydistill.tracking.mlflow_store import TrackingUnavailable, ui_command

    try:
        registered = register_choice(selection.sweep, key, budget, export_folder, fetch=sync.pull)
    except (TrackingUnavailable, TransientError) as error:
        print_progress(f"not registered: {error}. The same command again registers it")
        return None
    print_text(f"  registered: {registered.uri} (version {registered.version})", as_json)
    print_text(f"  to see it: {ui_command(selection.record.get('tracking_uri'))}\n", as_json)
    return asdict(registered)


def main() -> None:
    run_app(app)


if __name__ == "__main__":
    from raydistill.choose import main as real_main

    real_main()

"""`raydistill sweep`: a whole search, from a space file to the Pareto front and the choice for each budget."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import print_json, print_progress, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home

if TYPE_CHECKING:
    from raydistill.config.space import Space

app = make_app()


@app.command()
def sweep(
    space: Annotated[Path, typer.Argument(help="the space's YAML file, or example:NAME, such as example:quickstart")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a value of the file")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="print the plan and stop: trials, shapes, disk space; status 2 if inputs are missing")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="as --dry-run, and train a few steps to estimate time and device-hours")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Search students of one teacher: the front of quality against latency, and the best student for each budget.

    Results are in `outputs/sweeps/NAME`. Run the same command again to resume a sweep that was killed, to retry failed
    trials, or to add trials.

    Example: `raydistill sweep search_spaces/kd_xsum.yaml --set search.trials=12 --dry-run`
    """
    from raydistill.config.presets import check_teacher
    from raydistill.config.space import read_space

    loaded_space = read_space(space, settings)
    folder = raydistill_home() / "sweeps" / loaded_space.name
    _check_tracking(loaded_space.tracking_uri, folder)
    if dry_run or estimate:
        _print_plan(loaded_space, folder, estimate, as_json)
        return
    if isinstance(loaded_space.run.get("teacher"), str):
        check_teacher(loaded_space.run["teacher"])
    from raydistill.search.sweep import run_sweep

    result = run_sweep(loaded_space, folder, partial(print_text, as_json=as_json))
    print_json(result, as_json)
    if not result["complete"]:
        raise typer.Exit(1)


def _print_plan(space: "Space", folder: Path, estimate: bool, as_json: bool) -> None:
    """Print the plan of a sweep and, on request, its estimated cost; UserError if the sweep would not start."""
    from raydistill.search.dry_run import describe_plan

    plan = describe_plan(space, folder)
    print_text(plan.pop("text"), as_json)
    if estimate and not plan["problems"]:
        from raydistill.search.estimate import estimate_sweep

        estimated = estimate_sweep(space)
        print_text("\n" + "\n".join(estimated.describe(space.search.trials)), as_json)
        plan["estimate"] = estimated.to_json()
    print_json(plan, as_json)
    if plan["problems"]:
        raise UserError("the sweep would not start: " + "; ".join(plan["problems"]))


def _check_tracking(uri: str | None, folder: Path) -> None:
    """Refuse to start a sweep without its tracking server; a sweep that was started before continues without it."""
    from raydistill.tracking.mlflow_store import TrackingUnavailable, check_tracking

    try:
        check_tracking(uri)
    except TrackingUnavailable as error:
        if not (folder / "space.yaml").is_file():
            raise
        print_progress(f"{error} The sweep continues and publishes later")


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.sweep import main as entry

    entry()

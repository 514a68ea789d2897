"""`raydistill sweep`: the whole search, from a space file to the front and the choice per budget."""

from pathlib import Path
from typing import Annotated

import typer

from raydistill.config.console import finish, home, make_app, run_app, show

app = make_app()


@app.command()
def sweep(
    space: Annotated[Path, typer.Argument(help="the space's YAML file, such as search_spaces/quickstart.yaml")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a value of the file")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="print the plan and stop: trials, shapes, disk, what is there")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Search students of one teacher; ends with the quality/latency front and the best checkpoint per budget.

    The sweep lives in `outputs/sweeps/NAME`. Run again, whether killed or finished, it goes on under the same name.

    Example: `raydistill sweep search_spaces/kd_xsum.yaml --set search.trials=12 --dry-run`
    """
    from raydistill.config.space import read_space

    checked = read_space(space, settings)
    folder = home() / "sweeps" / checked.name
    from raydistill.config.presets import check_teacher
    from raydistill.results.tracking import check_tracking

    check_tracking(checked.tracking_uri)
    if isinstance(checked.run.get("teacher"), str) and not dry_run:
        check_teacher(checked.run["teacher"])
    if dry_run:
        from raydistill.cluster.plan import describe_plan

        plan = describe_plan(checked, folder)
        show(plan["text"], as_json)
        finish({k: v for k, v in plan.items() if k != "text"}, as_json)
        return
    from raydistill.cluster.sweep import run_sweep

    result = run_sweep(checked, folder)
    show(result["text"], as_json)
    finish({k: v for k, v in result.items() if k != "text"}, as_json)
    if result["died"]:
        raise typer.Exit(1)


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.sweep import main as entry

    entry()

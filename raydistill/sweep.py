"""`raydistill sweep`: a whole search, from a space file to the Pareto front and the choice for each budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import print_json, print_progress, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home

if TYPE_CHECKING:
    import pandas as pd

    from raydistill.config.space import Space
    from raydistill.results.selection import Selection
    from raydistill.tracking.exported_student import ExportedStudent

app = make_app()


@dataclass(frozen=True)
class SweepResult:
    """The result of `sweep`.

    Attributes:
        folder: The sweep's folder.
        summary: What the command prints under `--json`.
        exports: The folder of the exported student by budget.
    """

    folder: Path
    summary: dict[str, Any]
    exports: dict[str, Path]

    @property
    def complete(self) -> bool:
        """Whether no trial failed and every chosen student was exported."""
        return bool(self.summary["complete"])

    @property
    def selection(self) -> "Selection":
        """The trials, students and choices, read from the folder."""
        from raydistill.results.selection import load_selection

        return load_selection(self.folder)

    def to_pandas(self) -> "pd.DataFrame":
        """One row per student as served: scores, costs, and the budgets that the student was chosen for."""
        from raydistill.results.frames import students_frame

        return students_frame(self.selection)

    def best(self, budget: str) -> "ExportedStudent":
        """The student that was chosen for a budget.

        Raises:
            UserError: The space has no such budget, or no student fits.
        """
        from raydistill.tracking.exported_student import ExportedStudent

        selection = self.selection
        if budget not in self.exports:
            choice = selection.choices.get(budget)
            known = ", ".join(selection.choices) or "none"
            raise UserError(f"{budget}: {choice.reason if choice else f'no such budget; known: {known}'}")
        key = str(selection.chosen_keys[budget])
        return ExportedStudent(key, selection.student(key).label, self.exports[budget])


def sweep(
    space: "str | Path | Mapping[str, Any] | Space",
    settings: Sequence[str] = (),
    echo: Callable[[str], None] | None = None,
) -> SweepResult:
    """Run or resume a sweep, from a space to the exported students. Results are in `outputs/sweeps/NAME`.

    Args:
        space: A space file, the content of such a file, or a space.
        settings: Changes of values, as "KEY=VALUE".
        echo: Receives the tables that the command prints; by default nothing is printed but progress, on stderr.

    Raises:
        UserError: The space is not valid, differs from the one that the sweep was started with, or another process is
            running the sweep.
    """
    from raydistill.config.presets import check_teacher

    loaded_space = load_space(space, settings)
    folder = raydistill_home() / "sweeps" / loaded_space.name
    _check_tracking(loaded_space.tracking_uri, folder)
    if isinstance(loaded_space.run.get("teacher"), str):
        check_teacher(loaded_space.run["teacher"])
    from raydistill.search.sweep import run_sweep

    summary = run_sweep(loaded_space, folder, echo or (lambda text: None))
    return SweepResult(folder, summary, {budget: Path(path) for budget, path in summary["exports"].items()})


@app.command("sweep")
def sweep_command(
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
    if dry_run or estimate:
        loaded_space = load_space(space, settings or [])
        folder = raydistill_home() / "sweeps" / loaded_space.name
        _check_tracking(loaded_space.tracking_uri, folder)
        _print_plan(loaded_space, folder, estimate, as_json)
        return
    result = sweep(space, settings or [], partial(print_text, as_json=as_json))
    print_json(result.summary, as_json)
    if not result.complete:
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


def load_space(space: "str | Path | Mapping[str, Any] | Space", settings: Sequence[str]) -> "Space":
    """The validated space of a space file, of the content of such a file, or of a space, with the changed `settings`.

    Raises:
        UserError: The space or a setting is not valid.
    """
    from raydistill.config.space import Space, parse_space, read_space

    if isinstance(space, str | Path):
        return read_space(Path(space), list(settings))
    data = space.model_dump(mode="json", exclude_unset=True) if isinstance(space, Space) else dict(space)
    return parse_space(data, "space", {}, list(settings))


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

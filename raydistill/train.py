"""`raydistill train`: one run, a student or a teacher, launched by Ray Train."""

import contextlib
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from raydistill.cluster import sync
from raydistill.core.console import finish, home, make_app, progress, run_app, show, table
from raydistill.core.errors import UserError

app = make_app()
DEMO = Path(__file__).parent / "data" / "demo_teacher.yaml"


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="the run's YAML file, or `demo`: the demo's teacher")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a value of the file")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Train one student of a teacher, fine-tune a teacher, or train a new model from a random start.

    The same command goes on where a killed run was. The checkpoint is `outputs/runs/NAME/best`.

    Example: `raydistill train demo`, or `raydistill train run.yaml --set training.learning_rate=1e-4` with

        name: my-student
        teacher: facebook/bart-large-xsum
        dataset: xsum
        method: kd
        student: {size: 12-3}
    """
    from raydistill.config.loader import absolute_paths, apply_settings, check, read_yaml
    from raydistill.config.presets import check_teacher
    from raydistill.config.run import Run

    path = DEMO if run == "demo" else Path(run)
    data, lines = read_yaml(path)
    if "run" in data:
        raise UserError(f"{path}: this is a space (it has `run`); search it with `raydistill sweep {path}`")
    checked = check(Run, absolute_paths(apply_settings(data, settings or [])), path, lines)
    if checked.teacher:
        check_teacher(checked.teacher)
    folder = home() / "runs" / checked.name
    result = carry_out(checked, folder)
    metrics = {**result["metrics"], **{f"test {k}": v for k, v in (result["test"] or {}).items() if k != "interval"}}
    rows = [[name, f"{value:.4g}"] for name, value in metrics.items() if isinstance(value, int | float)]
    show(table(["measure", checked.name], rows), as_json)
    if result["status"] == "failed":
        show(f"the run failed: {result['reason']}", as_json)
        finish(result, as_json)
        raise typer.Exit(1)
    show(f"checkpoint: {folder / 'best'}", as_json)
    finish({**result, "checkpoint": str(folder / "best")}, as_json)


def carry_out(run: Any, folder: Path) -> dict[str, Any]:
    """Make what the run needs, train it under Ray Train, and tell of every validation as it comes."""
    from raydistill.cluster.start import cluster, device
    from raydistill.core.files import read_json
    from raydistill.jobs.train import check_room, train_with_ray_train
    from raydistill.search.dry_run import check_run
    from raydistill.search.prepare import inputs_for
    from raydistill.training.run_folder import ORIGIN, claim, claim_origin
    from raydistill.training.tokenized_data import origin_of

    if (folder / "run.json").is_file():
        claim(folder, run)
    if (folder / ORIGIN).is_file():
        claim_origin(folder, origin_of(run))
    if (folder / "result.json").is_file():
        progress(f"{folder}: this run is finished already")
        return read_json(folder / "result.json")
    check_run(run)
    with cluster():
        where = device()
        check_room(run, where)
        progress(f"run {run.name}: method {run.method} on {where}, in {folder}")
        inputs = inputs_for(run, where, folder)
        with following(folder):
            return train_with_ray_train(run, folder, inputs, device=where)


class following:
    """A block during which each new validation of the run in `folder` is told in one line."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.over = threading.Event()
        self.told = len(self._lines())
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []

    def _follow(self) -> None:
        import json

        while True:
            last = self.over.wait(1.0)
            with contextlib.suppress(UserError):  # the storage does not answer; it is asked again
                sync.fetch(self.path)
            lines = self._lines()
            for line in lines[self.told :]:
                m = json.loads(line)
                scores = ", ".join(f"{k} {m[k]:.2f}" for k in ("rouge2", "bleu") if k in m)
                progress(
                    f"  step {m['step']:>6}, epoch {m['epoch']:.2f}, {m['time_s']:.0f} s: "
                    f"loss {m['loss']:.3f}, validation loss {m['val_loss']:.3f}, {scores}"
                )
            self.told = len(lines)
            if last:
                return


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.train import main as entry

    entry()

"""`raydistill train`: one run, a student or a teacher, launched by Ray Train."""

import contextlib
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from raydistill._app import make_app, run_app
from raydistill.cluster import sync
from raydistill.core.console import format_table, print_json, print_progress, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home

app = make_app()
DEMO_RUN = Path(__file__).parent / "data" / "demo_teacher.yaml"


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
    from raydistill.config.loader import apply_overrides, read_yaml
    from raydistill.config.presets import check_teacher
    from raydistill.config.run import Run
    from raydistill.config.run_paths import make_paths_absolute
    from raydistill.config.validation import validate

    path = DEMO_RUN if run == "demo" else Path(run)
    data, lines = read_yaml(path)
    if "run" in data:
        raise UserError(f"{path}: this is a space (it has `run`); search it with `raydistill sweep {path}`")
    checked = validate(Run, make_paths_absolute(apply_overrides(data, settings or [])), path, lines)
    if checked.teacher:
        check_teacher(checked.teacher)
    folder = raydistill_home() / "runs" / checked.name
    result = train_run(checked, folder)
    metrics = {**result["metrics"], **{f"test {k}": v for k, v in (result["test"] or {}).items() if k != "interval"}}
    rows = [[name, f"{value:.4g}"] for name, value in metrics.items() if isinstance(value, int | float)]
    print_text(format_table(["measure", checked.name], rows), as_json)
    if result["status"] == "failed":
        print_text(f"the run failed: {result['reason']}", as_json)
        print_json(result, as_json)
        raise typer.Exit(1)
    print_text(f"checkpoint: {folder / 'best'}", as_json)
    print_json({**result, "checkpoint": str(folder / "best")}, as_json)


def train_run(run: Any, folder: Path) -> dict[str, Any]:
    """Make what the run needs, train it under Ray Train, and tell of every validation as it comes."""
    from raydistill.cluster.start import cluster_device, ray_cluster
    from raydistill.core.files import read_json
    from raydistill.jobs.train import TrainJob, check_capacity, train_with_ray_train
    from raydistill.search.dry_run import check_run
    from raydistill.search.prepare import prepare_inputs
    from raydistill.training.run_folder import FINGERPRINTS_FILE, check_same_config, check_same_inputs
    from raydistill.training.tokenized_data import input_fingerprints

    if (folder / "run.json").is_file():
        check_same_config(folder, run)
    if (folder / FINGERPRINTS_FILE).is_file():
        check_same_inputs(folder, input_fingerprints(run))
    if (folder / "result.json").is_file():
        print_progress(f"{folder}: this run is finished already")
        return read_json(folder / "result.json")
    check_run(run)
    with ray_cluster():
        where = cluster_device()
        check_capacity(run, where)
        print_progress(f"run {run.name}: method {run.method} on {where}, in {folder}")
        inputs = prepare_inputs(run, where, folder)
        with MetricsFollower(folder):
            return train_with_ray_train(TrainJob(run, folder, inputs), device=where)


class MetricsFollower:
    """A block during which each new validation of the run in `folder` is told in one line."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.over = threading.Event()
        self.num_reported = len(self._read_lines())
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _read_lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []

    def _follow(self) -> None:
        import json

        while True:
            last = self.over.wait(1.0)
            with contextlib.suppress(UserError):  # the storage does not answer; it is asked again
                sync.pull(self.path)
            lines = self._read_lines()
            for line in lines[self.num_reported :]:
                m = json.loads(line)
                scores = ", ".join(f"{k} {m[k]:.2f}" for k in ("rouge2", "bleu") if k in m)
                print_progress(
                    f"  step {m['step']:>6}, epoch {m['epoch']:.2f}, {m['time_s']:.0f} s: "
                    f"loss {m['loss']:.3f}, validation loss {m['val_loss']:.3f}, {scores}"
                )
            self.num_reported = len(lines)
            if last:
                return


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.train import main as entry

    entry()

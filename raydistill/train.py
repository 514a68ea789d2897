"""`raydistill train`: trains a student or a teacher, launched by Ray Train."""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raydistill._app import make_app, run_app
from raydistill.cluster import snapshots
from raydistill.config.metric_names import VALIDATION_LOSS
from raydistill.core.console import ProgressBar, format_table, print_json, print_progress, print_text
from raydistill.core.errors import UserError
from raydistill.core.last_error import record_error
from raydistill.core.paths import raydistill_home

if TYPE_CHECKING:
    import pandas as pd

    from raydistill.config.run import Run
    from raydistill.config.validation import KeyPath
    from raydistill.training.records import RunProgress, RunResult, Validation

app = make_app()
DEMO_RUN = Path(__file__).parent / "data" / "demo_teacher.yaml"


@dataclass(frozen=True)
class TrainResult:
    """The result of `train`.

    Attributes:
        folder: The run's folder.
        result: Scores, costs and status of the run.
    """

    folder: Path
    result: "RunResult"

    @property
    def checkpoint(self) -> Path | None:
        """The best checkpoint, which `from_pretrained` reads; None if the run failed."""
        return self.folder / "best" if self.result.scored else None

    def to_pandas(self) -> "pd.DataFrame":
        """One row per validation: step, epoch, losses and scores."""
        import pandas as pd

        from raydistill.training.records import read_history

        return pd.DataFrame([validation.numbers for validation in read_history(self.folder)])


def train(run: "str | Path | Mapping[str, Any] | Run", settings: Sequence[str] = ()) -> TrainResult:
    """Train a run, or resume it. Results are in `outputs/runs/NAME`.

    Args:
        run: A run file, the content of such a file, a run, or "demo" for the demo's teacher.
        settings: Changes of values, as "KEY=VALUE".

    Raises:
        UserError: The run is not valid, its folder holds another run, or its inputs changed.
    """
    from raydistill.config.run import Run

    if isinstance(run, str | Path):
        config = load_run(DEMO_RUN if run == "demo" else Path(run), list(settings))
    else:
        data = run.model_dump(mode="json", exclude_unset=True) if isinstance(run, Run) else dict(run)
        config = parse_run(data, "run", {}, list(settings))
    folder = raydistill_home() / "runs" / config.name
    return TrainResult(folder, train_run(config, folder))


@app.command("train")
def train_command(
    run: Annotated[str, typer.Argument(help="the run's YAML file, or `demo`: the demo's teacher")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a value of the file")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Train one student of a teacher, fine-tune a teacher, or train a new model from a random start.

    The same command resumes an interrupted run. The checkpoint is `outputs/runs/NAME/best`.

    Example: `raydistill train demo`, or `raydistill train run.yaml --set training.learning_rate=1e-4` with

        name: my-student
        teacher: facebook/bart-large-xsum
        dataset: xsum
        method: kd
        student: {size: 12-3}
    """
    from raydistill.training.records import repetition_warning

    trained = train(run, settings or [])
    folder, result = trained.folder, trained.result
    name = folder.name
    print_text(format_table(["measure", name], metric_rows(result)), as_json)
    if not result.scored:
        print_text(f"the run failed: {result.reason}", as_json)
        print_json(result.to_json(), as_json)
        raise typer.Exit(1)
    if warning := repetition_warning(name, result.metrics.get("repetition")):
        print_progress(warning)
    print_text(f"checkpoint: {folder / 'best'}", as_json)
    print_json({**result.to_json(), "checkpoint": str(folder / "best")}, as_json)


def load_run(path: Path, settings: list[str]) -> Any:
    """The validated run of a YAML file, with the changed `settings`.

    Raises:
        UserError: The file is a space file, or a setting is not valid.
    """
    from raydistill.config.loader import read_yaml

    data, lines = read_yaml(path)
    return parse_run(data, path, lines, settings)


def parse_run(data: dict[str, Any], path: Path | str, lines: "dict[KeyPath, int]", settings: list[str]) -> "Run":
    """The validated run of the content of a run file; `path` and `lines` are for messages."""
    from raydistill.config.loader import apply_overrides
    from raydistill.config.presets import check_teacher
    from raydistill.config.run import Run
    from raydistill.config.run_paths import make_paths_absolute
    from raydistill.config.setting_keys import complete_overrides, key_tree
    from raydistill.config.validation import validate

    if "run" in data:
        raise UserError(f"{path}: this is a space file (it has `run`); search it with `raydistill sweep {path}`")
    data = apply_overrides(data, complete_overrides(settings, key_tree(Run), path))
    run = validate(Run, make_paths_absolute(data), path, lines)
    if run.teacher:
        check_teacher(run.teacher)
    return run


def metric_rows(result: "RunResult") -> list[list[str]]:
    """The rows of the table of a result: validation metrics and costs, then test metrics."""
    test = {f"test {name}": value for name, value in result.test.metrics.items()} if result.test else {}
    return [[name, f"{value:.4g}"] for name, value in {**result.metrics, **test}.items()]


def train_run(run: Any, folder: Path) -> "RunResult":
    """Prepare the inputs of a run and train it under Ray Train, with a line for every validation.

    Returns:
        The run's result.
    """
    from raydistill.cluster.start import cluster_device, ray_cluster
    from raydistill.jobs.run_inputs import prepare_run_inputs
    from raydistill.jobs.train import TrainJob, check_capacity, train_with_ray_train
    from raydistill.training.preflight import check_run
    from raydistill.training.records import FINGERPRINTS_FILE, RESULT_FILE, RUN_FILE, RunResult
    from raydistill.training.run_folder import check_same_config, check_same_inputs
    from raydistill.training.tokenized_data import choose_metrics, input_fingerprints

    snapshots.pull(folder)
    if (folder / RUN_FILE).is_file():
        check_same_config(folder, run)
    if (folder / FINGERPRINTS_FILE).is_file():
        check_same_inputs(folder, input_fingerprints(run))
    if result := RunResult.read_if_present(folder / RESULT_FILE):
        print_progress(f"{folder}: this run is finished; nothing to train")
        return result
    check_run(run)
    with ray_cluster():
        device = cluster_device()
        check_capacity(run, device)
        print_progress(f"run {run.name}: method {run.method} on {device}, in {folder}")
        print_progress(choose_metrics(run).describe())  # what Ray's processes print is not shown
        inputs = prepare_run_inputs(run, device, folder)
        snapshots.save(folder)
        with record_error(folder), RunFollower(folder):
            return train_with_ray_train(TrainJob(run, folder, inputs), device=device)


class RunFollower:
    """Context manager that shows the progress of the run in `folder`: a bar of its steps, and a line per validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.closed = threading.Event()
        self.num_reported = len(self._read_history())
        self.shown = self._read_progress()  # of an earlier process
        self.bar: ProgressBar | None = None
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        self.thread.join()

    def _read_history(self) -> "list[Validation]":
        from raydistill.training.records import read_history

        return read_history(self.folder)

    def _read_progress(self) -> "RunProgress | None":
        from raydistill.training.records import PROGRESS_FILE, RunProgress

        return RunProgress.read_if_present(self.folder / PROGRESS_FILE)

    def _follow(self) -> None:
        while True:
            is_last = self.closed.wait(1.0)
            # The storage or the disk is unavailable, or a line is damaged: the next iteration tries again
            with contextlib.suppress(UserError, OSError):
                snapshots.pull_records(self.folder)
            with contextlib.suppress(UserError, OSError):
                history = self._read_history()
                for validation in history[self.num_reported :]:
                    print_progress(_describe_validation(validation))
                self.num_reported = len(history)
            with contextlib.suppress(UserError, OSError):
                self._show_steps(self._read_progress())
            if is_last:
                if self.bar:
                    self.bar.close()
                return

    def _show_steps(self, progress: "RunProgress | None") -> None:
        """Update the bar; start it at the first record of a process, which is new or was restarted."""
        if progress is None or (self.shown and progress.updated_at == self.shown.updated_at):
            return
        if self.bar is None or self.shown is None or progress.step < self.shown.step:
            start = progress.resumed_step
            resumes = f"resuming from step {start:,} of" if start else "training"
            print_progress(f"  {resumes} {progress.total_steps:,} steps")
            if self.bar:
                self.bar.close()
            self.bar = ProgressBar("training", progress.total_steps, progress.step)
        elif progress.steps_per_s:
            note = f"step {progress.step:,} of {progress.total_steps:,}, {progress.steps_per_s:.2f} steps/s"
            self.bar.advance(progress.step - self.shown.step, note)
        self.shown = progress


def _describe_validation(validation: "Validation") -> str:
    numbers = validation.numbers
    losses = {"loss": numbers.get("loss"), "validation loss": validation.val_loss}
    parts = [f"{name} {value:.3f}" for name, value in losses.items() if value is not None]
    if validation.metric != VALIDATION_LOSS:
        parts.append(f"{validation.metric} {validation.score:.2f}")
    progress = f"step {validation.step:>6}, epoch {validation.epoch:.2f}, {validation.time_s:.0f} s"
    return f"  {progress}: {', '.join(parts)}"


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.train import main as entry

    entry()

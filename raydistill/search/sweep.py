"""A whole sweep, from its space to exported and registered students. Start reading here.

A sweep has five steps:

    prepare (prepare.py)       score the teacher, time the shapes, write label sets and the teacher cache
    search (tune_search.py)    train the trials that Optuna proposes (study.py, trial.py)
    serve (finalists.py)       score and time the best trials in several serving configurations
    repeat (seeds.py)          train the chosen students and their nearest rivals with further seeds, if asked for
    publish (this file)        export the chosen students, print the summary, write the page, update MLflow

Every step keeps its results in the sweep's folder and does only what is missing, so a sweep that was killed is resumed
by the same command.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raydistill.cluster import snapshots
from raydistill.cluster.start import cluster_device, ray_cluster
from raydistill.config.space import Space
from raydistill.core.console import print_progress
from raydistill.core.errors import TransientError, UserError
from raydistill.core.last_error import record_error
from raydistill.results.formatting import format_count
from raydistill.results.page import write_report
from raydistill.results.records import count_finished_trials
from raydistill.results.selection import Selection, load_selection
from raydistill.results.sweep_record import StopReason
from raydistill.search.finalists import all_served, serve_finalists
from raydistill.search.prepare import PreparedSweep, prepare
from raydistill.search.progress import ProgressCallback
from raydistill.search.seeds import all_repeated, repeat_with_seeds
from raydistill.search.summary import format_summary, summary_record
from raydistill.search.sweep_folder import load_prepared, search_stop_reason, sweep_lock, write_sweep_record
from raydistill.search.trial import TrialContext
from raydistill.search.tune_search import run_search
from raydistill.tracking.export import export_student
from raydistill.tracking.mlflow_registry import register_choice
from raydistill.tracking.mlflow_runs import SearchPublisher, publish
from raydistill.tracking.mlflow_store import TrackingUnavailable, ui_command
from raydistill.training.preflight import check_space

# Seconds between publications; each takes some seconds of a core that could train.
PUBLISH_INTERVAL_S = 60.0


def run_sweep(space: Space, folder: Path, echo: Callable[[str], None]) -> dict[str, Any]:
    """Run or resume a sweep.

    Args:
        space: What to search.
        folder: The sweep's folder.
        echo: Prints results; progress goes to stderr.

    Returns:
        The summary that the command prints under `--json`.

    Raises:
        UserError: The space cannot be searched, differs from the one that the folder was started with, or another
            process is running the sweep.
    """
    start_time = time.monotonic()
    check_space(space)
    with sweep_lock(space, folder), record_error(folder):
        stop_reason = search_stop_reason(space, folder)
        if stop_reason is None:
            with ray_cluster():
                device = cluster_device()
                prepared, stop_reason = _prepare_and_search(space, folder, device, start_time)
                serve_finalists(space, folder, prepared.teacher, device)
                repeat_with_seeds(TrialContext(space, folder, prepared, device))
        else:
            print_progress(f"sweep {space.name}: {_describe_finished_search(stop_reason)}; nothing to run, in {folder}")
            prepared = load_prepared(space, folder)
            # The command's budgets count, and may make other trials finalists
            write_sweep_record(space, folder, prepared, "running", stop_reason)
            _serve_and_repeat(space, folder, prepared)
        write_sweep_record(space, folder, prepared, "finished", stop_reason)
        summary = export_and_publish(load_selection(folder), echo)
        snapshots.save(folder)
        return summary


def _serve_and_repeat(space: Space, folder: Path, prepared: PreparedSweep) -> None:
    """Do what is missing of the steps after a search. Ray is started only if something is missing."""
    if not all_served(space, folder, prepared.teacher):
        with ray_cluster():
            serve_finalists(space, folder, prepared.teacher, cluster_device())
    if not all_repeated(space, folder):
        with ray_cluster():
            device = cluster_device()
            repeat_with_seeds(TrialContext(space, folder, prepare(space, folder, device), device))


def _describe_finished_search(stop_reason: StopReason) -> str:
    return f"the search ended ({stop_reason.message})" if stop_reason.message else "all trials finished"


def _prepare_and_search(space: Space, folder: Path, device: str, start_time: float) -> tuple[PreparedSweep, StopReason]:
    """Prepare what is missing and run the remaining trials, while MLflow is kept up to date.

    `start_time`: when the command started, by the monotonic clock.
    """
    print_progress(f"sweep {space.name}: {format_count(space.search.trials, 'trial')} on {device}, in {folder}")
    prepared = prepare(space, folder, device)
    write_sweep_record(space, folder, prepared, "running")
    setup_s = time.monotonic() - start_time
    progress = ProgressCallback(folder, space.search, prepared.teacher.metric, setup_s)
    snapshots.save(folder)
    with publish_periodically(folder):
        stop_reason = run_search(TrialContext(space, folder, prepared, device), [progress], start_time)
    snapshots.pull_records(folder / "trials")
    if stop_reason.message:
        num_finished = count_finished_trials(folder)
        print_progress(f"the search ends after {num_finished} of {space.search.trials} trials: {stop_reason.message}")
    return prepared, stop_reason


@contextlib.contextmanager
def publish_periodically(folder: Path) -> Iterator[None]:
    """Publish to MLflow in a thread every `PUBLISH_INTERVAL_S` seconds, until the block ends.

    An error is printed once and does not end the sweep; what is missing is published at the end.
    """
    stop = threading.Event()

    def work() -> None:
        warned, publisher = False, SearchPublisher(folder)
        while not stop.wait(PUBLISH_INTERVAL_S):
            try:
                snapshots.pull_records(folder / "trials")
                publisher.publish()
            except Exception as error:  # no error of MLflow may end hours of training
                if not warned:
                    print_progress(f"  MLflow: {error} (the sweep continues and publishes what is missing at the end)")
                warned = True

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def export_and_publish(selection: Selection, echo: Callable[[str], None]) -> dict[str, Any]:
    """Export the chosen students and print the summary; then write the page and update MLflow.

    In this order, so that neither a full disk nor an unavailable tracking server loses a student or the table.

    Returns:
        `summary_record` with the sweep's folder, the exports, the keys of failed trials, and whether the sweep is
        complete: no trial failed and every chosen student was exported.
    """
    exports, problems = export_selected(selection)
    unfinished = [trial for trial in selection.trials if trial.status == "running"]
    shapes, budgets = selection.record.shapes, selection.record.budgets
    abandoned = [trial.key for trial in unfinished if shapes.is_infeasible(trial.requested_shape().name, budgets)]
    failed = [trial.key for trial in unfinished if trial.key not in abandoned]
    echo("\n".join([format_summary(selection, failed, abandoned), *problems]))
    write_report(selection)
    echo(f"\n{_publish_to_mlflow(selection, exports, finished=not failed)}")
    return {
        "sweep": str(selection.sweep),
        "failed": failed,
        "exports": {budget: str(path) for budget, path in exports.items()},
        "complete": not failed and not problems,
        **summary_record(selection),
    }


def export_selected(selection: Selection) -> tuple[dict[str, Path], list[str]]:
    """Export the student of each budget: the folders by budget, and a line for each student that cannot be exported."""
    exports, problems = {}, []
    for budget, key in selection.chosen_keys.items():
        if key:
            try:
                exports[budget] = export_student(selection, key)
            except (UserError, OSError) as error:
                problems.append(f"{budget}: {key} is not exported: {error}")
    return exports, problems


def _publish_to_mlflow(selection: Selection, exports: dict[str, Path], finished: bool) -> str:
    """Publish the sweep, register the exported students, and return a line on how to open MLflow."""
    try:
        published = publish(selection.sweep, finished=finished)
        versions = [
            register_choice(selection.sweep, str(selection.chosen_keys[budget]), budget, path)
            for budget, path in exports.items()
        ]
    except (TrackingUnavailable, TransientError) as error:
        return f"MLflow: {error}; run the same command again to publish"
    lines = [
        f"to open MLflow: {ui_command(selection.record.tracking_uri)}",
        f"  trials: {published.url}",
        f"  choices: {published.parent_url}",
        *(f"  {version.alias}: {version.url}" for version in versions),
    ]
    return "\n".join(lines)

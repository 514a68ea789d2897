"""A whole sweep: claim its folder, prepare, search, judge, publish. Every part goes on where a killed one was."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from raydistill.cluster import sync
from raydistill.cluster.start import cluster_device, ray_cluster
from raydistill.config.loader import read_yaml
from raydistill.config.run import RUNTIME_ONLY_FIELDS
from raydistill.config.space import Space
from raydistill.core.console import format_table, print_progress
from raydistill.core.errors import TransientError, UserError
from raydistill.core.files import corrupt_file_error, write_atomic, write_json_atomic
from raydistill.results.page import write_report
from raydistill.results.records import device_hours, read_sweep
from raydistill.results.selection import Selection, load_selection
from raydistill.results.tables import format_trial_counts, result_tables
from raydistill.search.dry_run import check_space, count_finished_trials
from raydistill.search.finalists import all_served, serve_finalists
from raydistill.search.prepare import PreparedSweep, prepare
from raydistill.search.progress import ProgressCallback
from raydistill.search.study import StopReason
from raydistill.search.tune_search import is_infeasible, run_search
from raydistill.tracking.export import export_student
from raydistill.tracking.mlflow_registry import register_choice
from raydistill.tracking.mlflow_runs import publish
from raydistill.tracking.mlflow_store import TrackingUnavailable, default_tracking_uri, ui_command

PUBLISH_INTERVAL_S = 20.0


def run_sweep(space: Space, folder: Path, echo: Callable[[str], None]) -> dict[str, Any]:
    """Carry out the sweep in `folder`; tells what the command prints and returns what it hands on under `--json`."""
    begun = time.monotonic()
    check_space(space)
    with sweep_lock(space, folder):
        ended = search_stop_reason(space, folder)
        prepared = load_prepared(folder) if ended else None
        if prepared:
            print_progress(
                f"sweep {space.name}: {count_finished_trials(folder)} trials are over, and none is to come; in {folder}"
            )
            write_sweep_record(space, folder, prepared, "running", ended)  # other budgets may make other finalists
        if prepared is None or not all_served(space, folder, prepared.teacher):
            with ray_cluster():
                where = cluster_device()
                if prepared is None:
                    prepared, ended = _prepare_and_search(space, folder, where, begun)
                serve_finalists(space, folder, prepared.teacher, where)
        write_sweep_record(space, folder, prepared, "finished", ended)
        told = export_and_publish(load_selection(folder), prepared, echo)
        sync.push(folder)
        return told


def export_and_publish(selection: Selection, prepared: PreparedSweep, echo: Callable[[str], None]) -> dict[str, Any]:
    """Export the choices, tell of everything, and only then draw and publish.

    In this order, since neither a tracking server that is down nor a full disk should keep a student or the table.
    """
    exports, problems = export_selected(selection)
    unfinished = [trial for trial in selection.trials if trial.status == "running"]
    left = [
        trial.key for trial in unfinished if is_infeasible(trial.size or None, selection.record["budgets"], prepared)
    ]
    died = [trial.key for trial in unfinished if trial.key not in left]
    echo("\n".join([format_summary(selection, prepared, died, left), *problems]))
    write_report(selection)
    echo(f"\n{_publish_to_mlflow(selection, exports, finished=not died)}")
    places = {budget: str(place) for budget, place in exports.items()}
    whole = not died and not problems
    return {
        "sweep": str(selection.sweep),
        "died": died,
        "exports": places,
        "whole": whole,
        **summary_record(selection, prepared),
    }


def export_selected(selection: Selection) -> tuple[dict[str, Path], list[str]]:
    """The folder of each budget's student, and a line for each that could not be made."""
    exports, problems = {}, []
    for budget, key in selection.chosen_keys.items():
        if key:
            try:
                exports[budget] = export_student(selection, key)
            except (UserError, OSError) as error:
                problems.append(f"{budget}: {key} is not exported: {error}")
    return exports, problems


def _prepare_and_search(space: Space, folder: Path, device: str, start_time: float) -> tuple[PreparedSweep, StopReason]:
    """Prepare what is missing and run the trials that are to come, with MLflow kept up to date.

    `start_time`: when the command began, by the monotonic clock.
    """
    print_progress(f"sweep {space.name}: {space.search.trials} trials on {device}, in {folder}")
    prepared = prepare(space, folder, device)
    write_sweep_record(space, folder, prepared, "running")
    watch = ProgressCallback(folder, space.search, prepared.teacher["metric"], setup_s=time.monotonic() - start_time)
    sync.push(folder)
    with publish_periodically(folder):
        ended = run_search(space, folder, prepared, device, [watch], start_time=start_time)
    sync.pull(folder / "trials", patterns=sync.RECORD_PATTERNS)
    if ended.why:
        print_progress(
            f"the search ends after {count_finished_trials(folder)} of {space.search.trials} trials: {ended.why}"
        )
    return prepared, ended


def search_stop_reason(space: Space, folder: Path) -> StopReason | None:
    """How a sweep's search ended, if no trial is to come; None while some are."""
    if not (folder / "sweep.json").is_file():
        return None
    if count_finished_trials(folder) >= space.search.trials:
        return StopReason()
    most = space.search.max_device_hours
    if most is not None and device_hours(folder) >= most:
        return StopReason(f"its {most:g} device-hours are used up")
    info = read_sweep(folder)
    before = StopReason(**info.get("ended", {}))
    # Other budgets or fewer beams may admit shapes that were not
    same = info["budgets"] == space.budgets and info.get("decoding") == space.search.decoding.model_dump()
    return before if before.exhausted and same else None


def load_prepared(folder: Path) -> PreparedSweep:
    """What a finished sweep was prepared with, as its sweep.json tells."""
    info = read_sweep(folder)
    return PreparedSweep(info["teacher"], info["shapes"], info.get("shapes_fewest_beams", info["shapes"]))


@contextlib.contextmanager
def sweep_lock(space: Space, folder: Path) -> Iterator[None]:
    """The sweep's folder, for one process at a time, and only for the space that it was begun with."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another process is at work on this sweep; wait for it, or end it first") from None
    try:
        sync.pull(folder, patterns=sync.RECORD_PATTERNS)
        path = folder / "space.yaml"
        asked = space.model_dump(mode="json")
        if path.is_file() and (folder / "trials").is_dir():  # before the first trial the space may still change
            before = read_yaml(path)[0]
            with corrupt_file_error(
                path, "Delete this file, if the space is still the one that the sweep was begun with"
            ):
                changed = (
                    ["run"] if without_runtime_fields(before["run"]) != without_runtime_fields(asked["run"]) else []
                )
                changed += ["points"] if before.get("points") != asked["points"] else []
                changed += [f"search.{k}" for k in ("sampler", "cost") if before["search"][k] != asked["search"][k]]
            if changed:
                raise UserError(
                    f"{folder}: this sweep was begun with another {' and '.join(changed)}; trials of two spaces are "
                    f"not mixed: give the space another name (--set name=...), or delete the folder"
                )
        write_atomic(path, yaml.safe_dump(asked, sort_keys=False, allow_unicode=True).encode())
        yield
    finally:
        lock.release()


def without_runtime_fields(run: dict[str, Any]) -> dict[str, Any]:
    """A space's run without what tells how a trial is computed and not what comes of it: that may change on the way."""
    sections = {
        name: {k: v for k, v in run.get(name, {}).items() if k not in settings}
        for name, settings in RUNTIME_ONLY_FIELDS.items()
    }
    return {name: value for name, value in (run | sections).items() if value != {}}


def write_sweep_record(
    space: Space, folder: Path, prepared: PreparedSweep, status: str, stop_reason: StopReason | None = None
) -> None:
    """Write sweep.json: what tables, choices and MLflow need beside the trials, and why no trial is to come."""
    teacher = prepared.teacher
    write_json_atomic(
        folder / "sweep.json",
        {
            "name": space.name,
            "status": status,
            "ended": asdict(stop_reason or StopReason()),
            "metric": teacher["metric"],
            "teacher": teacher,
            "teacher_gpu_hours": teacher["teacher_gpu_hours"],
            "dataset": {"fingerprints": teacher["data"], "rows": teacher["rows"]},
            "baseline": teacher["baseline"],
            "shapes": prepared.shape_costs,
            "shapes_fewest_beams": prepared.shape_costs_fewest_beams,
            "budgets": space.budgets,
            "decoding": space.search.decoding.model_dump(),
            "tracking_uri": space.tracking_uri or default_tracking_uri(),
            "versions": {name: version(name) for name in ("raydistill", "torch", "transformers", "ray", "optuna")},
        },
    )


@contextlib.contextmanager
def publish_periodically(folder: Path) -> Iterator[None]:
    """A block during which MLflow is kept up to date; a store that is down is told of once and costs nothing."""
    over = threading.Event()

    def work() -> None:
        told = False
        while not over.wait(PUBLISH_INTERVAL_S):
            try:
                sync.pull(folder / "trials", patterns=sync.RECORD_PATTERNS)
                publish(folder)
            except Exception as error:  # a fault in publishing must not end a sweep of hours; it is tried again
                if not told:
                    print_progress(f"  MLflow: {error} (the sweep goes on; what is missing is published at the end)")
                told = True

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def format_summary(
    selection: Selection, prepared: PreparedSweep, failed_keys: list[str], infeasible_keys: list[str]
) -> str:
    """The table with front and choices, the teacher, and where the picture is.

    `failed_keys`: keys of trials that are still to come. `infeasible_keys`: of those that were under way when their
    shape had a budget.
    """
    teacher = {**prepared.teacher, "costs": selection.teacher["costs"]}
    metric = selection.metric
    test = teacher["test"]
    ended = selection.record["ended"]["why"]
    lines = [
        f"sweep {selection.name}: {format_trial_counts(selection.trials)}{f' ({ended})' if ended else ''}",
        f"teacher {teacher['name']} ({teacher['size']}): {metric} {teacher['metrics'][metric]:.2f} on validation"
        + (f", {test[metric]:.2f} [{test['interval'][0]:.2f}, {test['interval'][1]:.2f}] on test" if test else "")
        + f", {teacher['costs']['latency_ms']:.1f} ms for 32, {teacher['costs']['params_m']:.2f} M parameters",
    ]
    if teacher["baseline"]:
        lines.append(f"first sentence as summary (Lead-1): {metric} {teacher['baseline']['lead1'][metric]:.2f} on test")
    trials, *finalists = result_tables(selection)
    lines += ["", format_table(*trials), ""]
    for students in finalists:
        lines += ["finalists as they serve, on real rows:", format_table(*students), ""]
    for name, choice in selection.choices.items():
        lines.append(f"{name}: {choice.reason}")
    if failed_keys:
        lines.append(
            f"{len(failed_keys)} trials died ({', '.join(failed_keys)}): run the same command to take them up again"
        )
    if infeasible_keys:
        lines.append(
            f"{len(infeasible_keys)} trials are left half-way ({', '.join(infeasible_keys)}): no budget admits "
            f"their shape any more"
        )
    lines += ["", f"front: {selection.sweep / 'front.html'} (and front.png)", f"table: {selection.sweep / 'table.md'}"]
    if any(selection.chosen_keys.values()):
        lines.append(f"chosen students: {selection.sweep / 'exports'}")
    return "\n".join(lines)


def summary_record(selection: Selection, prepared: PreparedSweep) -> dict[str, Any]:
    """The same for machines."""
    return {
        "name": selection.name,
        "metric": selection.metric,
        "ended": selection.record["ended"]["why"],
        "teacher": prepared.teacher,
        "front": list(dict.fromkeys(selection.trial_key(key) for key in selection.front_keys)),
        "choices": {name: selection.trial_key(key) if key else None for name, key in selection.chosen_keys.items()},
        "decodings": {
            name: selection.student(key).decoding if key else None for name, key in selection.chosen_keys.items()
        },
        "finalists": [
            {
                "key": t.folder.name,
                "decoding": t.decoding,
                "metrics": t.metrics,
                "interval": t.interval,
                "test": t.test,
                "front": t.key in selection.front_keys,
            }
            for t in selection.students
            if t.decoding
        ],
        "trials": [
            {
                "key": t.key,
                "status": t.status,
                "reason": t.reason,
                "method": t.method,
                "size": t.size,
                "metrics": t.metrics,
                "interval": t.interval,
                "test": t.test,
                "chosen": t.chosen,
            }
            for t in selection.trials
        ],
    }


def _publish_to_mlflow(selection: Selection, exports: dict[str, Path], finished: bool) -> str:
    """Bring MLflow up to date and register what was exported; returns the line that says how to look at it."""
    try:
        tracked = publish(selection.sweep, finished=finished)
        for budget, place in exports.items():
            register_choice(selection.sweep, str(selection.chosen_keys[budget]), budget, place)
    except (TrackingUnavailable, TransientError) as error:
        return f"MLflow: {error}; run the same command again to publish"
    return f"to look at it: {ui_command(selection.record.get('tracking_uri'))}\n{tracked.url}"

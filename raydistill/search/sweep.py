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
from raydistill.cluster.start import cluster, device
from raydistill.config.loader import read_yaml
from raydistill.config.run import HOW
from raydistill.config.space import Space
from raydistill.core.console import progress, table
from raydistill.core.errors import PassingError, UserError
from raydistill.core.files import damage_told, write_atomic, write_json_atomic
from raydistill.results.page import write_report
from raydistill.results.records import device_hours, read_sweep
from raydistill.results.selection import Outcome, outcome
from raydistill.results.tables import count_trials, result_tables
from raydistill.search.dry_run import check_space, trials_over
from raydistill.search.finalists import is_served, serve_finalists
from raydistill.search.prepare import Prepared, prepare
from raydistill.search.progress import Watch
from raydistill.search.study import Ending
from raydistill.search.tune_search import is_barred, search
from raydistill.tracking.export import export
from raydistill.tracking.mlflow_registry import register_choice
from raydistill.tracking.mlflow_runs import publish
from raydistill.tracking.mlflow_store import TrackingDown, default_uri, ui_command

PUBLISH_EVERY_S = 20.0


def run_sweep(space: Space, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Carry out the sweep in `folder`; tells what the command prints and returns what it hands on under `--json`."""
    begun = time.monotonic()
    check_space(space)
    with claimed(space, folder):
        ended = no_more_trials(space, folder)
        prepared = as_prepared(folder) if ended else None
        if prepared:
            progress(f"sweep {space.name}: {trials_over(folder)} trials are over, and none is to come; in {folder}")
            describe_sweep(space, folder, prepared, "running", ended)  # other budgets may make other finalists
        if prepared is None or not is_served(space, folder, prepared.teacher):
            with cluster():
                where = device()
                if prepared is None:
                    prepared, ended = _searched(space, folder, where, begun)
                serve_finalists(space, folder, prepared.teacher, where)
        describe_sweep(space, folder, prepared, "finished", ended)
        told = hand_over(outcome(folder), prepared, tell)
        sync.keep(folder)
        return told


def hand_over(found: Outcome, prepared: Prepared, tell: Callable[[str], None]) -> dict[str, Any]:
    """Export the choices, tell of everything, and only then draw and publish.

    In this order, since neither a tracking server that is down nor a full disk should keep a student or the table.
    """
    exports, problems = export_choices(found)
    unfinished = [trial for trial in found.trials if trial.status == "running"]
    left = [trial.key for trial in unfinished if is_barred(trial.size or None, found.info["budgets"], prepared)]
    died = [trial.key for trial in unfinished if trial.key not in left]
    tell("\n".join([summary(found, prepared, died, left), *problems]))
    write_report(found)
    tell(f"\n{_publish(found, exports, finished=not died)}")
    places = {budget: str(place) for budget, place in exports.items()}
    whole = not died and not problems
    return {"sweep": str(found.sweep), "died": died, "exports": places, "whole": whole, **as_data(found, prepared)}


def export_choices(found: Outcome) -> tuple[dict[str, Path], list[str]]:
    """The folder of each budget's student, and a line for each that could not be made."""
    exports, problems = {}, []
    for budget, key in found.chosen.items():
        if key:
            try:
                exports[budget] = export(found, key)
            except (UserError, OSError) as error:
                problems.append(f"{budget}: {key} is not exported: {error}")
    return exports, problems


def _searched(space: Space, folder: Path, where: str, begun: float) -> tuple[Prepared, Ending]:
    """Prepare what is missing and run the trials that are to come, with MLflow kept up to date.

    `begun`: when the command began, by the monotonic clock.
    """
    progress(f"sweep {space.name}: {space.search.trials} trials on {where}, in {folder}")
    prepared = prepare(space, folder, where)
    describe_sweep(space, folder, prepared, "running")
    watch = Watch(folder, space.search, prepared.teacher["metric"], prepared_s=time.monotonic() - begun)
    sync.keep(folder)
    with publishing(folder):
        ended = search(space, folder, prepared, where, [watch], begun=begun)
    sync.fetch(folder / "trials", names=sync.RECORDS)
    if ended.why:
        progress(f"the search ends after {trials_over(folder)} of {space.search.trials} trials: {ended.why}")
    return prepared, ended


def no_more_trials(space: Space, folder: Path) -> Ending | None:
    """How a sweep's search ended, if no trial is to come; None while some are."""
    if not (folder / "sweep.json").is_file():
        return None
    if trials_over(folder) >= space.search.trials:
        return Ending()
    most = space.search.max_device_hours
    if most is not None and device_hours(folder) >= most:
        return Ending(f"its {most:g} device-hours are used up")
    info = read_sweep(folder)
    before = Ending(**info.get("ended", {}))
    # Other budgets or fewer beams may admit shapes that were not
    same = info["budgets"] == space.budgets and info.get("decoding") == space.search.decoding.model_dump()
    return before if before.exhausted and same else None


def as_prepared(folder: Path) -> Prepared:
    """What a finished sweep was prepared with, as its sweep.json tells."""
    info = read_sweep(folder)
    return Prepared(info["teacher"], info["shapes"], info.get("shapes_fewest_beams", info["shapes"]))


@contextlib.contextmanager
def claimed(space: Space, folder: Path) -> Iterator[None]:
    """The sweep's folder, for one process at a time, and only for the space that it was begun with."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another process is at work on this sweep; wait for it, or end it first") from None
    try:
        sync.fetch(folder, names=sync.RECORDS)
        path = folder / "space.yaml"
        asked = space.model_dump(mode="json")
        if path.is_file() and (folder / "trials").is_dir():  # before the first trial the space may still change
            before = read_yaml(path)[0]
            with damage_told(path, "Delete this file, if the space is still the one that the sweep was begun with"):
                changed = ["run"] if without_how(before["run"]) != without_how(asked["run"]) else []
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


def without_how(run: dict[str, Any]) -> dict[str, Any]:
    """A space's run without what tells how a trial is computed and not what comes of it: that may change on the way."""
    sections = {
        name: {k: v for k, v in run.get(name, {}).items() if k not in settings} for name, settings in HOW.items()
    }
    return {name: value for name, value in (run | sections).items() if value != {}}


def describe_sweep(space: Space, folder: Path, prepared: Prepared, status: str, ended: Ending | None = None) -> None:
    """Write sweep.json: what tables, choices and MLflow need beside the trials, and why no trial is to come."""
    teacher = prepared.teacher
    write_json_atomic(
        folder / "sweep.json",
        {
            "name": space.name,
            "status": status,
            "ended": asdict(ended or Ending()),
            "metric": teacher["metric"],
            "teacher": teacher,
            "teacher_gpu_hours": teacher["teacher_gpu_hours"],
            "dataset": {"fingerprints": teacher["data"], "rows": teacher["rows"]},
            "baseline": teacher["baseline"],
            "shapes": prepared.shapes,
            "shapes_fewest_beams": prepared.shapes_fewest_beams,
            "budgets": space.budgets,
            "decoding": space.search.decoding.model_dump(),
            "tracking_uri": space.tracking_uri or default_uri(),
            "versions": {name: version(name) for name in ("raydistill", "torch", "transformers", "ray", "optuna")},
        },
    )


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[None]:
    """A block during which MLflow is kept up to date; a store that is down is told of once and costs nothing."""
    over = threading.Event()

    def work() -> None:
        told = False
        while not over.wait(PUBLISH_EVERY_S):
            try:
                sync.fetch(folder / "trials", names=sync.RECORDS)
                publish(folder, bring=sync.fetch)
            except Exception as error:  # a fault in publishing must not end a sweep of hours; it is tried again
                if not told:
                    progress(f"  MLflow: {error} (the sweep goes on; what is missing is published at the end)")
                told = True

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def summary(found: Outcome, prepared: Prepared, died: list[str], left: list[str]) -> str:
    """The table with front and choices, the teacher, and where the picture is.

    `died`: keys of trials that are still to come. `left`: of those that were under way when their shape had a budget.
    """
    teacher = {**prepared.teacher, "costs": found.teacher["costs"]}
    metric = found.metric
    test = teacher["test"]
    ended = found.info["ended"]["why"]
    lines = [
        f"sweep {found.name}: {count_trials(found.trials)}{f' ({ended})' if ended else ''}",
        f"teacher {teacher['name']} ({teacher['size']}): {metric} {teacher['metrics'][metric]:.2f} on validation"
        + (f", {test[metric]:.2f} [{test['interval'][0]:.2f}, {test['interval'][1]:.2f}] on test" if test else "")
        + f", {teacher['costs']['latency_ms']:.1f} ms for 32, {teacher['costs']['params_m']:.2f} M parameters",
    ]
    if teacher["baseline"]:
        lines.append(f"first sentence as summary (Lead-1): {metric} {teacher['baseline']['lead1'][metric]:.2f} on test")
    trials, *finalists = result_tables(found)
    lines += ["", table(*trials), ""]
    for students in finalists:
        lines += ["finalists as they serve, on real rows:", table(*students), ""]
    for name, choice in found.choices.items():
        lines.append(f"{name}: {choice.reason}")
    if died:
        lines.append(f"{len(died)} trials died ({', '.join(died)}): run the same command to take them up again")
    if left:
        lines.append(f"{len(left)} trials are left half-way ({', '.join(left)}): no budget admits their shape any more")
    lines += ["", f"front: {found.sweep / 'front.html'} (and front.png)", f"table: {found.sweep / 'table.md'}"]
    if any(found.chosen.values()):
        lines.append(f"chosen students: {found.sweep / 'exports'}")
    return "\n".join(lines)


def as_data(found: Outcome, prepared: Prepared) -> dict[str, Any]:
    """The same for machines."""
    return {
        "name": found.name,
        "metric": found.metric,
        "ended": found.info["ended"]["why"],
        "teacher": prepared.teacher,
        "front": list(dict.fromkeys(found.trial_of(key) for key in found.front)),
        "choices": {name: found.trial_of(key) if key else None for name, key in found.chosen.items()},
        "decodings": {name: found.student(key).decoding if key else None for name, key in found.chosen.items()},
        "finalists": [
            {
                "key": t.folder.name,
                "decoding": t.decoding,
                "metrics": t.metrics,
                "interval": t.interval,
                "test": t.test,
                "front": t.key in found.front,
            }
            for t in found.students
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
            for t in found.trials
        ],
    }


def _publish(found: Outcome, exports: dict[str, Path], finished: bool) -> str:
    """Bring MLflow up to date and register what was exported; returns the line that says how to look at it."""
    try:
        tracked = publish(found.sweep, finished=finished, bring=sync.fetch)
        for budget, place in exports.items():
            register_choice(found.sweep, str(found.chosen[budget]), budget, place, bring=sync.fetch)
    except (TrackingDown, PassingError) as error:
        return f"MLflow: {error}; run the same command again to publish"
    return f"to look at it: {ui_command(found.info.get('tracking_uri'))}\n{tracked.url}"

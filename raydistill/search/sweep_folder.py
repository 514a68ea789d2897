"""The state of a sweep in its folder: the lock, the space that the sweep was started with, and sweep.json."""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from raydistill.cluster import snapshots
from raydistill.config.loader import read_yaml
from raydistill.config.run import RUNTIME_ONLY_FIELDS
from raydistill.config.space import Space, corner_runs
from raydistill.core import artifact
from raydistill.core.artifact import LockHeld
from raydistill.core.errors import UserError
from raydistill.core.files import corrupt_file_error, remove_temporary_files, write_atomic
from raydistill.inference.shortlist import stored_map
from raydistill.results.records import count_finished_trials
from raydistill.results.sweep_record import SWEEP_FILE, StopReason, SweepRecord, read_sweep
from raydistill.results.trial_index import trial_index
from raydistill.search.prepare import PreparedSweep
from raydistill.search.shortlists import ensure_shortlists
from raydistill.search.study import has_deleted_trials
from raydistill.tracking.mlflow_runs import PUBLISH_LOCK, get_or_create_tracking_id
from raydistill.tracking.mlflow_store import default_tracking_uri


@contextlib.contextmanager
def sweep_lock(space: Space, folder: Path) -> Iterator[None]:
    """Hold the sweep's folder for this process, and write the space to SWEEP/space.yaml.

    Temporary files that killed commands left in the folder are deleted.

    Raises:
        LockHeld: Another process holds the folder.
        UserError: The trials in the folder are of another space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with artifact.lock(folder), snapshots.writer(folder):
        _remove_temporary_files(folder)
        snapshots.pull_records(folder / "trials")
        path = folder / "space.yaml"
        if path.is_file() and (folder / "trials").is_dir():  # before the first trial the space may still change
            _check_same_space(path, space)
        content = yaml.safe_dump(space.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomic(path, content.encode())
        get_or_create_tracking_id(folder, space.name)  # saved with the sweep, so that all machines use the same id
        yield


def _remove_temporary_files(folder: Path) -> None:
    """Delete the files that killed commands were writing into the sweep's folder. The caller holds its lock."""
    # A command that publishes the sweep writes files here without the sweep's lock: its files are not deleted
    with contextlib.suppress(LockHeld), artifact.lock(folder / PUBLISH_LOCK):
        remove_temporary_files(folder, recursive=False)


def _check_same_space(path: Path, space: Space) -> None:
    """Check that a space has the run, points, sampler and cost of the space in a file."""
    content = read_yaml(path)[0]
    with corrupt_file_error(path, "Delete this file, if the sweep was started with the same space"):
        recorded = Space.model_validate(content)
    changed = [] if without_runtime_fields(recorded.run) == without_runtime_fields(space.run) else ["run"]
    changed += ["points"] if recorded.points != space.points else []
    changed += ["search.sampler"] if recorded.search.sampler != space.search.sampler else []
    changed += ["search.cost"] if recorded.search.cost != space.search.cost else []
    if changed:
        raise UserError(
            f"{path.parent}: this sweep was started with another {' and '.join(changed)}, and trials of different "
            f"spaces cannot be compared. Give the space another name (--set name=...), or delete the folder"
        )


def without_runtime_fields(run: dict[str, Any]) -> dict[str, Any]:
    """The `run` section of a space without the settings that do not change results; these may change on resume."""
    sections = {
        name: {k: v for k, v in run.get(name, {}).items() if k not in settings}
        for name, settings in RUNTIME_ONLY_FIELDS.items()
    }
    return {name: value for name, value in (run | sections).items() if value != {}}


def search_stop_reason(space: Space, folder: Path) -> StopReason | None:
    """Why no trial remains to be run; None if trials remain. The reason has no message if all trials are finished."""
    if not (folder / SWEEP_FILE).is_file():
        return None
    if count_finished_trials(folder) >= space.search.trials:
        return StopReason()
    limit = space.search.max_device_hours
    if limit is not None and trial_index(folder).device_hours() >= limit:
        return StopReason(f"the limit of {limit:g} device-hours is reached (search.max_device_hours)")
    record = read_sweep(folder)
    # Other budgets or another way of serving may admit shapes that were infeasible before
    unchanged = record.budgets == space.budgets and record.serving == space.serving
    return record.stop if record.stop.exhausted and unchanged and not has_deleted_trials(folder) else None


def write_sweep_record(
    space: Space,
    folder: Path,
    prepared: PreparedSweep,
    status: Literal["running", "finished"],
    stop_reason: StopReason | None = None,
) -> None:
    """Write sweep.json: what tables, selection and MLflow need in addition to the trials."""
    SweepRecord(
        name=space.name,
        status=status,
        stop=stop_reason or StopReason(),
        teacher=prepared.teacher,
        shapes=prepared.shapes,
        cost=space.search.cost,
        budgets=space.budgets,
        tolerance=space.tolerance,
        serving=space.serving,
        shortlists=prepared.shortlists,
        tracking_uri=space.tracking_uri or default_tracking_uri(),
        versions={name: version(name) for name in ("raydistill", "torch", "transformers", "ray", "optuna")},
    ).write(folder / SWEEP_FILE)


def load_prepared(space: Space, folder: Path) -> PreparedSweep:
    """What sweep.json keeps of a sweep's preparation: enough to serve and to select, not to train.

    Shortlists that the space lists and that are missing are made.
    """
    record = read_sweep(folder)
    shortlists = record.shortlists
    coverages = [shortlists.get(str(name)) for name in space.serving.named_shortlists]
    if not all(coverage and stored_map(coverage.folder).is_file() for coverage in coverages):
        shortlists = shortlists | ensure_shortlists(space, corner_runs(space), record.teacher)
    return PreparedSweep(record.teacher, record.shapes, shortlists)

"""Fixtures shared by test files."""

import gc
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from raydistill.cluster.start import ray_cluster
from raydistill.tracking import mlflow_store
from tests.factories.browser import open_browser
from tests.factories.sweeps import make_sweep

# Files in which whole commands run on Ray, the longest first. Two processes share the files of the suite, each of which
# takes the next file when it is free: a long file at the end would run alone.
LONGEST_FILES = (
    "tests/search/test_sweep.py",
    "tests/jobs/test_train.py",
    "tests/jobs/test_pseudolabel.py",
    "tests/search/test_paper_search.py",
    "tests/search/test_resume.py",
    "tests/jobs/test_teacher_cache.py",
)

# Tests of the default run that may take more CPU time than LONG_TEST_SECONDS, with what no shorter test shows. Any
# other test that takes as long is named at the end of the run: shorten the test, or mark the test `slow`.
LONG_TEST_SECONDS = 20
LONG_TESTS = {
    "test_batch_that_kills_its_actor_every_time_stops_the_job_with_a_remedy": (
        "Ray starts the actor again as often as the job allows"
    ),
    "test_choice_for_a_stored_budget_is_exported_and_registered_and_every_library_loads_it": (
        "the command, and the exported student in every library"
    ),
    "test_commands_of_the_model_card_predict_and_serve": "the commands of the model card",
    "test_export_without_registration_uses_the_chosen_decoding_and_names_its_budgets": (
        "the command without a tracking server"
    ),
    "test_engines_agree_on_a_trained_model": "only a trained model has clear outputs",
    "test_a_job_whose_driver_was_killed_labels_every_row_once": (
        "the command is killed, resumes, and is compared with a command that was not killed"
    ),
    "test_job_builds_the_parts_of_a_build_in_one_process_and_only_missing_ones": (
        "the job in an actor builds the bytes of a build in this process"
    ),
    "test_a_trial_is_retried_as_often_as_the_space_says": "Tune's retries, with each launcher",
    "test_a_trial_without_a_cost_fails_and_a_deleted_trial_is_run_again": "Tune's own resume",
    "test_both_launchers_give_the_same_losses": "a run in each launcher",
    "test_only_transient_errors_are_retried": "Ray Train's retries",
    "test_a_decision_to_stop_is_kept_when_another_machine_finishes_the_run": "a run on two machines with a storage",
    "test_a_worker_that_was_cut_off_changes_nothing_that_its_successor_wrote": "two processes write the same run",
    "test_workers_on_two_machines_train_the_same_random_start": "workers without a shared folder",
    "test_pseudolabel_command_with_a_named_teacher_in_the_hub_cache": "the command with the name of a teacher",
    "test_the_papers_kd_search_runs_unchanged_to_a_registered_choice": "the README's example from start to end",
    "test_resume_after_sigkill_loses_and_repeats_no_trial": "a killed sweep resumes",
    "test_choose_evaluate_shrink_and_pseudolabel_work_on_a_finished_sweep": "the commands after a sweep",
    "test_a_sweep_is_served_once_and_timed_again_as_a_whole": "the whole serving step on real models, without Ray",
    "test_finalists_that_a_kill_left_unserved_are_served_by_the_same_command": (
        "a sweep that was killed after its last trial"
    ),
    "test_more_trials_under_the_same_name_are_added": "a finished sweep is extended",
    "test_two_workers_train_the_weights_of_one_worker": "two real processes",
}
SPECIAL_MARKERS = {"slow", "gpu", "cluster", "browser", "soak"}

# A sync to a disk takes about 10 ms, and the commands of the tests make thousands. A sync to memory takes no time.
MEMORY_FOLDER = Path("/dev/shm")
MEMORY_BYTES = 4_000_000_000  # a run leaves less than 1 GB; Ray's objects need the rest


def pytest_configure(config: pytest.Config) -> None:
    """Keep temporary folders in memory if the machine has enough. The hosts of cluster tests do not see /dev/shm."""
    usable = "not cluster" in config.option.markexpr and os.access(MEMORY_FOLDER, os.W_OK)
    if usable and shutil.disk_usage(MEMORY_FOLDER).free > MEMORY_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_FOLDER))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.nodeid.split("::")[0], len(ranks)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Record the CPU time of a test, with the processes that the test started and waited for."""
    started = cpu_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu_seconds", cpu_seconds() - started))


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished child processes."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests of the default run that take long and are not in LONG_TESTS. They do not fail the run."""
    for report in [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]:
        seconds = dict(report.user_properties).get("cpu_seconds", 0.0)
        known = report.nodeid.split("::")[-1].split("[")[0] in LONG_TESTS or SPECIAL_MARKERS & set(report.keywords)
        if report.when == "call" and seconds > LONG_TEST_SECONDS and not known:
            terminalreporter.write_line(f"long test, not in LONG_TESTS of conftest.py: {seconds:.0f} s {report.nodeid}")


@pytest.fixture(scope="module", autouse=True)
def garbage_collection_skips_libraries():
    """The garbage collector does not visit what was created before a test file: mostly objects of imported libraries.

    A full collection took 0.5 s with all libraries of the tests, and measurements of memory collect several times.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def empty_store_is_copied(tmp_path_factory):
    """MLflow's migrations run once in this process: every further local store starts as a copy of the empty one."""
    template = tmp_path_factory.mktemp("mlflow") / "empty.db"
    write_empty_store = mlflow_store.write_empty_store

    def copy_empty_store(path: Path) -> None:
        if not template.exists():
            write_empty_store(template)
        shutil.copyfile(template, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_store, "write_empty_store", copy_empty_store)
        yield


@pytest.fixture
def browser(tmp_path: Path) -> Generator[Any, None, None]:
    """Chromium without a window, for tests with the marker `browser`."""
    with open_browser(tmp_path / "chromium") as driver:
        yield driver


@pytest.fixture(scope="module")
def ray_here(request, tmp_path_factory):
    """A local Ray of two CPUs, or of RAY_CPUS of the file, and an empty RAYDISTILL_HOME, shared by the tests of a file.

    The environment is restored afterwards, since further files run in this process.
    """
    environment = dict(os.environ)
    os.environ["RAYDISTILL_HOME"] = str(tmp_path_factory.mktemp("home"))
    with ray_cluster(cpus=getattr(request.module, "RAY_CPUS", 2)):
        yield
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the sweep "mini", without trials, in a temporary home."""
    home = tmp_path / "home"
    monkeypatch.setenv("RAYDISTILL_HOME", str(home))
    return make_sweep(home / "sweeps" / "mini")

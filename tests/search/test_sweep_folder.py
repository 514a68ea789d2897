"""The folder of a sweep: why its search stopped, when it is started again, and what killed commands left."""

import signal
import subprocess
import sys

from raydistill.config.serving import Serving
from raydistill.config.space import Search
from raydistill.core import artifact
from raydistill.results.sweep_record import StopReason
from raydistill.search.study import PROPOSALS_FILE, Proposal, ProposalLog
from raydistill.search.sweep_folder import search_stop_reason, sweep_lock
from raydistill.tracking.mlflow_runs import PUBLISH_LOCK
from tests.factories.sweeps import change_sweep, finished_sweep, make_space

WRITE_AND_DIE = """
import os, sys
from pathlib import Path
from raydistill.core.files import atomic_path

with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_an_exhausted_search_is_not_started_again_unless_other_budgets_may_admit_more(world, tmp_path):
    space, _ = finished_sweep(tmp_path, *world)
    changes = space.model_copy(update={"search": Search(trials=9)})
    assert search_stop_reason(changes, tmp_path) is None
    change_sweep(tmp_path, stop=StopReason("all tried", exhausted=True))
    assert search_stop_reason(changes, tmp_path) == StopReason("all tried", exhausted=True)
    deleted = ProposalLog(proposals=(Proposal(key="deleted", number=9, params={}),))
    deleted.write(tmp_path / PROPOSALS_FILE)
    assert search_stop_reason(changes, tmp_path) is None, "a trial whose folder was deleted"
    (tmp_path / PROPOSALS_FILE).unlink()
    assert search_stop_reason(changes.model_copy(update={"budgets": {"b": {"params_m": 9}}}), tmp_path) is None
    assert search_stop_reason(changes.model_copy(update={"serving": Serving(beams=[1])}), tmp_path) is None
    change_sweep(tmp_path, stop=StopReason("one hour is used up"))
    assert search_stop_reason(changes, tmp_path) is None


def test_temporary_files_of_killed_commands_are_removed(tmp_path):
    """A trial's folder is cleaned by the worker of the trial, which may still run."""
    (tmp_path / "trials" / "k").mkdir(parents=True)
    for name in ("sweep.json", "trials/k/result.json"):
        process = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(tmp_path / name)], check=False)
        assert process.returncode == -signal.SIGKILL
    assert len(temporary_files(tmp_path)) == 2
    with artifact.lock(tmp_path / PUBLISH_LOCK), sweep_lock(make_space(), tmp_path):
        assert len(temporary_files(tmp_path)) == 2, "a command that publishes the sweep may be writing one of the files"
    with sweep_lock(make_space(), tmp_path):
        [left] = temporary_files(tmp_path)
        assert left.parent.name == "k"


def temporary_files(folder):
    """The temporary files in a folder."""
    return list(folder.rglob(".*.tmp"))

"""A sweep whose machines share a storage but no folder; a machine is a home."""

import shutil
from pathlib import Path

import pytest
import yaml

from raydistill.cluster import snapshots, sync
from raydistill.results.records import read_trials
from raydistill.search.early_stopping import peer_curves
from raydistill.search.sweep_folder import sweep_lock
from raydistill.tracking import mlflow_runs, mlflow_store
from tests.factories.machines import files_under, write_file
from tests.factories.sweeps import KILL_SPACE, change_sweep, make_space, make_sweep, make_trial
from tests.factories.workspace import command, last_json, make_world


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The sweep's folder on each of two machines; `use` switches to a machine."""
    (tmp_path / "storage").mkdir()
    monkeypatch.setenv(sync.STORAGE_ENV, f"file://{tmp_path / 'storage'}")
    return {name: tmp_path / name / "sweeps" / "s" for name in ("head", "other")}


def use(monkeypatch: pytest.MonkeyPatch, sweep: Path) -> None:
    monkeypatch.setenv("RAYDISTILL_HOME", str(sweep.parent.parent))


def parent_runs(uri: str) -> list[str]:
    """The tracking ids of the sweeps in a store."""
    client = mlflow_store.make_client(uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "s"]
    runs = client.search_runs([experiment.experiment_id])
    return [run.data.tags["raydistill.sweep"] for run in runs if "raydistill.trial" not in run.data.tags]


@pytest.mark.parametrize("first", ["head", "other"])
def test_two_machines_publish_a_sweep_into_the_same_run(
    homes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, first: str, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    use(monkeypatch, homes["head"])
    with sweep_lock(make_space(), homes["head"]):
        make_sweep(homes["head"])
        change_sweep(homes["head"], tracking_uri=uri)
        snapshots.save(make_trial(homes["head"], "k", 0, 10.0))
        if first == "head":
            mlflow_runs.publish(homes["head"])
        snapshots.save(homes["head"])
    use(monkeypatch, homes["other"])
    snapshots.pull_records(homes["other"])
    mlflow_runs.publish(homes["other"])
    use(monkeypatch, homes["head"])
    mlflow_runs.publish(homes["head"])
    assert len(parent_runs(uri)) == 1


def test_a_sweep_resumed_on_another_machine_has_all_records_and_no_part_of_a_checkpoint(
    homes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, homes["head"])
    with sweep_lock(make_space(), homes["head"]):
        running = make_trial(homes["head"], "running", 1, 12.0, status=None)
        for name in ("config.json", "raydistill.json", "model.safetensors"):
            write_file(running / "checkpoint-20" / name, name)
        write_file(running / "state" / "manifest.json", "{}")
        write_file(homes["head"] / "study.log", "journal")
        snapshots.save(running, make_trial(homes["head"], "done", 0, 10.0), homes["head"])
    use(monkeypatch, homes["other"])
    with sweep_lock(make_space(), homes["other"]):
        files = files_under(homes["other"] / "trials")
        assert not [name for name in files if "/best/" in name or "/checkpoint-" in name or "/state" in name]
        assert (homes["other"] / "study.log").read_text() == "journal"
        assert [(trial.key, trial.status) for trial in read_trials(homes["other"])] == [
            ("done", "done"),
            ("running", "running"),
        ]
        snapshots.pull(homes["other"] / "trials" / "running")
        assert files_under(homes["other"] / "trials" / "running") == files_under(running)


def test_early_stopping_sees_the_validations_of_trials_on_other_machines(
    homes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '{"step": 5, "total_steps": 10, "metric": "rouge2", "score": SCORE}\n'
    use(monkeypatch, homes["head"])
    peer = make_trial(homes["head"], "peer", 0, 12.0, status=None)
    write_file(peer / "metrics.jsonl", line.replace("SCORE", "12"))
    snapshots.save(peer)
    use(monkeypatch, homes["other"])
    own = make_trial(homes["other"], "own", 1, 10.0, status=None)
    write_file(own / "metrics.jsonl", line.replace("SCORE", "10"))
    with snapshots.writer(own):
        snapshots.pull_records(homes["other"] / "trials")
        curve, peers, _ = peer_curves(homes["other"], "own")
    assert (list(curve), [list(peer) for peer in peers]) == ([(0.5, 10.0)], [[(0.5, 12.0)]])


@pytest.mark.slow
def test_a_head_that_lost_its_disk_chooses_and_resumes_from_the_storage(tmp_path: Path) -> None:
    teacher, data = make_world(tmp_path / "world")
    run = KILL_SPACE["run"] | {"teacher": str(teacher), "dataset": {"name": str(data), "max_source_tokens": 32}}
    run |= {"student": {"size": {"choice": ["2-3", "2-2"]}}, "method": "kd"}
    space = KILL_SPACE | {"name": "moved", "run": run, "search": {"trials": 2, "sampler": "grid"}}
    path = write_file(tmp_path / "moved.yaml", yaml.safe_dump(space))
    home, storage = tmp_path / "outputs", f"file://{tmp_path / 'storage'}"
    (tmp_path / "storage").mkdir()
    first = last_json(command(home, "sweep", path, "--json", RAYDISTILL_STORAGE=storage))
    before = trial_files(home / "sweeps" / "moved")
    assert len([name for name in before if name.endswith("best/model.safetensors")]) == 2
    shutil.rmtree(home)
    choice = last_json(command(home, "choose", "moved", "--json", RAYDISTILL_STORAGE=storage))["choices"][0]
    assert Path(choice["checkpoint"], "model.safetensors").is_file()
    assert len(list((home / "sweeps" / "moved" / "trials").glob("*/best"))) >= 1
    shutil.rmtree(home)
    done = command(home, "sweep", path, "--json", RAYDISTILL_STORAGE=storage)
    assert "nothing to run" in done.stderr
    second = last_json(done)
    assert second["exports"].keys() == first["exports"].keys()
    assert trial_files(home / "sweeps" / "moved") == before


def trial_files(sweep: Path) -> dict[str, str]:
    """The files of all trials without locks, which are local to a machine."""
    return {name: text for name, text in files_under(sweep / "trials").items() if not name.endswith(".lock")}

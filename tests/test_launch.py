"""Both launchers under a real Ray: the same losses, data-parallel exactness, and life after a worker's death."""

import contextlib
import json
import os
import signal
import threading
import time
from functools import partial

import psutil
import pytest

from benchmarks.scaling import endless, made_up
from raydistill.cluster.actor_pool import places
from raydistill.cluster.start import largest_node
from raydistill.config.run import Run
from raydistill.core.errors import PassingError, UserError
from raydistill.jobs.train import check_room, launcher_for, train_with_ray_train
from raydistill.search.progress import Watch
from raydistill.search.study import StudySearch
from raydistill.search.tune_search import search
from raydistill.training.inputs import Inputs
from tests.world import make_world

KEPT = ("step", "loss", "val_loss", "score")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run_of(world, name, **training):
    teacher, data = world
    settings = {"epochs": 2, "batch_size": 8, "warmup_steps": 2, "checks_per_epoch": 2, "precision": "fp32"}
    return Run.model_validate(
        {
            "name": name,
            "teacher": str(teacher),
            "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16},
            "method": "kd",
            "student": {"size": "2-2"},
            "training": {**settings, **training},
            "decoding": {"beams": 1, "max_length": 12},
        }
    )


def history(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: json.loads(line)[k] for k in KEPT} for line in lines]


def same(a, b, tolerance):
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for x, y in zip(a, b, strict=True):
        for key in KEPT[1:3]:
            assert x[key] == pytest.approx(y[key], rel=tolerance)


def under_tune(run, folder):
    """The way of short CPU trials: an actor of Tune's that reports for every validation."""
    from ray import tune

    from raydistill.training.run import train

    def trial(config):
        def report(metrics, where):
            tune.report({"step": metrics["step"], "score": metrics["score"]})

        train(run, folder, report, Inputs())

    found = tune.Tuner(trial, run_config=tune.RunConfig(storage_path=str(folder.parent / "tune"), verbose=0)).fit()
    assert not found.errors
    return found


def test_one_trial_under_each_launcher_has_the_same_losses(ray_here, world, tmp_path):
    result = train_with_ray_train(run_of(world, "same"), tmp_path / "train", Inputs())
    reported = under_tune(run_of(world, "same"), tmp_path / "tuned")
    assert result["status"] == "done"
    same(history(tmp_path / "train"), history(tmp_path / "tuned"), 1e-6)
    assert reported[0].metrics["step"] == history(tmp_path / "tuned")[-1]["step"]


def test_everything_of_a_local_ray_listens_on_loopback_and_asks_for_a_token(ray_here):
    import ray

    @ray.remote
    def listeners():
        found = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
        return found, ray.util.get_node_ip_address(), os.environ["RAY_AUTH_MODE"]

    of_worker, node, auth = ray.get(listeners.remote())
    assert (node, auth) == ("127.0.0.1", "token")
    found = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # idle workers come and go
            addresses = {c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"}
            found |= {(process.name(), ip) for ip in addresses}
    assert {"gcs_server", "raylet"} <= {name for name, _ in found}
    assert {ip.removeprefix("::ffff:") for ip in [*of_worker, *(ip for _, ip in found)]} == {"127.0.0.1"}


def look_around(run, folder, report, inputs, worker):
    """Work that writes down where its process listens while it is at work, and whether it has a process group."""
    import torch.distributed as dist

    listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"worker{worker.rank}.json").write_text(json.dumps([listening, dist.is_initialized()]))
    if worker.world > 1:
        dist.barrier()
    (folder / "result.json").write_text("{}")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_at_work_listens_on_loopback_and_alone_has_no_process_group(ray_here, world, tmp_path, workers):
    """Torch's own store would listen on every address of the machine, and ask for no token."""
    train_with_ray_train(run_of(world, "around", workers=workers), tmp_path / "run", Inputs(), work=look_around)
    seen = [json.loads(path.read_text()) for path in sorted((tmp_path / "run").glob("worker*.json"))]
    assert [grouped for _, grouped in seen] == [workers > 1] * workers
    assert {ip.removeprefix("::ffff:") for listening, _ in seen for ip in listening} == {"127.0.0.1"}


def failing_work(error, count, run, folder, report, inputs, worker):
    """Work that leaves a line in `count` and fails."""
    with count.open("a") as file:
        file.write("tried\n")
    raise error


@pytest.mark.parametrize(("error", "tries"), [(UserError("too little memory"), 1), (PassingError("wait"), 2)])
def test_what_would_be_wrong_again_is_not_tried_again(ray_here, world, tmp_path, error, tries):
    work = partial(failing_work, error, tmp_path / "count")
    with pytest.raises(type(error), match=str(error)):
        train_with_ray_train(run_of(world, "wrong"), tmp_path / "run", Inputs(), retries=1, work=work)
    assert len((tmp_path / "count").read_text().splitlines()) == tries


@pytest.mark.parametrize(
    ("launcher", "error", "tries"),
    [
        ("tune", UserError("too little memory"), 1),
        ("tune", RuntimeError("died"), 2),
        pytest.param("train", OSError("full"), 2, marks=pytest.mark.slow),
    ],
)
def test_a_trial_is_tried_again_as_often_as_the_space_says(ray_here, tmp_path, capsys, launcher, error, tries):
    """And not as often again by Ray Train; one that failed so is the next command's to try."""
    space = endless(1, 1, 1.0, launcher, retries=1)
    (tmp_path / "sweep.json").write_text("{}")
    watch = Watch(tmp_path, space.search, "rouge2")
    work = partial(failing_work, error, tmp_path / "count")
    ending = search(space, tmp_path, made_up(), "cpu", [watch], work)
    assert len((tmp_path / "count").read_text().splitlines()) == tries
    assert not ending.exhausted
    [died] = [line for line in capsys.readouterr().err.splitlines() if " died: " in line]
    assert died.endswith(str(error))
    assert StudySearch(space, tmp_path).finished == 0


def test_two_data_parallel_workers_equal_one_with_the_same_global_batch(ray_here, world, tmp_path):
    train_with_ray_train(run_of(world, "one"), tmp_path / "one", Inputs())
    train_with_ray_train(run_of(world, "two", workers=2), tmp_path / "two", Inputs())
    same(history(tmp_path / "one"), history(tmp_path / "two"), 1e-4)


def test_a_worker_that_is_killed_is_started_again_and_goes_on_from_its_checkpoint(ray_here, world, tmp_path):
    """The same losses as the run that nobody killed, and the steps before the checkpoint are not done again."""
    run = run_of(world, "killed", epochs=12)
    train_with_ray_train(run, tmp_path / "untouched", Inputs())
    folder = tmp_path / "killed"
    killed = []

    def kill():
        while not (folder / "state.json").is_file() or json.loads((folder / "state.json").read_text())["step"] < 6:
            time.sleep(0.02)
        for process in psutil.process_iter(["cmdline"]):
            ours = "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
            if ours and process.environ().get("RAYDISTILL_HOME") == os.environ["RAYDISTILL_HOME"]:
                killed.append(json.loads((folder / "state.json").read_text())["step"])
                os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    result = train_with_ray_train(run, folder, Inputs())
    killer.join(10)
    assert killed
    assert killed[0] < 72, "the run was over before it could be killed"
    assert result["status"] == "done"
    same(history(tmp_path / "untouched"), history(folder), 1e-6)


def test_a_run_that_can_never_fit_is_refused_at_once(ray_here, world):
    with pytest.raises(UserError, match="8 workers need 1 CPUs of one machine each, and the cluster has room for 2"):
        check_room(run_of(world, "big", workers=8), "cpu")


def test_room_is_counted_by_machine_and_not_by_the_clusters_total(monkeypatch, world):
    """Four machines of four CPUs can never hold one worker of eight; with a GPU each they hold one worker of two."""
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}} for _ in range(4)]
    monkeypatch.setattr("ray.nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}])
    assert [places("cpu", threads) for threads in (1, 2, 4, 8)] == [16, 8, 4, 0]
    assert [places("cuda", threads) for threads in (2, 8)] == [4, 0]
    assert [places("cuda", 1, share) for share in (1, 0.6, 0.5, 0.3, 0.25, 0.1)] == [4, 4, 8, 12, 16, 16]
    with pytest.raises(UserError, match="1 workers need 8 CPUs of one machine each, and the cluster has room for 0"):
        check_room(run_of(world, "wide", threads=8), "cpu")


def test_what_is_timed_goes_to_the_same_one_of_several_machines(monkeypatch):
    def node(name, cpus, gpus=0.0, alive=True):
        return {"NodeManagerAddress": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}

    nodes = [node("a", 8.0), node("c", 8.0), node("b", 4.0, 1.0), node("d", 64.0, alive=False)]
    for order in (nodes, nodes[::-1]):
        monkeypatch.setattr("ray.nodes", lambda order=order: order)
        assert largest_node("cpu")["NodeManagerAddress"] == "c"
        assert largest_node("cuda")["NodeManagerAddress"] == "b"


def test_which_launcher_a_run_gets(world):
    assert launcher_for(run_of(world, "a"), "cpu") == "tune"
    assert launcher_for(run_of(world, "a"), "cuda") == "train"
    assert launcher_for(run_of(world, "a", workers=2), "cpu") == "train"
    assert launcher_for(run_of(world, "a", launcher="train"), "cpu") == "train"
    with pytest.raises(UserError, match="one worker"):
        launcher_for(run_of(world, "a", workers=2, launcher="tune"), "cpu")

"""The actor pool: how many workers a cluster can hold, and how errors and killed actors end a job."""

import os
import signal

import numpy as np
import pytest

from raydistill.cluster import actor_pool
from raydistill.cluster.actor_pool import _make_actor_class, max_actors, run_batches, slots
from raydistill.core.errors import UserError

RAY_CPUS = 1


def test_slots_are_counted_per_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four machines of four CPUs never hold a worker of eight; with a GPU each they hold a worker of two CPUs each."""
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}} for _ in range(4)]
    monkeypatch.setattr("ray.nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}])
    assert [slots("cpu", threads) for threads in (1, 2, 4, 8)] == [16, 8, 4, 0]
    assert [slots("cuda", threads) for threads in (2, 8)] == [4, 0]
    assert [slots("cuda", 1, share) for share in (1, 0.6, 0.5, 0.3, 0.25, 0.1)] == [4, 4, 8, 12, 16, 16]


def test_a_teacher_that_fits_no_machine_is_refused_with_a_setting_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only `raydistill pseudolabel` has --threads; a sweep and a cache use one CPU per teacher."""
    resources = {"CPU": 4.0, "GPU": 0.0}
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": resources}])
    with pytest.raises(UserError, match=r"has 8 CPUs for a teacher \(the largest has 4 CPUs\); lower --threads"):
        max_actors("cpu", 8)
    with pytest.raises(UserError, match=r"has 1 CPU and a GPU for a teacher .*; start Ray with at least that") as error:
        max_actors("cuda", 1)
    assert "--threads" not in str(error.value)


def test_error_in_a_batch_stops_the_job(ray_here):
    def make_function():
        def run_batch(number):
            if number == 2:
                raise UserError("the disk is full")
            return {"rows": 1.0}

        return run_batch

    done = []
    with pytest.raises(UserError, match="the disk is full"):
        run_batches(range(4), make_function, device="cpu", on_done=done.append)


def test_error_while_an_actor_starts_stops_the_job_with_the_cause(ray_here):
    def make_function():
        raise RuntimeError("CUDA error: the real cause")

    with pytest.raises(Exception, match="CUDA error: the real cause"):
        run_batches(range(2), make_function, device="cpu", on_done=lambda facts: None)


@pytest.mark.parametrize("error", [UserError("the teacher changed"), OSError("the teacher changed")])
def test_user_error_while_an_actor_starts_is_the_result_of_its_batches(error):
    """`run_batches` raises the message as a UserError."""

    def make_function():
        raise error

    actor = _make_actor_class(make_function)()
    assert actor({"batch": np.array([3])}) == {
        "batch": np.array([3]),
        "error_message": np.array(["the teacher changed"]),
    }


def test_batch_that_kills_its_actor_every_time_stops_the_job_with_a_remedy(ray_here, tmp_path, monkeypatch):
    attempts = tmp_path / "attempts"

    def make_function():
        def run_batch(number):
            if number == 1:
                with attempts.open("a") as file:
                    file.write("attempt\n")
                os.kill(os.getpid(), signal.SIGKILL)
            return {"rows": 1.0}

        return run_batch

    monkeypatch.setattr(actor_pool, "MAX_TASK_RETRIES", 2)  # each attempt starts a process
    with pytest.raises(ConnectionError, match=r"lost and could not be restarted .* Run the same command again"):
        run_batches(range(2), make_function, device="cpu", on_done=lambda facts: None)
    assert len(attempts.read_text().splitlines()) == 1 + 2

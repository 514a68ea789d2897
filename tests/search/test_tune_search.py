"""The adapter between Ray Tune and the study, and the limit of concurrent trials; without Ray's processes."""

import pickle

import pytest
from ray.tune.search import Searcher

from raydistill.search import tune_search
from raydistill.search.study import SweepStudy
from raydistill.search.tune_search import ConcurrencyLimit, StudySearcher
from tests.factories.sweeps import make_space

DONE = {"finished": True, "status": "done", "score": 10.0, "latency_ms": 5.0}


def test_a_searcher_waits_while_the_cluster_is_full_and_ends_with_the_study(tmp_path):
    searcher = StudySearcher(SweepStudy(make_space(), tmp_path), ConcurrencyLimit(lambda: 0, fixed_limit=2))
    assert searcher.suggest("a").keys() == {"key", "number", "params"}
    searcher.suggest("b")
    assert searcher.suggest("c") is None
    for trial_id in ("a", "b"):
        searcher.on_trial_complete(trial_id, DONE)
    for n in range(4):
        searcher.suggest(f"d{n}")
        searcher.on_trial_complete(f"d{n}", DONE)
    assert searcher.suggest("e") == Searcher.FINISHED
    assert searcher.study.num_finished == 6


def test_an_error_counts_as_a_lost_trial_whatever_was_reported_before(tmp_path):
    searcher = StudySearcher(SweepStudy(make_space(), tmp_path), lambda: 9)
    key = searcher.suggest("a")["key"]
    searcher.on_trial_complete("a", {"score": 1.0}, error=True)
    assert searcher.study.failed_keys == {key}
    assert searcher.study.num_finished == 0


def test_a_searcher_can_be_pickled_and_saves_nothing(tmp_path):
    """Tune pickles its configuration and saves the searcher; the study's journal is the state of the search."""
    searcher = StudySearcher(SweepStudy(make_space(), tmp_path), ConcurrencyLimit(int))
    searcher.suggest("a")
    pickle.loads(pickle.dumps(searcher))
    searcher.save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_slots_are_counted_at_intervals(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tune_search.time, "monotonic", lambda: now[0])
    counts = iter((3, 5))
    limit = ConcurrencyLimit(lambda: next(counts))
    assert [limit(), limit()] == [3, 3]
    now[0] += tune_search.RECOUNT_INTERVAL_S
    assert limit() == 5
    assert ConcurrencyLimit(lambda: pytest.fail("counted"), fixed_limit=4)() == 4

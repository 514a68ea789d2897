"""Prefetching of a step's inputs in a thread."""

import threading
from types import SimpleNamespace

import pytest

from raydistill.core.errors import UserError
from raydistill.training import prefetch as prefetch_module
from raydistill.training.prefetch import prefetch


def test_items_are_prepared_before_they_are_taken():
    prepared = threading.Event()

    def items():
        yield from (0, 1)
        prepared.set()
        yield 2

    with prefetch(items()) as feed:
        assert prepared.wait(60), "no item was prepared before the first was taken"
        assert list(feed) == [0, 1, 2]
    assert not feed.thread.is_alive()


def test_waiting_for_items_is_counted(monkeypatch):
    """The source gives an item only after the clock was read for it: the waits of 2 and 3 seconds begin before."""
    asked = threading.Semaphore(0)

    def items():
        for item in (0, 1):
            asked.acquire()
            yield item

    times = iter([10.0, 12.0, 50.0, 53.0])

    def monotonic():
        asked.release()
        return next(times)

    monkeypatch.setattr(prefetch_module, "time", SimpleNamespace(monotonic=monotonic))
    with prefetch(items()) as feed:
        assert [next(feed), next(feed)] == [0, 1]
        assert feed.wait_seconds == 5.0


def test_error_of_the_source_is_raised_where_the_item_is_taken():
    def fails():
        yield 1
        raise UserError("the part is missing")

    with prefetch(fails()) as feed:
        assert next(feed) == 1
        with pytest.raises(UserError, match="missing"):
            next(feed)


def test_endless_source_stops_with_the_block():
    def endless():
        while True:
            yield 1

    with prefetch(endless()) as feed:
        next(feed)
    assert not feed.thread.is_alive()

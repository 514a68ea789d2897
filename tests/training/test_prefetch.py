"""Prefetching of a step's inputs in a thread."""

import time

import pytest

from raydistill.core.errors import UserError
from raydistill.training.prefetch import prefetch


def test_items_are_prefetched_and_waiting_is_counted():
    def slow():
        for i in range(5):
            time.sleep(0.02)
            yield i

    with prefetch(slow()) as feed:
        assert list(feed) == [0, 1, 2, 3, 4]
        assert feed.wait_seconds > 0.06
    with prefetch(slow()) as feed:
        next(feed)
        time.sleep(0.2)
        before = feed.wait_seconds
        assert [next(feed), next(feed)] == [1, 2]  # both were in the queue
        assert feed.wait_seconds - before < 0.02
    assert not feed.thread.is_alive()


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

"""Prefetching: a thread prepares the next items, so that a training step does not wait for its data."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """An iterator over items that a thread prepares; `wait_seconds` is the total time spent waiting for an item."""

    def __init__(self, items: Iterator[Item], queue_size: int) -> None:
        self.items = items
        self.queue: Queue[tuple[Item | None, BaseException | None]] = Queue(maxsize=queue_size)
        self.closed = threading.Event()
        self.wait_seconds = 0.0
        self.thread = threading.Thread(target=self._fill_queue, daemon=True)
        self.thread.start()

    def __iter__(self) -> "Prefetcher[Item]":
        return self

    def __next__(self) -> Item:
        started = time.monotonic()
        item, error = self.queue.get()
        self.wait_seconds += time.monotonic() - started
        if error is not None:
            self.queue.put((None, error))  # every later call raises the error again
            raise error
        assert item is not None
        return item

    def _fill_queue(self) -> None:
        try:
            for item in self.items:
                self.queue.put((item, None))
                if self.closed.is_set():
                    return
            self.queue.put((None, StopIteration()))
        except BaseException as error:  # raised in the thread that takes the item
            self.queue.put((None, error))

    def close(self) -> None:
        """Stop the thread; it prepares no further item."""
        self.closed.set()
        while self.thread.is_alive():
            while not self.queue.empty():
                self.queue.get()
            self.thread.join(0.01)


@contextmanager
def prefetch(items: Iterator[Item], queue_size: int = 2) -> Iterator[Prefetcher[Item]]:
    """Prepare up to `queue_size` items ahead, in a thread that stops with the block.

    An exception raised by `items` is raised by the `next` call that would return the item.
    """
    prefetcher = Prefetcher(items, queue_size)
    try:
        yield prefetcher
    finally:
        prefetcher.close()

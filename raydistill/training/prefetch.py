"""Items made ahead of their use by one thread, so that a training step does not wait for its data."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """An iterator's items; `waited` counts the seconds for which the taker stood still."""

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
            self.queue.put((None, error))  # it stays over
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
        except BaseException as error:  # the taker's to raise
            self.queue.put((None, error))

    def close(self) -> None:
        """End the thread: it makes no further item."""
        self.closed.set()
        while self.thread.is_alive():
            while not self.queue.empty():
                self.queue.get()
            self.thread.join(0.01)


@contextmanager
def prefetch(items: Iterator[Item], queue_size: int = 2) -> Iterator[Prefetcher[Item]]:
    """A block in which a thread keeps up to `queue_size` items ready; what making one raises is raised where it is
    taken."""
    feed = Prefetcher(items, queue_size)
    try:
        yield feed
    finally:
        feed.close()

"""Items made ahead of their use by one thread, so that a training step does not wait for its data."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Feed(Generic[Item]):
    """An iterator's items; `waited` counts the seconds for which the taker stood still."""

    def __init__(self, items: Iterator[Item], ahead: int) -> None:
        self.items = items
        self.ready: Queue[tuple[Item | None, BaseException | None]] = Queue(maxsize=ahead)
        self.over = threading.Event()
        self.waited = 0.0
        self.thread = threading.Thread(target=self._make, daemon=True)
        self.thread.start()

    def __iter__(self) -> "Feed[Item]":
        return self

    def __next__(self) -> Item:
        started = time.monotonic()
        item, error = self.ready.get()
        self.waited += time.monotonic() - started
        if error is not None:
            self.ready.put((None, error))  # it stays over
            raise error
        assert item is not None
        return item

    def _make(self) -> None:
        try:
            for item in self.items:
                self.ready.put((item, None))
                if self.over.is_set():
                    return
            self.ready.put((None, StopIteration()))
        except BaseException as error:  # the taker's to raise
            self.ready.put((None, error))

    def close(self) -> None:
        """End the thread: it makes no further item."""
        self.over.set()
        while self.thread.is_alive():
            while not self.ready.empty():
                self.ready.get()
            self.thread.join(0.01)


@contextmanager
def ahead(items: Iterator[Item], count: int = 2) -> Iterator[Feed[Item]]:
    """A block in which a thread keeps up to `count` items ready; what making one raises is raised where it is taken."""
    feed = Feed(items, count)
    try:
        yield feed
    finally:
        feed.close()

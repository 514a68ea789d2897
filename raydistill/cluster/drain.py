"""Notice of nodes that Ray is about to remove, such as spot instances before they are taken away."""

import time
from collections.abc import Iterable

DRAIN_POLL_S = 5.0


class Departures:
    """Whether Ray was told that one of some machines is to be drained, as for a spot instance's notice.

    `nodes`: the ids of those that a run is on. The machine that a run has left stays in Ray's list until it is gone.
    Ray gives no new work to such a machine, so a run that ends with `Leaving` is started again elsewhere.
    """

    def __init__(self, nodes: Iterable[str]) -> None:
        self.nodes = frozenset(nodes)
        self.next = 0.0

    def __call__(self) -> bool:
        """Asks Ray's head at most once in `DRAIN_POLL_S`; no while it does not answer."""
        import ray

        now = time.monotonic()
        if now < self.next:
            return False
        self.next = now + DRAIN_POLL_S
        try:
            leaving = ray._private.state.state.get_draining_nodes()  # what Ray Train's own watcher asks
        except Exception:
            return False
        return not self.nodes.isdisjoint(leaving)

"""Detection of nodes that Ray is about to remove, such as spot instances with a preemption notice."""

import time
from collections.abc import Iterable

from raydistill.cluster.ray_compat import draining_node_ids
from raydistill.core.console import print_progress

DRAIN_POLL_S = 5.0


class DrainMonitor:
    """Callable that returns whether one of the given nodes is being drained.

    Ray schedules no new work on a draining node, so that a run that raises `Preempted` is restarted on another node.
    A draining node stays in Ray's list until it is removed.

    Args:
        node_ids: Ray's ids of the nodes to watch.
    """

    def __init__(self, node_ids: Iterable[str]) -> None:
        self.node_ids = frozenset(node_ids)
        self.next_check = 0.0
        self.has_warned = False

    def __call__(self) -> bool:
        """Query Ray's head at most once in `DRAIN_POLL_S` seconds; False in between and while the head is down.

        The first query that fails is reported.
        """
        from ray.exceptions import RayError

        now = time.monotonic()
        if now < self.next_check:
            return False
        self.next_check = now + DRAIN_POLL_S
        try:
            return not self.node_ids.isdisjoint(draining_node_ids())
        except (RayError, OSError, RuntimeError) as error:  # other errors are raised: Ray's interface has changed
            if not self.has_warned:
                print_progress(f"draining nodes are not detected while Ray's head does not answer: {error}")
            self.has_warned = True
            return False

"""Whether this node serves services: what balancers outside are told, as kube-proxy tells it.

Two things count. The tables must keep up with the objects; and, for balancers that send to every
node (externalTrafficPolicy Cluster), the node must not be on its way out (KEP-3836).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lockgate.objects.model import LEAVING, Node

__all__ = ["KeepingUp", "eligible"]

#: Seconds that a change may wait before the node counts as unhealthy: kube-proxy's, two of its
#: iptables.syncPeriod (cmd/kube-proxy/app/server.go).
LATE = 60.0


def eligible(node: Node | None) -> bool:
    """Whether balancers should go on sending to the node: it is there, is not being deleted, and
    the cluster autoscaler has not marked it for that."""
    return (
        node is not None
        and node.metadata.deletion_timestamp is None
        and all(taint.key != LEAVING for taint in node.spec.taints)
    )


class KeepingUp:
    """Whether changes come into force. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting_since: float | None = None
        #: Unix time at which everything known was in force last; 0: not yet.
        self.last = 0.0

    def noted(self) -> None:
        """There is a change that is not in force yet."""
        if self._waiting_since is None:
            self._waiting_since = self._clock()

    def done(self, *, all_of_it: bool) -> None:
        """What was known when it began is in force; `all_of_it`: nothing came since."""
        self.last = time.time()
        self._waiting_since = None if all_of_it else self._clock()

    @property
    def healthy(self) -> bool:
        waiting = self._waiting_since
        return waiting is None or self._clock() - waiting < LATE

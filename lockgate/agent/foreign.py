"""Pods of this node that another CNI plugin wired, from before Lockgate came (docs/migrate.md).

They have addresses and no lease. What goes to them is the stack's to deliver, as it was, and no
pod of ours gets an address of theirs. Nobody enforces policies for them; as the other end of a
connection they are the pods that they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from lockgate.net import dumps
from lockgate.net.links import IFINDEX_BASE
from lockgate.objects.changes import Name
from lockgate.objects.model import Pod

__all__ = ["Foreign"]

log = logging.getLogger(__name__)
_LO = 1
_AGAIN = 10.0  # seconds until a pod that seemed to be nobody's is looked at again


class Foreign:
    """As last looked at. Lives in the worker thread."""

    def __init__(self) -> None:
        #: By uid.
        self.pods: dict[str, Pod] = {}
        # Pods that are not, with their addresses, and when that was asked.
        self._others: dict[str, tuple[list[str], float]] = {}
        # Those that were looked at, and when to look at the same ones again.
        self._looked: Sequence[Pod] | None = None
        self._again = 0.0

    @property
    def addresses(self) -> set[str]:
        """What they have."""
        return {ip for pod in self.pods.values() for ip in pod.ips}

    def look(self, unleased: Sequence[Pod]) -> set[Name]:
        """Find them among the pods of this node that have no lease (the same sequence: the same
        pods). Returns the keys of those that were none the last time, or are none any more."""
        now = time.monotonic()
        if unleased is self._looked and now < self._again:
            return set()
        self._looked, self._again = unleased, now + _AGAIN
        before, self.pods = self.pods, {}
        others, self._others = self._others, {}
        for pod in unleased:
            uid, ips = pod.metadata.uid, list(pod.ips)
            if not ips or pod.spec.host_network:
                continue
            known, other = before.get(uid), others.get(uid)
            if known is not None and list(known.ips) == ips:
                self.pods[uid] = pod
            elif other is not None and other[0] == ips and now - other[1] < _AGAIN:
                self._others[uid] = other
            elif all(_led_to_a_link(ip) for ip in ips):
                self.pods[uid] = pod
            else:
                self._others[uid] = ips, now
        moved = before.keys() ^ self.pods.keys()
        for uid in sorted(moved & self.pods.keys()):
            pod = self.pods[uid]
            log.info(
                "pod %s (%s) was wired by another CNI plugin: its packets are the stack's",
                "/".join(pod.key),
                ", ".join(pod.ips),
            )
        return {(before.get(uid) or self.pods[uid]).key for uid in moved}


def _led_to_a_link(ip: str) -> bool:
    """Does the node's stack reach the address over a link that is not ours? A pod of ours whose
    link went has no route, or the default one."""
    try:
        ifindex = dumps.on_link(ip)
    except (OSError, ValueError):
        return False
    return _LO < ifindex < IFINDEX_BASE

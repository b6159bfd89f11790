"""Pods of this node that another CNI plugin wired, from before Lockgate came (docs/migrate.md).

They have addresses and no lease. What goes to them is the stack's to deliver, as it was, and no
pod of ours gets an address of theirs. Nobody enforces policies for them; as the other end of a
connection they are the pods that they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from lockgate.net import dumps
from lockgate.net.links import IFINDEX_BASE
from lockgate.objects.changes import Name
from lockgate.objects.model import Pod

__all__ = ["Foreign"]

log = logging.getLogger(__name__)
_LO = 1


class Foreign:
    """As last looked at. Lives in the worker thread."""

    def __init__(self) -> None:
        #: By uid.
        self.pods: dict[str, Pod] = {}

    @property
    def addresses(self) -> set[str]:
        """What they have."""
        return {ip for pod in self.pods.values() for ip in pod.ips}

    def look(self, unleased: Iterable[Pod]) -> set[Name]:
        """Find them among the pods of this node that have no lease. Returns the keys of those that
        were none the last time, or are none any more."""
        before, self.pods = self.pods, {}
        for pod in unleased:
            uid = pod.metadata.uid
            known = before.get(uid)
            same = known is not None and known.ips == pod.ips
            if pod.ips and (same or all(_led_to_a_link(ip) for ip in pod.ips)):
                self.pods[uid] = pod
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

"""Pods of this node: leases, wiring, programs. What CNI ADD and DEL come down to.

All methods block; call them from the worker thread that is in the node's namespace.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Container

import msgspec

from lockgate.agent.datapath import Datapath
from lockgate.agent.encode import EndpointRecord
from lockgate.agent.ipam import Ipam, Lease
from lockgate.net.links import IFINDEX_BASE, Net, PodLink
from lockgate.objects.model import Cluster, Pod, PodIP

__all__ = ["Endpoints"]

log = logging.getLogger(__name__)


class Endpoints:
    """The node's endpoints, by uid."""

    def __init__(self, dp: Datapath, ipam: Ipam, node: str) -> None:
        self._dp, self._ipam, self._node = dp, ipam, node
        self.mtu = 1500
        # Pods as last seen, so that one whose object went is judged until its DEL, and with
        # their addresses, which the object tells only later.
        self._pods: dict[str, tuple[Pod, Pod]] = {}
        # What `overlay` and `records` made last, and of what.
        self._overlaid: tuple[object, object, dict[tuple[str, str], Pod]] | None = None
        self._records: dict[str, tuple[Lease, EndpointRecord]] = {}

    def slot(self, uid: str) -> int | None:
        """Slot of a pod that has a lease."""
        lease = self._ipam.leases.get(uid)
        return None if lease is None else lease.slot

    def pod(self, uid: str) -> Pod:
        """A pod with a lease, as the overlay has it."""
        return self._pods[uid][1]

    def overlay(self, cluster: Cluster) -> Cluster:
        """The cluster as this node has to judge it: local pods bear the addresses of their
        leases at once, and stay until DEL. The same pods and leases give the same dict."""
        last = self._overlaid
        if last is None or last[0] is not cluster.pods or last[1] is not self._ipam.leases:
            pods = self._overlay(cluster)
            self._overlaid = last = cluster.pods, self._ipam.leases, pods
        return msgspec.structs.replace(cluster, pods=last[2])

    def _overlay(self, cluster: Cluster) -> dict[tuple[str, str], Pod]:
        pods = dict(cluster.pods)
        by_uid = {
            pod.metadata.uid: pod for pod in pods.values() if pod.metadata.uid in self._ipam.leases
        }
        for uid in set(self._pods) - set(self._ipam.leases):
            del self._pods[uid]
        for uid, lease in self._ipam.leases.items():
            pod = by_uid.get(uid)
            known = self._pods.get(uid)
            if pod is None:
                if known is not None:
                    pods.setdefault(known[1].key, known[1])
                continue
            if known is None or known[0] is not pod or tuple(known[1].ips) != lease.ips:
                known = pod, with_addresses(pod, lease)
                self._pods[uid] = known
            pods[pod.key] = known[1]
        return pods

    def records(
        self, slots: Container[int], number: Callable[[Pod], int]
    ) -> dict[int, EndpointRecord]:
        """What the publisher needs of the pods in `slots`; `number` is a pod's endpoint id.
        A record that stays the same stays the same object."""
        before, self._records = self._records, {}
        for uid, lease in self._ipam.leases.items():
            if lease.slot not in slots or uid not in self._pods:
                continue
            own = number(self._pods[uid][1])
            known = before.get(uid)
            if (
                known is None
                or known[0] is not lease
                or known[1].id != own
                or known[1].mtu != self.mtu
            ):
                link = self._link(lease)
                known = (
                    lease,
                    EndpointRecord(own, link.pod_mac, link.host_mac, self.mtu, lease.ips),
                )
            self._records[uid] = known
        return {lease.slot: record for lease, record in self._records.values()}

    def wired(self, lease: Lease, net: Net) -> bool:
        """Is the pod's link there, with its programs?"""
        name = self._link(lease).name
        return name in net.links() and lease.slot in self._dp.pod_slots()

    def wire(self, lease: Lease, net: Net, sources: tuple[str, ...]) -> None:
        """Links, programs. The policy must be in force already: from here on packets come.
        On OSError nothing stays."""
        link = self._link(lease)
        try:
            net.add_pod(link, lease.netns, sources, lambda: self._attach(link))
        except BaseException:
            self.unwire(lease.slot, net)
            raise

    def unwire(self, slot: int, net: Net) -> None:
        """Take away what there is of a slot's wiring. Nothing there is success."""
        with contextlib.suppress(OSError):
            net.remove_link(IFINDEX_BASE + slot)
        self._dp.detach_pod(slot)

    def reconcile(self, net: Net) -> list[str]:
        """At start: links and pins without a lease go, leases whose link is gone are given back
        (the namespace and the pod went while no agent ran), the others get the new programs.
        Returns what could not be done."""
        errors = []
        here = {
            index - IFINDEX_BASE
            for name, index in net.links().items()
            if index >= IFINDEX_BASE and name == f"lg{index - IFINDEX_BASE}"
        }
        for uid, lease in list(self._ipam.leases.items()):
            if lease.slot not in here:
                log.info("pod %s went while no agent ran: its addresses are free", uid)
                self._ipam.release(uid)
                continue
            try:
                self._attach(self._link(lease))
            except OSError as error:
                errors.append(f"pod {uid}: {error}")
        leased = {lease.slot for lease in self._ipam.leases.values()}
        for slot in (here | self._dp.pod_slots()) - leased:
            log.info("endpoint slot %d has wiring but no pod: removed", slot)
            self.unwire(slot, net)
        return errors

    def _attach(self, link: PodLink) -> None:
        self._dp.attach_pod(link.slot, link.ifindex)

    def _link(self, lease: Lease) -> PodLink:
        return PodLink(self._node, lease.slot, lease.ips, self.mtu)


def with_addresses(pod: Pod, lease: Lease) -> Pod:
    """The pod with the addresses of its lease in its status."""
    if tuple(pod.ips) == lease.ips:
        return pod
    status = msgspec.structs.replace(
        pod.status, pod_ip=lease.ips[0], pod_ips=[PodIP(ip) for ip in lease.ips]
    )
    return msgspec.structs.replace(pod, status=status)


def namespace_exists(path: str) -> bool:
    """Is there a network namespace to be entered at `path`?"""
    return os.path.exists(path)

"""Pods of this node: leases, wiring, programs. What CNI ADD and DEL come down to.

All methods block; call them from the worker thread that is in the node's namespace.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import msgspec

from lockgate.agent.datapath import Datapath
from lockgate.agent.encode import EndpointRecord
from lockgate.agent.ipam import Ipam, Lease
from lockgate.net import pods
from lockgate.net.pods import PodLink, Seal
from lockgate.objects.changes import Changed, Name
from lockgate.objects.model import Cluster, Pod, PodIP

__all__ = ["Attachment", "Endpoints"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attachment:
    """Who asks for an endpoint. `netns` is a path that need not outlive the request; `sandbox`
    is "CONTAINERID/IFNAME", or "" when who asks knows no sandboxes (a pod has one, then);
    `name` is (namespace, name), where it is known."""

    uid: str
    netns: str
    sandbox: str = ""
    name: tuple[str, str] = ("", "")

    @property
    def key(self) -> str:
        """What DEL will know it by; as `Lease.key`."""
        return self.sandbox or self.uid

    def __str__(self) -> str:
        return f"pod {'/'.join(self.name)} ({self.uid})" if any(self.name) else f"pod {self.uid}"


class Endpoints:
    """The node's endpoints, by uid."""

    def __init__(self, dp: Datapath, ipam: Ipam, node: str) -> None:
        self._dp, self._ipam, self._node = dp, ipam, node
        self.mtu = 1500
        # Pods as last seen, so that one whose object went is judged until its DEL, and with
        # their addresses, which the object tells only later.
        self._pods: dict[str, tuple[Pod, Pod]] = {}
        # What `overlay` made last: all pods, those of this node as the objects have them by uid,
        # where it put others than the objects, and the leases that this was for.
        self._judged: dict[Name, Pod] = {}
        self._here: dict[str, Pod] = {}
        self._laid: set[Name] = set()
        self._leases: dict[str, Lease] = {}
        # How often pods of this node or leases were others: what was made last is of that.
        self._times = 0
        self._records: dict[str, tuple[Lease, EndpointRecord]] = {}
        self._unleased: tuple[int, list[Pod]] | None = None
        self._recorded: tuple[int, int, set[int]] | None = None
        self._by_slot: dict[int, EndpointRecord] = {}

    def slot(self, uid: str) -> int | None:
        """Slot of a pod that has a lease."""
        lease = self._ipam.leases.get(uid)
        return None if lease is None else lease.slot

    def pod(self, uid: str) -> Pod:
        """A pod with a lease, as the overlay has it."""
        return self._pods[uid][1]

    def title(self, uid: str) -> str:
        """How errors and events name a pod with a lease: "Pod shop/web"."""
        known = self._pods.get(uid)
        return f"Pod {'/'.join(known[1].key)}" if known is not None else f"pod {uid}"

    def unleased(self) -> list[Pod]:
        """Pods of this node that have no lease, by the objects of the last `overlay`; the same
        list while there is no change."""
        if self._unleased is None or self._unleased[0] != self._times:
            leases = self._ipam.leases
            pods = [pod for uid, pod in self._here.items() if uid not in leases]
            self._unleased = self._times, pods
        return self._unleased[1]

    def overlay(
        self, cluster: Cluster, changed: Changed | None = None
    ) -> tuple[Cluster, Changed | None]:
        """The cluster as this node has to judge it: local pods bear the addresses of their
        leases at once, and stay until DEL. `changed` is what changed in `cluster` since the last
        time (None: anything), and comes back with what changed by leases besides; the dict of
        pods that comes is patched the next time."""
        leases = self._ipam.leases
        others = changed is None
        if changed is None:
            self._judged, self._here, self._laid = dict(cluster.pods), {}, set()
            keys: Collection[Name] = cluster.pods.keys()
        else:
            keys = changed.pods
        for key in keys:
            others |= self._take(key, cluster.pods.get(key))
        if others or leases is not self._leases:
            self._times += 1
            moved = self._lay(cluster.pods, leases)
            if changed is not None:
                changed.pods |= moved
        return msgspec.structs.replace(cluster, pods=self._judged), changed

    def _take(self, key: Name, pod: Pod | None) -> bool:
        """A pod is another, or went (None). True if that concerns this node."""
        before = self._judged.get(key)
        if pod is None:
            self._judged.pop(key, None)
        else:
            self._judged[key] = pod
        concerned = key in self._laid
        here = None if before is None else self._here.get(before.metadata.uid)
        if here is not None and here is not pod and here.key == key:
            del self._here[here.metadata.uid]
            concerned = True
        if pod is not None:
            uid = pod.metadata.uid
            if pod.spec.node_name == self._node or uid in self._ipam.leases:
                self._here[uid] = pod
                concerned = True
        return concerned

    def _lay(self, objects: Mapping[Name, Pod], leases: dict[str, Lease]) -> set[Name]:
        """Put pods with leases over the objects. Returns where there is another than before."""
        judged, before = self._judged, {key: self._judged.get(key) for key in self._laid}
        moved = {
            pod.key
            for uid, pod in self._here.items()
            if leases.get(uid) is not self._leases.get(uid)
        }
        for key in self._laid:
            if key in objects:
                judged[key] = objects[key]
            else:
                judged.pop(key, None)
        self._laid, self._leases = set(), leases
        for uid in self._pods.keys() - leases.keys():
            moved.add(self._pods.pop(uid)[1].key)
        for uid, lease in leases.items():
            pod, known = self._here.get(uid), self._pods.get(uid)
            if pod is None:
                if known is not None:
                    judged.setdefault(known[1].key, known[1])
                    self._laid.add(known[1].key)
                continue
            if known is None or known[0] is not pod or tuple(known[1].ips) != lease.ips:
                known = self._pods[uid] = pod, with_addresses(pod, lease)
            key = pod.key
            before.setdefault(key, judged.get(key))
            judged[key] = known[1]
            self._laid.add(key)
        return moved | {
            key for key in self._laid | before.keys() if judged.get(key) is not before.get(key)
        }

    def records(
        self, slots: Collection[int], number: Callable[[Pod], int]
    ) -> dict[int, EndpointRecord]:
        """What the publisher needs of the pods in `slots`; `number` is a pod's endpoint id.
        What stays the same, a record or all of them, stays the same object."""
        made_of = self._times, self.mtu, set(slots)
        if self._recorded == made_of:
            return self._by_slot
        self._recorded = None
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
                link = self.link(lease)
                known = (
                    lease,
                    EndpointRecord(own, link.pod_mac, link.host_mac, self.mtu, lease.ips),
                )
            self._records[uid] = known
        self._recorded = made_of
        self._by_slot = {lease.slot: record for lease, record in self._records.values()}
        return self._by_slot

    def wired(self, lease: Lease, netns: str) -> bool:
        """Is the pod's link there, whole, with its programs, and ends in this namespace?"""
        link = self.link(lease)
        whole = pods.seals().get(lease.slot) == self._seal(lease)
        try:
            if not whole or self._dp.guard.missing(link.ifindex):
                return False
            return pods.peer_of(netns, link.ifname) == link.ifindex
        except OSError:
            return False

    def wire(self, lease: Lease, netns: str, sources: tuple[str, ...]) -> None:
        """Links, programs. The policy must be in force already: from here on packets come.
        On OSError nothing stays."""
        pods.wire(self.link(lease), netns, self._seal(lease), sources, self._dp.guard.programs)

    def retire(self, slots: list[int]) -> None:
        """Cut pods off; `unwire` is to follow. Their slots stay taken until then."""
        pods.retire(slots)
        self._ipam.retired |= set(slots)

    def unwire(self, slots: list[int]) -> None:
        """Take away what there is of the slots' wiring. Nothing there is success."""
        pods.remove(slots)
        self._dp.guard.forget(slots)
        self._ipam.retired -= set(slots)

    def reconcile(self) -> list[str]:
        """At start, make leases and wiring agree: links tell whose they are, should the leases
        have been lost; links without a pod go; leases whose link is gone are given back
        (the namespace and the pod went while no agent ran). Returns what could not be done."""
        errors = [self._ipam.damaged] if self._ipam.damaged else []
        seals = pods.seals()
        with self._ipam.together():
            self._adopt(seals)
            for uid, lease in list(self._ipam.leases.items()):
                if seals.get(lease.slot) != self._seal(lease):
                    log.info("pod %s went while no agent ran: its addresses are free", uid)
                    self._ipam.release(uid)
        stray = set(seals) - {lease.slot for lease in self._ipam.leases.values()}
        if stray:
            log.info("links of no pod, removed: slots %s", sorted(stray))
            self.unwire(sorted(stray))
        return errors

    def attach(self) -> list[str]:
        """The programs to all pods that are wired. Returns what could not be done."""
        errors = []
        for lease in self._ipam.leases.values():
            try:
                self._dp.guard.take_over(lease.slot, self.link(lease).ifindex)
            except OSError as error:
                errors.append(f"pod {lease.uid}: {error}")
        return errors

    def _adopt(self, seals: dict[int, Seal | None]) -> None:
        for slot, seal in seals.items():
            if seal is None:
                continue
            lease = Lease(seal.uid, seal.ips, slot, seal.sandbox)
            if self._ipam.leases.get(seal.uid) != lease:
                log.warning(
                    "pod %s (%s) has a link and no lease: taken over", seal.uid, ", ".join(seal.ips)
                )
                self._ipam.adopt(lease)

    def link(self, lease: Lease) -> PodLink:
        """How a lease is wired."""
        return PodLink(self._node, lease.slot, lease.ips, self.mtu, lease.ifname)

    @staticmethod
    def _seal(lease: Lease) -> Seal:
        return Seal(lease.uid, lease.sandbox, lease.ips)


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

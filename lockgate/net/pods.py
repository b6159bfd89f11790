"""A pod's link: the veth pair and all that belongs to it, made and found again.

The host end's alias is a seal: it is set last and tells whose link it is, so the kernel itself
remembers the pods of a node, and a link without one was never finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
from dataclasses import dataclass
from types import MappingProxyType

from lockgate.net import dumps, filters
from lockgate.net.links import GATEWAY4, GATEWAY6, IFINDEX_BASE, sysctl
from lockgate.net.namespaces import inside
from lockgate.net.netlink import Batch

__all__ = ["PodLink", "Seal", "problems", "remove", "retire", "seals", "wire"]

_ALIAS_MAX = 255
_LO = 1


@dataclass(frozen=True, slots=True)
class Seal:
    """Whose link it is: the pod's uid, its sandbox ("" when nobody gave one), its addresses."""

    uid: str
    sandbox: str
    ips: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.uid} {self.sandbox or '-'} {','.join(self.ips)}"

    @classmethod
    def read(cls, alias: str) -> Seal | None:
        """None if this is no seal."""
        parts = alias.split(" ")
        if len(parts) != 3 or not all(parts):
            return None
        uid, sandbox, ips = parts
        return cls(uid, "" if sandbox == "-" else sandbox, tuple(ips.split(",")))

    @staticmethod
    def fits(uid: str, sandbox: str) -> bool:
        """Is there room for them, with an address of each family, in an alias?"""
        return len(uid.encode()) + len(sandbox.encode()) + 60 <= _ALIAS_MAX


def name_of(slot: int) -> str:
    """Of a pod's link, the host's end."""
    return f"lg{slot}"


@dataclass(frozen=True, slots=True)
class PodLink:
    """A pod's wiring, all of it decided by node, slot, addresses and the interface's name."""

    node: str
    slot: int
    addresses: tuple[str, ...]
    mtu: int
    ifname: str = "eth0"

    @property
    def name(self) -> str:
        return name_of(self.slot)

    @property
    def ifindex(self) -> int:
        return IFINDEX_BASE + self.slot

    @property
    def host_mac(self) -> bytes:
        return b"\x0a\x6c" + self._tail

    @property
    def pod_mac(self) -> bytes:
        return b"\x0a\x70" + self._tail

    @property
    def _tail(self) -> bytes:
        return hashlib.sha256(self.node.encode()).digest()[:2] + self.slot.to_bytes(2, "big")


def wire(
    link: PodLink,
    netns: str,
    seal: Seal,
    sources: tuple[str, ...] = (),
    programs: filters.Programs = MappingProxyType({}),
) -> None:
    """Make the pair, wire both ends and bring them up. `sources` are the node's addresses,
    which its own packets to the pod bear; `programs` are on the host's end before it is up, so
    that they see the first packet. What bears one of the names already is replaced. On OSError
    nothing stays."""
    target = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Batch() as host, contextlib.ExitStack() as ends:
            _make(host, link, target)
            try:
                filters.add(host, link.ifindex, programs)
                # Not with what follows: should this fail, the host's end stays down.
                host.send()
                with inside(f"/proc/self/fd/{target}"):
                    # A socket stays in the namespace that it was made in.
                    pod = ends.enter_context(Batch())
                    _quiet(link.ifname)
                    index = _wire_pod(pod, link)
                    pod.send()
                _quiet(link.name)
                sysctl(f"ipv4/conf/{link.name}/rp_filter", 0)
                _wire_host(host, link, sources)
                host.up(link.ifindex, alias=str(seal), addressless=False)
                host.send()
                pod.settle(index)
                pod.send()
            except BaseException:
                with contextlib.suppress(OSError), Batch() as fresh:
                    fresh.remove(link.name)
                    fresh.send()
                raise
    finally:
        os.close(target)


def _make(host: Batch, link: PodLink, target: int) -> None:
    """The pair, both ends down. What is in its place goes first: mostly there is nothing, and to
    look in both namespaces would cost as much as the pair."""
    pair = link.name, link.ifindex, link.host_mac, link.mtu, link.ifname, link.pod_mac, target
    host.veth(*pair)
    try:
        host.send()
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EBUSY):
            raise
        host.remove(link.name)
        host.send()
        with inside(f"/proc/self/fd/{target}"), Batch() as pod:
            pod.remove(link.ifname)
            pod.send()
        host.veth(*pair)
        try:
            host.send()
        except OSError as again:
            owner = _name(link.ifindex)
            if owner is None:
                raise
            what = f"cannot make interface {link.name}: {owner} has its index, {link.ifindex}"
            raise OSError(again.errno, what) from again


def _wire_pod(pod: Batch, link: PodLink) -> int:
    """The index of the pod's end."""
    index = socket.if_nametoindex(link.ifname)
    pod.up(_LO, addressless=False)
    pod.up(index)
    for address in link.addresses:
        gateway = GATEWAY6 if ":" in address else GATEWAY4
        pod.address(index, f"{address}/{_bits(address)}")
        pod.neighbour(index, gateway, link.host_mac)
        pod.route("::/0" if ":" in address else "0.0.0.0/0", index, gateway=gateway)
    return index


def _wire_host(host: Batch, link: PodLink, sources: tuple[str, ...]) -> None:
    # Routes want a link that is up.
    host.up(link.ifindex)
    host.address(link.ifindex, f"{GATEWAY6}/64")
    for address in link.addresses:
        host.neighbour(link.ifindex, address, link.pod_mac)
        source = next((s for s in sources if (":" in s) == (":" in address)), "")
        host.route(f"{address}/{_bits(address)}", link.ifindex, source=source)


def retire(slots: list[int]) -> None:
    """Cut pods off, at once: their links are down and nobody's. Nothing there is success."""
    with Batch() as host:
        for slot in slots:
            host.retire(name_of(slot))
        host.send()


def remove(slots: list[int]) -> None:
    """Take links away, with the ends in the pods. Takes the kernel about 20 ms, however many they
    are. Nothing there is success."""
    with Batch() as host:
        if slots:
            host.remove(*[name_of(slot) for slot in slots])
        host.send()


def seals() -> dict[int, Seal | None]:
    """Slot → seal of every pod's link in the calling thread's namespace; None: not finished."""
    return {
        one.index - IFINDEX_BASE: Seal.read(one.alias)
        for one in dumps.interfaces()
        if one.index >= IFINDEX_BASE and one.name == name_of(one.index - IFINDEX_BASE)
    }


def problems(link: PodLink, netns: str | None) -> list[str]:
    """What is not as `wire` left it, one sentence each; without `netns` only this node's side."""
    found = []
    ours = {one.index: one for one in dumps.interfaces()}.get(link.ifindex)
    if ours is None or ours.name != link.name:
        return [f"interface {link.name} is gone"]
    if not ours.up:
        found.append(f"interface {link.name} is down")
    routes = dumps.routes_of(link.ifindex)
    macs = dumps.macs(link.ifindex)
    for address in link.addresses:
        if f"{address}/{_bits(address)}" not in routes:
            found.append(f"the node has no route to {address} over {link.name}")
        if macs.get(address) != link.pod_mac:
            found.append(f"the node's neighbour entry for {address} is gone or another")
    if netns is not None:
        with inside(netns):
            found += _problems_inside(link)
    return found


def _problems_inside(link: PodLink) -> list[str]:
    own = next((one for one in dumps.interfaces() if one.name == link.ifname), None)
    if own is None or own.peer != link.ifindex:
        return [f"the pod has no {link.ifname} that is the other end of {link.name}"]
    found = []
    if not own.up:
        found.append(f"{link.ifname} is down")
    addresses, gateways = dumps.addresses(own.index), dumps.default_gateways(own.index)
    for address in link.addresses:
        if f"{address}/{_bits(address)}" not in addresses:
            found.append(f"{link.ifname} has lost the address {address}")
        if (GATEWAY6 if ":" in address else GATEWAY4) not in gateways:
            found.append(f"the pod has no default route for {address}")
    return found


def peer_of(netns: str, ifname: str) -> int | None:
    """Index of what an interface in another namespace is the other end of."""
    with inside(netns):
        return next((one.peer for one in dumps.interfaces() if one.name == ifname), None)


def _quiet(name: str) -> None:
    """No router discovery; nor is there an address but those we give (`Batch.up`). So nothing is
    ever sent unasked."""
    sysctl(f"ipv6/conf/{name}/disable_ipv6", 0)
    sysctl(f"ipv6/conf/{name}/accept_ra", 0)


def _name(index: int) -> str | None:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return None


def _bits(address: str) -> int:
    return 128 if ":" in address else 32

"""What a pod may not send: it arrives nowhere, and the flow log says why."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6PacketTooBig,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from tests.system.harness import Cluster, Place, Pod, until

ETH_P_ALL = 3
OTHER_MAC = "02:00:00:00:00:99"


class Wire:
    """A pod's link, and the addresses that matter on it."""

    def __init__(self, cluster: Cluster) -> None:
        self.pod = cluster.pod("traffic/a")
        self.neighbour = cluster.pod("traffic/b")
        self.remote = cluster.pod("traffic/c")
        self.outside = cluster.outside()
        self.mac = mac_of(self.pod)
        routers = self.pod.run("ip", "neigh", "show", "169.254.1.1").stdout.split()
        self.router = routers[routers.index("lladdr") + 1]

    def frame(self, payload: Packet, mac: str = "") -> bytes:
        return bytes(Ether(src=mac or self.mac, dst=self.router) / payload)


def mac_of(pod: Pod) -> str:
    words = pod.run("ip", "-o", "link", "show", "eth0").stdout.split()
    return words[words.index("link/ether") + 1]


Case = Callable[[Wire, Pod, bytes], Packet]

# name: (cause, the packet to a victim with a mark in it)
PACKETS: dict[str, tuple[str, Case]] = {
    "another pod's IPv4 address": (
        "spoofed-source",
        lambda w, to, mark: IP(src=w.neighbour.ip(4), dst=to.ip(4)) / UDP(dport=8080) / mark,
    ),
    "another pod's IPv6 address": (
        "spoofed-source",
        lambda w, to, mark: IPv6(src=w.neighbour.ip(6), dst=to.ip(6)) / UDP(dport=8080) / mark,
    ),
    "an address of the world": (
        "spoofed-source",
        lambda w, to, mark: IP(src="8.8.8.8", dst=to.ip(4)) / TCP(dport=8080) / mark,
    ),
    "the node's address": (
        "spoofed-source",
        lambda w, to, mark: IP(src="172.30.0.11", dst=to.ip(4)) / ICMP() / mark,
    ),
    "a link-local address": (
        "spoofed-source",
        lambda w, to, mark: IPv6(src="fe80::1234", dst=to.ip(6)) / ICMPv6EchoRequest() / mark,
    ),
    "no address": (
        "spoofed-source",
        lambda w, to, mark: IP(src="0.0.0.0", dst=to.ip(4)) / UDP(dport=8080) / mark,
    ),
    "a fragment of another's": (
        "spoofed-source",
        lambda w, to, mark: (
            IP(src=w.neighbour.ip(4), dst=to.ip(4), flags="MF") / UDP(dport=8080) / mark
        ),
    ),
}


@pytest.mark.parametrize("victim", ["traffic/b", "traffic/c", "outside"])
@pytest.mark.parametrize("name", PACKETS)
def test_a_pod_speaks_for_no_other_address(traffic: Cluster, name: str, victim: str) -> None:
    cause, make = PACKETS[name]
    wire, mark = Wire(traffic), os.urandom(12)
    to = Outside(traffic) if victim == "outside" else traffic.pod(victim)
    frame = wire.frame(make(wire, to, Raw(mark)))
    with recorded(traffic, cause):
        arrives_not(traffic, wire, to, frame, mark)


@pytest.mark.parametrize("victim", ["traffic/b", "traffic/c"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_sends_by_no_other_mac(traffic: Cluster, family: int, victim: str) -> None:
    wire, mark = Wire(traffic), os.urandom(12)
    to = traffic.pod(victim)
    ip = (IP if family == 4 else IPv6)(src=wire.pod.ip(family), dst=to.ip(family))
    frame = wire.frame(ip / UDP(dport=8080) / Raw(mark), mac=OTHER_MAC)
    with recorded(traffic, "spoofed-mac"):
        arrives_not(traffic, wire, to, frame, mark)


# name: (cause, what is said on the link). {b}: another pod's address.
CLAIMS: dict[str, tuple[str, Callable[[Wire], Packet]]] = {
    "ARP reply for another pod": (
        "spoofed-arp",
        lambda w: ARP(
            op=2, hwsrc=w.mac, psrc=w.neighbour.ip(4), hwdst=w.router, pdst="172.30.0.11"
        ),
    ),
    "ARP request as the gateway": (
        "spoofed-arp",
        lambda w: ARP(op=1, hwsrc=w.mac, psrc="169.254.1.1", pdst=w.pod.ip(4)),
    ),
    "ARP with another MAC": (
        "spoofed-arp",
        lambda w: ARP(op=2, hwsrc=OTHER_MAC, psrc=w.pod.ip(4), hwdst=w.router, pdst="172.30.0.11"),
    ),
    "neighbour advertisement for another pod": (
        "spoofed-ndp",
        lambda w: (
            IPv6(src=w.pod.ip(6), dst="ff02::1", hlim=255)
            / ICMPv6ND_NA(tgt=w.neighbour.ip(6), R=0, S=0, O=1)
            / ICMPv6NDOptDstLLAddr(lladdr=w.mac)
        ),
    ),
    "neighbour advertisement for the gateway": (
        "spoofed-ndp",
        lambda w: (
            IPv6(src=w.pod.ip(6), dst="ff02::1", hlim=255)
            / ICMPv6ND_NA(tgt="fe80::1", R=1, S=0, O=1)
            / ICMPv6NDOptDstLLAddr(lladdr=w.mac)
        ),
    ),
    "neighbour advertisement sent to another pod": (
        "spoofed-ndp",
        lambda w: (
            IPv6(src=w.pod.ip(6), dst=w.neighbour.ip(6), hlim=255)
            / ICMPv6ND_NA(tgt=w.pod.ip(6), R=0, S=1, O=1)
            / ICMPv6NDOptDstLLAddr(lladdr=w.mac)
        ),
    ),
    "router advertisement": (
        "router-advertisement",
        lambda w: (
            IPv6(src="fe80::2", dst="ff02::1", hlim=255)
            / ICMPv6ND_RA(routerlifetime=1800)
            / ICMPv6NDOptPrefixInfo(prefix="fd00:bad::", prefixlen=64)
            / ICMPv6NDOptSrcLLAddr(lladdr=w.mac)
        ),
    ),
    "redirect": (
        "ndp-redirect",
        lambda w: (
            IPv6(src="fe80::1", dst=w.neighbour.ip(6), hlim=255)
            / ICMPv6ND_Redirect(tgt=w.pod.ip(6), dst=w.remote.ip(6))
        ),
    ),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_pod_claims_nothing_on_its_link(traffic: Cluster, name: str) -> None:
    cause, make = CLAIMS[name]
    wire = Wire(traffic)
    node = traffic.node(wire.pod.node)
    before = beliefs(node)
    with recorded(traffic, cause):
        send(wire.pod, wire.frame(make(wire)))
    assert beliefs(node) == before


@pytest.mark.parametrize("ethertype", [0x88CC, 0x8100, 0x0842], ids=["LLDP", "VLAN", "other"])
def test_a_pod_speaks_ip_only(traffic: Cluster, ethertype: int) -> None:
    wire = Wire(traffic)
    frame = bytes(Ether(src=wire.mac, dst=wire.router, type=ethertype) / Raw(os.urandom(60)))
    with recorded(traffic, "unknown-ethertype"):
        send(wire.pod, frame)
    if ethertype == 0x8100:
        inner = IP(src=wire.neighbour.ip(4), dst=wire.remote.ip(4)) / UDP(dport=8080)
        with recorded(traffic, "unknown-ethertype"):
            send(wire.pod, frame[:14] + b"\0\x01\x08\0" + bytes(inner))


def test_the_outside_speaks_for_no_pod(traffic: Cluster) -> None:
    """A packet that comes by the outside link with a pod's source goes nowhere."""
    wire, mark = Wire(traffic), os.urandom(12)
    outside = wire.outside
    target = wire.pod
    with listener(target) as tap, outside.socket(socket.AF_PACKET, socket.SOCK_RAW) as near:
        near.bind(("br0", 0))
        with outside.socket(socket.AF_INET, socket.SOCK_DGRAM) as hello:
            hello.sendto(b"x", ("172.31.0.11", 9))  # so that the neighbour is known
        router = until(lambda: neighbour(outside, "172.31.0.11"), "the node's MAC")
        frame = Ether(src=OTHER_MAC, dst=router) / IP(src=wire.remote.ip(4), dst=target.ip(4))
        with recorded(traffic, "spoofed-source"):
            near.send(bytes(frame / UDP(dport=8080) / Raw(mark)))
        assert not heard(tap, mark)


def test_a_pod_has_one_place_in_its_nodes_neighbour_table(traffic: Cluster) -> None:
    """The table is the whole node's: full, the node finds no neighbour any more, its router either.
    Without link-local addresses of its own choice a pod can claim no more."""
    wire, node = Wire(traffic), traffic.node("node-1")
    before = drops(traffic, "spoofed-ndp")
    addresses = {f"fe80::{number:x}" for number in range(0x100, 0x100 + 100)}
    for address in sorted(addresses):
        packet = IPv6(src=address, dst="fe80::1", hlim=255)
        option = ICMPv6NDOptSrcLLAddr(lladdr=wire.mac)
        send(wire.pod, wire.frame(packet / ICMPv6ND_NS(tgt="fe80::1") / option))

    def claimed() -> list[str]:
        shown = node.run("ip", "-6", "neigh", "show").stdout
        return [line for line in shown.splitlines() if line.split()[0] in addresses]

    until(lambda: claimed() or drops(traffic, "spoofed-ndp") >= before + 100, "their end")
    assert claimed() == []


@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_cannot_narrow_its_nodes_way_to_others(traffic: Cluster, family: int) -> None:
    """By an ICMP error about a datagram of the node: UDP, and so VXLAN, believes it of anybody."""
    wire, node = Wire(traffic), traffic.node("node-1")
    here, there = traffic.node_ip("node-1", family), traffic.node_ip("node-2", family)
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    before = drops(traffic, "unrelated-error")

    def mtu() -> bool:
        return "mtu 1300" in node.run("ip", "route", "get", there).stdout

    with node.socket(kind, socket.SOCK_DGRAM) as tunnel:
        tunnel.bind(("", 0))
        head = IP if family == 4 else IPv6
        sent = head(src=here, dst=there) / UDP(sport=tunnel.getsockname()[1], dport=9) / bytes(64)
        error = (
            ICMP(type=3, code=4, nexthopmtu=1300) if family == 4 else ICMPv6PacketTooBig(mtu=1300)
        )
        send(wire.pod, wire.frame(head(src=wire.pod.ip(family), dst=here) / error / bytes(sent)))
        until(lambda: mtu() or drops(traffic, "unrelated-error") > before, "the error's end")
    assert not mtu()


# ---- How -----------------------------------------------------------------------------


class Outside:
    """The outside as a victim: as a pod, with an interface to listen on."""

    def __init__(self, cluster: Cluster) -> None:
        self.place = cluster.outside()
        self._cluster = cluster

    def ip(self, family: int) -> str:
        return self._cluster.outside_ip(family)


def listener(victim: Pod | Outside) -> socket.socket:
    """Sees every frame of the victim's link, to be polled."""
    where: Place = victim.place if isinstance(victim, Outside) else victim
    tap = where.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    tap.bind(("br0" if isinstance(victim, Outside) else "eth0", ETH_P_ALL))
    tap.setblocking(False)
    return tap


def send(pod: Place, frame: bytes) -> None:
    with pod.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        raw.send(frame)


def heard(tap: socket.socket, mark: bytes) -> bool:
    while True:
        try:
            if mark in tap.recv(65536):
                return True
        except BlockingIOError:
            return False


def arrives_not(
    cluster: Cluster, wire: Wire, victim: Pod | Outside, frame: bytes, mark: bytes
) -> None:
    """Sends the frame and then an honest datagram: only that one comes."""
    honest = os.urandom(12)
    with listener(victim) as tap:
        send(wire.pod, frame)
        with wire.pod.socket(socket.AF_INET, socket.SOCK_DGRAM) as near:
            near.sendto(honest, (victim.ip(4), 8080))
        seen = bytearray()

        def more() -> bool:
            try:
                seen.extend(tap.recv(65536))
            except BlockingIOError:
                return False
            return honest in seen

        until(more, "the honest datagram")
        assert mark not in seen


def drops(cluster: Cluster, cause: str) -> int:
    return int(cluster.agent_status("node-1")["drops"].get(cause, 0))


@contextlib.contextmanager
def recorded(cluster: Cluster, cause: str) -> Iterator[None]:
    """What is sent in here is dropped for that cause, by a new record of the node."""

    def records() -> int:
        return len(cluster.flows("node-1", cause=cause, limit=100_000))

    before = records()
    yield
    until(lambda: records() > before, f"a record of {cause}")


def beliefs(node: Place) -> str:
    """What a node's stack holds for true: routes and permanent neighbours."""
    routes = node.run("ip", "route").stdout + node.run("ip", "-6", "route").stdout
    neighbours = node.run("ip", "neigh", "show", "nud", "permanent").stdout
    return routes + "".join(sorted(neighbours.splitlines()))


def neighbour(where: Place, address: str) -> str:
    words = where.run("ip", "neigh", "show", address).stdout.split()
    return words[words.index("lladdr") + 1] if "lladdr" in words else ""

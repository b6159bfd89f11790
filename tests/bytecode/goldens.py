"""What the tables of packets share: one scene, packets by name of their ends, and the check.

A golden says: this frame into this program gives this answer, this frame and these events.
Frames are built by scapy, checksums too, so an equal frame has right checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet import TCP as Tcp
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.bytecode.world import (
    CARD_MAC,
    HOP_DROP,
    HOP_MAC,
    HOP_MASQ,
    HOST,
    IFINDEX_BASE,
    LOCAL,
    NODE,
    OUTSIDE,
    REMOTE,
    SCTP,
    TCP,
    UDP,
    UNDERLAY,
    Hop,
    Outcome,
    Peer,
    Scene,
    Service,
    World,
    host_mac,
    pod_mac,
)

A, B, C = 0, 1, 2  # slots of the local pods
ADDRESSES: dict[int, dict[str, str]] = {
    4: {
        "a": "10.0.1.2",
        "b": "10.0.1.3",
        "c": "10.0.1.4",
        "remote": "10.0.2.2",
        "far": "10.0.3.2",
        "node": "192.0.2.2",
        "host": "192.0.2.1",
        "world": "198.51.100.7",
        "unroutable": "203.0.113.1",
        "svc": "10.96.0.1",
        "masq": "192.0.2.1",
    },
    6: {
        "a": "fd00:1::2",
        "b": "fd00:1::3",
        "c": "fd00:1::4",
        "remote": "fd00:2::2",
        "far": "fd00:3::2",
        "node": "fd00:ff::2",
        "host": "fd00:ff::1",
        "world": "2001:db8::7",
        "unroutable": "2001:db8:dead::1",
        "svc": "fd00:96::1",
        "masq": "fd00:ff::1",
    },
}
FAMILIES = (4, 6)
HOP_DMAC, HOP_SMAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
OUT_DMAC, OUT_SMAC = "02:00:00:00:00:03", "02:00:00:00:00:04"
IDS = {"a": 1, "b": 2, "c": 3, "remote": 9, "far": 10}
#: Peer classes of the scene.
CLASS = {"a": 1, "b": 2, "c": 3, "remote": 4, "far": 5, "node": 6, "host": 7}


def base() -> Scene:
    peers, routes, services, via, masquerade = {}, {}, {}, [], []
    for family, ip in ADDRESSES.items():
        for slot, name in ((A, "a"), (B, "b"), (C, "c")):
            peers[ip[name]] = Peer(LOCAL, slot, IDS[name], CLASS[name])
        peers[ip["remote"]] = Peer(REMOTE, 1, IDS["remote"], CLASS["remote"])
        peers[ip["far"]] = Peer(REMOTE, 2, IDS["far"], CLASS["far"])
        peers[ip["node"]] = Peer(NODE, 1, 0, CLASS["node"])
        peers[ip["host"]] = Peer(HOST, 0, 0, CLASS["host"])
        routes["::/0" if family == 6 else "0.0.0.0/0"] = 3
        routes[f"{ip['unroutable']}/{128 if family == 6 else 32}"] = 4
        svc = ip["svc"]
        services |= {
            (svc, 80, TCP): Service(21, ((ip["b"], 8080),)),
            (svc, 53, UDP): Service(22, ((ip["b"], 5353),)),
            (svc, 81, TCP): Service(23, ((ip["a"], 8081),)),
            (svc, 82, TCP): Service(24, ((ip["world"], 443),)),
            (svc, 90, TCP): Service(25),
            (svc, 90, UDP): Service(26),
            (svc, 70, SCTP): Service(27, ((ip["b"], 70),)),
            (svc, 71, SCTP): Service(28, ((ip["b"], 7070),)),
            (svc, 83, TCP): Service(29, ((ip["remote"], 8083),)),
        }
        via.append(ip["node"])
        masquerade.append(ip["masq"])
    return Scene(
        peers,
        {
            slot: (IDS[name], (ADDRESSES[4][name], ADDRESSES[6][name]))
            for slot, name in ((A, "a"), (B, "b"), (C, "c"))
        },
        hops={
            1: Hop(UNDERLAY, HOP_MAC, HOP_DMAC, HOP_SMAC, mtu=1400),
            2: Hop(UNDERLAY, via=tuple(via)),
            3: Hop(OUTSIDE, HOP_MAC | HOP_MASQ, OUT_DMAC, OUT_SMAC, masquerade=tuple(masquerade)),
            4: Hop(OUTSIDE, HOP_DROP),
        },
        routes=routes,
        services=services,
        ports={(TCP, 80): 1, (TCP, 8080): 2, (UDP, 5353): 3},
    )


# ---- Packets -------------------------------------------------------------------------


def ip(family: int, source: str, target: str, ttl: int = 64, **more: Any) -> Packet:
    """IP header between ends by name ("a") or by address."""
    known = ADDRESSES[family]
    source, target = known.get(source, source), known.get(target, target)
    if family == 4:
        return IP(src=source, dst=target, ttl=ttl, **more)
    return IPv6(src=source, dst=target, hlim=ttl, **more)


def from_pod(slot: int = A, source: str | None = None) -> Ether:
    return Ether(src=source or pod_mac(slot), dst=host_mac(slot))


def to_pod(slot: int) -> Ether:
    """As the programs deliver to a pod."""
    return Ether(src=host_mac(slot), dst=pod_mac(slot))


def wire() -> Ether:
    """As it comes from a network card."""
    return Ether(src="02:00:00:00:00:aa", dst=CARD_MAC)


def to_hop() -> Ether:
    return Ether(src=HOP_SMAC, dst=HOP_DMAC)


def to_world() -> Ether:
    return Ether(src=OUT_SMAC, dst=OUT_DMAC)


def syn(sport: int = 40000, dport: int = 80) -> Packet:
    return Tcp(sport=sport, dport=dport, flags="S", seq=100)


def tcp(sport: int, dport: int, flags: str) -> Packet:
    return Tcp(sport=sport, dport=dport, flags=flags, seq=7, ack=101) / Raw(b"data")


def udp(sport: int = 40000, dport: int = 53) -> Packet:
    return Udp(sport=sport, dport=dport) / Raw(b"question")


def echo(family: int, number: int = 7, reply: bool = False) -> Packet:
    if family == 4:
        return ICMP(type=0 if reply else 8, id=number, seq=1) / Raw(b"ping")
    return (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=number, seq=1, data=b"ping")


def sctp(sport: int = 40000, dport: int = 70) -> Packet:
    """An INIT; the checksum does not cover addresses and is left as it is."""
    head = sport.to_bytes(2, "big") + dport.to_bytes(2, "big") + bytes(4) + b"\1\2\3\4"
    return Raw(head + b"\1\0\0\4")


#: How much of a packet an ICMP error of ours quotes, by family.
QUOTED = {4: 576 - 28, 6: 1280 - 48}


def unreachable(family: int, quoted: Packet, length: int | None = None) -> Packet:
    """Port unreachable about a packet, quoting it (or its first `length` bytes)."""
    quote = Raw(bytes(quoted)[:length])
    if family == 4:
        return ICMP(type=3, code=3) / quote
    return ICMPv6DestUnreach(code=4) / quote


def time_exceeded(family: int, quoted: Packet) -> Packet:
    if family == 4:
        return ICMP(type=11, code=0) / Raw(bytes(quoted)[: QUOTED[family]])
    return ICMPv6TimeExceeded(code=0) / Raw(bytes(quoted)[: QUOTED[family]])


def too_big(family: int, quoted: Packet, mtu: int) -> Packet:
    if family == 4:
        return ICMP(type=3, code=4, nexthopmtu=mtu) / Raw(bytes(quoted)[: QUOTED[family]])
    return ICMPv6PacketTooBig(mtu=mtu) / Raw(bytes(quoted)[: QUOTED[family]])


def answer4(packet: Packet) -> Packet:
    """As our own ICMP errors and resets are sent (IPv4: id 0, DF)."""
    if packet.haslayer(IP):
        packet[IP].id, packet[IP].flags = 0, "DF"
    return packet


def layers(frame: bytes) -> Packet:
    return Ether(frame)


# ---- The check -----------------------------------------------------------------------


@dataclass
class Golden:
    name: str
    program: str
    frame: Packet
    at: int  # interface index
    verdict: int
    out: Packet | None = None  # None: not looked at
    events: list[dict[str, Any]] | None = None  # fields that each event has, in order
    scene: Callable[[], Scene] = field(default=base)
    cb: tuple[int, ...] = ()


def at_pod(slot: int) -> int:
    return IFINDEX_BASE + slot


def check(world: World, golden: Golden) -> Outcome:
    world.publish(golden.scene())
    outcome = world.run(golden.program, bytes(golden.frame), golden.at, cb=golden.cb)
    assert outcome.verdict == golden.verdict, tell(outcome)
    if golden.out is not None:
        same_frame(outcome.packet, golden.out)
    if golden.events is not None:
        same_events(outcome.events, golden.events)
    return outcome


def same_frame(found: bytes, wanted: Packet) -> None:
    expected = bytes(wanted)
    if found != expected:
        pytest.fail(
            f"found:\n{layers(found).show2(dump=True)}\nwanted:\n"
            f"{layers(expected).show2(dump=True)}"
        )


def same_events(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    short = [{key: event[key] for key in want} for event, want in zip(found, wanted, strict=False)]
    assert short == wanted and len(found) == len(wanted), found


def tell(outcome: Outcome) -> str:
    return f"answer {outcome.verdict}, events {outcome.events}"


def dropped(cause: str, **more: Any) -> list[dict[str, Any]]:
    """The events of a packet dropped for a cause other than a policy."""
    return [{"type": 2, "verdict": 0, "cause": cause, **more}]


def allowed(*directions: int, **more: Any) -> list[dict[str, Any]]:
    return [{"type": 1, "verdict": 1, "direction": d, "cause": "none", **more} for d in directions]


def denied(direction: int, reason: int) -> dict[str, Any]:
    return {"type": 1, "verdict": 0, "direction": direction, "cause": "policy", "reason": reason}


def table(cases: Iterable[Golden]) -> Any:
    """Parametrize over goldens by name."""
    found = list(cases)
    return pytest.mark.parametrize("golden", found, ids=[golden.name for golden in found])

"""What XDP reads of a frame: ends, protocol and kind of any IP packet, and nothing beyond it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, IPOption_NOP
from scapy.layers.inet import TCP as Tcp
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from lockgate.bpf.maps import ArrayMap
from lockgate.objects.address import format_address
from tests.bytecode.edge import PASS, Edge
from tests.bytecode.goldens import FAMILIES, echo, ip, sctp, syn, tcp, udp, wire

PLAIN, OTHER, NOT_IP, BAD = range(4)  # enum frame_kind
FIRST, LATER = 1, 2  # enum fragment
OBJECT = Path(__file__).parents[2] / "build" / "frame.bpf.o"


@pytest.fixture(scope="module")
def reader(_world) -> Iterator[Edge]:
    with Edge(_world, path=OBJECT, program="read_frame") as edge:
        yield edge


def read(reader: Edge, frame: bytes) -> dict[str, Any]:
    """`struct frame`, as Python values."""
    frames = ArrayMap.of(reader.object, "frames", reader.object.schema.dtype("frame"))
    with reader.world.inside():
        assert reader.run(frame, 0).verdict == PASS
    found = frames.values()[0]
    ends = found["ends"]
    names = [name for name in found.dtype.names if name != "ends"]
    return {
        **{name: int(found[name]) for name in names},
        "source": format_address(ends["saddr"].tobytes()) if np.any(ends["saddr"]) else "",
        "target": format_address(ends["daddr"].tobytes()) if np.any(ends["daddr"]) else "",
        "ports": (int(ends["sport"]), int(ends["dport"])),
        "proto": int(ends["proto"]),
    }


@dataclass
class Case:
    name: str
    frame: Packet | bytes
    wanted: dict[str, Any]


def cut(packet: Packet, size: int) -> bytes:
    """The frame without its last `size` bytes, which its headers still count."""
    return bytes(packet)[:-size]


def changed(packet: Packet, at: int, value: int) -> bytes:
    raw = bytearray(bytes(packet))
    raw[at] = value
    return bytes(raw)


def both(family: int) -> list[Case]:
    def here(**more: Any) -> Packet:
        return wire() / ip(family, "world", "svc", ttl=63, **more)

    head = 20 if family == 4 else 40
    ends = {
        "source": "198.51.100.7" if family == 4 else "2001:db8::7",
        "target": "10.96.0.1" if family == 4 else "fd00:96::1",
        "family": family,
        "ttl": 63,
        "fragment": 0,
        "l4": 14 + head,
    }
    plain, other = ({**ends, "kind": kind} for kind in (PLAIN, OTHER))
    bad = {"kind": BAD, "cause": "malformed", "source": ends["source"]}
    protocol, length = ("proto", "len") if family == 4 else ("nh", "plen")
    nothing = {"kind": BAD, "cause": "malformed"}
    ack = tcp(40000, 80, "PA")
    return [
        Case(
            "TCP that begins",
            here() / syn(),
            {**plain, "ports": (40000, 80), "proto": 6, "tcp_flags": 2, "length": head + 20},
        ),
        Case(
            "TCP with data and options",
            here() / Tcp(sport=1, dport=2, flags="PA", options=[("NOP", None)] * 4) / Raw(b"x"),
            {**plain, "ports": (1, 2), "proto": 6, "tcp_flags": 0x18, "length": head + 25},
        ),
        Case(
            "UDP",
            here() / udp(),
            {**plain, "ports": (40000, 53), "proto": 17, "tcp_flags": 0, "length": head + 16},
        ),
        Case(
            "UDP without data",
            here() / Udp(sport=1, dport=2),
            {**plain, "ports": (1, 2), "proto": 17, "length": head + 8},
        ),
        Case(
            "padding does not count",
            bytes(here() / Udp(sport=1, dport=2)) + bytes(18),
            {**plain, "ports": (1, 2), "length": head + 8},
        ),
        Case(
            "half a TCP header, the rest is padding",
            bytes(here(**{protocol: 6, length: 12 + (20 if family == 4 else 0)}) / Raw(bytes(12)))
            + bytes(18),
            bad,
        ),
        Case(
            "SCTP", here(**{protocol: 132}) / sctp(), {**other, "ports": (40000, 70), "proto": 132}
        ),
        Case(
            "an echo request has no ports",
            here() / echo(family),
            {**other, "ports": (0, 0), "proto": 1 if family == 4 else 58},
        ),
        Case(
            "a protocol that nobody knows",
            here(**{protocol: 99}) / Raw(b"?"),
            {**other, "ports": (0, 0), "proto": 99},
        ),
        Case("in a VLAN", Ether() / Dot1Q(vlan=7) / here()[1] / syn(), {"kind": NOT_IP}),
        Case("cut within the IP header", bytes(here())[: 14 + head - 1], nothing),
        Case("nothing behind the IP header", here(**{protocol: 6}), bad),
        Case("cut within the TCP header", cut(here() / syn(), 1), bad),
        Case("cut within the UDP header", cut(here() / udp(), 9), bad),
        Case("cut within the data", cut(here() / ack, 1), bad),
        Case(
            "TCP header of 16 bytes",
            changed(here() / syn(), 14 + head + 12, 0x40),
            bad,
        ),
        Case("another version", changed(here() / syn(), 14, 0x55), nothing),
    ]


def ipv4() -> list[Case]:
    def here(**more: Any) -> Packet:
        return wire() / IP(src="198.51.100.7", dst="10.96.0.1", **more)

    bad = {"kind": BAD, "cause": "malformed"}
    known = {"source": "198.51.100.7", "target": "10.96.0.1"}
    options = [IPOption_NOP()] * 4
    return [
        Case(
            "options",
            here(options=options) / syn(),
            {"kind": OTHER, "ports": (40000, 80), "proto": 6, "tcp_flags": 2, **known},
        ),
        Case(
            "the first fragment",
            here(flags="MF") / udp(),
            {"kind": OTHER, "ports": (40000, 53), "fragment": FIRST, "proto": 17, **known},
        ),
        Case(
            "a later fragment has no ports",
            here(flags="MF", frag=100, proto=17) / Raw(bytes(32)),
            {"kind": OTHER, "ports": (0, 0), "fragment": LATER, "proto": 17, **known},
        ),
        Case(
            "the first fragment, too short for TCP", here(flags="MF", proto=6) / Raw(bytes(8)), bad
        ),
        Case(
            "an IP header of 16 bytes",
            changed(here() / syn(), 14, 0x44),
            {**bad, **known},
        ),
        Case("options beyond the packet", changed(here(proto=99), 14, 0x4F), bad),
        Case("a length less than the header", here(len=19) / syn(), bad),
        Case("ARP", Ether() / ARP(), {"kind": NOT_IP, "family": 0, "source": ""}),
        Case("less than an ICMP header", here() / ICMP() / Raw(b""), {"kind": OTHER, "proto": 1}),
    ]


def ipv6() -> list[Case]:
    def here(**more: Any) -> Packet:
        return wire() / IPv6(src="2001:db8::7", dst="fd00:96::1", **more)

    known = {"source": "2001:db8::7", "target": "fd00:96::1"}
    follows = {"kind": OTHER, "ports": (40000, 80), "proto": 6, "tcp_flags": 2, **known}
    unknown = {"kind": BAD, "cause": "extension-header", **known}
    return [
        Case("options for each hop", here() / IPv6ExtHdrHopByHop() / syn(), follows),
        Case("options for the target", here() / IPv6ExtHdrDestOpt() / syn(), follows),
        Case(
            "an authentication header",
            here() / AH(icv=bytes(12), payloadlen=4, nh=6) / syn(),
            follows,
        ),
        Case(
            "a route that is used up",
            here() / IPv6ExtHdrRouting(type=4, segleft=0) / syn(),
            follows,
        ),
        Case("a route", here() / IPv6ExtHdrRouting(addresses=["fd00::1"]) / syn(), unknown),
        Case(
            "seven of them",
            here() / IPv6ExtHdrHopByHop() / _chain([IPv6ExtHdrDestOpt()] * 6) / syn(),
            {**follows, "l4": 14 + 40 + 7 * 8},
        ),
        Case("more than we follow", here() / _chain([IPv6ExtHdrDestOpt()] * 9) / syn(), unknown),
        Case(
            "the first fragment",
            here() / IPv6ExtHdrFragment(m=1) / syn(),
            {**follows, "fragment": FIRST},
        ),
        Case(
            "a fragment that is all",
            here() / IPv6ExtHdrFragment() / syn(),
            {**follows, "fragment": 0},
        ),
        Case(
            "a later fragment has no ports",
            here() / IPv6ExtHdrFragment(offset=10, nh=6) / Raw(bytes(32)),
            {"kind": OTHER, "ports": (0, 0), "fragment": LATER, "proto": 6, **known},
        ),
        Case(
            "a fragment of a fragment",
            here() / IPv6ExtHdrFragment(m=1) / IPv6ExtHdrFragment(m=1) / syn(),
            unknown,
        ),
        Case(
            "cut within an extension header",
            cut(here() / IPv6ExtHdrDestOpt() / IPv6ExtHdrDestOpt(nh=59), 4),
            {"kind": BAD, "cause": "malformed"},
        ),
        Case(
            "an extension header that the packet does not have",
            here(nh=60),
            {"kind": BAD, "cause": "malformed"},
        ),
        Case(
            "an address that is IPv4 in our tables",
            wire() / IPv6(src="::ffff:198.51.100.7", dst="fd00:96::1") / syn(),
            {"kind": BAD, "cause": "malformed"},
        ),
    ]


def _chain(headers: list[Packet]) -> Packet:
    made = headers[0].copy()
    for header in headers[1:]:
        made = made / header.copy()
    return made


CASES = [
    *(Case(f"IPv{f}: {case.name}", case.frame, case.wanted) for f in FAMILIES for case in both(f)),
    *(Case(f"IPv4: {case.name}", case.frame, case.wanted) for case in ipv4()),
    *(Case(f"IPv6: {case.name}", case.frame, case.wanted) for case in ipv6()),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_frame_is_read(reader, case):
    found = read(reader, bytes(case.frame))
    found["cause"] = reader.world.causes[found["cause"]]
    assert {name: found[name] for name in case.wanted} == case.wanted, found


@pytest.mark.parametrize("family", FAMILIES)
def test_no_frame_makes_it_read_beyond_the_end(reader, family):
    """Whatever is cut off, the answer is of the bytes that are there."""
    whole = bytes(wire() / ip(family, "world", "svc") / tcp(40000, 80, "PA"))
    for size in range(14, len(whole)):
        assert read(reader, whole[:size])["kind"] == BAD, size
    assert read(reader, whole)["kind"] == PLAIN


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_in_pieces_is_read_but_not_plain(reader, family):
    """More than a page: the rest of it lies elsewhere."""
    packet = wire() / ip(family, "world", "svc") / Udp(sport=1, dport=2) / Raw(bytes(8000))
    found = read(reader, bytes(packet))
    assert (found["kind"], found["ports"], found["proto"]) == (OTHER, (1, 2), 17)

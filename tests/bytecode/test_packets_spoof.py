"""What a pod may not say, what cannot be read, and packets in pieces."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, IPOption_NOP
from scapy.layers.inet import TCP as Tcp
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import (
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    IDS,
    A,
    B,
    Golden,
    allowed,
    at_pod,
    base,
    check,
    dropped,
    echo,
    from_pod,
    ip,
    sctp,
    syn,
    table,
    tcp,
    to_pod,
    udp,
    unreachable,
    wire,
)
from tests.bytecode.world import DROP, DRY_MARK, NEXT, REDIRECT, UNDERLAY, host_mac, pod_mac

OTHER = "02:00:00:00:00:99"
SIX = ADDRESSES[6]
OWN_LINK = "fe80::870:ff:fe00:0"  # of pod_mac(A), RFC 4291


def arp(sender: str = pod_mac(A), **fields) -> Ether:
    fields = {"op": 1, "hwsrc": pod_mac(A), "psrc": "10.0.1.2", "pdst": "169.254.1.1"} | fields
    return Ether(src=sender, dst="ff:ff:ff:ff:ff:ff") / ARP(**fields)


def ndp(message, source: str = SIX["a"], target: str = "ff02::1:ff00:1", hops: int = 255) -> Ether:
    return from_pod(A) / IPv6(src=source, dst=target, hlim=hops) / message


def neighbours() -> Iterator[Golden]:
    na, ns = ICMPv6ND_NA(tgt=SIX["a"]), ICMPv6ND_NS(tgt="fe80::1")
    for name, frame, cause in (
        ("arp for the gateway", arp(), None),
        ("arp probe for itself", arp(psrc="0.0.0.0", pdst="10.0.1.2"), None),
        ("arp answer", arp(op=2), None),
        ("arp for another's address", arp(psrc="10.0.1.3"), "spoofed-arp"),
        ("arp for the gateway's address", arp(op=2, psrc="169.254.1.1"), "spoofed-arp"),
        ("arp with another's MAC", arp(hwsrc=OTHER), "spoofed-arp"),
        ("arp in a frame from another MAC", arp(OTHER), "spoofed-mac"),
        ("arp answer in a frame from another MAC", arp(OTHER, op=2), "spoofed-mac"),
        ("arp with another's MAC in a frame from it", arp(OTHER, hwsrc=OTHER), "spoofed-mac"),
        ("arp cut short", Ether(bytes(arp())[:30]), "malformed"),
        ("solicitation of the gateway", ndp(ns), None),
        ("solicitation, unicast", ndp(ns, target="fe80::1"), None),
        ("solicitation for an address of its own (DAD)", ndp(ns, source="::"), None),
        ("router solicitation", ndp(ICMPv6ND_RS(), target="ff02::2"), None),
        ("advertisement of its own address", ndp(na, target="fe80::1"), None),
        ("advertisement of another's", ndp(ICMPv6ND_NA(tgt=SIX["b"])), "spoofed-ndp"),
        ("advertisement of the gateway", ndp(ICMPv6ND_NA(tgt="fe80::1")), "spoofed-ndp"),
        ("advertisement from the gateway", ndp(na, source="fe80::1"), "spoofed-ndp"),
        ("advertisement from another", ndp(na, source=SIX["b"]), "spoofed-ndp"),
        ("solicitation from another", ndp(ns, source=SIX["b"]), "spoofed-ndp"),
        ("solicitation from the link-local address of its MAC", ndp(ns, source=OWN_LINK), None),
        ("solicitation from another link-local address", ndp(ns, source="fe80::9"), "spoofed-ndp"),
        ("router solicitation from another link-local address",
         ndp(ICMPv6ND_RS(), source="fe80::9"), "spoofed-ndp"),
        ("solicitation from a link-local address in another network",
         ndp(ns, source=OWN_LINK.replace("fe80::", "fe80:0:0:1:")), "spoofed-ndp"),
        ("advertisement of the link-local address of its MAC",
         ndp(ICMPv6ND_NA(tgt=OWN_LINK), target="fe80::1"), None),
        ("advertisement of another link-local address",
         ndp(ICMPv6ND_NA(tgt="fe80::9"), target="fe80::1"), "spoofed-ndp"),
        ("solicitation through routers", ndp(ns, hops=254), "spoofed-ndp"),
        ("solicitation to another pod", ndp(ns, target=SIX["b"]), "spoofed-ndp"),
        ("router solicitation to another node", ndp(ICMPv6ND_RS(), target=SIX["remote"]),
         "spoofed-ndp"),
        ("router advertisement", ndp(ICMPv6ND_RA(), target="ff02::1"), "router-advertisement"),
        ("redirect", ndp(ICMPv6ND_Redirect(tgt="fe80::9", dst=SIX["b"])), "ndp-redirect"),
        ("advertisement cut short", ndp(Raw(bytes(ICMPv6ND_NA(tgt=SIX["a"]))[:12]),
         target="ff02::1") , None),
    ):  # fmt: skip
        if name == "advertisement cut short":
            frame = (
                Ether(src=pod_mac(A), dst=host_mac(A))
                / IPv6(src=SIX["a"], dst="ff02::1", hlim=255, nh=58)
                / Raw(bytes(ICMPv6ND_NA(tgt=SIX["a"]))[:12])
            )
            cause = "malformed"
        events = dropped(cause, place=1, src_endpoint=IDS["a"]) if cause else []
        yield Golden(name, "from_pod", frame, at_pod(A), DROP if cause else NEXT, frame, events)


@table(neighbours())
def test_neighbours(world, golden):
    check(world, golden)


def lies(f: int) -> Iterator[Golden]:
    link = {4: "169.254.9.9", 6: "fe80::9"}[f]
    group = {4: "224.0.0.251", 6: "ff02::fb"}[f]
    for name, frame, cause in (
        ("another MAC", from_pod(A, OTHER) / ip(f, "a", "b") / syn(), "spoofed-mac"),
        ("another pod's address", from_pod(A) / ip(f, "c", "b") / syn(), "spoofed-source"),
        ("the node's address", from_pod(A) / ip(f, "host", "b") / syn(), "spoofed-source"),
        ("the service's address", from_pod(A) / ip(f, "svc", "b") / syn(), "spoofed-source"),
        ("a link-local address", from_pod(A) / ip(f, link, "b") / syn(), "spoofed-source"),
        ("an ICMP error from a router", from_pod(A) / ip(f, "world", "b")
         / unreachable(f, ip(f, "b", "a") / udp()), "spoofed-source"),
    ):  # fmt: skip
        yield Golden(
            name, "from_pod", frame, at_pod(A), DROP, None, dropped(cause, src_endpoint=IDS["a"])
        )
    frame = from_pod(A) / ip(f, "a", group) / udp(5353, 5353)
    yield Golden("multicast is dropped, counted and not told", "from_pod", frame, at_pod(A), DROP,
                 None, [])  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@table(lies(4))
def test_lies(world, golden, family):
    check(world, next(g for g in lies(family) if g.name == golden.name))


@pytest.mark.parametrize("family", FAMILIES)
def test_multicast_is_counted(world, family):
    frame = from_pod(A) / ip(family, "a", {4: "255.255.255.255", 6: "ff02::1"}[family]) / udp()
    world.publish(base())
    assert world.run("from_pod", bytes(frame), at_pod(A)).verdict == DROP
    causes = {name: number for number, name in world.causes.items()}
    assert world.counters()[8 + causes["multicast"]] == 1


def test_mld_is_no_news(world):
    frame = from_pod(A) / IPv6(src="fe80::5", dst="ff02::16", hlim=1) / ICMPv6MLReport2()
    check(world, Golden("mld", "from_pod", frame, at_pod(A), DROP, None, []))


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(from_pod(A) / Dot1Q(vlan=7) / ip(4, "a", "b") / syn(), id="VLAN tag"),
        pytest.param(Ether(src=pod_mac(A), dst=host_mac(A), type=0x88CC) / Raw(bytes(46)),
                     id="LLDP"),
        pytest.param(Ether(src=pod_mac(A), dst=host_mac(A), type=0x8847) / Raw(bytes(46)),
                     id="MPLS"),
    ],
)  # fmt: skip
def test_unknown_ethertypes_are_dropped(world, frame):
    outcome = check(world, Golden("", "from_pod", frame, at_pod(A), DROP))
    # A VLAN tag is taken off before the programs see it, or it is unknown as it stands.
    assert [e["cause"] for e in outcome.events] == ["unknown-ethertype"]


def test_a_slot_that_nobody_has_is_not_ready(world):
    frame = Ether(src=pod_mac(9), dst=host_mac(9)) / ip(4, "a", "b") / syn()
    check(world, Golden("", "from_pod", frame, at_pod(9), DROP, None, dropped("not-ready")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_without_a_published_address_is_refused(world, family):
    """Its interface is there, but no view knows the address: nothing could be judged."""
    scene = base().without(ADDRESSES[family]["a"])
    check(
        world,
        Golden("", "from_pod", from_pod(A) / ip(family, "a", "b") / syn(), at_pod(A), DROP, None,
               dropped("not-ready"), lambda: scene),
    )  # fmt: skip
    # Dry, because only there a test run can say that no socket of the node sent the packet.
    frame = bytes(to_pod(A) / ip(family, "remote", "a") / syn())
    result = world.run("to_pod", frame, at_pod(A), DRY_MARK, (0,)).cb[0]
    assert (result & 1, world.causes[result >> 8 & 0xFF]) == (0, "not-ready")


# ---- Malformed -----------------------------------------------------------------------


def whole(f: int) -> dict[str, Ether]:
    more = {"proto": 132} if f == 4 else {"nh": 132}
    return {
        "tcp": from_pod(A) / ip(f, "a", "b") / syn(),
        "udp": from_pod(A) / ip(f, "a", "b") / udp(),
        "sctp": from_pod(A) / ip(f, "a", "b", **more) / sctp(),
        "echo": from_pod(A) / ip(f, "a", "b") / echo(f),
        "error": from_pod(A) / ip(f, "a", "b") / unreachable(f, ip(f, "b", "a") / udp()),
    }


@pytest.mark.parametrize("kind", ["tcp", "udp", "sctp", "echo", "error"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packet_cut_at_any_byte_goes_nowhere(world, family, kind):
    """The IP header promises more than there is. (Test runs refuse less than an IP header.)"""
    world.publish(base())
    frame = bytes(whole(family)[kind])
    for length in range(34 if family == 4 else 54, len(frame)):
        outcome = world.run("from_pod", frame[:length], at_pod(A))
        assert outcome.verdict == DROP, length
        [event] = outcome.events
        assert event["cause"] == "malformed", length
        assert world.run("to_pod", frame[:length], at_pod(B)).verdict == DROP, length
        assert world.run("from_net", frame[:length], UNDERLAY).verdict == NEXT, length
    assert world.tracked() == []


def shortened(frame: bytes, family: int, length: int) -> bytes:
    """Cut, and the IP header says so: a well-formed IP packet whose upper layer is cut."""
    raw = bytearray(frame[:length])
    if family == 4:
        struct.pack_into("!H", raw, 16, length - 14)
    else:
        struct.pack_into("!H", raw, 18, length - 54)
    return bytes(raw)


@pytest.mark.parametrize("padded", [False, True], ids=["bare", "padded"])
@pytest.mark.parametrize("kind", ["tcp", "udp", "sctp", "echo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_header_that_is_not_all_there_goes_nowhere(world, family, kind, padded):
    """Also when the frame has padding where the rest of the header would stand."""
    world.publish(base())
    frame = bytes(whole(family)[kind])
    start = 34 if family == 4 else 54
    for length in range(start, start + (14 if kind == "tcp" else 8)):
        cut = shortened(frame, family, length) + (frame[length:] if padded else b"")
        outcome = world.run("from_pod", cut, at_pod(A))
        assert outcome.verdict == DROP, length
        assert [e["cause"] for e in outcome.events] == ["malformed"], length
    assert world.tracked() == []


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(14, 0x55, id="version 5"),
        pytest.param(14, 0x44, id="header of 16 bytes"),
        pytest.param(14, 0x4F, id="header longer than the packet"),
        pytest.param(17, 10, id="total length below the header"),
        pytest.param(16, 0xFF, id="total length beyond the frame"),
        pytest.param(46, 0x40, id="TCP header of 16 bytes"),
    ],
)
def test_inconsistent_headers_go_nowhere(world, offset, value):
    world.publish(base())
    frame = bytearray(bytes(from_pod(A) / ip(4, "a", "b") / syn()))
    frame[offset] = value
    outcome = world.run("from_pod", bytes(frame), at_pod(A))
    assert outcome.verdict == DROP and [e["cause"] for e in outcome.events] == ["malformed"]


def test_a_malformed_packet_shows_nothing_of_the_one_before(world):
    world.publish(base())
    world.run("from_pod", bytes(from_pod(A) / ip(4, "a", "b") / syn()), at_pod(A))
    frame = bytes(from_pod(A) / ip(4, "a", "b") / syn())[:36]
    [event] = world.run("from_pod", frame, at_pod(A)).events
    shown = {name: event[name] for name in ("saddr", "daddr", "sport", "dport", "proto", "length")}
    assert shown == {"saddr": "::", "daddr": "::", "sport": 0, "dport": 0, "proto": 0, "length": 40}


# ---- Fragments -----------------------------------------------------------------------


def pieces(f: int, source: str, target: str, number: int = 99, proto: int = 17):
    """(first, later) of a UDP datagram."""
    whole_ = bytes(Udp(sport=40000, dport=5353, len=88, chksum=0x1234) / Raw(bytes(80)))
    known = ADDRESSES[f]
    source, target = known.get(source, source), known.get(target, target)
    if f == 4:
        head = {"src": source, "dst": target, "id": number, "proto": proto}
        return (
            IP(**head, flags="MF") / Raw(whole_[:48]),
            IP(**head, frag=6) / Raw(whole_[48:]),
        )
    return (
        IPv6(src=source, dst=target)
        / IPv6ExtHdrFragment(id=number, m=1, nh=proto)
        / Raw(whole_[:48]),
        IPv6(src=source, dst=target)
        / IPv6ExtHdrFragment(id=number, offset=6, nh=proto)
        / Raw(whole_[48:]),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("allowed_there", [True, False], ids=["allowed", "denied"])
def test_later_fragments_share_the_verdict_of_the_first(world, family, allowed_there):
    allow = {(2, 3): 11} if allowed_there else {}  # b, UDP port 5353
    world.publish(base().isolate(A, 2, allow))
    for piece in pieces(family, "a", "b"):
        outcome = world.run("from_pod", bytes(from_pod(A) / piece), at_pod(A))
        assert outcome.verdict == (REDIRECT if allowed_there else DROP)
        if allowed_there:
            assert outcome.packet[14:] == bytes(piece)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_fragment_before_the_first_goes_nowhere(world, family):
    world.publish(base())
    first, later = pieces(family, "a", "b")
    outcome = world.run("from_pod", bytes(from_pod(A) / later), at_pod(A))
    assert outcome.verdict == DROP
    [event] = outcome.events
    assert event["cause"] == "fragment-untracked"
    assert (event["sport"], event["dport"], event["proto"]) == (0, 0, 17)
    assert world.run("from_pod", bytes(from_pod(A) / first), at_pod(A)).verdict == REDIRECT
    assert world.run("from_pod", bytes(from_pod(A) / later), at_pod(A)).verdict == REDIRECT


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments_from_the_net(world, family):
    world.publish(base())
    first, later = pieces(family, "remote", "a")
    outcome = world.run("from_net", bytes(wire() / later), UNDERLAY)
    assert (outcome.verdict, outcome.events[0]["cause"]) == (DROP, "fragment-untracked")
    assert world.run("from_net", bytes(wire() / first), UNDERLAY).verdict == REDIRECT
    outcome = world.run("from_net", bytes(wire() / later), UNDERLAY)
    assert outcome.verdict == REDIRECT
    assert outcome.packet == bytes(to_pod(A) / later)
    # For others they are the stack's business.
    _, later = pieces(family, "remote", "host")
    outcome = world.run("from_net", bytes(wire() / later), UNDERLAY)
    assert (outcome.verdict, outcome.events) == (NEXT, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments_through_a_service(world, family):
    """Addresses are translated in every piece, ports and checksum in the first."""
    world.publish(
        base().but(services={(ADDRESSES[family]["svc"], 5353, 17): base().services[
            ADDRESSES[family]["svc"], 53, 17]})
    )  # fmt: skip
    for piece, wanted in zip(pieces(family, "a", "svc"), pieces(family, "a", "b"), strict=True):
        outcome = world.run("from_pod", bytes(from_pod(A) / piece), at_pod(A))
        assert outcome.verdict == REDIRECT
        found, plain = bytearray(outcome.packet), bytearray(bytes(to_pod(B) / wanted))
        if piece.payload and b"\x14\xe9" in bytes(piece):  # the first: its checksum moved
            at = (34 if family == 4 else 62) + 6
            assert found[at : at + 2] != plain[at : at + 2]
            found[at : at + 2] = plain[at : at + 2] = bytes(2)
        assert found == plain


def test_an_atomic_fragment_is_a_whole_packet(world):
    world.publish(base())
    frame = from_pod(A) / ip(6, "a", "b") / IPv6ExtHdrFragment(id=5) / syn()
    assert world.run("from_pod", bytes(frame), at_pod(A)).verdict == REDIRECT
    assert len(world.fragments) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_fragment_to_a_refused_service_gets_no_answer(world, family):
    world.publish(base())
    known = ADDRESSES[family]
    for proto in (6, 17):
        l4 = bytes(Tcp(dport=90) if proto == 6 else Udp(dport=90, len=64)) + bytes(40)
        l4 = l4[: len(l4) // 8 * 8]
        if family == 4:
            head = {"src": known["a"], "dst": known["svc"], "id": 5, "proto": proto}
            first, later = IP(**head, flags="MF") / Raw(l4), IP(**head, frag=9) / Raw(bytes(40))
        else:
            head = IPv6(src=known["a"], dst=known["svc"])
            first = head / IPv6ExtHdrFragment(id=5, m=1, nh=proto) / Raw(l4)
            later = head / IPv6ExtHdrFragment(id=5, offset=9, nh=proto) / Raw(bytes(40))
        assert world.run("from_pod", bytes(from_pod(A) / first), at_pod(A)).verdict == REDIRECT
        outcome = world.run("from_pod", bytes(from_pod(A) / later), at_pod(A))
        assert (outcome.verdict, outcome.events[0]["cause"]) == (DROP, "no-backend")


# ---- IPv6 extension headers ------------------------------------------------------------


EXTENSIONS = {
    "hop by hop": IPv6ExtHdrHopByHop(),
    "destination options": IPv6ExtHdrDestOpt(),
    "routing": IPv6ExtHdrRouting(),
    "several": IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(),
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_extension_headers_are_walked(world, name):
    world.publish(base().isolate(A, 2, {(2, 1): 12}))
    packet = ip(6, "a", "b") / EXTENSIONS[name].copy() / syn()
    outcome = world.run("from_pod", bytes(from_pod(A) / packet), at_pod(A))
    assert outcome.verdict == REDIRECT
    event = outcome.events[0]
    assert (event["proto"], event["dport"], event["reason"]) == (6, 80, 12)
    other = ip(6, "a", "b") / EXTENSIONS[name].copy() / syn(dport=81)
    assert world.run("from_pod", bytes(from_pod(A) / other), at_pod(A)).verdict == DROP


def test_an_endless_chain_of_extensions_is_not_followed(world):
    chain = ip(6, "a", "b")
    for _ in range(9):
        chain = chain / IPv6ExtHdrDestOpt()
    check(
        world,
        Golden("", "from_pod", from_pod(A) / chain / syn(), at_pod(A), DROP, None,
               dropped("extension-header")),
    )  # fmt: skip
    check(
        world,
        Golden("", "from_net", wire() / chain / syn(), UNDERLAY, NEXT, None, []),
    )


def test_ipv4_options_are_walked(world):
    world.publish(base().isolate(A, 2, {(2, 1): 12}))
    packet = IP(src="10.0.1.2", dst="10.0.1.3", options=[IPOption_NOP()] * 4) / syn()
    outcome = world.run("from_pod", bytes(from_pod(A) / packet), at_pod(A))
    assert outcome.verdict == REDIRECT and outcome.events[0]["reason"] == 12


def test_what_is_no_ip_passes_at_the_other_hooks(world):
    world.publish(base())
    for program, at in (("to_pod", at_pod(A)), ("from_net", UNDERLAY)):
        frame = bytes(arp(psrc="10.0.1.3"))
        outcome = world.run(program, frame, at)
        assert (outcome.verdict, outcome.events, outcome.packet) == (NEXT, [], frame)


def test_neighbours_of_the_node_pass_to_the_pod(world):
    frame = to_pod(A) / IPv6(src="fe80::1", dst=SIX["a"], hlim=255) / ICMPv6ND_NS(tgt=SIX["a"])
    check(world, Golden("", "to_pod", frame, at_pod(A), NEXT, frame, []))


def test_mid_stream_packets_begin_a_connection_and_are_judged(world):
    """The node restarted, or an entry was evicted: policies decide, not the state."""
    frame = from_pod(A) / ip(4, "a", "b") / tcp(40000, 80, "A")
    check(
        world,
        Golden("", "from_pod", frame, at_pod(A), REDIRECT, None, allowed(2, 1, tcp_flags=0x10)),
    )

"""What a hostile pod, a neighbour on the wire or a stranger may try, and what it gets."""

from __future__ import annotations

import socket
import time
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import IP
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, IPv6ExtHdrRouting
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

from lockgate.agent.sweep import sweep
from lockgate.bpf import links
from lockgate.objects.address import format_address
from tests.bytecode.goldens import (
    ADDRESSES,
    CLASS,
    FAMILIES,
    A,
    B,
    C,
    at_pod,
    base,
    echo,
    from_pod,
    ip,
    sctp,
    syn,
    tcp,
    too_big,
    udp,
    unreachable,
    wire,
)
from tests.bytecode.world import (
    DROP,
    EGRESS,
    INGRESS,
    NEXT,
    OUTSIDE,
    REDIRECT,
    UNDERLAY,
    pod_mac,
    set_seen,
)

ESTABLISHED, CLOSED = 2, 4  # enum ct_state
WEB = 1  # port class of TCP 80


def sends(world, name: str, slot: int, packet, verdict: int = REDIRECT):
    """A pod sends; answers what the program did."""
    outcome = world.run("from_pod", bytes(from_pod(slot) / packet), at_pod(slot))
    assert outcome.verdict == verdict, (name, outcome.events)
    return outcome


def cause(outcome) -> str:
    return str(outcome.events[-1]["cause"])


def establish(world, family: int) -> None:
    """a:40000 → b:80"""
    sends(world, "syn", A, ip(family, "a", "b") / syn())
    sends(world, "syn ack", B, ip(family, "b", "a") / tcp(80, 40000, "SA"))


def states(world) -> list[int]:
    return [fields["state"] for _, fields in world.tracked()]


# ---- Shapes of packets ---------------------------------------------------------------


def mapped(name: str) -> str:
    return "::ffff:" + ADDRESSES[4][name]


def test_ipv4_addresses_in_ipv6_headers_are_nobodys(world):
    """In the tables ::ffff:10.0.1.3 is pod b; in an IPv6 header it must not be."""
    world.publish(base())
    establish(world, 4)
    for target in ("b", "svc", "world", "host"):
        outcome = sends(world, target, A, ip(6, "a", mapped(target)) / syn(dport=80), DROP)
        assert cause(outcome) == "malformed"
    assert cause(sends(world, "own", A, ip(6, mapped("a"), mapped("b")) / syn(), DROP)) == (
        "malformed"
    )
    # From the wire: neither into a connection nor to a pod; the stack drops it.
    for at in (UNDERLAY, OUTSIDE):
        for packet in (
            ip(6, mapped("b"), mapped("a")) / tcp(80, 40000, "R"),
            ip(6, mapped("world"), "a") / syn(),
        ):
            outcome = world.run("from_net", bytes(wire() / packet), at)
            assert (outcome.verdict, outcome.events) == (NEXT, [])
    assert states(world) == [ESTABLISHED]


def test_a_fragment_of_a_fragment_is_not_followed(world):
    """Its ports would be those of a piece that the receiver never joins it with."""
    world.publish(base())
    frags = IPv6ExtHdrFragment(id=1, m=1) / IPv6ExtHdrFragment(id=2, offset=3, nh=17)
    outcome = sends(world, "", A, ip(6, "a", "b") / frags / Raw(bytes(24)), DROP)
    assert cause(outcome) == "extension-header"


def test_a_route_beyond_the_judged_destination_is_not_followed(world):
    world.publish(base())
    route = IPv6ExtHdrRouting(addresses=[ADDRESSES[6]["c"]], segleft=1)
    outcome = sends(world, "", A, ip(6, "a", "b") / route / syn(), DROP)
    assert cause(outcome) == "extension-header"


def first_piece(family: int, source: str, target: str, port: int):
    body = Raw(bytes(Udp(sport=40000, dport=port, len=88))[:8] + bytes(40))
    if family == 4:
        return ip(4, source, target, id=99, proto=17, flags="MF") / body
    return ip(6, source, target) / IPv6ExtHdrFragment(id=99, m=1, nh=17) / body


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spoofed_first_fragment_says_nothing_of_anothers_pieces(world, family):
    world.publish(base())
    outcome = sends(world, "", C, first_piece(family, "a", "b", 5353), DROP)
    assert cause(outcome) == "spoofed-source"
    spoofed = bytes(wire() / first_piece(family, "remote", "b", 5353))
    assert cause(world.run("from_net", spoofed, OUTSIDE)) == "spoofed-source"
    assert len(world.fragments) == 0


@pytest.mark.parametrize("tag", [0, 7])
def test_a_vlan_tag_is_no_way_into_other_networks(world, tag, tmp_path):
    """The stack strips the tag before the program sees the frame, and would put it back on the
    way out. Only a real frame shows that: a test run keeps tags in the bytes."""
    world.publish(base())
    pin = f"/sys/fs/bpf/lg-vlan-{tag}-{tmp_path.name}"
    link = links.attach_tcx(world.object.prog_fd("from_pod"), at_pod(A), "ingress", pin)
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as card:
            world_up("lg0-peer")
            card.bind(("lg0-peer", 0))
            frame = Ether(src=pod_mac(A), dst="0a:6c:00:00:00:00")
            card.send(bytes(frame / Dot1Q(vlan=tag) / ip(4, "a", "node") / udp()))
            assert [e["cause"] for e in soon(world)] == ["unknown-ethertype"]
            assert world.tracked() == []
            card.send(bytes(frame / ip(4, "a", "node") / udp()))
            assert [e["cause"] for e in soon(world)] == ["none"]
    finally:
        link.close()
        links.remove(pin)


def world_up(name: str) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as ip_:
        ip_.link("set", index=socket.if_nametoindex(name), state="up")


def soon(world) -> list[dict]:
    """Events about IPv4 packets, and about frames without addresses: the kernel's own neighbour
    talk (ICMPv6, from `::` too) is none of ours."""
    found: list[dict] = []
    for _ in range(50):
        found += [
            e
            for e in world.events()
            if "." in e["saddr"] or (e["saddr"] == "::" and e["proto"] != socket.IPPROTO_ICMPV6)
        ]
        if found:
            break
        time.sleep(0.01)
    return found


# ---- From the wire -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["a", "b", "host"])
def test_addresses_of_this_node_never_come_from_a_card(world, family, source):
    """As its own peer a pod would even be exempt from its policies."""
    world.publish(base().isolate(A, INGRESS))
    frame = bytes(wire() / ip(family, source, "a") / syn())
    outcome = world.run("from_net", frame, UNDERLAY)
    assert (outcome.verdict, cause(outcome)) == (DROP, "spoofed-source")
    assert world.tracked() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_on_the_wire_cannot_speak_in_a_connection_of_two_local_pods(world, family):
    world.publish(base())
    establish(world, family)
    for source, target, ports in (("a", "b", (40000, 80)), ("b", "a", (80, 40000))):
        frame = bytes(wire() / ip(family, source, target) / tcp(*ports, "R"))
        outcome = world.run("from_net", frame, UNDERLAY)
        assert (outcome.verdict, cause(outcome)) == (DROP, "spoofed-source")
    assert states(world) == [ESTABLISHED]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("forger", ["responder", "originator"])
def test_a_connection_survives_a_reset_that_its_receiver_ignores(world, family, forger):
    world.publish(base())
    establish(world, family)
    to_a = ip(family, "b", "a") / tcp(80, 40000, "R")
    to_b = ip(family, "a", "b") / tcp(40000, 80, "R")
    ends = {"responder": (B, to_a, A), "originator": (A, to_b, B)}
    slot, reset, receiver = ends[forger]
    sends(world, "reset", slot, reset)
    assert states(world) == [CLOSED]
    more = {
        A: ip(family, "a", "b") / tcp(40000, 80, "A"),
        B: ip(family, "b", "a") / tcp(80, 40000, "A"),
    }
    sends(world, "what its sender says after it", slot, more[slot])
    assert states(world) == [CLOSED]
    sends(world, "the receiver goes on", receiver, more[receiver])
    assert states(world) == [ESTABLISHED]


# ---- Permissions that went -----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_revoked_connection_is_not_reopened_from_its_other_end(world, family):
    """b may open connections to a, but this one was a's. Were it forgotten when it ends, b's
    next data would begin it the other way round, and a's packets pass as replies."""
    world.publish(base().isolate(B, INGRESS, {(CLASS["a"], WEB): 6}))
    establish(world, family)
    world.publish(base().isolate(B, INGRESS))
    data = ip(family, "b", "a") / tcp(80, 40000, "PA")
    request = ip(family, "a", "b") / tcp(40000, 80, "PA")
    for _ in range(3):
        outcome = sends(world, "data", B, data, DROP)
        assert (cause(outcome), outcome.events[-1]["direction"]) == ("policy", INGRESS)
        outcome = sends(world, "request", A, request, DROP)
        assert (cause(outcome), outcome.events[-1]["direction"]) == ("policy", INGRESS)
    # A connection of b's own between the same ports is another.
    sends(world, "syn", B, ip(family, "b", "a") / syn(80, 40000))
    sends(world, "its reply", A, ip(family, "a", "b") / tcp(40000, 80, "SA"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permission_given_back_revives_the_connection(world, family):
    scene = base().isolate(B, INGRESS, {(CLASS["a"], WEB): 6})
    world.publish(scene)
    establish(world, family)
    world.publish(base().isolate(B, INGRESS))
    sends(world, "", B, ip(family, "b", "a") / tcp(80, 40000, "PA"), DROP)
    world.publish(scene)
    outcome = sends(world, "", B, ip(family, "b", "a") / tcp(80, 40000, "PA"))
    assert outcome.events == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_node_of_the_client_ends_it_too(world, family):
    """a's egress goes; the server is on another node, which has nothing against it."""
    world.publish(base().isolate(A, EGRESS, {(CLASS["remote"], WEB): 6}))
    sends(world, "syn", A, ip(family, "a", "remote") / syn())
    data = bytes(wire() / ip(family, "remote", "a") / tcp(80, 40000, "PA"))
    assert world.run("from_net", data, UNDERLAY).verdict == REDIRECT
    world.publish(base().isolate(A, EGRESS))
    for _ in range(2):
        assert cause(world.run("from_net", data, UNDERLAY)) == "policy"
        sends(world, "ack", A, ip(family, "a", "remote") / tcp(40000, 80, "A"), DROP)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_about_a_revoked_connection_are_no_way_around(world, family):
    world.publish(base().isolate(B, INGRESS, {(CLASS["a"], WEB): 6}))
    establish(world, family)
    error = ip(family, "a", "b") / unreachable(family, ip(family, "b", "a") / tcp(80, 40000, "A"))
    sends(world, "while allowed", A, error)
    world.publish(base().isolate(B, INGRESS))
    assert cause(sends(world, "revoked", A, error, DROP)) == "unrelated-error"


# ---- Errors about what others send ------------------------------------------------------


def of_others(family: int) -> dict[str, Any]:
    """ICMP errors by which a pod would move whose paths and sockets it has no part in."""
    sent = ip(family, "host", "node") / udp(8472, 8472)
    known = ip(family, "b", "a") / tcp(80, 40000, "A")
    cut = bytes(sent)[: -len(bytes(sent.payload))]
    if family == 4:
        later = bytearray(bytes(sent))
        later[7] = 1  # fragment offset
        odd = IP(bytes(later))
    else:
        odd = IPv6(src=sent.src, dst=sent.dst) / IPv6ExtHdrFragment(offset=1, nh=17) / b"12345678"
    return {
        "its node's tunnel is too wide": (A, "a", "host", too_big(family, sent, 600)),
        "another node's is": (A, "a", "node", too_big(family, sent, 600)),
        "of a quote that is a fragment": (A, "a", "host", too_big(family, odd, 600)),
        "of a quote without ports": (A, "a", "host", too_big(family, Raw(cut), 600)),
        "a connection of two others": (C, "c", "b", unreachable(family, known)),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", of_others(4))
def test_a_pod_sends_no_errors_about_what_it_was_not_sent(world, family, what):
    world.publish(base())
    establish(world, family)
    slot, source, target, error = of_others(family)[what]
    tracked = world.tracked()
    outcome = sends(world, what, slot, ip(family, source, target) / error, DROP)
    assert cause(outcome) == "unrelated-error"
    assert world.tracked() == tracked


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proto", [17, 99], ids=["UDP", "a protocol without ports"])
def test_a_pod_sends_errors_about_what_it_was_sent(world, family, proto):
    world.publish(base())
    more = {"proto": proto} if family == 4 else {"nh": proto}
    asked = ip(family, "b", "a", **more) / (udp() if proto == 17 else Raw(bytes(16)))
    sends(world, "asked", B, asked)
    sends(world, "told", A, ip(family, "a", "b") / unreachable(family, asked))


# ---- What is remembered --------------------------------------------------------------


def test_an_entry_seen_by_another_cpu_in_the_next_second_is_alive(world):
    world.publish(base())
    establish(world, 4)
    set_seen(world.connections, 1)
    assert sends(world, "", A, ip(4, "a", "b") / tcp(40000, 80, "A")).events == []


def leaves(world, slot: int, packet) -> IP | IPv6:
    outcome = sends(world, "to the world", slot, packet)
    return Ether(outcome.packet).payload


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evicted_connection_keeps_its_masquerade_port(world, family):
    """Another port would be another connection for the server: it would reset it."""
    world.publish(base())
    port = leaves(world, A, ip(family, "a", "world") / syn()).payload.sport
    for map_ in (world.connections, world.half_open):
        map_.delete_many(map_.keys())
    again = leaves(world, A, ip(family, "a", "world") / tcp(40000, 80, "A"))
    assert again.payload.sport == port
    assert len(world.nat) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evicted_translation_is_made_again(world, family):
    world.publish(base())
    leaves(world, A, ip(family, "a", "world") / udp())
    world.nat.delete_many(world.nat.keys())
    leaves(world, A, ip(family, "a", "world") / udp())
    assert len(world.nat) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_port_in_use_is_not_taken_and_one_that_is_over_is(world, family):
    """SCTP keeps its port, so two pods want the same."""
    world.publish(base())
    more = {"proto": 132} if family == 4 else {"nh": 132}
    leaves(world, A, ip(family, "a", "world", **more) / sctp())
    mine = ip(family, "c", "world", **more) / sctp()
    assert cause(sends(world, "taken", C, mine, DROP)) == "nat-exhausted"
    set_seen(world.half_open, -61)
    leaves(world, C, mine)
    assert len(world.nat) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_packets_one_way_keep_the_way_back(world, family):
    world.publish(base())
    leaves(world, A, ip(family, "a", "world") / udp())
    first = world.nat.items()[1]["seen"]
    assert len(first) == 2, "there and back"
    set_seen(world.nat, -100)
    leaves(world, A, ip(family, "a", "world") / udp())
    assert (world.nat.items()[1]["seen"] >= first.min()).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["world", "svc"])
def test_the_sweep_frees_the_ports_of_a_connection_that_is_over(world, family, target):
    world.publish(base())
    for slot, name in ((A, "a"), (C, "c")):
        sends(
            world, "syn", slot, ip(family, name, target) / syn(dport=82 if target == "svc" else 80)
        )
    mine = len(world.nat)
    keys, values = world.half_open.items()
    values = values.copy()
    first = np.array([ADDRESSES[family]["a"] in ends for ends in named(keys)])
    values["seen"][first] -= np.uint32(61)
    world.half_open.update_many(keys, values)
    assert sum(sweep(world)) == 1 + mine // 2
    [(_, left)] = world.tracked()
    assert ADDRESSES[family]["c"] in (left["lo"], left["hi"])
    port = 82 if target == "svc" else 80
    sends(world, "goes on", C, ip(family, "c", target) / tcp(40000, port, "A"))
    assert len(world.nat) == mine // 2


def named(keys) -> list[tuple[str, str]]:
    return [(format_address(k["lo"].tobytes()), format_address(k["hi"].tobytes())) for k in keys]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stranger_cannot_guess_its_way_to_a_pod(world, family):
    """The port alone is not enough: a translation is for one peer."""
    world.publish(base())
    port = leaves(world, A, ip(family, "a", "world") / udp()).payload.sport
    for packet in (
        ip(family, "unroutable", "masq") / udp(53, port),
        ip(family, "world", "masq") / udp(54, port),
        ip(family, "world", "masq") / echo(family, port),
    ):
        outcome = world.run("from_net", bytes(wire() / packet), OUTSIDE)
        assert (outcome.verdict, outcome.events) == (NEXT, [])

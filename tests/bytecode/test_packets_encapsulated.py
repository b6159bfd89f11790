"""What another node sent here in an outer header: served, passed on, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from lockgate.objects.address import parse_address
from tests.bytecode.balancing import (
    CHAIN,
    HERE,
    HOST,
    LB,
    NODE_PORT,
    OTHER,
    PORTS,
    RANGED,
    SNAT,
    flow_hash,
    frontends,
    outer,
)
from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    A,
    B,
    allowed,
    at_pod,
    base,
    dropped,
    from_pod,
    ip,
    same_events,
    same_frame,
    syn,
    tcp,
    to_hop,
    to_pod,
    to_world,
    too_big,
    udp,
    wire,
)
from tests.bytecode.world import (
    DROP,
    DRY_MARK,
    INGRESS,
    NEXT,
    OUTSIDE,
    REDIRECT,
    SVC_FRONTEND,
    SVC_OPEN,
    TCP,
    UDP,
    UNDERLAY,
    Outcome,
    World,
)

SPORT = 40000


@pytest.fixture(autouse=True)
def _other_tables(world: World) -> None:
    """Tables alone make no difference that a publisher looks for."""
    world.publish(base())


KINDS = {"syn": syn, "udp": udp, "ack": lambda s, d: tcp(s, d, "A")}


def inner(family: int, service: int, kind: str = "syn", source: str = "world") -> Packet:
    return ip(family, source, LB[family], ttl=63) / KINDS[kind](SPORT, PORTS[service])


def arrives(
    world: World, packet: Packet, to: str = "b", at: int = UNDERLAY, **more: Any
) -> Outcome:
    return world.run("from_net", bytes(wire() / outer(packet, to, **more)), at)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["syn", "udp"])
def test_what_begins_is_served_by_the_pod(world: World, family: int, kind: str) -> None:
    world.publish(frontends())
    out = arrives(world, inner(family, HERE, kind))
    assert out.verdict == REDIRECT
    same_frame(out.packet, to_pod(B) / ip(family, "world", "b", ttl=63) / KINDS[kind](SPORT, 8080))
    same_events(out.events, allowed(INGRESS, service=HERE))
    answer = tcp(8080, SPORT, "SA") if kind == "syn" else udp(8080, SPORT)
    packet = from_pod(B) / ip(family, "b", "world") / answer
    out = world.run("from_pod", bytes(packet), at_pod(B))
    answer = tcp(PORTS[HERE], SPORT, "SA") if kind == "syn" else udp(PORTS[HERE], SPORT)
    same_frame(out.packet, to_world() / ip(family, LB[family], "world", ttl=63) / answer)
    out = arrives(world, inner(family, HERE, "ack" if kind == "syn" else "udp"))
    assert out.verdict == REDIRECT and not out.events


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["syn", "udp"])
def test_a_process_of_the_node_serves(world: World, family: int, kind: str) -> None:
    world.publish(frontends())
    out = arrives(world, inner(family, HOST, kind), "host")
    assert out.verdict == NEXT
    same_frame(out.packet, wire() / ip(family, "world", "host", ttl=63) / KINDS[kind](SPORT, 8080))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["syn", "udp"])
@pytest.mark.parametrize("service", [HERE, CHAIN])
def test_dry_it_is_served_too(world: World, family: int, kind: str, service: int) -> None:
    world.publish(frontends())
    packet = bytes(wire() / outer(inner(family, service, kind), "b"))
    out = world.run("from_net", packet, UNDERLAY, mark=DRY_MARK)
    assert out.cb[0] & 0xFFFF == 1 and out.cb[3] == 1 << 28 | B and out.cb[4] == service
    assert not world.tracked()


# ---- The chain -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_tcp_goes_on_to_the_next_owner_elsewhere(world: World, family: int) -> None:
    """CHAIN's owners in order: b, remote, far."""
    world.publish(frontends())
    packet = inner(family, CHAIN, "ack")
    out = arrives(world, packet)
    assert out.verdict == REDIRECT and not world.tracked()
    same_frame(out.packet, to_hop() / outer(packet, "remote", ttl=48))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_owner_is_not_one_on_this_node(world: World, family: int) -> None:
    in_order(world, family, 0, 3, 2)
    packet = inner(family, CHAIN, "ack")
    out = arrives(world, packet)
    assert out.packet[14:] == bytes(outer(packet, "far", ttl=48))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("to", "slot"), [("b", (1, 2, 0)), ("c", (1, 2, 3)), ("c", (1, 0, 3))])
def test_behind_the_last_owner_comes_the_first(
    world: World, family: int, to: str, slot: Any
) -> None:
    """Who sent it here had another order, perhaps: a new owner is before the connection's now, and
    that one before this one."""
    in_order(world, family, *slot)
    packet = inner(family, CHAIN, "ack")
    out = arrives(world, packet, to)
    assert out.packet[14:] == bytes(outer(packet, "remote", ttl=48))
    assert not world.tracked()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("to", "slot"), [("b", (0, 3)), ("c", (0, 3)), ("b", (0,))])
def test_who_is_the_only_one_in_the_chain_serves(
    world: World, family: int, to: str, slot: Any
) -> None:
    in_order(world, family, *slot)
    out = arrives(world, inner(family, CHAIN, "ack"), to)
    assert out.verdict == REDIRECT
    number = {"b": B, "c": 2}[to]
    same_frame(out.packet, to_pod(number) / ip(family, "world", to, ttl=63) / tcp(SPORT, 8080, "A"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ttl", "goes_on"), [(17, True), (16, False), (1, False)])
def test_the_chain_ends_with_the_outer_ttl(
    world: World, family: int, ttl: int, goes_on: bool
) -> None:
    world.publish(frontends())
    packet = inner(family, CHAIN, "ack")
    out = arrives(world, packet, ttl=ttl)
    wanted = (
        to_hop() / outer(packet, "remote", ttl=ttl - 16)
        if goes_on
        else to_pod(B) / ip(family, "world", "b", ttl=63) / tcp(SPORT, 8080, "A")
    )
    same_frame(out.packet, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_known_here_is_served_whatever_the_order(world: World, family: int) -> None:
    """Sent to another pod of this node, and after the owners changed."""
    world.publish(frontends())
    arrives(world, inner(family, CHAIN))
    packet = from_pod(B) / ip(family, "b", "world") / tcp(8080, SPORT, "SA")
    world.run("from_pod", bytes(packet), at_pod(B))
    in_order(world, family, 3, 1, 2)
    out = arrives(world, inner(family, CHAIN, "ack"), "c")
    same_frame(out.packet, to_pod(B) / ip(family, "world", "b", ttl=63) / tcp(SPORT, 8080, "A"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_for_a_pod_that_is_no_backend_by_now_the_first_owner_serves(
    world: World, family: int, kind: str
) -> None:
    """The nodes' tables differ for a moment: nothing is lost, and no client is reset."""
    in_order(world, family, 1, 2)
    packet = inner(family, CHAIN, kind)
    out = arrives(world, packet, "c" if kind != "syn" else "a")
    if kind == "ack" or kind == "syn":
        same_frame(out.packet, to_hop() / outer(packet, "remote", ttl=48))
    in_order(world, family, 0)
    out = arrives(world, packet, "a")
    same_frame(out.packet, to_pod(B) / ip(family, "world", "b", ttl=63) / KINDS[kind](SPORT, 8080))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backend_that_is_none_of_the_slots_is_known_by_its_port(
    world: World, family: int
) -> None:
    """Affinity chose it, or a flow of before the owners changed."""
    in_order(world, family, 1, 2)
    packet = inner(family, CHAIN)
    out = arrives(world, packet, "b", hint=8080)
    same_frame(out.packet, to_pod(B) / ip(family, "world", "b", ttl=63) / syn(SPORT, 8080))
    world.clear()
    out = arrives(world, packet, "b", hint=22)
    same_frame(out.packet, to_hop() / outer(packet, "remote", ttl=48))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_icmp_error_follows_the_connection(world: World, family: int) -> None:
    world.publish(frontends())
    answered = ip(family, LB[family], "world") / quoted(PORTS[CHAIN], SPORT)
    error = ip(family, OTHER[family], LB[family]) / too_big(family, answered, 1300)
    number = flow_hash(inner(family, CHAIN, "udp"))
    out = arrives(world, error, hash=number)
    same_frame(out.packet, to_hop() / outer(error, "remote", ttl=48, hash=number))
    arrives(world, inner(family, CHAIN, "udp"))
    out = arrives(world, error, hash=number)
    assert out.verdict == REDIRECT
    answered = ip(family, "b", "world") / quoted(8080, SPORT)
    same_frame(
        out.packet,
        to_pod(B) / ip(family, OTHER[family], "b") / too_big(family, answered, 1300),
    )


def quoted(sport: int, dport: int) -> Packet:
    from scapy.layers.inet import UDP as Udp

    return Udp(sport=sport, dport=dport, chksum=0x1234) / Raw(b"question")


def in_order(world: World, family: int, *slot: int) -> None:
    """Bring other owners of CHAIN's slot in force."""
    scene = frontends()
    services = dict(scene.services)
    for proto in (TCP, UDP):
        key = LB[family], PORTS[CHAIN], proto
        services[key] = replace(services[key], slots=(slot,))
    world.publish(base())
    world.publish(scene.but(services=services))


# ---- Where the client is ---------------------------------------------------------------


def begin_at_pod(world: World, slot: int, family: int, client: str) -> None:
    """It has a connection to the address that it asked, which another node is to serve."""
    scene = frontends()
    without = {key: one for key, one in scene.services.items() if key[0] != LB[family]}
    world.publish(scene.but(services=without))
    packet = from_pod(slot) / ip(family, client, LB[family]) / syn(SPORT, PORTS[HERE])
    assert world.run("from_pod", bytes(packet), at_pod(slot)).verdict == REDIRECT
    world.publish(scene)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("client", ["a", "remote", "far", "node", "b"])
def test_the_client_may_be_a_pod_or_node_that_asked_another_node(
    world: World, family: int, client: str
) -> None:
    """A pod of this node as well, its own backend too: then it sees the frontend as its peer."""
    world.publish(frontends())
    if client in ("a", "b"):
        slot = {"a": A, "b": B}[client]
        begin_at_pod(world, slot, family, client)
    out = arrives(world, inner(family, HERE, source=client))
    assert out.verdict == REDIRECT, out.events
    seen = LB[family] if client == "b" else client
    same_frame(out.packet, to_pod(B) / ip(family, seen, "b", ttl=63) / syn(SPORT, 8080))
    packet = from_pod(B) / ip(family, "b", seen) / tcp(8080, SPORT, "SA")
    out = world.run("from_pod", bytes(packet), at_pod(B))
    assert out.verdict == REDIRECT
    found = Ether(out.packet)[1]
    assert (found.src, found.dst) == (LB[family], ADDRESSES[family][client])
    out = arrives(world, inner(family, HERE, "ack", source=client))
    assert out.verdict == REDIRECT, out.events


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asked", ["node", "external", "unpublished"])
def test_a_node_port_of_another_node(world: World, family: int, asked: str) -> None:
    """At an address of it that this node does not know as its, too, or that is an external IP of
    another service; but not as a pod's."""
    scene, known = frontends(), ADDRESSES[family]
    if asked == "external":
        services = {**scene.services, (known["node"], 80, TCP): scene.services[LB[family], 80, TCP]}
        addresses = {**scene.addresses, known["node"]: SVC_FRONTEND | SVC_OPEN}
        scene = scene.but(services=services, addresses=addresses)
    world.publish(scene)
    own = world.state.view[f"node{family}"][0]
    own[:] = np.frombuffer(parse_address(known["host"]), np.uint8)
    address = OTHER[family] if asked == "unpublished" else known["node"]
    packet = ip(family, "world", address, ttl=63) / syn(SPORT, NODE_PORT)
    out = arrives(world, packet)
    same_frame(out.packet, to_pod(B) / ip(family, "world", "b", ttl=63) / syn(SPORT, 8080))
    answer = from_pod(B) / ip(family, "b", "world") / tcp(8080, SPORT, "SA")
    out = world.run("from_pod", bytes(answer), at_pod(B))
    same_frame(
        out.packet, to_world() / ip(family, address, "world", ttl=63) / tcp(NODE_PORT, SPORT, "SA")
    )
    for other in (known["remote"], known["a"], known["svc"], LB[family]):
        out = arrives(world, ip(family, "world", other, ttl=63) / syn(SPORT, NODE_PORT))
        same_events(out.events, dropped("no-frontend"))
    own[:] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_here_that_asked_another_node_hears_a_pod_here_by_the_card(
    world: World, family: int
) -> None:
    """As it hears pods elsewhere: its stack asks for the way back to the other node."""
    world.publish(frontends())
    known = ADDRESSES[family]
    own = world.state.view[f"node{family}"][0]
    own[:] = np.frombuffer(parse_address(known["host"]), np.uint8)
    packet = ip(family, "host", known["node"], ttl=63) / syn(SPORT, NODE_PORT)
    out = arrives(world, packet)
    same_frame(out.packet, to_pod(B) / ip(family, "host", "b", ttl=63) / syn(SPORT, 8080))
    for flags in ("SA", "A"):
        answer = ip(family, "b", "host") / tcp(8080, SPORT, flags)
        out = world.run("from_pod", bytes(from_pod(B) / answer), at_pod(B))
        assert out.verdict == REDIRECT
        answer = ip(family, "node", "host") / tcp(NODE_PORT, SPORT, flags)
        same_frame(out.packet, Ether(src=from_pod(B).src, dst=to_hop().src) / answer)
        out = world.run("from_net", out.packet, UNDERLAY)
        assert out.verdict == NEXT, out.events
        arrives(world, ip(family, "host", known["node"], ttl=63) / tcp(SPORT, NODE_PORT, "A"))
    own[:] = 0


# ---- What is refused -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_to_no_frontend(world: World, family: int) -> None:
    world.publish(frontends())
    known = ADDRESSES[family]
    for packet in (
        ip(family, "world", "b") / syn(SPORT, 8080),
        ip(family, "remote", "b") / syn(SPORT, 8080),
        ip(family, "world", "host") / syn(SPORT, 22),
        ip(family, "world", LB[family]) / syn(SPORT, 9999),
        ip(family, "world", "svc") / syn(SPORT, 80),
        ip(family, "world", LB[family]) / Raw(bytes(8)),
        outer(inner(family, HERE), "b"),
        outer(outer(inner(family, HERE), "b"), "b"),
    ):
        out = arrives(world, packet, hash=7)
        assert out.verdict == DROP, known
        assert out.events[-1]["cause"] in ("no-frontend", "policy"), out.events
    assert not world.tracked()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_connection_is_none_of_a_frontend(world: World, family: int) -> None:
    """Another node's word opens no other connection: nor answers to one."""
    world.publish(frontends())
    packet = from_pod(A) / ip(family, "a", "remote") / syn(SPORT, 80)
    world.run("from_pod", bytes(packet), at_pod(A))
    out = arrives(world, ip(family, "remote", "a") / tcp(80, SPORT, "SA"), "a", hash=7)
    same_events(out.events, dropped("no-frontend"))
    packet = from_pod(A) / ip(family, "a", "world") / syn(SPORT, 80)
    port = Ether(world.run("from_pod", bytes(packet), at_pod(A)).packet)[2].sport
    out = arrives(world, ip(family, "world", "host") / tcp(80, port, "SA"), "a", hash=7)
    same_events(out.events, dropped("no-frontend"))


@pytest.mark.parametrize("family", FAMILIES)
def test_sources_are_checked_again(world: World, family: int) -> None:
    world.publish(frontends())
    out = arrives(world, inner(family, RANGED))
    assert out.verdict == REDIRECT
    client = {4: "198.51.101.7", 6: "2001:db8:1::7"}[family]
    out = arrives(world, inner(family, RANGED, source=client))
    same_events(out.events, dropped("source-range"))


@pytest.mark.parametrize("family", FAMILIES)
def test_not_from_outside(world: World, family: int) -> None:
    """There it is a packet of that protocol, as any other: to the pod, if its policy allows."""
    world.publish(frontends().isolate(B, INGRESS))
    out = arrives(world, inner(family, HERE), at=OUTSIDE)
    assert out.verdict == DROP
    same_events(out.events, [{"cause": "policy", "proto": 4 if family == 4 else 41}])


@pytest.mark.parametrize("family", FAMILIES)
def test_another_source_is_another_tunnel(world: World, family: int) -> None:
    """Pods may encapsulate what they say to one another."""
    world.publish(frontends())
    packet = ip(family, "remote", "b", **({"proto": 4} if family == 4 else {"nh": 41}))
    out = world.run("from_net", bytes(wire() / packet / inner(family, HERE)), UNDERLAY)
    assert out.verdict == REDIRECT
    same_frame(
        out.packet,
        to_pod(B)
        / ip(family, "remote", "b", **({"proto": 4} if family == 4 else {"nh": 41}))
        / inner(family, HERE),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_to_an_address_that_is_not_here_is_the_stacks(world: World, family: int) -> None:
    world.publish(frontends())
    for to in ("remote", OTHER[family]):
        out = arrives(world, inner(family, HERE), to)
        assert out.verdict == NEXT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_that_a_policy_denies(world: World, family: int) -> None:
    world.publish(frontends().isolate(B, INGRESS))
    out = arrives(world, inner(family, HERE))
    assert out.verdict == DROP and out.events[0]["cause"] == "policy"


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_headers_are_dropped_by_name(world: World, family: int) -> None:
    world.publish(frontends())
    good = inner(family, HERE)
    source = {4: "198.18.0.7", 6: "100::7"}[family]
    to = ADDRESSES[family]["b"]
    raw = bytes(good)
    if family == 4:
        head: Any = {"src": source, "dst": to, "proto": 4, "flags": "DF"}
        packets = [
            (IP(**head) / raw[:10], "malformed"),
            (IP(**head) / raw[:30], "malformed"),
            (IP(**head) / (b"\x46" + raw[1:]), "no-frontend"),
            (IP(**head) / (b"\x65" + raw[1:]), "malformed"),
            (IP(**head) / (raw[:2] + b"\xff\xff" + raw[4:]), "malformed"),
            (IP(**head, ttl=65) / raw, "malformed"),
            (IP(src=source, dst=to, proto=4, flags="MF") / raw, "malformed"),
            (IP(src=source, dst=to, proto=4, frag=3) / raw, "fragment-untracked"),
            (IP(**head, options=[b"\x01" * 4]) / raw, "malformed"),
            (IP(**{**head, "proto": 41}) / bytes(inner(6, HERE)), None),
        ]
    else:
        packets = [
            (IPv6(src=source, dst=to, nh=41) / raw[:20], "malformed"),
            (IPv6(src=source, dst=to, nh=41) / raw[:50], "malformed"),
            (IPv6(src=source, dst=to, nh=41) / (b"\x45" + raw[1:]), "malformed"),
            (IPv6(src=source, dst=to, nh=41, hlim=65) / raw, "malformed"),
            (IPv6(src=source, dst=to, nh=60) / IPv6ExtHdrDestOpt(nh=41) / raw, "malformed"),
            (IPv6(src=source, dst=to, nh=4) / bytes(inner(4, HERE)), None),
        ]
    for packet, cause in packets:
        out = world.run("from_net", bytes(wire() / packet), UNDERLAY)
        if cause is None:  # of the other family: nothing of ours, a packet like any other
            assert out.verdict == REDIRECT
            continue
        assert out.verdict == DROP
        assert [event["cause"] for event in out.events] == [cause], packet
    assert {fields["dst_endpoint"] for _, fields in world.tracked()} <= {2}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_truncation_is_survived(world: World, family: int) -> None:
    world.publish(frontends())
    whole = bytes(wire() / outer(inner(family, HERE), "b"))
    for length in range(34 if family == 4 else 54, len(whole)):
        out = world.run("from_net", whole[:length], UNDERLAY)
        assert out.verdict in (DROP, NEXT), length
    assert not world.tracked()


@pytest.mark.parametrize("family", FAMILIES)
def test_congestion_marked_outside_is_marked_inside(world: World, family: int) -> None:
    """RFC 6040: where the packet says that it can be."""
    world.publish(frontends())
    for mark, wanted in ((2, 3), (0, 0)):
        more = {"tos": mark} if family == 4 else {"tc": mark}
        packet = ip(family, "world", LB[family], ttl=63, **more) / syn(SPORT, PORTS[HERE])
        out = arrives(world, packet, tos=3)
        found = Ether(out.packet)[1]
        assert (found.tos if family == 4 else found.tc) == wanted
        assert bytes(found) == bytes(
            ip(family, "world", "b", ttl=63, **({"tos": wanted} if family == 4 else {"tc": wanted}))
            / syn(SPORT, 8080)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_node_is_not_by_two_nodes(world: World, family: int) -> None:
    """Only the first is asked by the client."""
    world.publish(frontends())
    out = arrives(world, inner(family, SNAT), "b")
    same_frame(out.packet, to_hop() / outer(inner(family, SNAT), "remote", ttl=48))

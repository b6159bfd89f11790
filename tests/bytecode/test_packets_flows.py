"""What the balancer remembers of flows that it sent on: nothing, something, or all."""

from __future__ import annotations

import pytest
from scapy.layers.l2 import Ether

from tests.bytecode.balancing import (
    CHAIN,
    DSR,
    LB,
    PORTS,
    SNAT,
    frontends,
    outer,
    owner,
)
from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    at_pod,
    base,
    from_pod,
    ip,
    same_frame,
    syn,
    tcp,
    to_hop,
    udp,
    wire,
)
from tests.bytecode.world import (
    DRY_MARK,
    OUTSIDE,
    REDIRECT,
    TCP,
    UDP,
    Service,
    World,
    set_seen,
)

KINDS = {"syn": syn, "udp": udp, "ack": lambda s, d: tcp(s, d, "A")}


def send(world: World, family: int, kind: str, service: int = DSR, port: int = 40000) -> str:
    """By name, where the packet of a client is sent."""
    packet = wire() / ip(family, "world", LB[family]) / KINDS[kind](port, PORTS[service])
    out = world.run("from_net", bytes(packet), OUTSIDE)
    assert out.verdict == REDIRECT, out.events
    to = Ether(out.packet)[1].dst
    return next(name for name, address in ADDRESSES[family].items() if address == to)


def first_is(world: World, family: int, name: str, other: str) -> None:
    """Owners of CHAIN in order."""
    scene = frontends()
    owners = owner(family, name), owner(family, other)
    service = Service(CHAIN, flags=0, owners=owners, slots=((0, 1),))
    keys = {(LB[family], PORTS[CHAIN], proto): service for proto in (TCP, UDP)}
    world.publish(base())
    world.publish(scene.but(services={**scene.services, **keys}))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_table_nothing_is_remembered(configured, family: int) -> None:
    world = configured("stateless", config_flows=0)
    with world.inside():
        for name, other in (("remote", "far"), ("far", "remote")):
            first_is(world, family, name, other)
            assert [send(world, family, kind, CHAIN) for kind in KINDS] == [name] * 3
        for remembered in (world.flows, world.nat, world.connections, world.half_open):
            assert not len(remembered.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_above_its_rate_the_table_learns_no_more(configured, family: int) -> None:
    """One a second at most, and a quarter of a second's worth at once: the first is learned."""
    world = configured("slow", config_flow_ns=1_000_000_000)
    with world.inside():
        first_is(world, family, "remote", "far")
        for port in range(40000, 40050):
            send(world, family, "udp", CHAIN, port)
            send(world, family, "syn", CHAIN, port)
        assert len(world.flows.keys()) <= 2
        # Those that it does not know go by the hash all the same.
        assert send(world, family, "ack", CHAIN, 40049) == "remote"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "seconds"), [("udp", 180), ("ack", 60)])
def test_what_was_silent_for_long_is_chosen_anew(
    world: World, family: int, kind: str, seconds: int
) -> None:
    first_is(world, family, "remote", "far")
    send(world, family, "udp", CHAIN)
    send(world, family, "syn", CHAIN)
    first_is(world, family, "far", "remote")
    set_seen(world.flows, -seconds + 5)
    assert send(world, family, kind, CHAIN) == "remote"
    set_seen(world.flows, -seconds - 5)
    assert send(world, family, kind, CHAIN) == "far"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_of_another_service_is_another(world: World, family: int) -> None:
    """The frontend became another service's, which has the same backend besides its own."""
    first_is(world, family, "remote", "far")
    send(world, family, "udp", CHAIN)
    scene = frontends()
    other = Service(99, owners=(owner(family, "far"), owner(family, "remote")), slots=((0, 1),))
    key = LB[family], PORTS[CHAIN], UDP
    world.publish(scene.but(services={**scene.services, key: other}))
    assert send(world, family, "udp", CHAIN) == "far"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_goes_on_when_its_frontend_is_another_by_now(
    world: World, family: int
) -> None:
    """As when a node port is changed: its backend is the same service's."""
    scene = frontends()
    world.publish(scene)
    send(world, family, "syn")
    at = LB[family], PORTS[DSR], TCP
    services = dict(scene.services)
    services[LB[family], 8181, TCP] = services.pop(at)
    world.publish(scene.but(services=services))
    assert send(world, family, "ack") == "remote"
    other = wire() / ip(family, "world", LB[family])
    for packet in (syn(40000, PORTS[DSR]), tcp(40001, PORTS[DSR], "A")):
        out = world.run("from_net", bytes(other / packet), OUTSIDE)
        assert [event["cause"] for event in out.events] == ["unknown-service-port"]
    del services[LB[family], 8181, TCP]  # nor with a service that is no more
    world.publish(scene.but(services=services))
    out = world.run("from_net", bytes(other / tcp(40000, PORTS[DSR], "A")), OUTSIDE)
    assert [event["cause"] for event in out.events] == ["unknown-service-port"]


@pytest.mark.parametrize("family", FAMILIES)
def test_icmp_errors_learn_nothing(world: World, family: int) -> None:
    from tests.bytecode.balancing import OTHER
    from tests.bytecode.goldens import too_big

    world.publish(frontends())
    answered = ip(family, LB[family], "world") / udp(PORTS[DSR], 40000)
    error = ip(family, OTHER[family], LB[family]) / too_big(family, answered, 1300)
    assert world.run("from_net", bytes(wire() / error), OUTSIDE).verdict == REDIRECT
    assert not len(world.flows.keys())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["syn", "udp"])
def test_a_dry_run_shows_the_packet_as_it_would_leave_and_writes_nothing(
    world: World, family: int, kind: str
) -> None:
    world.publish(frontends())
    for service, kind_ in ((DSR, kind), (SNAT, kind)):
        packet = ip(family, "world", LB[family]) / KINDS[kind_](40000, PORTS[service])
        out = world.run("from_net", bytes(wire() / packet), OUTSIDE, mark=DRY_MARK)
        assert out.cb[0] & 0xFFFF == 1 and (out.cb[3], out.cb[4]) == (2 << 28 | 1, service)
        if service == DSR:
            inner = ip(family, "world", LB[family], ttl=63) / KINDS[kind_](40000, PORTS[DSR])
            assert out.packet[14:] == bytes(outer(inner, "remote"))
    for remembered in (world.flows, world.nat, world.connections, world.half_open):
        assert not len(remembered.keys())


# ---- Floods ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_connections_as_the_node_begin_in_the_crowd_when_there_are_many(
    configured, family: int
) -> None:
    """And are known there; an answered one whose client comes again moves."""
    world = configured("crowded", config_connection_ns=100_000_000)
    with world.inside():
        world.publish(frontends())
        for port in range(40000, 40020):
            send(world, family, "syn", SNAT, port)
        where = [name for name, _ in world.tracked()]
        assert where.count("crowd") >= 10
        packet = wire() / ip(family, "world", LB[family]) / syn(40019, PORTS[SNAT])
        port = Ether(world.run("from_net", bytes(packet), OUTSIDE).packet)[2].sport
        answer = wire() / ip(family, "remote", "host") / tcp(8080, port, "SA")
        out = world.run("from_net", bytes(answer), 100)
        assert out.verdict == REDIRECT
        assert Ether(out.packet)[1].src == LB[family]
        packet = wire() / ip(family, "world", LB[family]) / tcp(40019, PORTS[SNAT], "A")
        out = world.run("from_net", bytes(packet), OUTSIDE)
        same_frame(
            out.packet, to_hop() / ip(family, "host", "remote", ttl=63) / tcp(port, 8080, "A")
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_connections_to_a_pod_behind_a_frontend_begin_in_the_crowd(configured, family: int) -> None:
    from tests.bytecode.balancing import HERE

    world = configured("crowded", config_connection_ns=100_000_000)
    with world.inside():
        world.publish(frontends())
        for port in range(41000, 41020):
            send(world, family, "syn", HERE, port)
        assert [name for name, _ in world.tracked()].count("crowd") >= 10
        for flags, program in (("SA", "from_pod"), ("A", "from_net"), ("A", "from_pod")):
            if program == "from_pod":
                packet = from_pod(1) / ip(family, "b", "world") / tcp(8080, 41019, flags)
                out = world.run("from_pod", bytes(packet), at_pod(1))
                assert Ether(out.packet)[1].src == LB[family]
            else:
                assert send(world, family, "ack", HERE, 41019) == "b"

"""Pods' packets to services: addresses that are a host's too, ranges, traffic policy Local."""

from __future__ import annotations

import pytest

from tests.bytecode.balancing import LB, NODE_PORT, PORTS, RANGED, frontends
from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    A,
    B,
    at_pod,
    dropped,
    from_pod,
    ip,
    same_events,
    same_frame,
    syn,
    to_pod,
    udp,
)
from tests.bytecode.world import (
    DROP,
    NEXT,
    REDIRECT,
    SVC_FRONTEND,
    SVC_HOST_ONLY,
    SVC_INTERNAL_LOCAL,
    SVC_LOCAL,
    SVC_RANGES,
    TCP,
    UDP,
    Outcome,
    Scene,
    Service,
    World,
)


def scene(family: int) -> Scene:
    known = ADDRESSES[family]
    whole = frontends()
    backend = ((known["b"], 8080),)
    pods = {4: ((4, 0x0A000102, 32),), 6: ((6, 0xFD00_0001 << 96 | 2, 128),)}[family]
    services = {}
    for proto in (TCP, UDP):
        services |= {
            (known["host"], NODE_PORT, proto): Service(1, backend, flags=SVC_FRONTEND | SVC_LOCAL),
            (LB[family], 80, proto): Service(2, backend, flags=SVC_FRONTEND),
            (LB[family], PORTS[RANGED], proto): Service(
                3, backend, flags=SVC_FRONTEND | SVC_RANGES, ranges=pods
            ),
            (known["svc"], 80, proto): Service(4, (), flags=SVC_INTERNAL_LOCAL),
            (known["svc"], 81, proto): Service(5, backend, flags=SVC_INTERNAL_LOCAL),
            (known["host"], 7, proto): Service(6, backend, flags=SVC_HOST_ONLY),
        }
    return whole.but(services=services)


def ask(world: World, family: int, to: str, port: int, slot: int = A, kind: str = "syn") -> Outcome:
    source = {A: "a", 2: "c"}[slot]
    l4 = syn(40000, port) if kind == "syn" else udp(40000, port)
    return world.run("from_pod", bytes(from_pod(slot) / ip(family, source, to) / l4), at_pod(slot))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["syn", "udp"])
def test_a_port_of_the_own_node(world: World, family: int, kind: str) -> None:
    """A pod of the cluster is served wherever the backend is: Local is for clients outside."""
    world.publish(scene(family))
    out = ask(world, family, "host", NODE_PORT, kind=kind)
    assert out.verdict == REDIRECT
    l4 = syn(40000, 8080) if kind == "syn" else udp(40000, 8080)
    same_frame(out.packet, to_pod(B) / ip(family, "a", "b") / l4)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_ports_of_the_own_node_are_its_own(world: World, family: int) -> None:
    world.publish(scene(family))
    for port in (22, 7):
        assert ask(world, family, "host", port).verdict == NEXT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cluster_ip_rejects_other_ports_and_other_addresses_do_not(
    world: World, family: int
) -> None:
    """Of an address outside that a service asked for it has the ports that it names."""
    world.publish(scene(family))
    assert ask(world, family, LB[family], 80).verdict == REDIRECT
    out = ask(world, family, "svc", 99)
    same_events(out.events, dropped("unknown-service-port"))
    assert out.verdict == REDIRECT
    other = ask(world, family, LB[family], 99)
    nobodys = ask(world, family, "world", 99)
    assert other.verdict == nobodys.verdict
    assert [event["cause"] for event in other.events] == ["none"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_hold_for_pods_too(world: World, family: int) -> None:
    world.publish(scene(family))
    out = ask(world, family, LB[family], PORTS[RANGED])
    same_frame(out.packet, to_pod(B) / ip(family, "a", "b") / syn(40000, 8080))
    out = ask(world, family, LB[family], PORTS[RANGED], slot=2)
    assert out.verdict == DROP
    same_events(out.events, dropped("source-range", service=3))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_backend_here_internal_policy_local_drops(world: World, family: int) -> None:
    world.publish(scene(family))
    out = ask(world, family, "svc", 80)
    assert out.verdict == DROP
    same_events(out.events, dropped("no-local-backend", service=4))
    assert ask(world, family, "svc", 81).verdict == REDIRECT

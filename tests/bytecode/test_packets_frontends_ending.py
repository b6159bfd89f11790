"""A frontend whose backends all end: none takes new connections, each keeps what it has. So it is
while all of a service fail their readiness probes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scapy.layers.inet import TCP as Tcp
from scapy.layers.l2 import Ether

from tests.bytecode.balancing import (
    DSR,
    HERE,
    LB,
    PORTS,
    SNAT,
    SPORT,
    STICKY,
    ask,
    frontends,
    outer,
)
from tests.bytecode.goldens import FAMILIES, ip, tcp, wire
from tests.bytecode.world import (
    DROP,
    OUTSIDE,
    OWNER_ENDS,
    REDIRECT,
    SVC_LOCAL,
    UNDERLAY,
    Outcome,
    Scene,
    World,
)


def ending(more: int = 0) -> Scene:
    """All owners of all frontends."""
    scene = frontends()
    services = {
        key: replace(
            one,
            owners=tuple(replace(owner, flags=OWNER_ENDS) for owner in one.owners),
            flags=one.flags | (more if one.owners else 0),
        )
        for key, one in scene.services.items()
    }
    return scene.but(services=services)


def sent(world: World, family: int, service: int, kind: str) -> Outcome:
    return world.run("from_net", bytes(wire() / ask(family, service, kind)), OUTSIDE)


def causes(outcome: Outcome) -> list[str]:
    return [event["cause"] for event in outcome.events]


@pytest.mark.parametrize("service", [HERE, DSR, SNAT, STICKY])
@pytest.mark.parametrize("family", FAMILIES)
def test_who_comes_new_is_refused(world: World, family: int, service: int) -> None:
    world.publish(ending())
    for kind in ("syn", "udp"):
        outcome = sent(world, family, service, kind)
        assert outcome.verdict == REDIRECT and causes(outcome) == ["no-backend"]
        back = Ether(outcome.packet)
        assert back[1].src == LB[family]
        assert kind == "udp" or back[Tcp].flags == "RA"
    world.publish(ending(SVC_LOCAL))
    for kind in ("syn", "udp"):
        outcome = sent(world, family, service, kind)
        assert outcome.verdict == DROP and causes(outcome) == ["no-local-backend"]


@pytest.mark.parametrize("more", [0, SVC_LOCAL], ids=["all nodes'", "this node's"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_goes_on_though_the_balancer_does_not_know_it(
    world: World, family: int, more: int
) -> None:
    world.publish(ending(more))
    outcome = sent(world, family, DSR, "ack")
    inner = ip(family, "world", LB[family], ttl=63) / tcp(SPORT, PORTS[DSR], "A")
    assert outcome.verdict == REDIRECT and not outcome.events
    assert outcome.packet[14:] == bytes(outer(inner, "remote"))


@pytest.mark.parametrize("kind", ["syn", "udp"])
@pytest.mark.parametrize("service", [HERE, DSR])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_began_goes_on(world: World, family: int, service: int, kind: str) -> None:
    world.publish(frontends())
    first = sent(world, family, service, kind).packet
    world.publish(ending())
    later = sent(world, family, service, "ack" if kind == "syn" else kind)
    assert later.verdict == REDIRECT and not later.events
    assert Ether(later.packet)[1].dst == Ether(first)[1].dst


@pytest.mark.parametrize("family", FAMILIES)
def test_another_node_that_sends_a_new_one_here_is_not_believed(world: World, family: int) -> None:
    """To a pod that is no backend; where all end nobody else serves it."""
    world.publish(ending())
    frame = bytes(wire() / outer(ask(family, DSR, "syn"), "c"))
    outcome = world.run("from_net", frame, UNDERLAY)
    assert outcome.verdict == DROP and causes(outcome) == ["no-frontend"]

"""Clients outside whose connection's translation was evicted, as by a flood: it goes on."""

from __future__ import annotations

import pytest
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from tests.bytecode.balancing import CHAIN, HERE, LB, PORTS, SPORT, ask, frontends, outer
from tests.bytecode.goldens import (
    FAMILIES,
    B,
    at_pod,
    dropped,
    from_pod,
    ip,
    same_events,
    same_frame,
    syn,
    tcp,
    to_hop,
    to_pod,
    wire,
)
from tests.bytecode.world import OUTSIDE, UNDERLAY, Outcome, World, set_seen


def run(world: World, program: str, frame: Packet, at: int) -> Outcome:
    return world.run(program, bytes(frame), at)


def answers(world: World, family: int, flags: str = "SA") -> Outcome:
    packet = from_pod(B) / ip(family, "b", "world") / tcp(8080, SPORT, flags)
    return run(world, "from_pod", packet, at_pod(B))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["client", "balancer"])
def test_a_connection_whose_translation_was_evicted_goes_on(
    world: World, family: int, by: str
) -> None:
    """CHAIN's owners in order: b, remote, far. They would not know it."""
    world.publish(frontends())
    run(world, "from_net", wire() / ask(family, CHAIN), OUTSIDE)
    answers(world, family)
    world.nat.delete_many(world.nat.keys())
    if by == "client":
        out = run(world, "from_net", wire() / ask(family, CHAIN, "ack"), OUTSIDE)
    else:
        inner = ip(family, "world", LB[family]) / tcp(SPORT, PORTS[CHAIN], "A")
        out = run(world, "from_net", wire() / outer(inner, "b"), UNDERLAY)
    same_frame(out.packet, to_pod(B) / ip(family, "world", "b") / tcp(SPORT, 8080, "A"))
    assert Ether(answers(world, family, "A").packet)[1].src == LB[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_direct_connection_is_none_of_the_frontends(world: World, family: int) -> None:
    world.publish(frontends())
    direct = ip(family, "world", "b")
    run(world, "from_net", wire() / direct / syn(SPORT, 8080), OUTSIDE)
    answers(world, family)
    out = run(world, "from_net", wire() / ask(family, CHAIN, "ack"), OUTSIDE)
    inner = ip(family, "world", LB[family], ttl=63) / tcp(SPORT, PORTS[CHAIN], "A")
    same_frame(out.packet, to_hop() / outer(inner, "remote"))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_whose_translation_was_evicted_go_on_when_the_client_says_more(
    world: World, family: int
) -> None:
    world.publish(frontends())
    run(world, "from_net", wire() / ask(family, HERE), OUTSIDE)
    answers(world, family)
    keys = world.nat.keys()
    world.nat.delete_many(keys[keys["dport"] == SPORT])
    assert len(world.nat) == 1
    same_events(answers(world, family, "A").events, dropped("nat-failed"))
    set_seen(world.connections, -1)
    run(world, "from_net", wire() / ask(family, HERE, "ack"), OUTSIDE)
    assert Ether(answers(world, family, "A").packet)[1].src == LB[family]

"""XDP does what from_net would do with the same packet, or leaves it to it.

The same packets, in the same changing scenes, go twice through a node: once by XDP and then, what
that passes, by from_net; once by from_net alone. What leaves the node, the records, and what it
remembers must be the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from scapy.layers.inet import TCP as Tcp
from scapy.layers.inet import UDP as Udp
from scapy.packet import Packet, Raw

from tests.bytecode.balancing import (
    CHAIN,
    DSR,
    HERE,
    LB,
    NODE,
    NODE_PORT,
    OTHER,
    PORTS,
    SNAT,
    WORLD,
    frontends,
)
from tests.bytecode.edge import PASS, TX, Edge, awake
from tests.bytecode.edge import REDIRECT as BY_XDP
from tests.bytecode.goldens import ADDRESSES, FAMILIES, ip, same_frame, wire
from tests.bytecode.world import HOP_XDP, OUTSIDE, REDIRECT, UNDERLAY, Scene, World

MTU = 1400
#: As the node itself: each connection gets a port by chance.
BY_CHANCE = PORTS[SNAT], PORTS[WORLD]
KINDS = {"S": 20, "A": 20, "PA": 20, "FA": 20, "R": 20, "SA": 20, "udp": 8}


def seen(scene: Scene) -> Scene:
    """Hop 1 takes what XDP sends."""
    hop = replace(scene.hops[1], flags=scene.hops[1].flags | HOP_XDP, mtu=MTU)
    return scene.but(hops={**scene.hops, 1: hop})


def turned(scene: Scene, step: int) -> Scene:
    """Each frontend's owners in another order, or some fewer."""
    services = {}
    for key, service in scene.services.items():
        if len(service.owners) > 1:
            order = service.slots[0]
            order = (*order[step % len(order) :], *order[: step % len(order)])
            service = replace(service, slots=(order[: len(order) - step % 2],))
        services[key] = service
    return scene.but(services=services)


def with_more(scene: Scene) -> Scene:
    """Some services get a second owner, so that there is something to turn."""
    services = dict(scene.services)
    both = {key: s for key, s in services.items() if len(s.owners) == 1 and s.id in (40, 41, 51)}
    for key, service in both.items():
        others = [
            s for k, s in services.items() if k[0] == key[0] and s.id in (40, 41) and s.owners
        ]
        more = next(o for s in others for o in s.owners if o != service.owners[0])
        services[key] = replace(service, owners=(*service.owners, more), slots=((0, 1),))
    return scene.but(services=services)


SCENES = [seen(turned(with_more(frontends()), step)) for step in range(4)]


@dataclass(frozen=True)
class Step:
    """A packet, or with `scene` a change of the scene."""

    frame: bytes = b""
    at: int = OUTSIDE
    scene: int = -1
    compared: bool = True


def packet(rng: random.Random) -> Step:
    family = rng.choice(FAMILIES)
    service = rng.choice([*PORTS, DSR, DSR, DSR, NODE, HERE, CHAIN])
    kind = rng.choice([*KINDS, "S", "A", "PA", "udp", "udp"])
    target, port = LB[family], PORTS[service]
    if rng.random() < 0.1:
        target, port = ADDRESSES[family]["host"], NODE_PORT
    elif rng.random() < 0.05:
        port = 1
    elif rng.random() < 0.05:
        target = ADDRESSES[family][rng.choice(["b", "remote", "unroutable"])]
    # Apart by frontend: one of two connections with the same backend gets a port by chance.
    sport = 40000 + 10 * (port % 997) + rng.randrange(3)
    upper: Packet
    if kind == "udp":
        upper = Udp(sport=sport, dport=port)
    else:
        upper = Tcp(sport=sport, dport=port, flags=kind, seq=7, ack=9)
    room = MTU - {4: 20, 6: 40}[family] * 2 - KINDS[kind]
    size = rng.choice([0, 4, 4, 4, room - 1, room, room + 1, room + 60])
    name = rng.choice(["world"] * 8 + [OTHER[family], OTHER[family], "remote", "node", "a", "host"])
    ttl = rng.choice([64] * 8 + [2, 1, 0])
    frame = wire() / ip(family, name, target, ttl=ttl) / upper / Raw(bytes(size))
    if rng.random() < 0.03:
        frame.dst = "02:00:00:00:00:cc"
    raw = bytes(frame)
    itself = (name, port) == ("node", PORTS[NODE])  # served as this node, while it is so
    if rng.random() < 0.05 and not itself:
        at = rng.randrange(14, 14 + 20)
        raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
    by_chance = itself or port in BY_CHANCE
    return Step(raw, rng.choice([OUTSIDE, OUTSIDE, UNDERLAY]), compared=not by_chance)


def steps(seed: str, count: int) -> list[Step]:
    rng = random.Random(seed)
    return [
        Step(scene=rng.randrange(len(SCENES))) if rng.random() < 0.04 else packet(rng)
        for _ in range(count)
    ]


@dataclass
class Told:
    verdict: int
    frame: bytes
    events: list[dict[str, Any]]
    by_xdp: bool = False


def go(world: World, course: list[Step], edge: Edge | None) -> tuple[list[Told], list[Any]]:
    """What became of each packet, and the flows in the end."""
    world.publish(SCENES[0])
    world.clear()
    told = []
    for step in course:
        if step.scene >= 0:
            world.publish(SCENES[step.scene])
            continue
        if edge is not None:
            first = edge.run(step.frame, step.at)
            if first.verdict != PASS:
                assert first.verdict in (TX, BY_XDP) and not first.events
                told.append(Told(REDIRECT, first.packet, [], True))
                continue
            assert first.packet == step.frame
        last = world.run("from_net", step.frame, step.at)
        dull = ("time", "epoch", "line")
        events = [{k: v for k, v in e.items() if k not in dull} for e in last.events]
        told.append(Told(last.verdict, last.packet, events))
    names = ("client", "addr", "sport", "port", "hash", "service")
    flows = [tuple(value[name].tobytes() for name in names) for value in world.flows.items()[1]]
    return told, sorted(flows)


@pytest.fixture(scope="module")
def edges(_world) -> Iterator[dict[str, Edge]]:
    with (
        _world.inside(),
        Edge(_world, {"config_balance": 1}) as usual,
        Edge(_world, {"config_balance": 1, "config_generic": 1}) as generic,
        awake(usual),
    ):
        yield {"native": usual, "generic": generic}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", ["native", "generic"])
def test_they_agree(world, edges, mode, seed):
    course = steps(f"{mode}/{seed}", 500)
    one, flows = go(world, course, edges[mode])
    other, wanted = go(world, course, None)
    packets = [step for step in course if step.scene < 0]
    for number, (step, found, expected) in enumerate(zip(packets, one, other, strict=True)):
        if not step.compared:
            assert found.verdict == expected.verdict and not found.by_xdp
            continue
        assert found.verdict == expected.verdict, (number, step, found, expected)
        same_frame(found.frame, Raw(expected.frame))
        assert found.events == expected.events, (number, step)
    assert flows == wanted
    taken = sum(told.by_xdp for told in one)
    assert len(one) / 40 < taken < len(one) / 2, "the comparison sees both"

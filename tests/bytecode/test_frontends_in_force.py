"""What an agent tells of services' frontends is what its node's programs read."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lockgate.agent.frontends import Asked, frontends
from lockgate.compile.balance import flow_hash
from lockgate.objects.address import parse_address
from tests.bytecode import balancing
from tests.bytecode.balancing import CHAIN, EMPTY, HERE, LB, LOCAL, PORTS, RANGED, SNAT, STICKY
from tests.bytecode.goldens import ADDRESSES, FAMILIES, ip, syn, wire
from tests.bytecode.test_packets_frontends import SPORT
from tests.bytecode.world import DRY_MARK, OUTSIDE, TCP, TO_HOP, TO_LOCAL, World


@pytest.fixture
def agent(world: World) -> Any:
    world.publish(balancing.frontends())
    return SimpleNamespace(
        dp=world,
        publisher=world.publisher,
        hops=SimpleNamespace(numbers={"two": 1, "three": 2}),
        config=SimpleNamespace(node="one"),
        journal=SimpleNamespace(
            served=lambda: {
                CHAIN: ("shop", "web", "http", "TCP", 80),
                HERE: ("shop", "pod", "hostPort", "TCP", 80),
            }
        ),
    )


def told(agent: Any, family: int, service: int, hash: int = -1) -> dict[str, Any]:
    found = frontends(agent, [Asked(LB[family], PORTS[service], "TCP", hash)])[0]
    assert found is not None
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_owners_with_their_slots_and_nodes(agent: Any, family: int) -> None:
    known = ADDRESSES[family]
    view = told(agent, family, CHAIN)
    assert view["service"] == CHAIN and view["frontend"] and view["forwarding"] == "dsr"
    assert [
        (one["address"], one["port"], one["target"], one["node"], one["slots"], one["second"])
        for one in view["owners"]
    ] == [
        (known["b"], 8080, "local", "one", 1, 0),
        (known["remote"], 8080, "hop", "two", 0, 1),
        (known["far"], 8080, "hop", "three", 0, 0),
        (known["c"], 8080, "local", "one", 0, 0),
    ]
    assert (view["slots"], view["slot"]) == (1, None)


def test_whose_it_is(agent: Any) -> None:
    assert [told(agent, 4, one)["of"] for one in (CHAIN, HERE, SNAT)] == [
        {"kind": "Service", "namespace": "shop", "name": "web"},
        {"kind": "Pod", "namespace": "shop", "name": "pod"},
        None,
    ]


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        (HERE, {"forwarding": "dsr", "localOutside": False, "ranges": False, "affinity": 0}),
        (SNAT, {"forwarding": "snat"}),
        (RANGED, {"ranges": True}),
        (STICKY, {"affinity": 60}),
        (LOCAL, {"localOutside": True}),
        (EMPTY, {"owners": [], "slots": 0, "backends": []}),
    ],
)
def test_flags_in_words(agent: Any, service: int, expected: dict[str, Any]) -> None:
    view = told(agent, 4, service)
    assert {key: view[key] for key in expected} == expected


def test_what_is_not_there_is_none(agent: Any) -> None:
    assert frontends(agent, [Asked(LB[4], 4444), Asked("192.0.2.1", 80)]) == [None, None]
    with pytest.raises(ValueError, match="ICMP has no ports"):
        frontends(agent, [Asked(LB[4], 80, "ICMP")])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_owner_of_the_slot_is_whom_the_kernel_chooses(
    agent: Any, world: World, family: int
) -> None:
    """By the hash that the compiler has, too."""
    scene = balancing.frontends()
    key = LB[family], PORTS[CHAIN], TCP
    slots = tuple(tuple((n + more) % 4 for more in range(4)) for n in (0, 1, 2, 3, 1, 0, 3, 2))
    world.publish(
        scene.but(services={**scene.services, key: replace(scene.services[key], slots=slots)})
    )
    client = {4: "198.51.100.7", 6: "2001:db8::7"}[family]
    seen = set()
    for sport in range(SPORT, SPORT + 40):
        ends = parse_address(client), parse_address(LB[family]), sport, PORTS[CHAIN], TCP
        view = told(agent, family, CHAIN, flow_hash(*ends))
        number, owners = view["slot"]["number"], view["slot"]["owners"]
        assert tuple(owners) == slots[number]
        frame = wire() / ip(family, client, LB[family]) / syn(sport, PORTS[CHAIN])
        with world.inside():
            target = world.run("from_net", bytes(frame), OUTSIDE, mark=DRY_MARK).cb[3]
        owner = view["owners"][owners[0]]
        kinds = {TO_LOCAL: "local", TO_HOP: "hop"}
        assert kinds[target >> 28] == owner["target"]
        assert owner["hop"] in (None, target & 0xFFF_FFFF)
        seen.add(number)
    assert len(seen) == 8, "all slots"

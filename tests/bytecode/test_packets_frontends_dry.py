"""Questions about a service's frontend, as `lockgate service trace` asks them: no trace is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scapy.layers.l2 import Ether

from tests.bytecode.balancing import (
    CHAIN,
    DSR,
    EMPTY,
    FAR,
    HERE,
    HOST,
    LOCAL,
    RANGED,
    SNAT,
    STICKY,
    frontends,
    outer,
)
from tests.bytecode.goldens import FAMILIES, B, wire
from tests.bytecode.test_packets_frontends import ask
from tests.bytecode.world import (
    DRY_MARK,
    OUTSIDE,
    REMEMBERED,
    TO_HOP,
    TO_HOST,
    TO_LOCAL,
    UNDERLAY,
    Outcome,
    World,
)

RESULT, TARGET, SERVICE = 0, 3, 4  # enum dry_answer
ALLOW = 1
CAUSES = {"no-backend": 13, "no-local-backend": 28, "source-range": 27}
#: service → verdict or cause, and where it goes.
ANSWERS: dict[int, tuple[str, int, int]] = {
    HERE: ("allow", TO_LOCAL, B),
    DSR: ("allow", TO_HOP, 1),
    FAR: ("allow", TO_HOP, 2),
    SNAT: ("allow", TO_HOP, 1),
    HOST: ("allow", TO_HOST, 0),
    CHAIN: ("allow", TO_LOCAL, B),
    EMPTY: ("no-backend", 0, 0),
    LOCAL: ("no-local-backend", 0, 0),
    STICKY: ("allow", TO_HOP, 1),
}


def snapshot(world: World) -> dict[str, list[bytes]]:
    """Everything that programs remember."""
    found = {}
    for name in REMEMBERED:
        keys, values = getattr(world, name).items()
        found[name] = sorted(k.tobytes() + v.tobytes() for k, v in zip(keys, values, strict=True))
    return found


def question(world: World, frame: Any, at: int = OUTSIDE) -> Outcome:
    """A dry run; whatever there is of it beside the answer fails."""
    before = snapshot(world)
    with world.inside():
        outcome = world.run("from_net", bytes(frame), at, mark=DRY_MARK)
    assert outcome.events == []
    assert not world.counters().any()
    assert snapshot(world) == before
    return outcome


@pytest.fixture
def asked(world: World) -> World:
    world.publish(frontends())
    world.clear()
    return world


@pytest.mark.parametrize("service", ANSWERS)
@pytest.mark.parametrize("kind", ["syn", "ack", "udp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_packet_would_go(asked: World, family: int, kind: str, service: int) -> None:
    # To nobody's MAC: a question is about a packet that comes in, whatever card it is.
    frame = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / ask(family, service, kind)
    outcome = question(asked, frame)
    verdict, target, index = ANSWERS[service]
    if (service, kind) == (CHAIN, "ack"):  # nobody knows it here: the next owner may
        target, index = TO_HOP, 1
    word = outcome.cb[RESULT]
    assert outcome.cb[SERVICE] == service
    if verdict != "allow":
        assert (word & 1, word >> 8 & 0xFF) == (0, CAUSES[verdict])
        return
    assert word & 1 == ALLOW
    assert outcome.cb[TARGET] == target << 28 | index


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_outside_the_ranges_is_told_so(asked: World, family: int) -> None:
    stranger = {4: "192.0.2.77", 6: "2001:db8:9::1"}[family]
    outcome = question(asked, wire() / ask(family, RANGED, source=stranger))
    assert (outcome.cb[RESULT] & 1, outcome.cb[RESULT] >> 8 & 0xFF) == (0, CAUSES["source-range"])
    outcome = question(asked, wire() / ask(family, RANGED))
    assert outcome.cb[RESULT] & 1 == ALLOW


@pytest.mark.parametrize("kind", ["syn", "udp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_came_out_is_answered_at_the_next_node(asked: World, family: int, kind: str) -> None:
    inner = ask(family, CHAIN, kind)
    frame = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / outer(inner, "b")
    outcome = question(asked, frame, UNDERLAY)
    assert outcome.cb[RESULT] & 1 == ALLOW
    assert outcome.cb[TARGET] == TO_LOCAL << 28 | B


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_does_not_make_a_remembered_flow_last(asked: World, family: int) -> None:
    frame = wire() / ask(family, FAR, "udp")
    with asked.inside():
        asked.run("from_net", bytes(frame), OUTSIDE)
    keys, values = asked.flows.items()
    assert len(keys) == 1
    values = values.copy()
    values["seen"] -= 5
    asked.flows.update_many(keys, values)
    asked._base = asked.counters_map.values().sum(axis=1)
    asked.events()
    question(asked, frame)
    assert np.array_equal(asked.flows.items()[1], values)

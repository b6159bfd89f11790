"""What one pod may use up of what all share, and that others have theirs all the while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import UDP as Udp
from scapy.packet import Packet, Raw

from lockgate.bpf.maps import ArrayMap
from tests.bytecode.goldens import FAMILIES, A, B, at_pod, base, from_pod, ip, syn, udp
from tests.bytecode.world import DROP, DRY_MARK, REDIRECT, SLOTS, World

UNANSWERED = 3  # enum counter
HOUR = 3600 * 10**9
#: Of a token that comes back after 60 ms, five may be taken at once (BURST_NS is 250 ms).
SOON, AT_ONCE = 60 * 10**6, 5


@pytest.fixture(scope="module")
def worlds() -> Iterator[Callable[..., World]]:
    """World by what a token takes, in nanoseconds: each is loaded once."""
    made: dict[tuple[tuple[str, int], ...], World] = {}

    def world(**nanoseconds: int) -> World:
        key = tuple(nanoseconds.items())
        if key not in made:
            constants = {f"config_{name}_ns": value for name, value in key}
            made[key] = World(constants=constants, name=f"limits{len(made)}")
        return made[key]

    yield world
    for one in made.values():
        one.close()


@contextmanager
def fresh(world: World) -> Iterator[World]:
    """Inside the world, with nothing remembered and all budgets full."""
    with world.inside(), ArrayMap.of(world.object, "budgets", world.dtype("budget")) as budgets:
        for slot in range(SLOTS):
            budgets[slot] = np.zeros((), world.dtype("budget"))
        world.clear()
        world.publish(base())
        yield world


def sends(world: World, slot: int, packet: Packet, **more: Any) -> Any:
    return world.run("from_pod", bytes(from_pod(slot) / packet), at_pod(slot), **more)


# ---- Answers -------------------------------------------------------------------------


def answered(family: int, sender: str) -> dict[str, tuple[Packet, str]]:
    """What we answer with an ICMP error or a reset, and the cause of the drop."""
    big = ip(family, sender, "remote", **({"flags": "DF"} if family == 4 else {}))
    return {
        "a reset": (ip(family, sender, "svc") / syn(dport=90), "no-backend"),
        "port unreachable": (ip(family, sender, "svc") / udp(dport=90), "no-backend"),
        "time exceeded": (ip(family, sender, "remote", ttl=1) / udp(), "ttl-exceeded"),
        "packet too big": (big / Udp(sport=1, dport=2) / Raw(bytes(1410)), "packet-too-big"),
    }


@pytest.fixture
def one_answer(worlds) -> Iterator[World]:
    with fresh(worlds(answer=HOUR)) as world:
        yield world


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", answered(4, "a"))
def test_over_the_limit_a_packet_is_dropped_and_its_sender_not_told(one_answer, family, kind):
    packet, cause = answered(family, "a")[kind]
    assert sends(one_answer, A, packet).verdict == REDIRECT
    second = sends(one_answer, A, packet)
    assert (second.verdict, second.events[-1]["cause"]) == (DROP, cause)
    assert second.packet == bytes(from_pod(A) / packet)
    assert one_answer.counters()[UNANSWERED] == 1


def test_one_limit_is_for_all_kinds_of_answers_and_for_each_pod(one_answer):
    for family in FAMILIES:
        for packet, _ in answered(family, "a").values():
            sends(one_answer, A, packet)
    assert one_answer.counters()[UNANSWERED] == 7
    packet, _ = answered(4, "b")["time exceeded"]
    assert sends(one_answer, B, packet).verdict == REDIRECT


def test_questions_take_no_answers(one_answer):
    for packet, _ in answered(4, "a").values():
        sends(one_answer, A, packet, mark=DRY_MARK)
    packet, _ = answered(4, "a")["a reset"]
    assert sends(one_answer, A, packet).verdict == REDIRECT
    assert not one_answer.counters()[UNANSWERED]


def test_what_is_never_answered_takes_none(one_answer):
    reset = syn(dport=90)
    reset.flags = "R"
    sends(one_answer, A, ip(4, "a", "svc") / reset)
    packet, _ = answered(4, "a")["a reset"]
    assert sends(one_answer, A, packet).verdict == REDIRECT


def test_after_a_pause_some_may_come_at_once(worlds):
    packet, _ = answered(4, "a")["a reset"]
    with fresh(worlds(answer=SOON)) as world:
        told = sum(sends(world, A, packet).verdict == REDIRECT for _ in range(100))
        assert told >= AT_ONCE
        assert told + world.counters()[UNANSWERED] == 100

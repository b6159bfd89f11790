"""Associations of SCTP (RFC 9260): they begin and end by the first chunk of a packet."""

from __future__ import annotations

import pytest
from scapy.packet import Raw

from tests.bytecode.goldens import FAMILIES, A, B, at_pod, base, from_pod, ip
from tests.bytecode.world import DROP, INGRESS, REDIRECT, World, set_seen

NEW, ESTABLISHED, CLOSING, CLOSED = 1, 2, 3, 4  # enum ct_state
# RFC 9260 3.2: types of chunks.
DATA, INIT, INIT_ACK, HEARTBEAT, ABORT, SHUTDOWN, SHUTDOWN_ACK = 0, 1, 2, 4, 6, 7, 8
COOKIE_ECHO, COOKIE_ACK, SHUTDOWN_COMPLETE = 10, 11, 14


def packet(sport: int, dport: int, chunk: int | None) -> Raw:
    head = sport.to_bytes(2, "big") + dport.to_bytes(2, "big") + bytes(8)
    return Raw(head + (b"" if chunk is None else bytes((chunk, 0, 0, 4))))


def says(
    world: World, family: int, who: str, *chunks: int | None, verdict: int = REDIRECT
) -> list[list[str]]:
    """Packets with these first chunks, and the verdicts that each was told with."""
    told = []
    next_header = {"proto": 132} if family == 4 else {"nh": 132}
    slot, other, ports = (A, "b", (40000, 70)) if who == "a" else (B, "a", (70, 40000))
    for chunk in chunks:
        frame = from_pod(slot) / ip(family, who, other, **next_header) / packet(*ports, chunk)
        outcome = world.run("from_pod", bytes(frame), at_pod(slot))
        assert outcome.verdict == verdict, outcome
        assert all(event["tcp_flags"] == 0 for event in outcome.events)
        told.append([event["cause"] for event in outcome.events])
    return told


def state(world: World) -> tuple[str, int]:
    [(where, entry)] = world.tracked()
    return where, entry["state"]


BEGUN = [["none", "none"]]  # both directions, allowed


def begin(world: World, family: int) -> None:
    world.publish(base())
    assert says(world, family, "a", INIT) == BEGUN
    assert state(world) == ("half_open", NEW)
    assert says(world, family, "b", INIT_ACK) == [[]]
    assert says(world, family, "a", COOKIE_ECHO) == [[]]
    assert says(world, family, "b", COOKIE_ACK, DATA) == [[], []]
    assert state(world) == ("connections", ESTABLISHED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", ["a", "b"])
def test_an_association_that_both_shut_down_is_closed_and_an_init_begins_another(
    world, family, who
):
    other = "b" if who == "a" else "a"
    begin(world, family)
    assert says(world, family, who, SHUTDOWN) == [[]]
    assert state(world) == ("connections", CLOSING)
    assert says(world, family, other, DATA) == [[]]
    assert says(world, family, who, SHUTDOWN) == [[]]
    assert state(world) == ("connections", CLOSING)
    assert says(world, family, other, SHUTDOWN_ACK) == [[]]
    assert state(world) == ("connections", CLOSED)
    assert says(world, family, who, SHUTDOWN_COMPLETE) == [[]]
    assert state(world) == ("connections", CLOSED)
    assert says(world, family, "a", INIT) == BEGUN
    assert state(world) == ("connections", NEW)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", ["a", "b"])
def test_an_abort_closes_at_once_and_an_init_begins_another(world, family, who):
    begin(world, family)
    assert says(world, family, who, ABORT) == [[]]
    assert state(world) == ("connections", CLOSED)
    assert says(world, family, "a", INIT) == BEGUN


@pytest.mark.parametrize("family", FAMILIES)
def test_an_abort_that_its_receiver_ignores_closes_nothing(world, family):
    """We do not follow verification tags: it may be forged."""
    begin(world, family)
    says(world, family, "a", ABORT)
    assert says(world, family, "b", DATA) == [[]]
    assert state(world) == ("connections", ESTABLISHED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("silence", [0, 30, 55], ids="{} s".format)
def test_an_idle_association_outlives_an_abort_that_its_receiver_ignores(world, family, silence):
    """Its next packet may be the next heartbeat: every 30 s and an RTO, RFC 9260 8.3 and 16."""
    begin(world, family)
    says(world, family, "a", ABORT)
    set_seen(world.connections, -silence)
    assert says(world, family, "b", HEARTBEAT) == [[]]
    assert state(world) == ("connections", ESTABLISHED)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_abort_begins_no_association(world, family):
    world.publish(base())
    says(world, family, "a", ABORT)
    assert world.tracked() == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [DATA, HEARTBEAT, INIT, 0x3F, 0xC0, None])
def test_no_other_chunk_ends_an_association(world, family, chunk):
    """Nor an INIT sent again, nor a packet that has none."""
    begin(world, family)
    for who in ("a", "b"):
        assert says(world, family, who, chunk, chunk) == [[], []]
    assert state(world) == ("connections", ESTABLISHED)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_denied_association_only_an_init_of_the_responder_begins_another(world, family):
    begin(world, family)
    world.publish(base().isolate(B, INGRESS))
    for chunk in (DATA, INIT_ACK, SHUTDOWN):
        says(world, family, "b", chunk, verdict=DROP)
    says(world, family, "a", INIT, verdict=DROP)
    assert says(world, family, "b", INIT) == BEGUN

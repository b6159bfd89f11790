"""How long what the programs remember counts: by state and protocol, for them and for the sweep."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.packet import Packet, Raw

from lockgate.agent.sweep import sweep, timeouts
from tests.bytecode.goldens import FAMILIES, A, B, at_pod, base, echo, from_pod, ip, syn, tcp, udp
from tests.bytecode.test_packets_sctp import (
    ABORT,
    DATA,
    INIT,
    INIT_ACK,
    SHUTDOWN,
    SHUTDOWN_ACK,
    packet,
)
from tests.bytecode.world import DROP, REDIRECT, World, set_seen


def sctp(chunk: int) -> tuple[Packet, Packet]:
    """A packet with this chunk from a and one from b."""
    return packet(40000, 70, chunk), packet(70, 40000, chunk)


def conversation(kind: str, family: int) -> dict[str, list[Packet]]:
    """Packets that bring a connection into a state, by state; the first is a's, then b's, and
    so on, and the last is one more of a's that begins nothing."""
    if kind == "UDP":
        there, back = udp(), udp(53, 40000)
        return {"half_open": [there, there], "datagram": [there, back, there]}
    if kind == "echo":
        there, back = echo(family), echo(family, reply=True)
        return {"half_open": [there, there], "datagram": [there, back, there]}
    if kind == "TCP":
        open_, more = [syn(), tcp(80, 40000, "SA")], tcp(40000, 80, "A")
        fin, fin_back = tcp(40000, 80, "FA"), tcp(80, 40000, "FA")
        reset = tcp(40000, 80, "R")
    else:
        open_, more = [sctp(INIT)[0], sctp(INIT_ACK)[1]], sctp(DATA)[0]
        fin, fin_back = sctp(SHUTDOWN)[0], sctp(SHUTDOWN_ACK)[1]
        reset = sctp(ABORT)[0]
    return {
        "half_open": [open_[0], more],
        "established": [*open_, more],
        "closing": [*open_, fin, more],
        "closed": [*open_, fin, fin_back, more],
        "closed by a reset": [*open_, reset, more],
    }


def run(world: World, family: int, number: int, l4: Packet) -> Any:
    slot, source, target = (B, "b", "a") if number % 2 else (A, "a", "b")
    more: dict[str, int] = {}
    if isinstance(l4, Raw):
        more = {"proto": 132} if family == 4 else {"nh": 132}
    frame = from_pod(slot) / ip(family, source, target, **more) / l4
    outcome = world.run("from_pod", bytes(frame), at_pod(slot))
    assert outcome.verdict == REDIRECT, outcome
    return outcome


CASES = [(k, state) for k in ("TCP", "SCTP", "UDP", "echo") for state in conversation(k, 4)]
# Seconds past the timeout. Between two steps of a test a busy machine may let some go by: half of
# the shortest timeout are left for that. What is too late only gets later.
AGES = {"in time": -5, "too late": +1}


def age_of(kind: str, state: str) -> str:
    """The name of its timeout."""
    return "half_open" if (kind, state) == ("SCTP", "closed by a reset") else state.split()[0]


def aged(world: World, family: int, kind: str, state: str, seconds: int) -> Packet:
    """A connection in this state, nobody's for as long as that lasts and so many seconds more;
    answers the packet that comes then."""
    world.clear()
    *packets, last = conversation(kind, family)[state]
    for number, l4 in enumerate(packets):
        run(world, family, number, l4)
    age = timeouts(world.object.schema)[age_of(kind, state)]
    table = world.half_open if state == "half_open" else world.connections
    assert len(table) == len(world.tracked()) == 1
    set_seen(table, -age - seconds)
    return last


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize(("kind", "state"), CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_programs_and_sweep_have_the_same_timeouts(world, family, kind, state, age):
    """A packet is a new connection's, and the entry swept, exactly when its time is over."""
    world.publish(base())
    last = aged(world, family, kind, state, AGES[age])
    assert (run(world, family, 0, last).events == []) == (age == "in time")
    aged(world, family, kind, state, AGES[age])
    assert sum(sweep(world)) == (age == "too late")
    assert len(world.tracked()) == (age == "in time")


def pieces(family: int) -> tuple[Packet, Packet]:
    whole = bytes(Udp(sport=40000, dport=53, len=24 + 8, chksum=0xFFFF) / Raw(bytes(24)))
    if family == 4:
        more = {"proto": 17, "id": 5}
        return (
            ip(4, "a", "b", flags="MF", **more) / Raw(whole[:16]),
            ip(4, "a", "b", frag=2, **more) / Raw(whole[16:]),
        )
    head = ip(6, "a", "b")
    return (
        head / IPv6ExtHdrFragment(nh=17, m=1, id=5) / Raw(whole[:16]),
        head / IPv6ExtHdrFragment(nh=17, offset=2, id=5) / Raw(whole[16:]),
    )


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ports_of_a_fragmented_packet_are_known_until_the_receiver_gives_up(world, family, age):
    world.publish(base())
    first, later = (bytes(from_pod(A) / piece) for piece in pieces(family))
    known = age == "in time"

    def begin() -> None:
        assert world.run("from_pod", first, at_pod(A)).verdict == REDIRECT
        assert len(world.fragments) == 1
        set_seen(world.fragments, -timeouts(world.object.schema)["fragment"] - AGES[age])

    begin()
    outcome = world.run("from_pod", later, at_pod(A))
    assert outcome.verdict == (REDIRECT if known else DROP)
    assert [e["cause"] for e in outcome.events] == ([] if known else ["fragment-untracked"])
    begin()
    assert sum(sweep(world)) == (not known)

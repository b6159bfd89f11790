"""What one pod may use up of what all share, and that others have theirs all the while."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from lockgate.bpf import syscall
from lockgate.bpf.maps import ArrayMap
from tests.bytecode.goldens import (
    FAMILIES,
    A,
    B,
    C,
    at_pod,
    base,
    from_pod,
    ip,
    syn,
    tcp,
    to_pod,
    udp,
    wire,
)
from tests.bytecode.world import (
    DROP,
    DRY_MARK,
    EGRESS,
    INGRESS,
    NEXT,
    OUTSIDE,
    REDIRECT,
    SLOTS,
    UNDERLAY,
    World,
)

UNANSWERED = 3  # enum counter
EVENTS, LOST, CUT = 0, 1, 4
HOUR = 3600 * 10**9
#: Of a token that comes back after 60 ms, five may be taken at once (BURST_NS is 250 ms).
SOON, AT_ONCE = 60 * 10**6, 5


@pytest.fixture(autouse=True)
def _on_one_cpu() -> Iterator[None]:
    """What another CPU wrote last into an LRU table stays, however many come on this one."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


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


# ---- New connections -----------------------------------------------------------------


@pytest.fixture
def one_connection(worlds) -> Iterator[World]:
    with fresh(worlds(connection=HOUR)) as world:
        yield world


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("target", "l4"),
    [
        pytest.param("b", syn(40001), id="tcp"),
        pytest.param("b", udp(40001), id="udp"),
        pytest.param("svc", syn(40001), id="tcp to a service"),
        pytest.param("world", syn(40001), id="masqueraded"),
    ],
)
def test_one_connection_too_many_is_dropped_by_name(one_connection, family, target, l4):
    world = one_connection
    assert sends(world, A, ip(family, "a", "b") / syn()).verdict == REDIRECT
    outcome = sends(world, A, ip(family, "a", target) / l4)
    assert outcome.verdict == DROP
    assert [event["cause"] for event in outcome.events] == ["new-connection-rate"]
    number = {name: n for n, name in world.causes.items()}["new-connection-rate"]
    assert world.counters()[8 + number] == 1
    assert len(world.tracked()) == 1


def test_known_connections_and_other_pods_go_on(one_connection):
    world = one_connection
    for sender, receiver, packet in (
        (A, B, ip(4, "a", "b") / syn()),
        (A, B, ip(4, "a", "b") / syn()),  # sent again
        (B, A, ip(4, "b", "a") / tcp(80, 40000, "SA")),
        (A, B, ip(4, "a", "b") / tcp(40000, 80, "A")),
        (B, A, ip(4, "b", "a") / syn()),
    ):
        assert sends(world, sender, packet).verdict == REDIRECT, (sender, receiver, packet)
    assert sends(world, A, ip(4, "a", "b") / syn(40001)).verdict == DROP


def test_what_comes_to_a_pod_is_not_its_own_beginning(one_connection):
    world = one_connection
    for sport in range(40000, 40010):
        frame = wire() / ip(4, "remote", "a") / syn(sport)
        assert world.run("from_net", bytes(frame), UNDERLAY).verdict == REDIRECT
        frame = to_pod(A) / ip(4, "host", "a") / syn(sport)
        assert world.run("to_pod", bytes(frame), at_pod(A)).verdict == NEXT


def test_denied_packets_and_questions_begin_nothing(one_connection):
    world = one_connection
    world.publish(base().isolate(B, INGRESS))
    for sport in range(40000, 40010):
        outcome = sends(world, A, ip(4, "a", "b") / syn(sport))
        assert outcome.events[-1]["cause"] == "policy"
        sends(world, A, ip(4, "a", "c") / syn(sport), mark=DRY_MARK)
    assert sends(world, A, ip(4, "a", "c") / syn()).verdict == REDIRECT


@pytest.mark.parametrize("family", FAMILIES)
def test_what_may_not_begin_keeps_no_translation(one_connection, family):
    """Else a pod would push the translations of others out, at any rate and against a policy."""
    world = one_connection
    world.publish(base().isolate(A, EGRESS))
    assert sends(world, A, ip(family, "a", "svc") / syn()).events[-1]["cause"] == "policy"
    assert len(world.nat) == 0
    world.publish(base())
    assert sends(world, A, ip(family, "a", "svc") / syn()).verdict == REDIRECT
    kept = len(world.nat)
    assert kept == 2
    outcome = sends(world, A, ip(family, "a", "svc") / syn(40001))
    assert outcome.events[-1]["cause"] == "new-connection-rate"
    assert len(world.nat) == kept


@pytest.mark.parametrize(
    ("limit", "opens"),
    [pytest.param({"connection": HOUR}, True, id="limited"),
     pytest.param({}, False, id="without a limit, which shows that this is a flood")],
)  # fmt: skip
def test_a_flood_of_one_pod_leaves_the_half_open_connection_of_another(worlds, limit, opens):
    """First packets, three times what the table holds, between another's SYN and its answer, which
    only as an answer may pass."""
    with fresh(worlds(**limit)) as world:
        world.publish(base().isolate(B, INGRESS))
        assert sends(world, B, ip(4, "b", "c") / syn()).verdict == REDIRECT
        frame = bytearray(bytes(from_pod(A) / ip(4, "a", "remote") / udp()))
        context = syscall.skb_context(ifindex=at_pod(A))
        for sport in range(1024, 1024 + 12288):
            frame[34:36] = sport.to_bytes(2, "big")
            syscall.prog_test_run(world.object.prog_fd("from_pod"), bytes(frame), context)
        world.events()
        answer = sends(world, C, ip(4, "c", "b") / tcp(80, 40000, "SA"))
        assert (answer.verdict == REDIRECT) == opens


def test_some_connections_may_begin_at_once(worlds):
    with fresh(worlds(connection=SOON)) as world:
        begun = sum(
            sends(world, A, ip(4, "a", "b") / syn(40000 + n)).verdict == REDIRECT
            for n in range(AT_ONCE)
        )
        assert begun == AT_ONCE


# ---- Connections from elsewhere ------------------------------------------------------

CROWDED = 5  # enum counter


def arrives(world: World, packet: Packet, card: int = OUTSIDE) -> Any:
    return world.run("from_net", bytes(wire() / packet), card)


def floods(world: World, frames: int, answered: bool = False) -> None:
    """SYNs of the world to pod a, from an address each."""
    program, context = world.object.prog_fd("from_net"), syscall.skb_context(ifindex=OUTSIDE)
    frame = bytearray(bytes(wire() / ip(4, "world", "a") / syn()))
    answer = bytearray(bytes(from_pod(A) / ip(4, "a", "world") / tcp(80, 40000, "SA")))
    for number in range(frames):
        frame[28:30] = answer[32:34] = number.to_bytes(2, "big")
        assert syscall.prog_test_run(program, bytes(frame), context).retval == REDIRECT
        if answered:
            assert sends(world, A, Ether(bytes(answer)).payload).verdict == REDIRECT
    world.events()


def where(world: World, port: int) -> list[str]:
    """The tables that a connection from this port is in."""
    return [name for name, fields in world.tracked() if port in fields["ports"]]


LIMITED = [
    pytest.param({"connection": HOUR}, True, id="limited"),
    pytest.param({}, False, id="without a limit, which shows that this is a flood"),
]


@pytest.mark.parametrize(("limit", "opens"), LIMITED)
def test_a_flood_to_one_pod_leaves_the_half_open_connection_of_another(worlds, limit, opens):
    with fresh(worlds(**limit)) as world:
        world.publish(base().isolate(B, INGRESS))
        assert sends(world, B, ip(4, "b", "c") / syn()).verdict == REDIRECT
        floods(world, 12288)
        answer = sends(world, C, ip(4, "c", "b") / tcp(80, 40000, "SA"))
        assert (answer.verdict == REDIRECT) == opens


@pytest.mark.parametrize(("limit", "stays"), LIMITED)
def test_a_flood_that_is_answered_leaves_established_connections(worlds, limit, stays):
    """A server with SYN cookies answers each SYN, whoever is said to have sent it. Another's
    connection is idle meanwhile: its server's next packet passes only as a part of it."""
    with fresh(worlds(**limit)) as world:
        world.publish(base().isolate(B, INGRESS))
        sends(world, B, ip(4, "b", "c") / syn())
        sends(world, C, ip(4, "c", "b") / tcp(80, 40000, "SA"))
        assert where(world, 40000) == ["connections"]
        floods(world, 12288, answered=True)
        data = sends(world, C, ip(4, "c", "b") / tcp(80, 40000, "PA"))
        assert (data.verdict == REDIRECT) == stays


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("card", [OUTSIDE, UNDERLAY], ids=["from outside", "from another node"])
def test_over_its_budget_a_pod_is_reached_all_the_same(one_connection, family, card):
    """Its answers pass although its own policy lets it begin nothing."""
    world = one_connection
    world.publish(base().isolate(A, EGRESS))
    source = "world" if card == OUTSIDE else "remote"
    arrives(world, ip(family, source, "a") / syn(39999), card)
    assert where(world, 39999) == ["half_open"]
    there, back = ip(family, source, "a"), ip(family, "a", source)
    assert len(arrives(world, there / syn(), card).events) == 1
    assert where(world, 40000) == ["crowd"]
    for _ in range(2):
        outcome = arrives(world, there / syn(), card)  # sent again
        assert (outcome.verdict, outcome.events) == (REDIRECT, [])
        outcome = sends(world, A, back / tcp(80, 40000, "SA"))
        assert (outcome.verdict, outcome.events) == (REDIRECT, [])
        outcome = arrives(world, there / tcp(40000, 80, "A"), card)
        assert (outcome.verdict, outcome.events) == (REDIRECT, [])
        assert where(world, 40000) == ["crowd"]
    assert world.counters()[CROWDED] == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_who_was_answered_and_comes_again_settles(one_connection, family, proto):
    """As soon as the budget has room; a SYN sent again is no coming again."""
    world = one_connection
    there, back = ip(family, "world", "a"), ip(family, "a", "world")
    first, answer, more = {
        "tcp": (syn(), tcp(80, 40000, "SA"), tcp(40000, 80, "A")),
        "udp": (udp(40000, 80), udp(80, 40000), udp(40000, 80)),
    }[proto]
    arrives(world, there / syn(39999))
    arrives(world, there / first)
    with ArrayMap.of(world.object, "budgets", world.dtype("budget")) as budgets:
        account = budgets[A].copy()
        account["arrivals"] = 0
        budgets[A] = account
    for packet in (there / first, there / first) if proto == "tcp" else (there / first,):
        arrives(world, packet)
    sends(world, A, back / answer)
    if proto == "tcp":
        arrives(world, there / first)
    assert where(world, 40000) == ["crowd"]
    assert arrives(world, there / more).events == []
    assert where(world, 40000) == ["connections"]
    assert sends(world, A, back / (tcp(80, 40000, "A") if proto == "tcp" else answer)).events == []


def test_what_the_node_sends_to_its_pod_is_counted_on_no_account(one_connection):
    world = one_connection
    floods(world, 10)
    frame = to_pod(A) / ip(4, "host", "a") / syn()
    assert world.run("to_pod", bytes(frame), at_pod(A)).verdict == NEXT
    assert world.run("from_pod", bytes(from_pod(A) / ip(4, "a", "host") / tcp(80, 40000, "SA")),
                     at_pod(A)).events == []  # fmt: skip


# ---- Fragments -----------------------------------------------------------------------


@pytest.fixture
def one_fragment(worlds) -> Iterator[World]:
    with fresh(worlds(fragment=HOUR)) as world:
        yield world


def pieces(family: int, source: str, target: str, number: int) -> tuple[Packet, Packet]:
    """The first and a later fragment of a UDP datagram."""
    l4 = bytes(Udp(sport=40000, dport=53, len=72)) + bytes(24)
    if family == 4:
        return (
            ip(4, source, target, id=number, flags="MF", proto=17) / Raw(l4),
            ip(4, source, target, id=number, frag=4, proto=17) / Raw(bytes(40)),
        )
    head = ip(6, source, target)
    return (
        head / IPv6ExtHdrFragment(id=number, m=1, nh=17) / Raw(l4),
        head / IPv6ExtHdrFragment(id=number, offset=4, nh=17) / Raw(bytes(40)),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_fragmented_packet_too_many_is_dropped_by_name(one_fragment, family):
    world = one_fragment
    for piece in pieces(family, "a", "b", 1):
        assert sends(world, A, piece).verdict == REDIRECT
    first, later = pieces(family, "a", "b", 2)
    outcome = sends(world, A, first)
    assert (outcome.verdict, outcome.events[-1]["cause"]) == (DROP, "fragment-rate")
    assert sends(world, A, later).events[-1]["cause"] == "fragment-untracked"
    number = {name: n for n, name in world.causes.items()}["fragment-rate"]
    assert world.counters()[8 + number] == 1
    assert len(world.fragments) == 1
    for piece in pieces(family, "b", "c", 1):  # others have theirs
        assert sends(world, B, piece).verdict == REDIRECT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("card", [UNDERLAY, OUTSIDE], ids=["underlay", "outside"])
def test_what_comes_to_a_pod_in_fragments_is_on_its_account(one_fragment, family, card):
    world = one_fragment
    source = "remote" if card == UNDERLAY else "world"
    verdicts = []
    for target in ("a", "a", "b"):
        first, later = pieces(family, source, target, len(verdicts))
        verdicts.append(
            tuple(world.run("from_net", bytes(wire() / p), card).verdict for p in (first, later))
        )
    assert verdicts == [(REDIRECT, REDIRECT), (DROP, DROP), (REDIRECT, REDIRECT)]


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments_for_the_node_itself_take_no_room(one_fragment, family):
    """Its stack puts them together; a stranger that sends many pushes no pod's out."""
    world = one_fragment
    for number in range(3):
        for piece in pieces(family, "world", "host", number):
            assert world.run("from_net", bytes(wire() / piece), OUTSIDE).verdict == NEXT
    assert len(world.fragments) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments_of_answers_from_the_world_find_their_pod(worlds, family):
    with fresh(worlds(fragment=SOON)) as world:
        asked = sends(world, A, ip(family, "a", "world") / udp(40000, 53))
        port = Ether(asked.packet).payload.payload.sport
        first, later = pieces(family, "world", "masq", 3)
        l4 = bytes(Udp(sport=53, dport=port, len=72)) + bytes(24)
        first = Ether(bytes(wire() / first)[: -len(l4)] + l4)
        for piece in (first, wire() / later):
            outcome = world.run("from_net", bytes(piece), OUTSIDE)
            assert (outcome.verdict, outcome.events) == (REDIRECT, [])


@pytest.mark.parametrize(
    ("limit", "passes"),
    [pytest.param({"fragment": HOUR}, True, id="limited"),
     pytest.param({}, False, id="without a limit, which shows that this is a flood")],
)  # fmt: skip
def test_a_flood_of_fragments_leaves_those_of_another_pod(worlds, limit, passes):
    with fresh(worlds(**limit)) as world:
        first, later = pieces(4, "b", "c", 1)
        assert sends(world, B, first).verdict == REDIRECT
        frame = bytearray(bytes(from_pod(A) / pieces(4, "a", "remote", 0)[0]))
        context = syscall.skb_context(ifindex=at_pod(A))
        for number in range(8192):
            frame[18:20] = number.to_bytes(2, "big")
            syscall.prog_test_run(world.object.prog_fd("from_pod"), bytes(frame), context)
        world.events()
        assert (sends(world, B, later).verdict == REDIRECT) == passes


# ---- Events --------------------------------------------------------------------------


@pytest.mark.parametrize("capture", [0, 64], ids=["events", "events_raw"])
def test_events_about_one_pod_are_cut_exactly_and_verdicts_are_not(worlds, capture):
    with fresh(worlds(event=HOUR)) as world:
        world.state.view["capture"][0] = capture
        for sport in range(40000, 40100):
            assert sends(world, A, ip(4, "a", "b") / syn(sport)).verdict == REDIRECT
        counters = world.counters()
        assert (counters[EVENTS], counters[LOST], counters[CUT]) == (2, 0, 198)
        sends(world, B, ip(4, "b", "c") / syn())
        assert world.counters()[EVENTS] == 4


def test_drops_and_denials_are_events_too(worlds):
    with fresh(worlds(event=HOUR)) as world:
        world.publish(base().isolate(B, INGRESS))
        sends(world, A, ip(4, "c", "b") / syn())  # spoofed
        sends(world, A, ip(4, "a", "b") / syn())  # denied: egress verdict, ingress verdict
        counters = world.counters()
        assert (counters[EVENTS], counters[CUT]) == (1, 2)

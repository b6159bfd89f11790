"""What cannot be done: no pod in the slot, no checksum to mend, no port left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.packet import Packet, Raw

from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    IDS,
    A,
    B,
    Golden,
    at_pod,
    base,
    check,
    dropped,
    echo,
    from_pod,
    ip,
    layers,
    syn,
    table,
    tcp,
    udp,
    wire,
)
from tests.bytecode.world import (
    DROP,
    DRY_MARK,
    LOCAL,
    OUTSIDE,
    REDIRECT,
    UNDERLAY,
    Outcome,
    Peer,
    Scene,
    World,
    set_seen,
)

# ---- No pod in the slot -----------------------------------------------------------------


def vacant() -> Scene:
    """The address of `far` leads to a slot that nobody has."""
    peers = {**base().peers}
    for family in FAMILIES:
        peers[ADDRESSES[family]["far"]] = Peer(LOCAL, 9, IDS["far"], 5)
    return base().but(peers=peers)


def gone() -> Iterator[Golden]:
    for f in FAMILIES:
        for name, program, frame, at, place in (
            ("from a pod", "from_pod", from_pod(A) / ip(f, "a", "far") / syn(), at_pod(A), 1),
            ("from the net", "from_net", wire() / ip(f, "remote", "far") / udp(), UNDERLAY, 3),
        ):
            events = [
                *([{"type": 1, "verdict": 1}] * (2 if place == 1 else 1)),
                *dropped("endpoint-gone", place=place, dst_endpoint=IDS["far"]),
            ]
            yield Golden(f"IPv{f}, {name}", program, frame, at, DROP, frame, events, vacant)


@table(gone())
def test_a_packet_to_a_pod_that_is_gone(world, golden):
    check(world, golden)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packet_of_a_known_connection_to_a_pod_that_is_gone(world, family):
    """Its slot is free before the next state is in force: the short way leaves it to the long."""
    world.publish(base())
    world.run("from_pod", bytes(from_pod(A) / ip(family, "a", "b") / syn()), at_pod(A))
    world.run("from_pod", bytes(from_pod(B) / ip(family, "b", "a") / tcp(80, 40000, "SA")),
              at_pod(B))  # fmt: skip
    flags = world.endpoints.view["flags"]
    flags[B] = 0
    try:
        frame = bytes(from_pod(A) / ip(family, "a", "b") / tcp(40000, 80, "A"))
        outcome = world.run("from_pod", frame, at_pod(A))
        assert outcome.verdict == DROP
        assert [event["cause"] for event in outcome.events] == ["endpoint-gone"]
    finally:
        flags[B] = 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_about_a_pod_that_is_gone(world, family):
    world.publish(vacant())
    frame = bytes(from_pod(A) / ip(family, "a", "far") / syn())
    outcome = world.run("from_pod", frame, at_pod(A), DRY_MARK)
    causes = {name: number for number, name in world.causes.items()}
    assert outcome.cb[0] & 0xFFFF == causes["endpoint-gone"] << 8


# ---- No checksum to mend ------------------------------------------------------------------


def short(family: int, source: str, target: str, l4: Packet) -> Packet:
    """A TCP header cut off before its checksum, after all that says where it goes."""
    more = {"proto": 6} if family == 4 else {"nh": 6}
    return ip(family, source, target, **more) / Raw(bytes(l4)[:14])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["svc", "world"])
def test_what_cannot_be_translated_is_dropped_as_it_came(world, family, target):
    frame = bytes(from_pod(A) / short(family, "a", target, syn()))
    world.publish(base())
    outcome = world.run("from_pod", frame, at_pod(A))
    assert outcome.verdict == DROP
    assert (outcome.events[-1]["cause"], outcome.events[-1]["place"]) == ("nat-failed", 1)
    # As it is, without translation, it passes.
    frame = bytes(from_pod(A) / short(family, "a", "b", syn()))
    assert world.run("from_pod", frame, at_pod(A)).verdict == REDIRECT


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_cannot_be_translated_back_is_dropped(world, family):
    world.publish(base())
    frame = bytes(from_pod(A) / ip(family, "a", "svc") / syn(dport=83))
    world.run("from_pod", frame, at_pod(A))
    answer = wire() / short(family, "remote", "a", tcp(8083, 40000, "SA"))
    outcome = world.run("from_net", bytes(answer), UNDERLAY)
    assert outcome.verdict == DROP
    assert [(e["cause"], e["place"]) for e in outcome.events] == [("nat-failed", 3)]


# ---- No port left ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ports() -> Iterator[World]:
    """Masquerade may use two ports."""
    constants = {"masquerade_port_min": 20000, "masquerade_port_max": 20001}
    world = World(constants=constants, name="ports")
    yield world
    world.close()


def numbered(kind: str, family: int, number: int) -> Packet:
    return {
        "TCP": lambda: syn(40000 + number),
        "UDP": lambda: udp(40000 + number),
        "echo": lambda: echo(family, 7 + number),
    }[kind]()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["TCP", "UDP", "echo"])
def test_when_all_ports_are_in_use_none_is_taken_away(two_ports, kind, family):
    world = two_ports
    frames = [bytes(from_pod(A) / ip(family, "a", "world") / numbered(kind, family, n))
              for n in range(3)]  # fmt: skip
    with world.inside():
        world.clear()
        world.publish(base())
        for frame in frames[:2]:
            assert world.run("from_pod", frame, at_pod(A)).verdict == REDIRECT
        outcome = world.run("from_pod", frames[2], at_pod(A))
        assert (outcome.verdict, outcome.events[-1]["cause"]) == (DROP, "nat-exhausted")
        assert outcome.packet == frames[2]
        assert len(world.tracked()) == 2 and len(world.nat) == 4
        for frame in frames[:2]:  # those that have one go on
            assert world.run("from_pod", frame, at_pod(A)).events == []
        # One that is over is free.
        set_seen(world.half_open, -61)
        assert world.run("from_pod", frames[2], at_pod(A)).verdict == REDIRECT


@pytest.mark.parametrize("family", FAMILIES)
def test_where_no_port_is_free_one_of_a_closed_connection_is_taken(two_ports, family):
    """Who begins many short connections needs them sooner than closed ones are forgotten."""
    world = two_ports
    answers = ADDRESSES[family]["masq"]

    def begins(number: int) -> Outcome:
        frame = from_pod(A) / ip(family, "a", "world") / syn(40000 + number)
        return world.run("from_pod", bytes(frame), at_pod(A))

    def answered(port: int, flags: str) -> int:
        """The port of the pod that hears it."""
        frame = wire() / ip(family, "world", answers) / tcp(80, port, flags)
        outcome = world.run("from_net", bytes(frame), OUTSIDE)
        return layers(outcome.packet)[2].dport if outcome.verdict == REDIRECT else 0

    with world.inside():
        world.clear()
        world.publish(base())
        ports = [layers(begins(number).packet)[2].sport for number in (0, 1)]
        assert answered(ports[0], "SA") == 40000 and answered(ports[1], "SA") == 40001
        assert begins(2).events[-1]["cause"] == "nat-exhausted"
        assert answered(ports[1], "R") == 40001  # the second is closed now
        outcome = begins(2)
        assert layers(outcome.packet)[2].sport == ports[1]
        assert answered(ports[0], "A") == 40000, "who lives keeps its port"
        assert answered(ports[1], "SA") == 40002
        assert begins(3).events[-1]["cause"] == "nat-exhausted"
        # What else comes of the closed one finds no port, and takes none away.
        late = from_pod(A) / ip(family, "a", "world") / tcp(40001, 80, "R")
        assert world.run("from_pod", bytes(late), at_pod(A)).verdict == DROP
        assert answered(ports[1], "A") == 40002


@pytest.mark.parametrize("family", FAMILIES)
def test_ports_in_use_towards_one_peer_are_free_towards_another(two_ports, family):
    world = two_ports
    routed = ADDRESSES[family]["world"][:-1] + "8"
    with world.inside():
        world.clear()
        world.publish(base())
        for target, verdict in (("world", REDIRECT), ("world", REDIRECT), (routed, REDIRECT)):
            number = len(world.tracked())
            frame = bytes(from_pod(A) / ip(family, "a", target) / syn(40000 + number))
            assert world.run("from_pod", frame, at_pod(A)).verdict == verdict

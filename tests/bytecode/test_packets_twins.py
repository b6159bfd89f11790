"""A pod's stack may use one port towards a service and towards its backend, or towards two services
of one backend. At the backend each needs a port of its own, and both live."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scapy.layers.inet import TCP as Tcp
from scapy.packet import Packet

from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    A,
    B,
    at_pod,
    base,
    dropped,
    from_pod,
    ip,
    layers,
    same_events,
    same_frame,
    sctp,
    syn,
    tcp,
    to_pod,
)
from tests.bytecode.world import DROP, REDIRECT, TCP, Service, World

PORT, BACKEND = 40000, 8080  # the client's; what port 80 and 84 of "svc" lead to, on b
DIRECT, SERVICE, SECOND = ("b", BACKEND), ("svc", 80), ("svc", 84)


def scene(family: int):
    own = ADDRESSES[family]
    services = dict(base().services)
    services[own["svc"], 84, TCP] = Service(31, ((own["b"], BACKEND),))
    return base().but(services=services)


def sent(world, family: int, target: tuple[str, int], l4: Packet) -> Packet:
    """What comes to pod b of what pod a sends."""
    frame = from_pod(A) / ip(family, "a", target[0]) / l4
    outcome = world.run("from_pod", bytes(frame), at_pod(A))
    assert outcome.verdict == REDIRECT, outcome.events
    return layers(outcome.packet)


def opened(world, family: int, target: tuple[str, int]) -> int:
    """Open a connection from PORT; the port that b sees. What b answers comes from `target`."""
    port = sent(world, family, target, syn(PORT, target[1]))[Tcp].sport
    answers(world, family, target, port, "SA")
    return port


def answers(world, family: int, target: tuple[str, int], port: int, flags: str = "A") -> None:
    frame = from_pod(B) / ip(family, "b", "a") / tcp(BACKEND, port, flags)
    outcome = world.run("from_pod", bytes(frame), at_pod(B))
    wanted = to_pod(A) / ip(family, target[0], "a") / tcp(target[1], PORT, flags)
    same_frame(outcome.packet, wanted)


def goes_on(world, family: int, target: tuple[str, int], port: int) -> None:
    """Both ways, still between the same ends."""
    wanted = to_pod(B) / ip(family, "a", "b") / tcp(port, BACKEND, "A")
    same_frame(bytes(sent(world, family, target, tcp(PORT, target[1], "A"))), wanted)
    answers(world, family, target, port)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("first", "second"),
    [(DIRECT, SERVICE), (SERVICE, DIRECT), (SERVICE, SECOND)],
    ids=["the backend, then its service", "a service, then its backend", "two services"],
)
def test_two_connections_from_one_port_both_live(world, family, first, second):
    world.publish(scene(family))
    one = opened(world, family, first)
    other = opened(world, family, second)
    assert one == PORT and 1024 <= other < 32768
    for _ in range(2):
        goes_on(world, family, first, one)
        goes_on(world, family, second, other)
    world.publish(scene(family))
    goes_on(world, family, second, other)
    goes_on(world, family, first, one)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", [DIRECT, SERVICE, SECOND], ids=["direct", "service", "second"])
def test_a_first_packet_sent_again_is_of_the_same_connection(world, family, target):
    world.publish(scene(family))
    opened(world, family, SERVICE)
    ports = {sent(world, family, target, syn(PORT, target[1]))[Tcp].sport for _ in range(3)}
    assert len(ports) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_over_takes_no_port(world, family):
    world.publish(scene(family))
    opened(world, family, DIRECT)
    keys, values = world.connections.items()
    values = values.copy()
    values["seen"] -= 500_000  # seconds, more than any connection is kept
    world.connections.update_many(keys, values)
    assert opened(world, family, SERVICE) == PORT


@pytest.mark.parametrize("family", FAMILIES)
def test_sctp_whose_port_is_taken_is_refused(world, family):
    world.publish(scene(family))
    next_header = {"proto": 132} if family == 4 else {"nh": 132}
    for target, verdict in (("b", REDIRECT), ("svc", DROP)):
        frame = from_pod(A) / ip(family, "a", target, **next_header) / sctp()
        outcome = world.run("from_pod", bytes(frame), at_pod(A))
        assert outcome.verdict == verdict, outcome.events
    same_events(outcome.events[-1:], dropped("sctp-port-rewrite"))


@pytest.fixture
def roomy() -> Iterator[World]:
    """One that remembers as many connections as there are ports."""
    made = World(name="roomy", room=1 << 16)
    with made.inside():
        yield made
    made.close()


@pytest.mark.parametrize(("state", "port"), [("closed", PORT), ("alive", None)])
@pytest.mark.parametrize("family", FAMILIES)
def test_where_no_port_is_free_one_of_a_closed_connection_is_taken(roomy, family, state, port):
    """Who begins many short connections needs them sooner than closed ones are forgotten."""
    roomy.publish(scene(family))
    opened(roomy, family, DIRECT)
    if state == "closed":
        sent(roomy, family, DIRECT, tcp(PORT, BACKEND, "RA"))
    keys, values = roomy.connections.items()
    side = "lo_port" if keys["lo_port"][0] == PORT else "hi_port"
    taken = np.repeat(keys, 31744)
    taken[side] = np.arange(1024, 32768)
    roomy.connections.update_many(taken, np.repeat(values, len(taken)))
    if port is not None:
        assert opened(roomy, family, SERVICE) == port
        return
    frame = from_pod(A) / ip(family, "a", "svc") / syn(PORT, 80)
    outcome = roomy.run("from_pod", bytes(frame), at_pod(A))
    assert outcome.verdict == DROP
    same_events(outcome.events[-1:], dropped("nat-exhausted"))

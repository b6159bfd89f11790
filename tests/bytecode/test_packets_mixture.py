"""A packet sees the old state or the new one while the agent publishes, never a mixture.

Pairs of states whose halves put together, in any way, say what neither says. They take turns as
fast as the agent can publish while packets run, each of a new connection; point 30 of
docs/policy.md.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from lockgate.bpf.grace import wait_grace
from lockgate.compile.tables import CELL_ALLOW
from tests.bytecode.goldens import (
    ADDRESSES,
    CLASS,
    FAMILIES,
    IDS,
    A,
    B,
    C,
    at_pod,
    base,
    from_pod,
    ip,
    syn,
)
from tests.bytecode.world import (
    DROP,
    HOP_MAC,
    INGRESS,
    LIVE_INSIDE,
    LOCAL,
    REDIRECT,
    TCP,
    UNDERLAY,
    Hop,
    Outcome,
    Peer,
    Scene,
    Service,
    World,
    mac_bytes,
)

WEB = 1  # port class of TCP 80
FLIPS = 40
VERDICTS = {"both allow": REDIRECT, "both deny": DROP}


@contextlib.contextmanager
def by_turns(world: World, scenes: Sequence[Scene]) -> Iterator[threading.Event]:
    """The first is in force, then they take turns. The event: the last turn is over."""
    states = [(s.tables(), s.records(), world.hop_table(s)) for s in scenes]
    world.publish(scenes[0])
    before = world.publisher.epoch
    finished = threading.Event()
    errors: list[BaseException] = []

    def flip() -> None:
        try:
            for n in range(1, FLIPS + 1):
                assert world.publisher.publish(*states[n % 2])
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    writer = threading.Thread(target=flip)
    writer.start()
    try:
        yield finished
    finally:
        writer.join()
    assert not errors, errors
    assert world.publisher.epoch == before + FLIPS


PORTS = 60000


def new_connection(world: World, frame: bytes, number: int) -> Outcome:
    """The same TCP SYN from another port each time; once all had their turn, what is known of
    them is forgotten, so that it begins a connection again."""
    if number % PORTS == 0:
        world.clear()
    at = 34 if frame[12:14] == b"\x08\x00" else 54
    port = (1024 + number % PORTS).to_bytes(2, "big")
    return world.run("from_pod", frame[:at] + port + frame[at + 2 :], at_pod(A))


def seen_by_turns(
    world: World, scenes: Sequence[Scene], frame: bytes, told: Callable[[Outcome], Any]
) -> set[tuple[int, Any]]:
    """(parity of the epoch, what was told) of many new connections."""
    seen, runs = set(), 0
    with by_turns(world, scenes) as finished:
        while not finished.is_set() or runs < 1000:
            runs += 1
            outcome = new_connection(world, frame, runs)
            seen.add((outcome.events[-1]["epoch"] & 1, told(outcome)))
    return seen


# ---- Addresses, classes, cells -----------------------------------------------------------


RAW_SYN = bytes(from_pod(A) / ip(4, "a", "b") / syn())


def class_scenes(verdict: int) -> list[Scene]:
    """a has class "a" or "c", and the cells of b say the same of it both times. In the state
    where a has the one class, the other has the other verdict."""
    found = []
    for cls, other, number in ((CLASS["a"], CLASS["c"], 1), (CLASS["c"], CLASS["a"], 2)):
        peers = dict(base().peers)
        for family in FAMILIES:
            peers[ADDRESSES[family]["a"]] = Peer(LOCAL, A, IDS["a"], cls)
        allow = {(cls if verdict == REDIRECT else other, WEB): number}
        scene = base().but(peers=peers, reason=70 + number).isolate(B, INGRESS, allow)
        found.append(scene)
    return found


def of_class(outcome: Outcome) -> tuple[int, int, int]:
    event = outcome.events[-1]
    return outcome.verdict, event["class"], event["reason"]


@pytest.mark.parametrize("verdict", VERDICTS.values(), ids=VERDICTS)
def test_no_packet_sees_classes_of_one_state_and_cells_of_the_other(world, verdict):
    scenes = class_scenes(verdict)
    world.publish(scenes[1])
    parity = world.publisher.epoch + 1 & 1  # of the epoch of the first
    reasons = (1, 2) if verdict == REDIRECT else (71, 72)
    assert seen_by_turns(world, scenes, RAW_SYN, of_class) == {
        (parity, (verdict, CLASS["a"], reasons[0])),
        (1 - parity, (verdict, CLASS["c"], reasons[1])),
    }


# ---- Services, backends, ports -----------------------------------------------------------


def service_scenes(family: int, verdict: int, affinity: int) -> list[Scene]:
    """The service leads to c:8080 or to b:8081. Only the port that it leads to now has the class
    that both pods admit ("both allow") or do not admit ("both deny"). In the second state there
    is another service before it, so that its backends stand elsewhere in the image."""
    own = ADDRESSES[family]
    found = []
    for number, (name, port, other) in enumerate((("c", 8080, 8081), ("b", 8081, 8080)), 1):
        services = {(own["svc"], 79, TCP): Service(60, ((own["remote"], 9999),))}
        if number == 1:
            services.clear()
        # A client that shall keep its backend keeps it by the service's id.
        id = 50 if affinity else 50 + number
        services[own["svc"], 80, TCP] = Service(id, ((own[name], port),), affinity)
        ports = {(TCP, port): 1, (TCP, other): 2}
        scene = base().but(services=services, ports=ports, reason=70 + number)
        allow = {(CLASS["a"], 1 if verdict == REDIRECT else 2): number}
        found.append(scene.isolate(B, INGRESS, allow).isolate(C, INGRESS, allow))
    return found


def of_service(outcome: Outcome) -> tuple[Any, ...]:
    event = outcome.events[-1]
    return (
        outcome.verdict,
        *(event[name] for name in ("service", "daddr", "dport", "dst_endpoint", "reason")),
    )


def pure(family: int, verdict: int, affinity: int) -> list[tuple[Any, ...]]:
    """What either state says, by hand."""
    own = ADDRESSES[family]
    first, second = (50, 50) if affinity else (51, 52)
    reasons = (1, 2) if verdict == REDIRECT else (71, 72)
    return [
        (verdict, first, own["c"], 8080, IDS["c"], reasons[0]),
        (verdict, second, own["b"], 8081, IDS["b"], reasons[1]),
    ]


SERVICE_CASES = [
    pytest.param(family, verdict, affinity, id=f"{name}-{kept}-{family}")
    for name, verdict in VERDICTS.items()
    for kept, affinity in (("any backend", 0), ("the backend of before", 10))
    for family in FAMILIES
]


@pytest.mark.parametrize(("family", "verdict", "affinity"), SERVICE_CASES)
def test_no_packet_sees_services_of_one_state_and_ports_of_the_other(
    world, family, verdict, affinity
):
    """With affinity it asks as well which backends are live, and finds those of its view."""
    scenes = service_scenes(family, verdict, affinity)
    world.publish(scenes[1])
    parity = world.publisher.epoch + 1 & 1
    frame = bytes(from_pod(A) / ip(family, "a", "svc") / syn())
    first, second = pure(family, verdict, affinity)
    assert seen_by_turns(world, scenes, frame, of_service) == {
        (parity, first),
        (1 - parity, second),
    }


# ---- Ways out ----------------------------------------------------------------------------


def test_no_packet_leaves_by_half_a_hop(world):
    """Two hops to the same node, each with MACs of its own: never one of each."""
    macs = (("02:00:00:00:01:01", "02:00:00:00:01:02"), ("02:00:00:00:02:01", "02:00:00:00:02:02"))
    scenes = [base().but(hops={1: Hop(UNDERLAY, HOP_MAC, *pair)}) for pair in macs]
    packet = bytes(from_pod(A) / ip(4, "a", "remote") / syn())
    seen = set()
    with by_turns(world, scenes) as finished:
        while not finished.is_set():
            seen.add(world.run("from_pod", packet, at_pod(A)).packet[:12])
    assert seen == {b"".join(mac_bytes(mac) for mac in pair) for pair in macs}


def test_a_port_whose_turn_comes_again_begins_a_connection_again(world):
    """However many packets run while the states take turns, each is told."""
    world.publish(base())
    for number in (1, PORTS, PORTS + 1):
        assert new_connection(world, RAW_SYN, number).events, number


# ---- A mixture would show ----------------------------------------------------------------


@pytest.mark.parametrize("verdict", VERDICTS.values(), ids=VERDICTS)
@pytest.mark.parametrize("mixed", [0, 1])
def test_cells_of_the_other_state_would_show(world, verdict, mixed):
    scenes = class_scenes(verdict)
    world.publish(scenes[mixed].but(cells=scenes[1 - mixed].cells))
    outcome = world.run("from_pod", RAW_SYN, at_pod(A))
    assert outcome.verdict != verdict


@pytest.mark.parametrize(("family", "verdict", "affinity"), SERVICE_CASES)
@pytest.mark.parametrize("mixed", [0, 1])
@pytest.mark.parametrize("half", ["services", "ports"])
def test_services_or_ports_of_the_other_state_would_show(
    world, half, mixed, family, verdict, affinity
):
    scenes = service_scenes(family, verdict, affinity)
    other = getattr(scenes[1 - mixed], half)
    world.publish(scenes[mixed].but(**{half: other}))
    frame = bytes(from_pod(A) / ip(family, "a", "svc") / syn())
    told = of_service(new_connection(world, frame, 1))
    assert told not in pure(family, verdict, affinity)
    assert told[0] != verdict


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("verdict", VERDICTS.values(), ids=VERDICTS)
def test_backends_that_are_live_in_the_other_state_would_show(world, family, verdict):
    """The client keeps the backend of before, which its own view says is gone."""
    scenes = service_scenes(family, verdict, 10)
    frame = bytes(from_pod(A) / ip(family, "a", "svc") / syn())
    world.publish(scenes[0])
    assert of_service(new_connection(world, frame, 1)) == pure(family, verdict, 10)[0]
    world.publish(scenes[1])
    keys, values = world.backends.items()
    values = values.copy()
    values["live"][:] = LIVE_INSIDE
    world.backends.update_many(keys, values)
    assert of_service(new_connection(world, frame, 2))[0] != verdict
    world.publisher.read_back()


def test_the_class_of_the_other_state_in_the_view_in_force_would_show(world):
    peers = {**base().peers, ADDRESSES[4]["a"]: Peer(LOCAL, A, IDS["a"], CLASS["a"])}
    world.publish(base().but(peers=peers).isolate(B, INGRESS, {(CLASS["c"], WEB): 1}))
    assert world.run("from_pod", RAW_SYN, at_pod(A)).verdict == DROP
    world.endpoints.view["view"]["class4"][A, world.publisher.epoch & 1] = CLASS["c"]
    assert world.run("from_pod", RAW_SYN, at_pod(A)).verdict == REDIRECT
    world.publisher.read_back()


def test_writing_the_idle_view_changes_nothing(world):
    """Step 2 of publishing, by hand: everything but the epoch is written."""
    world.publish(base())
    world.publish(base().isolate(B, INGRESS))
    view = world.publisher.epoch & 1
    wait_grace()
    idle = 1 - view
    inner = world.images.inner(idle)
    assert inner is not None
    inner.view[:] |= CELL_ALLOW  # every cell of the idle image allows
    world.endpoints.view["view"]["isolated"][:, idle] = 0
    outcome = world.run("from_pod", RAW_SYN, at_pod(A))
    assert outcome.verdict == DROP
    assert outcome.events[-1]["cause"] == "policy"
    world.publisher.read_back()

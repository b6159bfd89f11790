"""Policies, connections and epochs: who is judged when, and what is remembered."""

from __future__ import annotations

import pytest
from scapy.layers.inet import TCP as Tcp

from tests.bytecode.goldens import (
    ADDRESSES,
    CLASS,
    FAMILIES,
    IDS,
    A,
    B,
    C,
    Golden,
    allowed,
    at_pod,
    base,
    check,
    denied,
    echo,
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
    EGRESS,
    INGRESS,
    LOCAL,
    NEXT,
    REDIRECT,
    TCP,
    UDP,
    UNDERLAY,
    Peer,
    Service,
)

NEW, ESTABLISHED, CLOSING, CLOSED = 1, 2, 3, 4  # enum ct_state
WEB = 1  # port class of TCP 80


def a_to_b(family: int, l4) -> bytes:
    return bytes(from_pod(A) / ip(family, "a", "b") / l4)


def b_to_a(family: int, l4) -> bytes:
    return bytes(from_pod(B) / ip(family, "b", "a") / l4)


def pass_(world, frame: bytes, slot: int, program: str = "from_pod", verdict: int = REDIRECT):
    outcome = world.run(program, frame, at_pod(slot))
    assert outcome.verdict == verdict, outcome
    return outcome


def state(world) -> tuple[str, int]:
    [(where, entry)] = world.tracked()
    return where, entry["state"]


# ---- Policies ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "scene", "verdict", "events"),
    [
        ("nobody is isolated", base(), REDIRECT, allowed(EGRESS, INGRESS, reason=0)),
        (
            "egress denied: ingress is not asked",
            base().isolate(A, EGRESS),
            DROP,
            [denied(EGRESS, 77)],
        ),
        (
            "ingress denied after egress was allowed",
            base().isolate(A, EGRESS, {(CLASS["b"], WEB): 5}).isolate(B, INGRESS),
            DROP,
            [*allowed(EGRESS, reason=5), denied(INGRESS, 77)],
        ),
        (
            "both allowed, each for its reason",
            base()
            .isolate(A, EGRESS, {(CLASS["b"], WEB): 5})
            .isolate(B, INGRESS, {(CLASS["a"], WEB): 6}),
            REDIRECT,
            allowed(EGRESS, reason=5) + allowed(INGRESS, reason=6),
        ),
        (
            "allowed for another port",
            base().isolate(B, INGRESS, {(CLASS["a"], 2): 6}),
            DROP,
            [*allowed(EGRESS, reason=0), denied(INGRESS, 77)],
        ),
        (
            "allowed for another peer",
            base().isolate(B, INGRESS, {(CLASS["c"], WEB): 6}),
            DROP,
            [*allowed(EGRESS, reason=0), denied(INGRESS, 77)],
        ),
        (
            "isolation in the other direction does not matter",
            base().isolate(A, INGRESS).isolate(B, EGRESS),
            REDIRECT,
            allowed(EGRESS, INGRESS, reason=0),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verdicts(world, family, name, scene, verdict, events):
    frame = from_pod(A) / ip(family, "a", "b") / syn()
    check(world, Golden(name, "from_pod", frame, at_pod(A), verdict, None, events, lambda: scene))
    assert len(world.tracked()) == (verdict == REDIRECT)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backend_is_judged_not_the_service(world, family):
    scene = base().isolate(A, EGRESS, {(CLASS["b"], 2): 8})  # TCP 8080 of b
    frame = from_pod(A) / ip(family, "a", "svc") / syn()
    check(
        world,
        Golden(
            "",
            "from_pod",
            frame,
            at_pod(A),
            REDIRECT,
            None,
            allowed(EGRESS, reason=8, service=21, dport=8080) + allowed(INGRESS, reason=0),
            lambda: scene,
        ),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_ingress_is_judged_for_packets_from_the_net(world, family):
    for allow, verdict in (({(CLASS["remote"], WEB): 9}, REDIRECT), ({}, DROP)):
        world.clear()
        world.publish(base().isolate(A, INGRESS, allow))
        outcome = world.run("from_net", bytes(wire() / ip(family, "remote", "a") / syn()), UNDERLAY)
        assert outcome.verdict == verdict
        assert [e["direction"] for e in outcome.events] == [INGRESS]


def test_the_nodes_own_socket_is_exempt(world):
    """A test run's packets have a socket of the node."""
    world.publish(base().isolate(A, INGRESS))
    frame = bytes(to_pod(A) / ip(4, "host", "a") / syn())
    outcome = pass_(world, frame, A, "to_pod", NEXT)
    assert [(e["verdict"], e["reason"]) for e in outcome.events] == [(1, 0)]


# ---- States --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_half_open_moves_to_connections_with_the_first_reply(world, family):
    world.publish(base())
    pass_(world, a_to_b(family, syn()), A)
    assert state(world) == ("half_open", NEW)
    pass_(world, a_to_b(family, syn()), A)
    assert state(world) == ("half_open", NEW)
    pass_(world, b_to_a(family, tcp(80, 40000, "SA")), B)
    assert state(world) == ("connections", ESTABLISHED)
    [(_, entry)] = world.tracked()
    assert (entry["src_endpoint"], entry["dst_endpoint"]) == (IDS["a"], IDS["b"])


@pytest.mark.parametrize("l4", ["udp", "echo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_are_established_by_a_reply_too(world, family, l4):
    there, back = {
        "udp": (udp(), udp(53, 40000)),
        "echo": (echo(family), echo(family, reply=True)),
    }[l4]
    world.publish(base().isolate(A, INGRESS).isolate(B, EGRESS))
    pass_(world, a_to_b(family, there), A)
    assert pass_(world, b_to_a(family, back), B).events == []
    assert state(world) == ("connections", ESTABLISHED)


def test_a_connection_closes_by_both_fins(world):
    world.publish(base())
    pass_(world, a_to_b(4, syn()), A)
    pass_(world, b_to_a(4, tcp(80, 40000, "SA")), B)
    pass_(world, a_to_b(4, tcp(40000, 80, "FA")), A)
    assert state(world) == ("connections", CLOSING)
    pass_(world, a_to_b(4, tcp(40000, 80, "FA")), A)
    assert state(world) == ("connections", CLOSING)
    pass_(world, b_to_a(4, tcp(80, 40000, "FA")), B)
    assert state(world) == ("connections", CLOSED)
    # The last acknowledgement still belongs to it; a SYN begins anew,
    # in the same entry.
    assert pass_(world, a_to_b(4, tcp(40000, 80, "A")), A).events == []
    assert len(pass_(world, a_to_b(4, syn()), A).events) == 2
    assert state(world) == ("connections", NEW)


@pytest.mark.parametrize("by_originator", [True, False])
def test_a_reset_closes_at_once(world, by_originator):
    world.publish(base())
    pass_(world, a_to_b(4, syn()), A)
    pass_(world, b_to_a(4, tcp(80, 40000, "SA")), B)
    if by_originator:
        pass_(world, a_to_b(4, tcp(40000, 80, "R")), A)
    else:
        pass_(world, b_to_a(4, tcp(80, 40000, "RA")), B)
    assert state(world) == ("connections", CLOSED)


def test_a_reset_begins_no_connection(world):
    world.publish(base())
    pass_(world, a_to_b(4, Tcp(sport=1, dport=80, flags="R")), A)
    assert world.tracked() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_mid_stream_is_judged_as_new(world, family):
    world.publish(base().isolate(B, INGRESS))
    outcome = pass_(world, a_to_b(family, tcp(40000, 80, "PA")), A, verdict=DROP)
    assert [e["cause"] for e in outcome.events] == ["none", "policy"]


# ---- Epochs --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["originator", "responder"])
def test_a_live_connection_is_denied_when_its_policy_goes(world, family, by):
    allow = {(CLASS["a"], WEB): 6}
    world.publish(base().isolate(B, INGRESS, allow))
    pass_(world, a_to_b(family, syn()), A)
    pass_(world, b_to_a(family, tcp(80, 40000, "SA")), B)
    world.publish(base().isolate(B, INGRESS))
    if by == "originator":
        outcome = pass_(world, a_to_b(family, tcp(40000, 80, "A")), A, verdict=DROP)
    else:
        outcome = pass_(world, b_to_a(family, tcp(80, 40000, "A")), B, verdict=DROP)
    # The event speaks of the connection, from its originator, whoever sent the packet.
    last = outcome.events[-1]
    assert (last["cause"], last["direction"]) == ("policy", INGRESS)
    assert (last["saddr"], last["dport"]) == (ADDRESSES[family]["a"], 80)
    # Nothing reopens it: what the other end says next is no connection of its own ...
    pass_(world, b_to_a(family, tcp(80, 40000, "A")), B, verdict=DROP)
    pass_(world, a_to_b(family, tcp(40000, 80, "A")), A, verdict=DROP)
    pass_(world, b_to_a(family, tcp(80, 40000, "SA")), B, verdict=DROP)
    # ... unless it opens one.
    pass_(world, b_to_a(family, tcp(80, 40000, "S")), B)
    pass_(world, a_to_b(family, tcp(40000, 80, "SA")), A)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_connection_goes_on_when_its_policy_comes_back(world, family):
    allow = {(CLASS["a"], WEB): 6}
    world.publish(base().isolate(B, INGRESS, allow))
    pass_(world, a_to_b(family, syn()), A)
    pass_(world, b_to_a(family, tcp(80, 40000, "SA")), B)
    world.publish(base().isolate(B, INGRESS))
    pass_(world, a_to_b(family, tcp(40000, 80, "A")), A, verdict=DROP)
    world.publish(base().isolate(B, INGRESS, allow))
    assert pass_(world, b_to_a(family, tcp(80, 40000, "A")), B).events == []
    assert state(world) == ("connections", ESTABLISHED)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_connection_that_is_still_allowed_goes_on_untold(world, family):
    world.publish(base())
    pass_(world, a_to_b(family, syn()), A)
    pass_(world, b_to_a(family, tcp(80, 40000, "SA")), B)
    world.publish(base().isolate(B, INGRESS, {(CLASS["a"], WEB): 6}))
    assert pass_(world, a_to_b(family, tcp(40000, 80, "A")), A).events == []
    assert state(world) == ("connections", ESTABLISHED)
    [(_, entry)] = world.tracked()
    assert entry["epoch"] == world.publisher.epoch


def reused(scene, name: str, slot: int, new_slot: int, new_id: int):
    """The addresses of `name` go to a new pod in another slot."""
    peers = dict(scene.peers)
    pods = {s: pod for s, pod in scene.pods.items() if s != slot}
    addresses = []
    for family in FAMILIES:
        address = ADDRESSES[family][name]
        peers[address] = Peer(LOCAL, new_slot, new_id, peers[address].cls)
        addresses.append(address)
    pods[new_slot] = (new_id, tuple(addresses))
    return scene.but(peers=peers, pods=pods)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_pod_at_an_old_address_begins_new_connections(world, family):
    world.publish(base())
    pass_(world, a_to_b(family, syn()), A)
    pass_(world, b_to_a(family, tcp(80, 40000, "SA")), B)
    world.publish(reused(base(), "b", B, 5, 50))
    outcome = pass_(world, a_to_b(family, tcp(40000, 80, "A")), A)
    assert [e["dst_endpoint"] for e in outcome.events] == [50, 50]
    assert outcome.packet[:12] == bytes(to_pod(5))[:12]
    [(where, entry)] = world.tracked()
    assert (where, entry["dst_endpoint"]) == ("half_open", 50)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backends_address_reused_sends_clients_through_the_service_again(world, family):
    """TCP to a backend that went, whose address is another pod's now: not to that pod, and
    never out of the node under the service's address."""
    world.publish(base())
    first = bytes(from_pod(A) / ip(family, "a", "svc") / syn())
    pass_(world, first, A)
    scene = reused(base(), "b", B, 5, 50)
    services = dict(scene.services)
    services[ADDRESSES[family]["svc"], 80, TCP] = Service(21, ((ADDRESSES[family]["c"], 8080),))
    world.publish(scene.but(services=services))
    later = from_pod(A) / ip(family, "a", "svc") / tcp(40000, 80, "A")
    outcome = pass_(world, bytes(later), A)
    wanted = to_pod(C) / ip(family, "a", "c") / tcp(40000, 8080, "A")
    assert outcome.packet == bytes(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_udp_moves_to_another_backend_when_its_own_goes(world, family):
    svc = ADDRESSES[family]["svc"]
    world.publish(base())
    question = bytes(from_pod(A) / ip(family, "a", "svc") / udp())
    pass_(world, question, A)
    pass_(world, b_to_a(family, udp(5353, 40000)), B)
    services = {**base().services, (svc, 53, UDP): Service(22, ((ADDRESSES[family]["c"], 54),))}
    world.publish(base().but(services=services))
    for _ in range(3):
        outcome = pass_(world, question, A)
        assert outcome.packet == bytes(to_pod(C) / ip(family, "a", "c") / udp(dport=54))
        answer = pass_(world, bytes(from_pod(C) / ip(family, "c", "a") / udp(54, 40000)), C)
        assert answer.packet == bytes(to_pod(A) / ip(family, "svc", "a") / udp(53, 40000))
    world.publish(base().but(services={**services, (svc, 53, UDP): Service(22)}))
    outcome = pass_(world, question, A)
    assert [e["cause"] for e in outcome.events] == ["no-backend"]


def test_a_hairpin_of_a_reused_address_goes_to_the_new_pod(world):
    world.publish(base())
    frame = from_pod(A) / ip(4, "a", "svc") / syn(dport=81)
    pass_(world, bytes(frame), A)
    world.publish(reused(base(), "a", A, 5, 50))
    frame = from_pod(5) / ip(4, "a", "svc") / tcp(40000, 81, "A")
    outcome = pass_(world, bytes(frame), 5)
    assert outcome.packet == bytes(to_pod(5) / ip(4, "svc", "a") / tcp(40000, 8081, "A"))

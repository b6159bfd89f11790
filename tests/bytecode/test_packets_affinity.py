"""Session affinity: which backend a client keeps, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scapy.layers.l2 import Ether

from tests.bytecode.balancing import LB, PORTS, SPORT, STICKY, frontends
from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    A,
    at_pod,
    base,
    from_pod,
    ip,
    syn,
    tcp,
    wire,
)
from tests.bytecode.world import (
    OUTSIDE,
    OWNER_ENDS,
    REDIRECT,
    SVC_FRONTEND,
    SVC_INTERNAL_LOCAL,
    TCP,
    Owner,
    Scene,
    Service,
    World,
    set_seen,
)


def sticky(family, *names, affinity=10):
    """The service with backends of these names; its clients keep theirs for 10 s."""
    backends = tuple((ADDRESSES[family][name], 8080) for name in names)
    services = {**base().services}
    services[ADDRESSES[family]["svc"], 80, TCP] = Service(21, backends, affinity)
    return base().but(services=services)


def led(world, family, l4, to: str = "svc") -> bytes:
    """Where a packet of A's goes."""
    frame = from_pod(A) / ip(family, "a", to) / l4
    outcome = world.run("from_pod", bytes(frame), at_pod(A))
    assert outcome.verdict == REDIRECT, outcome
    return outcome.packet[30:34] if family == 4 else outcome.packet[38:54]


def chosen(world, family, sport: int) -> bytes:
    """The backend of a connection that A begins from this port."""
    return led(world, family, syn(sport))


def many(world, family, first: int) -> set[bytes]:
    return {chosen(world, family, first + n) for n in range(40)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_keeps_its_backend_while_it_comes_back_in_time(world, family):
    world.publish(sticky(family, "b", "c"))
    (kept,) = many(world, family, 40000)
    found = set()
    for sport in range(41000, 41040):
        set_seen(world.affinities, -9)
        assert chosen(world, family, sport) == kept
        set_seen(world.affinities, -11)
        kept = chosen(world, family, sport + 1000)
        found.add(kept)
    assert len(found) == 2, "too late, it is given any"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_is_given_another_when_its_backend_goes(world, family):
    world.publish(sticky(family, "b"))
    first = chosen(world, family, 40000)
    world.publish(sticky(family, "b", "c"))
    assert many(world, family, 41000) == {first}
    world.publish(sticky(family, "c"))
    (second,) = many(world, family, 42000)
    assert second != first
    world.publish(sticky(family, "b", "c"))
    assert many(world, family, 43000) == {second}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_affinity_nothing_is_kept(world, family):
    world.publish(sticky(family, "b", "c", affinity=0))
    assert len(many(world, family, 40000)) == 2
    assert len(world.affinities.keys()) == 0


# ---- Backends that end -----------------------------------------------------------------


def drained(family: int, *names: str) -> Scene:
    """The service's backends are these; `b` is one that ends."""
    scene = sticky(family, *names)
    key = ADDRESSES[family]["svc"], 80, TCP
    owners = tuple(
        Owner(ADDRESSES[family][name], 8080, 1, 0, OWNER_ENDS * (name == "b")) for name in "bc"
    )
    one = replace(scene.services[key], owners=owners, slots=((1, 0),), flags=SVC_FRONTEND)
    return scene.but(services={**scene.services, key: one})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_keeps_a_backend_that_ends_for_what_it_has_and_no_more(world, family) -> None:
    world.publish(sticky(family, "b"))
    first = chosen(world, family, 40000)
    world.publish(drained(family, "c"))
    assert led(world, family, tcp(40000, 80, "A")) == first
    (second,) = many(world, family, 41000)
    assert second != first
    assert led(world, family, tcp(40000, 80, "A")) == first


def by_card(world: World, family: int, sport: int, flags: str) -> str:
    """Where the outer header leads of a packet to STICKY."""
    packet = ip(family, "world", LB[family]) / tcp(sport, PORTS[STICKY], flags)
    return Ether(world.run("from_net", bytes(wire() / packet), OUTSIDE).packet)[1].dst


@pytest.mark.parametrize("flows", ["flows", "no flows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_outside_keeps_a_backend_that_ends_for_what_it_has_and_no_more(
    world, family: int, flows: str
) -> None:
    scene, known = frontends(), ADDRESSES[family]
    world.publish(scene)
    assert by_card(world, family, SPORT, "S") == known["remote"]
    key = LB[family], PORTS[STICKY], TCP
    one = scene.services[key]
    ends = (replace(one.owners[0], flags=OWNER_ENDS), one.owners[1])
    one = replace(one, owners=ends, slots=((1, 0),))
    world.publish(scene.but(services={**scene.services, key: one}))
    if flows == "no flows":
        world.flows.delete_many(world.flows.keys())
    # The first owner's node passes it on to the second.
    by = {"flows": "remote", "no flows": "far"}[flows]
    assert by_card(world, family, SPORT, "A") == known[by]
    for sport in range(41000, 41010):
        assert by_card(world, family, sport, "S") == known["far"]
    if flows == "flows":
        assert by_card(world, family, SPORT, "A") == known["remote"]


# ---- Clients outside that come back too late ---------------------------------------------


def by_one_slot(family: int, *slot: int) -> Scene:
    """STICKY, whose owners are `remote` and `far`, with this order in its one slot."""
    scene = frontends()
    key = LB[family], PORTS[STICKY], TCP
    one = replace(scene.services[key], slots=(slot,))
    return scene.but(services={**scene.services, key: one})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_outside_is_given_the_next_backend_after_its_time(world, family: int) -> None:
    """And in turn: what its address is made into by the hash stays the same for ever."""
    world.publish(by_one_slot(family, 0, 1))
    found = []
    for sport in range(41000, 41008):
        found.append(by_card(world, family, sport, "S"))
        set_seen(world.affinities, -59)
        assert by_card(world, family, sport + 1000, "S") == found[-1]
        set_seen(world.affinities, -61)
    known = ADDRESSES[family]
    assert found == [known["remote"], known["far"]] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_outside_is_not_given_a_backend_that_ends_after_its_time(
    world, family: int
) -> None:
    scene = by_one_slot(family, 0, 1)
    key = LB[family], PORTS[STICKY], TCP
    one = scene.services[key]
    one = replace(one, owners=(one.owners[0], replace(one.owners[1], flags=OWNER_ENDS)))
    world.publish(scene.but(services={**scene.services, key: one}))
    for sport in range(41000, 41004):
        assert by_card(world, family, sport, "S") == ADDRESSES[family]["remote"]
        set_seen(world.affinities, -61)


@pytest.mark.parametrize("flows", ["flows", "no flows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_connections_of_before_a_clients_time_was_over_go_on(
    world, family: int, flows: str
) -> None:
    """As what is remembered of their flows says, or along the chain, which has both backends."""
    world.publish(by_one_slot(family, 0, 1))
    known = ADDRESSES[family]
    assert by_card(world, family, 41000, "S") == known["remote"]
    set_seen(world.affinities, -61)
    assert by_card(world, family, 41001, "S") == known["far"]
    assert by_card(world, family, 41002, "S") == known["far"]
    if flows == "no flows":
        world.flows.delete_many(world.flows.keys())
    later = known["far" if flows == "flows" else "remote"]
    assert by_card(world, family, 41000, "A") == known["remote"]
    assert by_card(world, family, 41001, "A") == later
    assert by_card(world, family, 41002, "A") == later


@pytest.mark.parametrize("family", FAMILIES)
def test_who_keeps_a_backend_by_another_address_gets_one_here_where_the_policy_is_local(
    world, family: int
) -> None:
    """Both are one service: affinity is its, policies are its addresses'."""
    scene, known = sticky(family, "b"), ADDRESSES[family]
    one = scene.services[known["svc"], 80, TCP]
    here = replace(one, backends=((known["c"], 8080),), flags=SVC_INTERNAL_LOCAL)
    keys = {(LB[family], 80, TCP): one, (known["svc"], 80, TCP): here}
    world.publish(scene.but(services={**scene.services, **keys}))
    first = led(world, family, syn(40000), LB[family])
    assert led(world, family, syn(40001), LB[family]) == first
    assert led(world, family, syn(40002)) != first

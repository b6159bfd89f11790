"""Who the ends of a connection are: the pod at the hook, peers, and what is in the CIDR trie."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from lockgate.agent import publish
from lockgate.objects.address import parse_address
from lockgate.spec.policy import Packet
from tests import blocks as cases
from tests.bytecode import compare
from tests.bytecode.goldens import (
    ADDRESSES,
    CLASS,
    FAMILIES,
    IDS,
    A,
    B,
    at_pod,
    base,
    from_pod,
    ip,
    syn,
    to_pod,
)
from tests.bytecode.world import (
    DROP,
    DRY_MARK,
    HOST,
    LOCAL,
    REDIRECT,
    REMOTE,
    UNDERLAY,
    Peer,
    Scene,
)

# ---- CIDR blocks ---------------------------------------------------------------------


def agree(world, blocks: list[str], addresses: list[cases.Address]) -> None:
    """Each address asks for pod b from the underlay: the record says of which class it is."""
    world.clear()
    with pytest.MonkeyPatch.context() as patch:
        # Numbers of classes are asked for, which views that say the same may differ in.
        patch.setattr(publish, "alike", lambda *_: False)
        world.publish(base().but(leaves=tuple(cases.leaves(blocks)), classes=len(blocks) + 8))
    wanted = cases.longest(blocks, addresses)
    for address in addresses:
        to = ADDRESSES[address.version]["b"]
        frame = compare.build(Packet(str(address), to, "TCP", 80))
        outcome = world.run("from_net", frame, UNDERLAY)
        assert [event["class"] for event in outcome.events] == [wanted[address]], address


@pytest.mark.parametrize("blocks", cases.CASES.values(), ids=cases.CASES)
def test_an_address_has_the_class_of_the_longest_block(world, blocks):
    edges = cases.edges(blocks)
    agree(world, blocks, Random(1).sample(edges, min(len(edges), 700)))


def test_addresses_have_the_classes_of_random_blocks(world):
    rng = Random(2)
    for _ in range(20):
        blocks = cases.random_blocks(rng, rng.randrange(1, 60))
        agree(world, blocks, cases.edges(blocks))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peer_is_not_asked_of_the_blocks(world, family):
    world.publish(base().but(leaves=tuple(cases.leaves(["0.0.0.0/0", "::/0"]))))
    known = ADDRESSES[family]
    frame = compare.build(Packet(known["remote"], known["b"], "TCP", 80))
    [event] = world.run("from_net", frame, UNDERLAY).events
    assert event["class"] == CLASS["remote"] and event["src_endpoint"] == IDS["remote"]


# ---- The pod at the hook --------------------------------------------------------------


OTHERS = {
    "another pod here": Peer(LOCAL, B, IDS["b"], CLASS["b"]),
    "another pod elsewhere": Peer(REMOTE, 1, IDS["remote"], CLASS["remote"]),
    "this node": Peer(HOST, 0, 0, CLASS["host"]),
}


def owned_by(other: Peer, family: int) -> Scene:
    """An address that pod a has configured is another's."""
    return base().but(peers={**base().peers, ADDRESSES[family]["a"]: other})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_pod_whose_address_is_anothers_is_not_ready(world, other, family):
    world.publish(owned_by(other, family))
    for program, frame in (
        ("from_pod", from_pod(A) / ip(family, "a", "remote") / syn()),
        ("to_pod", to_pod(A) / ip(family, "remote", "a") / syn()),
    ):
        # Dry, because only there a test run can say that no socket of the node sent the packet.
        result = world.run(program, bytes(frame), at_pod(A), DRY_MARK, (0,)).cb[0]
        assert (result & 1, world.causes[result >> 8 & 0xFF]) == (0, "not-ready")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_family_may_be_anothers(world, family):
    other = 10 - family
    world.publish(owned_by(OTHERS["another pod here"], other))
    outcome = world.run("from_pod", bytes(from_pod(A) / ip(family, "a", "b") / syn()), at_pod(A))
    assert outcome.verdict == REDIRECT
    assert {event["src_endpoint"] for event in outcome.events} == {IDS["a"]}


def test_a_slot_that_changes_hands_speaks_for_nobody(world):
    """What both views share is written before the epoch moves: the new pod's packets are not
    judged as the old one's."""
    world.publish(base())
    new = "10.0.1.99"
    record = world.endpoints.view[A].copy()
    try:
        world.endpoints.view["id"][A] = 99
        world.endpoints.view["addr4"][A] = np.frombuffer(parse_address(new), np.uint8)
        frame = bytes(from_pod(A) / ip(4, new, "b") / syn())
        outcome = world.run("from_pod", frame, at_pod(A))
        assert outcome.verdict == DROP and outcome.events[0]["cause"] == "not-ready"
    finally:
        world.endpoints.view[A] = record

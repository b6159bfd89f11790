"""Ways through the VXLAN device. What the device makes of them is seen in tests/system."""

from __future__ import annotations

import pytest

from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    HOP_DMAC,
    HOP_SMAC,
    A,
    at_pod,
    base,
    from_pod,
    ip,
    syn,
    tcp,
    udp,
    wire,
)
from tests.bytecode.world import (
    DROP,
    HOP_MAC,
    NEXT,
    OUTSIDE,
    REDIRECT,
    UNDERLAY,
    Hop,
    World,
    mac_bytes,
)

HOP_TUNNEL, LINK_UNDERLAY, LINK_TUNNEL = 8, 1, 3
OUTER = {4: ("192.0.2.2", "192.0.2.1"), 6: ("fd00:ff::2", "fd00:ff::1")}


@pytest.fixture
def tunnel(world: World):
    """UNDERLAY has the role of the VXLAN device."""
    world.link_roles.set(UNDERLAY, LINK_TUNNEL)
    yield world
    world.link_roles.set(UNDERLAY, LINK_UNDERLAY)


def scene(outer: int):
    remote, local = OUTER[outer]
    hop = Hop(
        UNDERLAY, HOP_MAC | HOP_TUNNEL, HOP_DMAC, HOP_SMAC, mtu=1350, remote=remote, local=local
    )
    return base().but(hops={**base().hops, 1: hop})


@pytest.mark.parametrize("outer", FAMILIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packet_leaves_by_the_device_the_long_way_and_the_short(world, family, outer) -> None:
    world.publish(scene(outer))
    there = bytes(from_pod(A) / ip(family, "a", "remote") / syn())
    back = bytes(wire() / ip(family, "remote", "a") / tcp(80, 40000, "SA"))
    for packet in (there, bytes(from_pod(A) / ip(family, "a", "remote") / tcp(40000, 80, "A"))):
        outcome = world.run("from_pod", packet, at_pod(A))
        assert outcome.verdict == REDIRECT
        assert outcome.packet[:12] == mac_bytes(HOP_DMAC) + mac_bytes(HOP_SMAC)
        world.run("from_net", back, OUTSIDE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_into_the_tunnel_is_told_its_mtu(world, family) -> None:
    world.publish(scene(4))
    packet = bytes(from_pod(A) / ip(family, "a", "remote") / udp() / bytes(1400))
    outcome = world.run("from_pod", packet, at_pod(A))
    assert outcome.verdict == REDIRECT and outcome.events[-1]["cause"] == "packet-too-big"
    assert (1350).to_bytes(4, "big") in outcome.packet[34:70]


ARRIVALS = [
    ("a pod's SYN without outer addresses", lambda f: wire() / ip(f, "remote", "a") / syn()),
    ("a node's own", lambda f: wire() / ip(f, "node", "a") / syn()),
    ("the world's", lambda f: wire() / ip(f, "world", "a") / syn()),
    ("for the node itself", lambda f: wire() / ip(f, "remote", "host") / syn()),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [a[1] for a in ARRIVALS], ids=[a[0] for a in ARRIVALS])
def test_what_no_tunnel_brought_is_refused(tunnel, make, family) -> None:
    tunnel.publish(scene(family))
    outcome = tunnel.run("from_net", bytes(make(family)), UNDERLAY)
    assert outcome.verdict == DROP
    assert outcome.events[-1]["cause"] == "spoofed-source"


def test_what_is_not_understood_goes_to_the_stack_from_a_card_only(tunnel) -> None:
    tunnel.publish(scene(4))
    arp = bytes(12) + b"\x08\x06" + bytes(46)
    assert tunnel.run("from_net", arp, UNDERLAY).verdict == DROP
    assert tunnel.run("from_net", arp, OUTSIDE).verdict == NEXT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_connection_does_not_let_others_in(tunnel, family) -> None:
    """The short way asks who sent it, too."""
    tunnel.publish(scene(family))
    tunnel.run("from_pod", bytes(from_pod(A) / ip(family, "a", "remote") / syn()), at_pod(A))
    back = bytes(wire() / ip(family, "remote", "a") / tcp(80, 40000, "SA"))
    assert tunnel.run("from_net", back, UNDERLAY).verdict == DROP
    assert ADDRESSES[family]["remote"]

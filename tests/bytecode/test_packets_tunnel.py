"""Ways through the VXLAN device. What the device makes of them is seen in tests/system."""

from __future__ import annotations

import pytest
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import ARP
from scapy.packet import Raw

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
    DRY_MARK,
    HOP_MAC,
    NEXT,
    OUTSIDE,
    REDIRECT,
    UNDERLAY,
    Hop,
    World,
    mac_bytes,
)

HOP_TUNNEL, LINK_UNDERLAY, LINK_OUTSIDE, LINK_TUNNEL = 8, 1, 2, 3
PORT = 8472
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


NOT_UNDERSTOOD = [
    ("ARP", wire() / ARP(), "unknown-ethertype"),
    ("a header too short", wire() / ip(4, "remote", "a", ihl=4) / syn(), "malformed"),
    ("no header", wire() / IPv6(nh=6, src=ADDRESSES[6]["remote"], dst="::2"), "malformed"),
    (
        "unknown headers",
        wire() / ip(6, "remote", "host", nh=43) / Raw(b"\x06\x00\x00\x01" + bytes(60)),
        "extension-header",
    ),
    (
        "a fragment of nothing",
        wire() / ip(4, "remote", "node", frag=9) / Raw(bytes(32)),
        "fragment-untracked",
    ),
]


@pytest.mark.parametrize(
    ("frame", "cause"), [n[1:] for n in NOT_UNDERSTOOD], ids=[n[0] for n in NOT_UNDERSTOOD]
)
def test_what_is_not_understood_goes_to_the_stack_from_a_card_only(tunnel, frame, cause) -> None:
    tunnel.publish(scene(4))
    outcome = tunnel.run("from_net", bytes(frame), UNDERLAY)
    assert outcome.verdict == DROP
    [event] = outcome.events
    assert (event["type"], event["cause"], event["place"]) == (2, cause, 3) and event["line"]
    outcome = tunnel.run("from_net", bytes(frame), OUTSIDE)
    assert (outcome.verdict, outcome.events) == (NEXT, [])


def test_before_anything_is_published_the_tunnel_brings_nothing(tunnel) -> None:
    tunnel.publish(scene(4))
    epoch = int(tunnel.state.view["epoch"][0])
    tunnel.state.view["epoch"][0] = 0
    try:
        frame = bytes(wire() / ip(4, "remote", "a") / syn())
        outcome = tunnel.run("from_net", frame, UNDERLAY)
        assert [(e["cause"], e["place"]) for e in outcome.events] == [("not-ready", 3)]
        assert outcome.verdict == DROP
    finally:
        tunnel.state.view["epoch"][0] = epoch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_connection_does_not_let_others_in(tunnel, family) -> None:
    """The short way asks who sent it, too."""
    tunnel.publish(scene(family))
    tunnel.run("from_pod", bytes(from_pod(A) / ip(family, "a", "remote") / syn()), at_pod(A))
    back = bytes(wire() / ip(family, "remote", "a") / tcp(80, 40000, "SA"))
    assert tunnel.run("from_net", back, UNDERLAY).verdict == DROP
    assert ADDRESSES[family]["remote"]


# ---- Beside the tunnel ---------------------------------------------------------------


@pytest.fixture(params=[LINK_UNDERLAY, LINK_OUTSIDE], ids=["by the underlay", "from outside"])
def card(tunnel: World, request: pytest.FixtureRequest):
    """OUTSIDE is the card that the tunnel's packets come by, of either role."""
    tunnel.link_roles.set(OUTSIDE, request.param)
    tunnel.publish(scene(4))
    yield tunnel
    tunnel.link_roles.set(OUTSIDE, LINK_OUTSIDE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["remote", "node"])
def test_who_is_behind_the_tunnel_does_not_come_without(card, source, family) -> None:
    """Whoever can send to the card would speak for every pod of other nodes."""
    frame = bytes(wire() / ip(family, source, "a") / syn())
    outcome = card.run("from_net", frame, OUTSIDE)
    assert (outcome.verdict, outcome.events[-1]["cause"]) == (DROP, "spoofed-source")
    assert not card.tracked()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_is_about_the_address_and_not_about_the_card(tunnel, family) -> None:
    tunnel.link_roles.set(OUTSIDE, LINK_UNDERLAY)
    tunnel.publish(scene(4))
    frame = bytes(wire() / ip(family, "node", "a") / syn())
    assert tunnel.run("from_net", frame, OUTSIDE, mark=DRY_MARK).cb[0] & 0xFF == 1
    tunnel.link_roles.set(OUTSIDE, LINK_OUTSIDE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answered", [False, True], ids=["half open", "established"])
def test_nor_in_a_known_connection(card, family, answered) -> None:
    there = bytes(from_pod(A) / ip(family, "a", "remote") / syn())
    assert card.run("from_pod", there, at_pod(A)).verdict == REDIRECT
    if answered:
        keys, values = card.half_open.items()
        values = values.copy()
        values["state"] = 2
        card.connections.update_many(keys, values)
        card.half_open.delete_many(keys)
    back = bytes(wire() / ip(family, "remote", "a") / tcp(80, 40000, "A"))
    outcome = card.run("from_net", back, OUTSIDE)
    assert (outcome.verdict, outcome.events[-1]["cause"]) == (DROP, "spoofed-source")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_world_comes_by_any_card(card, family) -> None:
    for packet in (syn(), tcp(40000, 80, "A")):
        frame = bytes(wire() / ip(family, "world", "a") / packet)
        assert card.run("from_net", frame, OUTSIDE).verdict == REDIRECT
    frame = bytes(from_pod(A) / ip(family, "a", "world") / tcp(80, 40000, "A"))
    card.run("from_pod", frame, at_pod(A))
    frame = bytes(wire() / ip(family, "world", "a") / tcp(40000, 80, "A"))
    assert card.run("from_net", frame, OUTSIDE).verdict == REDIRECT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["remote", "node"])
@pytest.mark.parametrize(
    ("role", "answer"), [(LINK_UNDERLAY, REDIRECT), (LINK_OUTSIDE, DROP), (0, DROP)],
    ids=["of the underlay too", "to the outside", "to nowhere that we know"],
)  # fmt: skip
def test_who_has_a_direct_way_comes_by_a_card_of_the_underlay(
    world, role, answer, source, family
) -> None:
    """Another than that of the way, where each family has its own."""
    world.publish(base())
    world.link_roles.set(OUTSIDE, role)
    frame = bytes(wire() / ip(family, source, "a") / syn())
    try:
        assert world.run("from_net", frame, OUTSIDE).verdict == answer
    finally:
        world.link_roles.set(OUTSIDE, LINK_OUTSIDE)


# ---- Who may send to the tunnel's port -------------------------------------------------


@pytest.fixture
def port(world: World):
    """The VXLAN device is there."""
    world.state.view["tunnel_port"][0] = PORT
    world.publish(base())
    yield world
    world.state.view["tunnel_port"][0] = 0
    world.link_roles.set(UNDERLAY, LINK_UNDERLAY)


STRANGERS = [
    # name, source, role of the card, may
    ("a node by the underlay", "node", LINK_UNDERLAY, True),
    ("the world by the underlay", "world", LINK_UNDERLAY, False),
    ("a pod by the underlay", "remote", LINK_UNDERLAY, False),
    ("a node from outside", "node", LINK_OUTSIDE, False),
    ("the world from outside", "world", LINK_OUTSIDE, False),
    ("a node by a card that leads nowhere that we know", "node", 0, False),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("source", "role", "may"), [s[1:] for s in STRANGERS],
                         ids=[s[0] for s in STRANGERS])  # fmt: skip
def test_only_nodes_send_to_the_tunnel_and_by_the_card_that_leads_to_them(
    port, source, role, may, family
) -> None:
    port.link_roles.set(UNDERLAY, role)
    frame = bytes(wire() / ip(family, source, "host") / udp(40000, PORT))
    outcome = port.run("from_net", frame, UNDERLAY)
    assert outcome.verdict == (NEXT if may else DROP)
    if not may:
        expected = "spoofed-source" if (source, role) == ("remote", LINK_OUTSIDE) else CAUSE
        assert outcome.events[-1]["cause"] == expected


CAUSE = "tunnel-stranger"
OTHERS = [
    # name, target, l4, the device is there, answer
    ("the node's other ports", "host", udp(40000, PORT + 1), True, NEXT),
    ("TCP", "host", syn(40000, PORT), True, NEXT),
    ("a pod's own port of that number", "a", udp(40000, PORT), True, REDIRECT),
    ("another host's, that the node forwards", "world", udp(40000, PORT), True, NEXT),
    ("a node without the device", "host", udp(40000, PORT), False, NEXT),
    ("port 0 of a node without the device", "host", udp(40000, 0), False, NEXT),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("target", "l4", "there", "answer"), [o[1:] for o in OTHERS],
                         ids=[o[0] for o in OTHERS])  # fmt: skip
def test_what_is_not_for_the_tunnel_goes_its_way(port, target, l4, there, answer, family) -> None:
    port.state.view["tunnel_port"][0] = PORT if there else 0
    frame = bytes(wire() / ip(family, "world", target) / l4)
    assert port.run("from_net", frame, OUTSIDE).verdict == answer


@pytest.mark.parametrize("there", [True, False], ids=["with the device", "without"])
def test_no_headers_that_only_the_stack_follows_lead_to_the_tunnel(port, there) -> None:
    port.state.view["tunnel_port"][0] = PORT if there else 0
    packet = ip(6, "node", "host")
    for _ in range(9):
        packet /= IPv6ExtHdrDestOpt()
    outcome = port.run("from_net", bytes(wire() / packet / udp(40000, PORT)), OUTSIDE)
    assert outcome.verdict == (DROP if there else NEXT)
    assert [event["cause"] for event in outcome.events] == ["extension-header"] * there

"""What XDP does for itself: plain packets to a frontend leave for another node's backend, in an
outer header; all else, and every error to tell, is left to from_net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IPOption_NOP
from scapy.layers.inet import TCP as Tcp
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from lockgate.bpf.maps import MappedArray
from lockgate.objects.address import parse_address
from tests.bytecode.balancing import OTHER, flow_hash, outer
from tests.bytecode.edge import PASS, REDIRECT, TX, Edge, awake
from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    B,
    base,
    echo,
    ip,
    same_frame,
    sctp,
    syn,
    tcp,
    to_hop,
    udp,
    wire,
)
from tests.bytecode.world import (
    HOP_DROP,
    HOP_MAC,
    HOP_MASQ,
    HOP_TUNNEL,
    HOP_XDP,
    HOST,
    OUTSIDE,
    OWNER_ENDS,
    SVC_HOST_ONLY,
    SVC_RANGES,
    SVC_SNAT,
    TCP,
    TO_HOP,
    TO_HOST,
    TO_LOCAL,
    UDP,
    UNDERLAY,
    Owner,
    Peer,
    Scene,
    Service,
    set_seen,
)
from tests.bytecode.world import REDIRECT as BY_TCX

MTU = 1400  # of the hop to the other node
FRONTEND = {4: "203.0.113.80", 6: "2001:db8:80::1"}
TCP_SERVICE, UDP_SERVICE = 41, 42


def remote(family: int, name: str = "remote", hop: int = 1) -> Owner:
    return Owner(ADDRESSES[family][name], 8080, TO_HOP, hop)


def scene(**changes: Any) -> Scene:
    """One frontend of each family and protocol, with one backend behind hop 1. `changes`: of both
    services, or of `hop` (flags, mtu, …)."""
    hop = changes.pop("hop", {})
    made = base()
    services = {}
    for family in FAMILIES:
        for protocol, port, number in ((TCP, 80, TCP_SERVICE), (UDP, 53, UDP_SERVICE)):
            service = Service(number, owners=(remote(family),))
            for name, change in changes.items():
                service = replace(service, **{name: change(family) if callable(change) else change})
            services[FRONTEND[family], port, protocol] = service
    one = replace(made.hops[1], flags=HOP_MAC | HOP_XDP, mtu=MTU)
    return made.but(
        services={**made.services, **services}, hops={**made.hops, 1: replace(one, **hop)}
    )


def asked(family: int, upper: Packet, source: str = "world", ttl: int = 64, **more: Any) -> Packet:
    return wire() / ip(family, source, FRONTEND[family], ttl=ttl, **more) / upper


def sent(family: int, packet: Packet, backend: str = "remote", **more: Any) -> Packet:
    """The packet as it leaves for the other node."""
    inner = packet[1].copy()
    if family == 4:
        inner.ttl -= 1
    else:
        inner.hlim -= 1
    return to_hop() / outer(inner, backend, **more)


@pytest.fixture(scope="module")
def edge(_world) -> Iterator[Edge]:
    with (
        _world.inside(),
        Edge(_world, {"config_balance": 1}) as made,
        awake(made),
    ):
        yield made


@pytest.fixture
def run(edge, world) -> Iterator[Callable[..., Any]]:
    """One frame through the program, in a scene that is in force."""

    def runs(frame: Packet, at: int = OUTSIDE, by: Edge = edge) -> Any:
        return by.run(bytes(frame), at)

    yield runs


# ---- What it sends on ----------------------------------------------------------------


@dataclass
class Sent:
    name: str
    packet: Callable[[int], Packet]
    at: int = OUTSIDE
    verdict: int = REDIRECT
    header: Callable[[int], dict[str, Any]] = lambda family: {}


def filled(family: int, protocol: int, over: int = 0) -> Packet:
    """As large as fits behind the outer header, and `over` bytes more."""
    heads = {4: 40, 6: 80}[family] + {TCP: 20, UDP: 8}[protocol]
    data = Raw(bytes(MTU - heads + over))
    return (Tcp(sport=1, dport=80, flags="A") if protocol == TCP else Udp(sport=1, dport=53)) / data


def too_long(family: int) -> Packet:
    """A small packet, and what is none of it: together a byte more than fits."""
    packet = bytes(asked(family, tcp(40000, 80, "PA")))
    return Raw(packet.ljust(len(asked(family, filled(family, TCP, 1))), b"\0"))


def marked(family: int) -> Packet:
    return asked(family, syn(), **{"tos" if family == 4 else "tc": 0xB9})


SENT = [
    Sent("TCP that begins", lambda f: asked(f, syn())),
    Sent("TCP", lambda f: asked(f, tcp(40000, 80, "PA"))),
    Sent("TCP that ends", lambda f: asked(f, tcp(40000, 80, "FA"))),
    Sent("a reset", lambda f: asked(f, Tcp(sport=40000, dport=80, flags="R"))),
    Sent("TCP options", lambda f: asked(f, Tcp(sport=9, dport=80, options=[("NOP", None)] * 4))),
    Sent("UDP", lambda f: asked(f, udp())),
    Sent("back by the card that it came by", lambda f: asked(f, syn()), UNDERLAY, TX),
    Sent("the last hop but one", lambda f: asked(f, syn(), ttl=2)),
    Sent("as large as fits", lambda f: asked(f, filled(f, TCP))),
    Sent("UDP as large as fits", lambda f: asked(f, filled(f, UDP))),
    Sent(
        "class of traffic and congestion mark go outside",
        marked,
        header=lambda f: {"tos": 0xB9},
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", SENT, ids=[case.name for case in SENT])
def test_it_leaves_for_the_other_node(world, run, case, family):
    world.publish(scene())
    packet = case.packet(family)
    outcome = run(packet, case.at)
    assert outcome.verdict == case.verdict
    same_frame(outcome.packet, sent(family, packet, **case.header(family)))
    assert outcome.events == []
    assert world.counters()[world.object.schema.enum("counter")["COUNT_BALANCED"]] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_of_a_short_frame_is_no_part_of_the_packet(world, run, family):
    world.publish(scene())
    packet = asked(family, Udp(sport=1, dport=53))
    outcome = run(bytes(packet) + bytes(18))
    assert outcome.verdict == REDIRECT
    assert outcome.packet == bytes(sent(family, packet)) + bytes(18)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_flow_picks_the_slot_and_the_slot_its_first_owner(world, run, family):
    """Eight slots of three owners in turn: the low bits of the hash tell."""
    owners = tuple(
        Owner(f"10.0.9.{n}" if family == 4 else f"fd00:9::{n}", 8080, TO_HOP, 1) for n in range(3)
    )
    slots = tuple(((n * 5 + n // 4) % 3, n % 3) for n in range(8))
    world.publish(scene(owners=lambda f: owners if f == family else (remote(f),), slots=slots))
    seen = set()
    for port in range(1024, 1088):
        packet = asked(family, syn(port))
        owner = owners[slots[flow_hash(packet) % 8][0]]
        same_frame(run(packet).packet, sent(family, packet, owner.address))
        seen.add(flow_hash(packet) % 8)
    assert seen == set(range(8))


@pytest.mark.parametrize("family", FAMILIES)
def test_sources_in_the_ranges_are_served(world, run, family):
    packet = asked(family, syn())
    first, length = parse_address(ADDRESSES[family]["world"]), 32 if family == 4 else 128
    number = int.from_bytes(first[12:] if family == 4 else first, "big")
    world.publish(scene(flags=SVC_RANGES, ranges=((family, number, length),)))
    assert run(packet).verdict == REDIRECT
    assert run(asked(family, syn(), source=OTHER[family])).verdict == PASS


# ---- What it leaves to from_net -------------------------------------------------------


@dataclass
class Left:
    name: str
    packet: Callable[[int], Packet]
    scene: Callable[[], Scene] = scene
    at: int = OUTSIDE


def hop(**changes: Any) -> Callable[[], Scene]:
    return lambda: scene(hop=changes)


def owned(kind: int, index: int = 0) -> Callable[[], Scene]:
    return lambda: scene(owners=lambda f: (Owner(ADDRESSES[f]["b"], 8080, kind, index),))


def ended(family: int) -> Owner:
    return replace(remote(family), flags=OWNER_ENDS)


def crossed() -> Scene:
    """Backends of the other family."""
    return scene(owners=lambda f: (remote(4 if f == 6 else 6),))


def without_table() -> Scene:
    """For clients in the cluster only."""
    return scene(owners=(), backends=lambda f: ((ADDRESSES[f]["remote"], 8080),))


def fragment(family: int) -> Packet:
    if family == 4:
        return asked(4, udp(), flags="MF")
    return wire() / ip(6, "world", FRONTEND[6]) / IPv6ExtHdrFragment(m=1) / udp()


def with_options(family: int) -> Packet:
    if family == 4:
        return asked(4, syn(), options=[IPOption_NOP()] * 4)
    return wire() / ip(6, "world", FRONTEND[6]) / IPv6ExtHdrDestOpt() / syn()


def syns(family: int) -> Packet:
    return asked(family, syn())


LEFT = [
    Left("no frontend", lambda f: wire() / ip(f, "world", "unroutable") / syn()),
    Left("another port of it", lambda f: asked(f, syn(dport=81))),
    Left("the port of another protocol", lambda f: asked(f, udp(dport=80))),
    Left("a pod", lambda f: wire() / ip(f, "world", "b") / syn()),
    Left("the node itself", lambda f: wire() / ip(f, "world", "host") / syn()),
    Left("a service for clients in the cluster", syns, without_table),
    Left("SNAT", syns, lambda: scene(flags=SVC_SNAT)),
    Left("not in the ranges of sources", syns, lambda: scene(flags=SVC_RANGES, ranges=())),
    Left("for another machine", lambda f: Ether(dst="02:00:00:00:00:cc") / asked(f, syn())[1]),
    Left("loopback only", syns, lambda: scene(flags=SVC_HOST_ONLY)),
    Left("session affinity", syns, lambda: scene(affinity=60)),
    Left("none takes new ones", syns, lambda: scene(owners=lambda f: (ended(f),))),
    Left("no owner in the slot", syns, lambda: scene(slots=((),))),
    Left("a pod of this node", syns, owned(TO_LOCAL, B)),
    Left("a process of this node", syns, owned(TO_HOST)),
    Left("a backend of the other family", syns, crossed),
    Left("no way to the node", syns, hop(flags=HOP_MAC | HOP_XDP | HOP_DROP)),
    Left("through a tunnel", syns, hop(flags=HOP_MAC | HOP_XDP | HOP_TUNNEL)),
    Left("to the world", syns, hop(flags=HOP_MAC | HOP_XDP | HOP_MASQ)),
    Left("a neighbour that is not known", syns, hop(flags=HOP_XDP)),
    Left("a card that XDP can't send by", syns, hop(flags=HOP_MAC)),
    Left("a hop that is none", syns, owned(TO_HOP, 4000)),
    Left("the last hop", lambda f: asked(f, syn(), ttl=1)),
    Left("no hop left", lambda f: asked(f, syn(), ttl=0)),
    Left("one byte more than fits", lambda f: asked(f, filled(f, TCP, 1))),
    Left("UDP, one byte more than fits", lambda f: asked(f, filled(f, UDP, 1))),
    Left("what follows the packet does not fit", too_long),
    Left("from a pod of another node", lambda f: asked(f, syn(), "remote"), at=UNDERLAY),
    Left("from another node", lambda f: asked(f, syn(), "node"), at=UNDERLAY),
    Left("who pretends to be a pod", lambda f: asked(f, syn(), "remote")),
    Left("who pretends to be a pod of this node", lambda f: asked(f, syn(), "a")),
    Left("who pretends to be this node", lambda f: asked(f, syn(), "host")),
    Left("a fragment", fragment),
    Left("options", with_options),
    Left("echo", lambda f: asked(f, echo(f))),
    Left("SCTP", lambda f: asked(f, sctp(), **{"proto" if f == 4 else "nh": 132})),
    Left("in a VLAN", lambda f: Ether() / Dot1Q(vlan=7) / asked(f, syn())[1]),
    Left("an error", lambda f: asked(f, ICMP(type=3, code=3) / Raw(bytes(28)))),
    Left("ARP", lambda f: Ether() / ARP()),
    Left("a packet that is cut off", lambda f: Raw(bytes(asked(f, tcp(40000, 80, "PA")))[:-1])),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", LEFT, ids=[case.name for case in LEFT])
def test_it_is_left_to_from_net(world, run, case, family):
    world.publish(case.scene())
    frame = bytes(case.packet(family))
    outcome = run(frame, case.at)
    assert (outcome.verdict, outcome.packet, outcome.events) == (PASS, frame, [])
    assert not world.counters().any()
    assert not len(world.flows.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_that_is_served_here_is_left(world, run, family):
    """The slot's first owner is another now; what began here stays."""
    here = scene(owners=lambda f: (Owner(ADDRESSES[f]["b"], 8080, TO_LOCAL, B),))
    world.publish(here)
    for upper in (syn(), udp()):
        packet = bytes(asked(family, upper))
        assert run(packet).verdict == PASS
        assert world.run("from_net", packet, OUTSIDE).verdict == BY_TCX
    world.publish(scene())
    for upper in (syn(), tcp(40000, 80, "PA"), udp()):
        assert run(asked(family, upper)).verdict == PASS, upper.summary()
    assert run(asked(family, udp(sport=40001))).verdict == REDIRECT


def test_nothing_is_published(world, run):
    world.publish(scene())
    epoch = world.state.view["epoch"][0]
    world.state.view["epoch"][0] = 0
    try:
        assert run(syns(4)).verdict == PASS
    finally:
        world.state.view["epoch"][0] = epoch


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_that_may_be_joined_are_left(world, run, family):
    """Generic XDP comes after GRO: a segment with data may be several. What has none is one."""
    world.publish(scene())
    with Edge(world, {"config_balance": 1, "config_generic": 1}) as generic:
        for upper, verdict in (
            (syn(), REDIRECT),
            (Tcp(sport=40000, dport=80, flags="A", options=[("NOP", None)] * 4), REDIRECT),
            (tcp(40000, 80, "A"), PASS),
            (tcp(40000, 80, "PA"), PASS),
            (udp(), REDIRECT),
        ):
            assert run(asked(family, upper), by=generic).verdict == verdict, upper.summary()


def test_it_is_switched_off(world, run):
    world.publish(scene())
    with Edge(world) as off:
        assert run(syns(4), by=off).verdict == PASS


# ---- What it remembers ------------------------------------------------------------------


def flow(world) -> dict[str, Any]:
    """The only flow there is."""
    _, values = world.flows.items()
    assert len(values) == 1, values
    return {name: values[0][name] for name in values.dtype.names}


def moved(**changes: Any) -> Scene:
    """The first owner is another now; the one before serves still, as the second."""
    return scene(owners=lambda f: (remote(f, "far"), remote(f)), slots=((0, 1),), **changes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("first", "after"), [(syn(), tcp(40000, 80, "PA")), (udp(), udp())], ids=["TCP", "UDP"]
)
def test_a_flow_stays_with_its_backend(world, run, family, first, after):
    world.publish(scene())
    run(asked(family, first))
    found = flow(world)
    assert found["hash"] == flow_hash(asked(family, first))
    assert found["service"] in (TCP_SERVICE, UDP_SERVICE)
    world.publish(moved())
    for _ in range(2):  # judged again, then known
        packet = asked(family, after)
        same_frame(run(packet).packet, sent(family, packet, hint=8080))
    assert flow(world)["epoch"] == world.state.view["epoch"][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_that_begins_goes_by_the_table(world, run, family):
    world.publish(scene())
    run(asked(family, syn()))
    world.publish(moved())
    for upper, hint in ((syn(), 0), (tcp(40000, 80, "PA"), 8080)):
        packet = asked(family, upper)
        same_frame(run(packet).packet, sent(family, packet, "far", hint=hint))


@pytest.mark.parametrize("family", FAMILIES)
def test_who_is_not_known_goes_by_the_table_and_is_not_learned(world, run, family):
    world.publish(scene())
    packet = asked(family, tcp(40000, 80, "PA"))
    same_frame(run(packet).packet, sent(family, packet))
    assert not len(world.flows.keys())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("first", "after", "holds"),
    [(syn(), tcp(40000, 80, "PA"), 60), (udp(), udp(), 180)],
    ids=["TCP", "UDP"],
)
def test_a_flow_is_forgotten_in_time(world, run, family, first, after, holds):
    for age, name, hint in ((holds - 1, "remote", 8080), (holds + 2, "far", 0)):
        world.clear()
        world.publish(scene())
        run(asked(family, first))
        world.publish(moved())
        set_seen(world.flows, -age)
        packet = asked(family, after)
        same_frame(run(packet).packet, sent(family, packet, name, hint=hint))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_leaves_a_backend_that_went(world, run, family):
    world.publish(scene())
    run(asked(family, udp()))
    world.publish(scene(owners=lambda f: (remote(f, "far"),)))
    packet = asked(family, udp())
    same_frame(run(packet).packet, sent(family, packet, "far"))
    assert flow(world)["addr"].tobytes() == parse_address(ADDRESSES[family]["far"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_of_another_service_does_not_count(world, run, family):
    """The frontend was given to another service, with the same backend among others."""
    world.publish(scene())
    run(asked(family, udp()))
    world.publish(moved(id=77))
    packet = asked(family, udp())
    same_frame(run(packet).packet, sent(family, packet, "far"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backend_that_moves_is_found_again(world, run, family):
    """The same address on this node now: from_net has it."""
    world.publish(scene())
    run(asked(family, udp()))
    address = ADDRESSES[family]["remote"]
    made = scene()
    world.publish(made.but(peers={**made.peers, address: Peer(HOST, 0)}))
    assert run(asked(family, udp())).verdict == PASS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_that_becomes_a_pod_is_left(world, run, family):
    world.publish(scene())
    run(asked(family, udp()))
    made = scene()
    world.publish(
        made.but(peers={**made.peers, ADDRESSES[family]["world"]: made.peers["10.0.2.2"]})
    )
    assert run(asked(family, udp())).verdict == PASS


@pytest.mark.parametrize("family", FAMILIES)
def test_an_element_that_is_anothers_by_now_does_not_count(world, run, family):
    world.publish(scene())
    run(asked(family, udp()))
    keys, values = world.flows.items()
    values = values.copy()
    values["hash"] ^= 1
    world.flows.update_many(keys, values)
    world.publish(moved())
    packet = asked(family, udp())
    same_frame(run(packet).packet, sent(family, packet, "far"))


def places(world) -> dict[int, list[int]]:
    """Clients' ports by the set of flows that theirs is in, some for each of the first."""
    found: dict[int, list[int]] = {}
    for port in range(1024, 65536):
        ports = found.setdefault(flow_hash(asked(4, syn(port))) % world.flows.sets, [])
        ports.append(port)
        if len(ports) == 3:
            break
    return found


def test_flows_beside_each_other_are_all_found(world, run):
    """Tags of neighbouring sets are in one word."""
    world.publish(scene())
    found = places(world)
    words = [range(first, first + 4) for first in range(0, world.flows.sets, 4)]
    ports = max(([found[n][0] for n in word if n in found] for word in words), key=len)
    assert len(ports) > 2
    for port in ports:
        run(asked(4, syn(port)))
    world.publish(moved())
    for port in ports:
        packet = asked(4, tcp(port, 80, "PA"))
        same_frame(run(packet).packet, sent(4, packet, "remote", hint=8080))


def test_a_flow_is_known_by_its_tag(world, run):
    world.publish(scene())
    run(asked(4, syn()))
    with MappedArray.of(world.object, "flow_tags", np.dtype("<u8")) as tags:
        tags.view[:] = ~tags.view
    world.publish(moved())
    packet = asked(4, tcp(40000, 80, "PA"))
    same_frame(run(packet).packet, sent(4, packet, "far"))


def test_of_three_flows_in_one_place_the_one_that_was_silent_goes(world, run):
    """There is room for two, and the first is not found again."""
    world.publish(scene())
    ports = max(places(world).values(), key=len)
    for port in ports:
        set_seen(world.flows, -10)
        run(asked(4, syn(port)))
    assert sorted(world.flows.items()[1]["sport"]) == sorted(ports[1:])
    world.publish(moved())
    for port, name, hint in zip(ports, ("far", "remote", "remote"), (0, 8080, 8080), strict=True):
        packet = asked(4, tcp(port, 80, "PA"))
        same_frame(run(packet).packet, sent(4, packet, name, hint=hint))


def test_a_flood_does_not_push_flows_out(world, run):
    """One a second is learned, a quarter of that at once; who is known is kept up all the same."""
    world.publish(scene())
    with Edge(world, {"config_balance": 1, "config_flow_ns": 1_000_000_000}) as slow:
        for port in range(1024, 1124):
            packet = asked(4, syn(port))
            outcome = run(packet, by=slow)
            same_frame(outcome.packet, sent(4, packet))
        known = int(flow(world)["sport"])
        world.publish(moved())
        packet = asked(4, syn(known))
        same_frame(run(packet, by=slow).packet, sent(4, packet, "far"))
        assert flow(world)["addr"].tobytes() == parse_address(ADDRESSES[4]["far"])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_table_of_flows(world, run, family):
    world.publish(scene())
    with Edge(world, {"config_balance": 1, "config_flows": 0}) as stateless:
        for upper in (syn(), tcp(40000, 80, "PA"), udp()):
            packet = asked(family, upper)
            same_frame(run(packet, by=stateless).packet, sent(family, packet))
    assert not len(world.flows.keys())


def test_the_outer_source_is_what_the_settings_say(world, run):
    world.publish(scene())
    prefix = bytes.fromhex("fd0000ab000000000000000000000000")
    constants = {"config_balance": 1, "config_outer4": [172, 20, 0, 0]}
    constants["config_outer6"] = list(prefix)
    with Edge(world, constants) as other:
        packet = run(syns(4), by=other).packet
        assert packet[26:28] == bytes((172, 20))
        packet = run(syns(6), by=other).packet
        assert packet[22:34] == prefix[:12]

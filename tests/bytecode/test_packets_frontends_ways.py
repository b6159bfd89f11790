"""Clients outside at a frontend: there and back, errors, fragments, and what changes meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.bytecode.balancing import (
    CHAIN,
    DSR,
    FAR,
    HERE,
    HOST,
    LB,
    NODE,
    NODE_PORT,
    OTHER,
    PORTS,
    SNAT,
    SPORT,
    STICKY,
    WORLD,
    ask,
    back,
    frontends,
    outer,
    owner,
)
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
    same_events,
    same_frame,
    syn,
    tcp,
    to_hop,
    to_pod,
    to_world,
    too_big,
    udp,
    unreachable,
    wire,
)
from tests.bytecode.world import (
    DROP,
    HOP_MAC,
    HOP_TUNNEL,
    INGRESS,
    NEXT,
    OUTSIDE,
    REDIRECT,
    TCP,
    UDP,
    UNDERLAY,
    Scene,
    World,
    set_seen,
)

# ---- Ways there and back ---------------------------------------------------------------


def run(world: World, program: str, frame: Packet, at: int):
    return world.run(program, bytes(frame), at)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_of_a_pod_here_bear_the_frontends_address(world: World, family: int) -> None:
    world.publish(frontends())
    run(world, "from_net", wire() / ask(family, HERE), OUTSIDE)
    for flags in ("SA", "A", "FA"):
        out = run(
            world,
            "from_pod",
            from_pod(B) / ip(family, "b", "world") / tcp(8080, SPORT, flags),
            at_pod(B),
        )
        assert out.verdict == REDIRECT
        same_frame(
            out.packet,
            to_world() / ip(family, LB[family], "world", ttl=63) / tcp(PORTS[HERE], SPORT, flags),
        )
        out = run(world, "from_net", wire() / ask(family, HERE, "ack"), OUTSIDE)
        same_frame(out.packet, to_pod(B) / ip(family, "world", "b") / tcp(SPORT, 8080, "A"))
    assert [where for where, _ in world.tracked()] == ["connections"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["syn", "udp"])
def test_as_the_node_there_and_back(world: World, family: int, kind: str) -> None:
    world.publish(frontends())
    l4 = {"syn": syn, "udp": udp}[kind]
    out = run(world, "from_net", wire() / ask(family, SNAT, kind), OUTSIDE)
    assert out.verdict == REDIRECT and not out.events
    port = Ether(out.packet)[2].sport
    assert 10000 <= port < 30000
    same_frame(out.packet, to_hop() / ip(family, "host", "remote", ttl=63) / l4(port, 8080))
    answer = tcp(8080, port, "SA") if kind == "syn" else udp(8080, port)
    out = run(world, "from_net", wire() / ip(family, "remote", "host") / answer, UNDERLAY)
    assert out.verdict == REDIRECT
    answer = tcp(PORTS[SNAT], SPORT, "SA") if kind == "syn" else udp(PORTS[SNAT], SPORT)
    same_frame(out.packet, to_world() / ip(family, LB[family], "world", ttl=63) / answer)
    world.next_epoch()
    again = "ack" if kind == "syn" else "udp"
    out = run(world, "from_net", wire() / ask(family, SNAT, again), OUTSIDE)
    assert Ether(out.packet)[2].sport == port
    out = run(
        world,
        "from_net",
        wire()
        / ip(family, "remote", "host")
        / (tcp(8080, port, "A") if kind == "syn" else udp(8080, port)),
        UNDERLAY,
    )
    assert Ether(out.packet)[2].dport == SPORT
    assert len(world.nat.keys()) == 2 and len(world.tracked()) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_icmp_errors_of_a_connection_as_the_node_both_ways(world: World, family: int) -> None:
    world.publish(frontends())
    out = run(world, "from_net", wire() / ask(family, SNAT, "udp"), OUTSIDE)
    sent = Ether(out.packet)[1]
    port = sent[1].sport
    # The backend's node says that nobody is there.
    error = ip(family, "remote", "host") / unreachable(family, sent, 48 if family == 6 else 28)
    out = run(world, "from_net", wire() / error, UNDERLAY)
    assert out.verdict == REDIRECT
    quoted = ip(family, "world", LB[family], ttl=63) / udp(SPORT, PORTS[SNAT])
    # IPv4's quoted header keeps its checksum; what scapy builds has the same.
    wanted = (
        to_world()
        / ip(family, LB[family], "world", ttl=63)
        / unreachable(family, quoted, 48 if family == 6 else 28)
    )
    found = Ether(out.packet)
    assert found[1].src == LB[family] and found[1].dst == ADDRESSES[family]["world"]
    assert bytes(found[1].payload)[8:16] == bytes(wanted[1].payload)[8:16]
    # And a router on the way to the client, about an answer.
    answered = ip(family, LB[family], "world") / udp(PORTS[SNAT], SPORT)
    error = ip(family, OTHER[family], LB[family]) / too_big(family, answered, 1300)
    out = run(world, "from_net", wire() / error, OUTSIDE)
    assert out.verdict == REDIRECT
    found = Ether(out.packet)
    assert (found[1].src, found[1].dst) == (OTHER[family], ADDRESSES[family]["remote"])
    inside = (IP if family == 4 else IPv6)(bytes(found[1].payload)[8:])
    assert (inside.src, inside.dst) == tuple(ADDRESSES[family][n] for n in ("remote", "host"))
    assert (inside.payload.sport, inside.payload.dport) == (8080, port)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_endpoint_that_is_no_pod_is_reached_as_the_node(world: World, family: int) -> None:
    world.publish(frontends())
    out = run(world, "from_net", wire() / ask(family, WORLD, source=OTHER[family]), OUTSIDE)
    port = Ether(out.packet)[2].sport
    same_frame(out.packet, to_world() / ip(family, "host", "world", ttl=63) / syn(port, 8080))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["syn", "udp"])
def test_a_nodes_process_is_asked_as_this_node_by_one_beside_it(
    world: World, family: int, kind: str
) -> None:
    """Its stack would take its own address, from outside, for a lie."""
    world.publish(frontends())
    l4 = {"syn": syn, "udp": udp}[kind]
    out = run(world, "from_net", wire() / ask(family, NODE, kind, "node"), UNDERLAY)
    assert out.verdict == REDIRECT and not out.events
    port = Ether(out.packet)[2].sport
    same_frame(out.packet, to_hop() / ip(family, "host", "node", ttl=63) / l4(port, 8080))
    answer = tcp(8080, port, "SA") if kind == "syn" else udp(8080, port)
    out = run(world, "from_net", wire() / ip(family, "node", "host") / answer, UNDERLAY)
    assert out.verdict == REDIRECT
    answer = tcp(PORTS[NODE], SPORT, "SA") if kind == "syn" else udp(PORTS[NODE], SPORT)
    same_frame(out.packet, to_hop() / ip(family, LB[family], "node", ttl=63) / answer)
    # A client elsewhere is told of to its stack, which answers by itself.
    out = run(world, "from_net", wire() / ask(family, NODE, kind), OUTSIDE)
    same_frame(out.packet, to_hop() / outer(ask(family, NODE, kind, ttl=63), "node"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_balancer_remembers_nothing_of_tcp_without_the_table(world: World, family: int) -> None:
    world.publish(frontends())
    for _ in range(2):
        for kind in ("syn", "ack"):
            run(world, "from_net", wire() / ask(family, DSR, kind), OUTSIDE)
    assert not world.tracked() and not len(world.nat.keys())
    assert len(world.flows.keys()) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_keeps_its_backend_while_that_serves(world: World, family: int) -> None:
    """UDP after another owner became the first, and after its own went; TCP likewise, but for a
    SYN, which always goes to the first."""
    scene = frontends()
    key = LB[family], PORTS[CHAIN]

    def order(*slot: int, names: tuple[str, ...] = ("remote", "far")):
        owners = tuple(owner(family, name) for name in names)
        service = scene.services[(*key, TCP)]
        changed = type(service)(service.id, flags=service.flags, owners=owners, slots=(slot,))
        world.publish(
            scene.but(services={**scene.services, (*key, TCP): changed, (*key, UDP): changed})
        )

    def to(kind: str) -> str:
        packet = run(world, "from_net", wire() / ask(family, CHAIN, kind), OUTSIDE).packet
        dst = Ether(packet)[1].dst
        return next(name for name, one in ADDRESSES[family].items() if one == dst)

    order(0, 1)
    assert [to(kind) for kind in ("syn", "ack", "udp")] == ["remote"] * 3
    order(1, 0)
    assert [to(kind) for kind in ("ack", "udp")] == ["remote"] * 2
    order(0, names=("far",))
    assert [to(kind) for kind in ("ack", "udp")] == ["far"] * 2
    order(0, 1)
    assert to("udp") == "far"
    assert to("ack") == "remote"
    assert to("syn") == "remote"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_first_owner_here_does_not_know_goes_on_to_the_next(
    world: World, family: int
) -> None:
    """CHAIN's owners in order: b, remote, far. What begins is b's."""
    world.publish(base())
    world.publish(frontends())
    out = run(world, "from_net", wire() / ask(family, CHAIN, "ack"), OUTSIDE)
    inner = ip(family, "world", LB[family], ttl=63) / tcp(SPORT, PORTS[CHAIN], "A")
    same_frame(out.packet, to_hop() / outer(inner, "remote"))
    for kind in ("syn", "udp", "ack"):
        out = run(world, "from_net", wire() / ask(family, CHAIN, kind), OUTSIDE)
        assert Ether(out.packet)[1].dst == ADDRESSES[family]["b"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_with_affinity_keeps_its_backend_by_whatever_port(
    world: World, family: int
) -> None:
    world.publish(frontends())
    there = set()
    for port in range(50000, 50020):
        packet = ip(family, "world", LB[family]) / syn(port, PORTS[STICKY])
        there.add(Ether(run(world, "from_net", wire() / packet, OUTSIDE).packet)[1].dst)
    assert len(there) == 1
    assert len(world.affinities.keys()) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_told_to_the_backends_node(world: World, family: int) -> None:
    world.publish(frontends())
    run(world, "from_net", wire() / ask(family, STICKY), OUTSIDE)
    out = run(world, "from_net", wire() / ask(family, STICKY, "ack"), OUTSIDE)
    inner = ip(family, "world", LB[family], ttl=63) / tcp(SPORT, PORTS[STICKY], "A")
    same_frame(out.packet, to_hop() / outer(inner, "remote", hint=8080))


def fragments(family: int, whole: Packet) -> list[Packet]:
    if family == 4:
        return list(whole.fragment(800))
    head, body = whole.copy(), bytes(whole.payload)
    head.remove_payload()
    return [
        head
        / IPv6ExtHdrFragment(nh=17, offset=at // 8, m=at + 800 < len(body), id=7)
        / Raw(body[at : at + 800])
        for at in range(0, len(body), 800)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments_follow_their_first(world: World, family: int) -> None:
    world.publish(frontends())
    whole = ip(family, "world", LB[family]) / udp(SPORT, PORTS[DSR]) / Raw(bytes(2000))
    for fragment in fragments(family, whole):
        out = run(world, "from_net", wire() / fragment, OUTSIDE)
        assert out.verdict == REDIRECT, out.events
        assert Ether(out.packet)[1].dst == ADDRESSES[family]["remote"]
    world.clear()
    last = fragments(family, whole)[-1]
    out = run(world, "from_net", wire() / last, OUTSIDE)
    assert out.verdict == DROP
    same_events(out.events, dropped("fragment-untracked"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_icmp_error_goes_where_what_it_quotes_would_go(world: World, family: int) -> None:
    world.publish(frontends())
    answered = ip(family, LB[family], "world") / udp(PORTS[DSR], SPORT)
    error = ip(family, OTHER[family], LB[family]) / too_big(family, answered, 1300)
    out = run(world, "from_net", wire() / error, OUTSIDE)
    assert out.verdict == REDIRECT
    assert Ether(out.packet)[1].dst == ADDRESSES[family]["remote"]


@pytest.mark.parametrize("family", FAMILIES)
def test_udp_served_here_moves_when_its_backend_goes(world: World, family: int) -> None:
    scene = frontends()
    world.publish(scene)
    run(world, "from_net", wire() / ask(family, HERE, "udp"), OUTSIDE)
    key = LB[family], PORTS[HERE], UDP
    service = scene.services[key]
    moved = type(service)(service.id, flags=service.flags, owners=(owner(family, "remote"),))
    world.publish(scene.but(services={**scene.services, key: moved}))
    for _ in range(2):
        out = run(world, "from_net", wire() / ask(family, HERE, "udp"), OUTSIDE)
        assert Ether(out.packet)[1].dst == ADDRESSES[family]["remote"]


@pytest.mark.parametrize("family", FAMILIES)
def test_udp_as_the_node_moves_when_its_backend_goes(world: World, family: int) -> None:
    scene = frontends()
    world.publish(scene)
    run(world, "from_net", wire() / ask(family, SNAT, "udp"), OUTSIDE)
    key = LB[family], PORTS[SNAT], UDP
    moved = replace(scene.services[key], owners=(owner(family, "far"),))
    world.publish(scene.but(services={**scene.services, key: moved}))
    ports = set()
    for _ in range(2):
        out = run(world, "from_net", wire() / ask(family, SNAT, "udp"), OUTSIDE)
        found = Ether(out.packet)
        assert (found[1].src, found[1].dst) == tuple(ADDRESSES[family][n] for n in ("host", "far"))
        ports.add(found[2].sport)
    (port,) = ports
    answer = wire() / ip(family, "far", "host") / udp(8080, port)
    out = run(world, "from_net", answer, UNDERLAY)
    assert Ether(out.packet)[1].src == LB[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_port_whose_connection_is_over_is_given_out_again(configured, family: int) -> None:
    """Not before: with one port to give, a second client has to wait for it."""
    world = configured("oneport", masquerade_port_min=20000, masquerade_port_max=20000)
    with world.inside():
        world.publish(frontends())
        run(world, "from_net", wire() / ask(family, SNAT), OUTSIDE)
        second = ip(family, "world", LB[family]) / syn(SPORT + 1, PORTS[SNAT])
        out = run(world, "from_net", wire() / second, OUTSIDE)
        same_events(out.events, dropped("nat-exhausted"))
        set_seen(world.half_open, -70)
        out = run(world, "from_net", wire() / second, OUTSIDE)
        assert out.verdict == REDIRECT and Ether(out.packet)[2].sport == 20000


@pytest.mark.parametrize("family", FAMILIES)
def test_a_port_of_a_closed_connection_is_given_out_where_none_is_free(
    configured, family: int
) -> None:
    world = configured("oneport", masquerade_port_min=20000, masquerade_port_max=20000)
    with world.inside():
        world.publish(frontends())
        run(world, "from_net", wire() / ask(family, SNAT), OUTSIDE)
        for flags in ("SA", "R"):
            answer = wire() / ip(family, "remote", "host") / tcp(8080, 20000, flags)
            out = run(world, "from_net", answer, UNDERLAY)
            assert Ether(out.packet)[2].dport == SPORT
        second = ip(family, "world", LB[family]) / syn(SPORT + 1, PORTS[SNAT])
        out = run(world, "from_net", wire() / second, OUTSIDE)
        assert out.verdict == REDIRECT and Ether(out.packet)[2].sport == 20000
        answer = wire() / ip(family, "remote", "host") / tcp(8080, 20000, "SA")
        assert Ether(run(world, "from_net", answer, UNDERLAY).packet)[2].dport == SPORT + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_connection_goes_on_whatever_the_owners(world: World, family: int) -> None:
    scene = frontends()
    world.publish(scene)
    run(world, "from_net", wire() / ask(family, HERE), OUTSIDE)
    run(
        world,
        "from_pod",
        from_pod(B) / ip(family, "b", "world") / tcp(8080, SPORT, "SA"),
        at_pod(B),
    )
    key = LB[family], PORTS[HERE], TCP
    service = scene.services[key]
    moved = type(service)(service.id, flags=service.flags, owners=(owner(family, "remote"),))
    world.publish(scene.but(services={**scene.services, key: moved}))
    out = run(world, "from_net", wire() / ask(family, HERE, "ack"), OUTSIDE)
    same_frame(out.packet, to_pod(B) / ip(family, "world", "b") / tcp(SPORT, 8080, "A"))
    # But a new one of the same ends goes to the new owner, with all that follows.
    for _ in range(2):
        run(world, "from_net", wire() / ask(family, HERE, "ack"), OUTSIDE)
    run(
        world,
        "from_pod",
        from_pod(B) / ip(family, "b", "world") / tcp(8080, SPORT, "R"),
        at_pod(B),
    )
    for kind in ("syn", "ack"):
        out = run(world, "from_net", wire() / ask(family, HERE, kind), OUTSIDE)
        assert Ether(out.packet)[1].dst == ADDRESSES[family]["remote"]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_frontends_of_one_backend_and_the_same_client_port(world: World, family: int) -> None:
    """Two connections for the client, and so for the pod."""
    world.publish(frontends())
    first = run(world, "from_net", wire() / ask(family, HERE), OUTSIDE)
    packet = ip(family, "world", "host") / syn(SPORT, NODE_PORT)
    second = run(world, "from_net", wire() / packet, OUTSIDE)
    ports = [Ether(out.packet)[2].sport for out in (first, second)]
    assert ports[0] == SPORT != ports[1]
    out = run(
        world,
        "from_pod",
        from_pod(B) / ip(family, "b", "world") / tcp(8080, ports[1], "SA"),
        at_pod(B),
    )
    same_frame(
        out.packet,
        to_world() / ip(family, "host", "world", ttl=63) / tcp(NODE_PORT, SPORT, "SA"),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denied_client_is_dropped(world: World, family: int) -> None:
    world.publish(frontends().isolate(B, INGRESS))
    out = run(world, "from_net", wire() / ask(family, HERE), OUTSIDE)
    assert out.verdict == DROP and out.events[0]["cause"] == "policy"
    assert not len(world.nat.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hop_without_known_macs(world: World, family: int) -> None:
    world.publish(frontends())
    out = run(world, "from_net", wire() / ask(family, FAR), OUTSIDE)
    assert out.verdict == REDIRECT
    inner = ip(family, "world", LB[family], ttl=63) / syn(SPORT, PORTS[FAR])
    assert out.packet[14:] == bytes(outer(inner, "far"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["syn", "udp"])
def test_answers_of_the_nodes_process_get_the_frontends_address(
    world: World, family: int, kind: str
) -> None:
    world.publish(frontends())
    run(world, "from_net", wire() / ask(family, HOST, kind), OUTSIDE)
    answer = tcp(8080, SPORT, "SA") if kind == "syn" else udp(8080, SPORT)
    frame = back(wire()) / ip(family, "host", "world") / answer
    out = run(world, "to_net", frame, OUTSIDE)
    assert (out.verdict, out.packet) == (NEXT, bytes(frame))
    world.state.view["host_backends"][0] = 1
    out = run(world, "to_net", frame, OUTSIDE)
    assert out.verdict == NEXT
    answer = tcp(PORTS[HOST], SPORT, "SA") if kind == "syn" else udp(PORTS[HOST], SPORT)
    same_frame(out.packet, back(wire()) / ip(family, LB[family], "world") / answer)
    # What is no answer stays as it is.
    for other in (
        ip(family, "host", OTHER[family]) / tcp(8080, SPORT, "SA"),
        ip(family, "world", "host") / syn(SPORT, 8080),
    ):
        out = run(world, "to_net", back(wire()) / other, OUTSIDE)
        assert (out.verdict, out.packet) == (NEXT, bytes(back(wire()) / other))


@pytest.mark.parametrize("family", FAMILIES)
def test_icmp_errors_about_the_nodes_process_both_ways(world: World, family: int) -> None:
    world.publish(frontends())
    world.state.view["host_backends"][0] = 1
    run(world, "from_net", wire() / ask(family, HOST, "udp"), OUTSIDE)
    # A quote's own checksum stays what it was.
    asked = ip(family, "world", "host") / quoted_udp(SPORT, 8080)
    frame = back(wire()) / ip(family, "host", "world") / unreachable(family, asked)
    out = run(world, "to_net", frame, OUTSIDE)
    assert out.verdict == NEXT
    asked = ip(family, "world", LB[family]) / quoted_udp(SPORT, PORTS[HOST])
    same_frame(
        out.packet, back(wire()) / ip(family, LB[family], "world") / unreachable(family, asked)
    )
    answered = ip(family, LB[family], "world") / quoted_udp(PORTS[HOST], SPORT)
    frame = wire() / ip(family, OTHER[family], LB[family]) / too_big(family, answered, 1300)
    out = run(world, "from_net", frame, OUTSIDE)
    assert out.verdict == NEXT
    answered = ip(family, "host", "world") / quoted_udp(8080, SPORT)
    same_frame(
        out.packet,
        wire() / ip(family, OTHER[family], "host") / too_big(family, answered, 1300),
    )


def quoted_udp(sport: int, dport: int) -> Packet:
    return Udp(sport=sport, dport=dport, chksum=0x1234) / Raw(b"question")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_reaches_another_nodes_port_and_hears_a_third(world: World, family: int) -> None:
    """It keeps its address; the backend's node answers in the name of the node that was asked."""
    world.publish(frontends())
    out = run(
        world, "from_pod", from_pod(A) / ip(family, "a", "node") / syn(SPORT, NODE_PORT), at_pod(A)
    )
    same_frame(out.packet, to_hop() / ip(family, "a", "node", ttl=63) / syn(SPORT, NODE_PORT))
    out = run(
        world,
        "from_net",
        wire() / ip(family, "node", "a") / tcp(NODE_PORT, SPORT, "SA"),
        UNDERLAY,
    )
    assert out.verdict == REDIRECT


# ---- By which link ---------------------------------------------------------------------


def tunnelled() -> Scene:
    """The way to hop 1 leads through another link, as VXLAN's device would be."""
    scene = frontends()
    hop = replace(scene.hops[1], ifindex=999, flags=HOP_MAC | HOP_TUNNEL)
    return scene.but(hops={**scene.hops, 1: hop})


@pytest.mark.parametrize("family", FAMILIES)
def test_nodes_talk_to_nodes_beside_the_tunnel_and_pods_do_not(world: World, family: int) -> None:
    world.publish(tunnelled())
    for kind in ("syn", "ack"):
        out = run(world, "from_net", wire() / ask(family, HERE, kind, source="node"), UNDERLAY)
        assert out.verdict == REDIRECT, out.events
    out = run(world, "from_net", wire() / ask(family, HERE, source="node"), OUTSIDE)
    same_events(out.events, dropped("spoofed-source"))
    for service in (HERE, DSR, SNAT):
        out = run(world, "from_net", wire() / ask(family, service, source="remote"), UNDERLAY)
        same_events(out.events, dropped("spoofed-source"))
    out = run(world, "from_net", wire() / ip(family, "node", "a") / syn(), UNDERLAY)
    same_events(out.events, dropped("spoofed-source"))

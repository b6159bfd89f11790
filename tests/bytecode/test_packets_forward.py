"""Ways of packets: to pods, nodes and the world, through services and back, errors told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, IPOption_NOP
from scapy.layers.inet import TCP as Tcp
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop
from scapy.packet import Padding, Raw

from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    IDS,
    QUOTED,
    A,
    B,
    Golden,
    allowed,
    answer4,
    at_pod,
    base,
    check,
    dropped,
    echo,
    from_pod,
    ip,
    layers,
    same_frame,
    sctp,
    syn,
    table,
    tcp,
    time_exceeded,
    to_hop,
    to_pod,
    to_world,
    too_big,
    udp,
    unreachable,
    wire,
)
from tests.bytecode.world import DROP, NEXT, OUTSIDE, REDIRECT, UNDERLAY

DIR_INGRESS, DIR_EGRESS = 1, 2
BOTH = (DIR_EGRESS, DIR_INGRESS)


def ways(f: int) -> Iterator[Golden]:
    sctp_more = {"proto": 132} if f == 4 else {"nh": 132}
    for kind, l4 in (("tcp", syn()), ("udp", udp()), ("echo", echo(f))):
        yield Golden(
            f"{kind} to a pod of this node",
            "from_pod",
            from_pod(A) / ip(f, "a", "b") / l4,
            at_pod(A),
            REDIRECT,
            to_pod(B) / ip(f, "a", "b") / l4,
            allowed(*BOTH, src_endpoint=IDS["a"], dst_endpoint=IDS["b"], place=1, reason=0),
        )
        yield Golden(
            f"{kind} to a pod of another node whose MAC is known",
            "from_pod",
            from_pod(A) / ip(f, "a", "remote") / l4,
            at_pod(A),
            REDIRECT,
            to_hop() / ip(f, "a", "remote", ttl=63) / l4,
            allowed(DIR_EGRESS, dst_endpoint=IDS["remote"]),
        )
        yield Golden(
            f"{kind} to a pod of another node by a neighbour look-up",
            "from_pod",
            from_pod(A) / ip(f, "a", "far") / l4,
            at_pod(A),
            REDIRECT,
            from_pod(A) / ip(f, "a", "far", ttl=63) / l4,
            allowed(DIR_EGRESS),
        )
        yield Golden(
            f"{kind} to the own node",
            "from_pod",
            from_pod(A) / ip(f, "a", "host") / l4,
            at_pod(A),
            NEXT,
            from_pod(A) / ip(f, "a", "host") / l4,
            allowed(DIR_EGRESS),
        )
        yield Golden(
            f"{kind} to another node's address",
            "from_pod",
            from_pod(A) / ip(f, "a", "node") / l4,
            at_pod(A),
            REDIRECT,
            to_hop() / ip(f, "a", "node", ttl=63) / l4,
            allowed(DIR_EGRESS),
        )
        yield Golden(
            f"{kind} from another node to a pod",
            "from_net",
            wire() / ip(f, "remote", "a") / l4,
            UNDERLAY,
            REDIRECT,
            to_pod(A) / ip(f, "remote", "a") / l4,
            allowed(DIR_INGRESS, place=3, src_endpoint=IDS["remote"], dst_endpoint=IDS["a"]),
        )
        yield Golden(
            f"{kind} from the node's stack to a pod",
            "to_pod",
            to_pod(A) / ip(f, "host", "a") / l4,
            at_pod(A),
            NEXT,
            to_pod(A) / ip(f, "host", "a") / l4,
            allowed(DIR_INGRESS, place=2),
        )
        yield Golden(
            f"{kind} where no route leads",
            "from_pod",
            from_pod(A) / ip(f, "a", "unroutable") / l4,
            at_pod(A),
            DROP,
            None,
            allowed(DIR_EGRESS) + dropped("no-route"),
        )
        yield Golden(
            f"{kind} from the net for nobody here goes up the stack",
            "from_net",
            wire() / ip(f, "world", "host") / l4,
            OUTSIDE,
            NEXT,
            wire() / ip(f, "world", "host") / l4,
            [],
        )
    yield Golden(
        "sctp to a service whose port stays",
        "from_pod",
        from_pod(A) / ip(f, "a", "svc", **sctp_more) / sctp(),
        at_pod(A),
        REDIRECT,
        to_pod(B) / ip(f, "a", "b", **sctp_more) / sctp(),
        allowed(*BOTH, service=27),
    )
    sent = ip(f, "a", "svc", **sctp_more) / sctp(dport=71)
    yield Golden(
        "sctp to a service whose port would change is refused by name",
        "from_pod",
        from_pod(A) / sent,
        at_pod(A),
        REDIRECT,
        to_pod(A) / answer4(ip(f, "svc", "a") / unreachable(f, sent, QUOTED[f])),
        dropped("sctp-port-rewrite", service=28),
    )
    yield Golden(
        "tcp to a service without backends is reset",
        "from_pod",
        from_pod(A) / ip(f, "a", "svc") / syn(dport=90),
        at_pod(A),
        REDIRECT,
        to_pod(A)
        / answer4(
            ip(f, "svc", "a") / Tcp(sport=90, dport=40000, flags="RA", seq=0, ack=101, window=0)
        ),
        dropped("no-backend", service=25),
    )
    sent = ip(f, "a", "svc") / udp(dport=90)
    yield Golden(
        "udp to a service without backends is told",
        "from_pod",
        from_pod(A) / sent,
        at_pod(A),
        REDIRECT,
        to_pod(A) / answer4(ip(f, "svc", "a") / unreachable(f, sent, QUOTED[f])),
        dropped("no-backend", service=26),
    )
    yield Golden(
        "an unknown port of a service's address is refused",
        "from_pod",
        from_pod(A) / ip(f, "a", "svc") / syn(dport=9999),
        at_pod(A),
        REDIRECT,
        to_pod(A)
        / answer4(
            ip(f, "svc", "a") / Tcp(sport=9999, dport=40000, flags="RA", seq=0, ack=101, window=0)
        ),
        dropped("unknown-service-port"),
    )
    yield Golden(
        "a reset is not answered by a reset",
        "from_pod",
        from_pod(A) / ip(f, "a", "svc") / Tcp(sport=1, dport=90, flags="R"),
        at_pod(A),
        DROP,
        None,
        dropped("no-backend"),
    )
    for name, target in (("a node", "remote"), ("the world", "world")):
        sent = ip(f, "a", target, ttl=1) / udp(dport=33434)
        yield Golden(
            f"out of hops towards {name}: the sender is told about the packet it sent",
            "from_pod",
            from_pod(A) / sent,
            at_pod(A),
            REDIRECT,
            to_pod(A) / answer4(ip(f, target, "a") / time_exceeded(f, sent)),
            allowed(DIR_EGRESS) + dropped("ttl-exceeded"),
        )
    more = {"flags": "DF"} if f == 4 else {}
    sent = ip(f, "a", "remote", **more) / Udp(sport=1, dport=2) / Raw(bytes(1410))
    yield Golden(
        "too big for the way: the sender is told the MTU",
        "from_pod",
        from_pod(A) / sent,
        at_pod(A),
        REDIRECT,
        to_pod(A) / answer4(ip(f, "remote", "a") / too_big(f, sent, 1400)),
        allowed(DIR_EGRESS) + dropped("packet-too-big"),
    )
    size = 1400 - (28 if f == 4 else 48)
    sent = ip(f, "a", "remote", **more) / Udp(sport=1, dport=2) / Raw(bytes(size))
    yield Golden(
        "just the MTU passes",
        "from_pod",
        from_pod(A) / sent,
        at_pod(A),
        REDIRECT,
        to_hop() / ip(f, "a", "remote", ttl=63, **more) / Udp(sport=1, dport=2) / Raw(bytes(size)),
    )
    yield Golden(
        "a pod's address from outside is spoofed",
        "from_net",
        wire() / ip(f, "remote", "a") / syn(),
        OUTSIDE,
        DROP,
        None,
        dropped("spoofed-source", place=3),
    )
    yield Golden(
        "a pod of this node as source from outside is spoofed",
        "from_net",
        wire() / ip(f, "b", "host") / syn(),
        OUTSIDE,
        DROP,
        None,
        dropped("spoofed-source", place=3),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_ping_of_a_service_stays_on_the_node(world, family):
    """The address is a service's for every protocol: no such packet leaves for the world."""
    f = family
    sent = ip(f, "a", "svc") / echo(f)
    check(
        world,
        Golden(
            "",
            "from_pod",
            from_pod(A) / sent,
            at_pod(A),
            REDIRECT,
            to_pod(A) / answer4(ip(f, "svc", "a") / unreachable(f, sent, QUOTED[f])),
            dropped("unknown-service-port"),
        ),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["svc", "remote"])
def test_an_error_is_never_answered_by_an_error(world, family, target):
    """RFC 1122 3.2.2, RFC 4443 2.4."""
    f = family
    world.publish(base())
    if target == "remote":
        frame = wire() / ip(f, "remote", "a") / udp(1, 2)
        send(world, "from_net", frame, UNDERLAY, REDIRECT)
    error = unreachable(f, ip(f, target, "a") / udp(1, 2))
    frame = from_pod(A) / ip(f, "a", target, ttl=1) / error
    outcome = send(world, "from_pod", frame, at_pod(A), DROP)
    cause = {"svc": "unrelated-error", "remote": "ttl-exceeded"}[target]
    assert outcome.events[-1]["cause"] == cause


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [0, 60])
@pytest.mark.parametrize("payload", [0, 1, 99, 100, 101, 400, 519, 520, 521, 1192, 1300])
def test_an_error_quotes_as_much_as_fits(world, family, payload, padding):
    """RFC 1812 4.3.2.3, RFC 4443 2.4 (c): behind options and extensions too, padding never."""
    f = family
    world.publish(base())
    head = ip(f, "a", "svc")
    if f == 4:
        head.options = [IPOption_NOP()] * 12
    else:
        head = head / IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop()
    body = Raw(bytes(n % 251 for n in range(payload)))
    sent = type(head)(bytes(head / udp(dport=90) / body))
    check(
        world,
        Golden(
            "",
            "from_pod",
            from_pod(A) / sent / Padding(bytes(padding)),
            at_pod(A),
            REDIRECT,
            to_pod(A) / answer4(ip(f, "svc", "a") / unreachable(f, sent, QUOTED[f])),
            dropped("no-backend", service=26),
        ),
    )


@pytest.mark.parametrize("family", FAMILIES)
@table(ways(4))
def test_ways(world, golden, family):
    wanted = next(g for g in ways(family) if g.name == golden.name)
    check(world, wanted)


# ---- There and back -----------------------------------------------------------------


def send(world, program, frame, at, verdict, out=None):
    outcome = world.run(program, bytes(frame), at)
    assert outcome.verdict == verdict, outcome
    if out is not None:
        same_frame(outcome.packet, out)
    return outcome


def ported(l4, **changes):
    """The same L4 header with other ports or identifier, checksum to be computed."""
    l4 = l4.copy()
    for name, value in changes.items():
        setattr(l4, name, value)
    return l4


def chosen(frame: bytes, kind: str, family: int) -> int:
    """The port or identifier that masquerading chose."""
    inner = layers(frame).payload.payload
    return inner.id if kind == "echo" else inner.sport


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["tcp", "udp", "echo"])
def test_masqueraded_and_back(world, family, kind):
    f = family
    world.publish(base())
    there = {"tcp": syn(dport=443), "udp": udp(), "echo": echo(f)}[kind]
    first = send(world, "from_pod", from_pod(A) / ip(f, "a", "world") / there, at_pod(A), REDIRECT)
    port = chosen(first.packet, kind, f)
    assert 10000 <= port <= 29999
    name = "id" if kind == "echo" else "sport"
    same_frame(
        first.packet,
        to_world() / ip(f, "masq", "world", ttl=63) / ported(there, **{name: port}),
    )
    back = {
        "tcp": lambda p: tcp(443, p, "SA"),
        "udp": lambda p: udp(53, p),
        "echo": lambda p: echo(f, p, reply=True),
    }[kind]
    origin = 7 if kind == "echo" else 40000
    send(
        world,
        "from_net",
        wire() / ip(f, "world", "masq") / back(port),
        OUTSIDE,
        REDIRECT,
        to_pod(A) / ip(f, "world", "a") / back(origin),
    )
    [(map_name, entry)] = world.tracked()
    assert map_name == "connections" and entry["state"] == 2
    again = send(world, "from_pod", from_pod(A) / ip(f, "a", "world") / there, at_pod(A), REDIRECT)
    assert chosen(again.packet, kind, f) == port and not again.events


@pytest.mark.parametrize("family", FAMILIES)
def test_udp_without_checksum_stays_without(world, family):
    """RFC 768: zero means none; translating must not make up one."""
    if family == 6:
        pytest.skip("IPv6 has no UDP without checksum")
    world.publish(base())
    out = send(
        world,
        "from_pod",
        from_pod(A) / ip(4, "a", "world") / Udp(sport=5, dport=6, chksum=0) / Raw(b"x"),
        at_pod(A),
        REDIRECT,
    )
    assert layers(out.packet)[Udp].chksum == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_unasked_packets_to_the_masquerade_address_go_up_the_stack(world, family):
    world.publish(base())
    frame = wire() / ip(family, "world", "masq") / udp(53, 12345)
    send(world, "from_net", frame, OUTSIDE, NEXT, frame)
    assert world.tracked() == []


SERVICES = [
    # kind, backend's slot and name, service port, backend port
    ("tcp", B, "b", 80, 8080),
    ("udp", B, "b", 53, 5353),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "slot", "name", "port", "target"), SERVICES)
def test_service_and_reply(world, family, kind, slot, name, port, target):
    f = family
    world.publish(base())
    there = {"tcp": lambda p: syn(dport=p), "udp": lambda p: udp(dport=p)}[kind]
    back = {"tcp": lambda p: tcp(p, 40000, "SA"), "udp": lambda p: udp(p, 40000)}[kind]
    for _ in range(2):  # first packet and a later one
        first = send(
            world,
            "from_pod",
            from_pod(A) / ip(f, "a", "svc") / there(port),
            at_pod(A),
            REDIRECT,
            to_pod(slot) / ip(f, "a", name) / there(target),
        )
    assert not first.events
    send(
        world,
        "from_pod",
        from_pod(slot) / ip(f, name, "a") / back(target),
        at_pod(slot),
        REDIRECT,
        to_pod(A) / ip(f, "svc", "a") / back(port),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_service_with_a_remote_backend_and_its_reply(world, family):
    f = family
    world.publish(base())
    send(
        world,
        "from_pod",
        from_pod(A) / ip(f, "a", "svc") / syn(dport=83),
        at_pod(A),
        REDIRECT,
        to_hop() / ip(f, "a", "remote", ttl=63) / syn(dport=8083),
    )
    send(
        world,
        "from_net",
        wire() / ip(f, "remote", "a") / tcp(8083, 40000, "SA"),
        UNDERLAY,
        REDIRECT,
        to_pod(A) / ip(f, "svc", "a") / tcp(83, 40000, "SA"),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_service_with_a_backend_in_the_world_is_translated_twice(world, family):
    f = family
    world.publish(base())
    first = send(
        world, "from_pod", from_pod(A) / ip(f, "a", "svc") / syn(dport=82), at_pod(A), REDIRECT
    )
    port = chosen(first.packet, "tcp", f)
    same_frame(
        first.packet, to_world() / ip(f, "masq", "world", ttl=63) / syn(sport=port, dport=443)
    )
    send(
        world,
        "from_net",
        wire() / ip(f, "world", "masq") / tcp(443, port, "SA"),
        OUTSIDE,
        REDIRECT,
        to_pod(A) / ip(f, "svc", "a") / tcp(82, 40000, "SA"),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_hairpin_and_its_reply(world, family):
    """A pod that is its own backend sees the service as its peer, both ways."""
    f = family
    world.publish(base().isolate(A, 1).isolate(A, 2))
    send(
        world,
        "from_pod",
        from_pod(A) / ip(f, "a", "svc") / syn(dport=81),
        at_pod(A),
        REDIRECT,
        to_pod(A) / ip(f, "svc", "a") / syn(dport=8081),
    )
    for _ in range(2):
        send(
            world,
            "from_pod",
            from_pod(A) / ip(f, "a", "svc") / tcp(8081, 40000, "SA"),
            at_pod(A),
            REDIRECT,
            to_pod(A) / ip(f, "svc", "a") / tcp(81, 40000, "SA"),
        )
        world.next_epoch()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("peer", ["b", "remote"])
def test_reply_passes_without_a_verdict(world, family, peer):
    f = family
    world.publish(base())
    send(world, "from_pod", from_pod(A) / ip(f, "a", peer) / syn(), at_pod(A), REDIRECT)
    if peer == "b":
        frame, program, at = from_pod(B), "from_pod", at_pod(B)
    else:
        frame, program, at = wire(), "from_net", UNDERLAY
    reply = send(
        world,
        program,
        frame / ip(f, peer, "a") / tcp(80, 40000, "SA"),
        at,
        REDIRECT,
        to_pod(A) / ip(f, peer, "a") / tcp(80, 40000, "SA"),
    )
    assert reply.events == []


@pytest.mark.parametrize("family", FAMILIES)
def test_reply_to_the_host_goes_up_the_stack(world, family):
    world.publish(base().isolate(A, 2))
    send(world, "to_pod", to_pod(A) / ip(family, "host", "a") / syn(), at_pod(A), NEXT)
    send(
        world,
        "from_pod",
        from_pod(A) / ip(family, "a", "host") / tcp(80, 40000, "SA"),
        at_pod(A),
        NEXT,
    )


# ---- ICMP errors ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_error_about_a_masqueraded_packet_reaches_the_pod(world, family):
    """From a router that is no end of the connection; the quote is translated back."""
    f, router = family, {4: "198.51.100.254", 6: "2001:db8::fe"}[family]
    world.publish(base().isolate(A, 1))
    first = send(world, "from_pod", from_pod(A) / ip(f, "a", "world") / udp(), at_pod(A), REDIRECT)
    port = chosen(first.packet, "udp", f)
    quoted = ip(f, "masq", "world") / udp(port)
    out = send(
        world,
        "from_net",
        wire() / ip(f, router, "masq") / unreachable(f, quoted),
        OUTSIDE,
        REDIRECT,
    )
    same_error(out.packet, to_pod(A) / ip(f, router, "a"), ip(f, "a", "world") / udp(), f)


@pytest.mark.parametrize("family", FAMILIES)
def test_error_about_a_masqueraded_echo_reaches_the_pod(world, family):
    f = family
    world.publish(base())
    first = send(
        world, "from_pod", from_pod(A) / ip(f, "a", "world") / echo(f), at_pod(A), REDIRECT
    )
    quoted = ip(f, "masq", "world") / echo(f, chosen(first.packet, "echo", f))
    out = send(
        world,
        "from_net",
        wire() / ip(f, "world", "masq") / unreachable(f, quoted),
        OUTSIDE,
        REDIRECT,
    )
    same_error(out.packet, to_pod(A) / ip(f, "world", "a"), ip(f, "a", "world") / echo(f), f)


@pytest.mark.parametrize("family", FAMILIES)
def test_error_of_a_backend_speaks_of_the_service(world, family):
    f = family
    world.publish(base())
    sent = from_pod(A) / ip(f, "a", "svc") / udp()
    send(world, "from_pod", sent, at_pod(A), REDIRECT)
    out = send(
        world,
        "from_pod",
        from_pod(B) / ip(f, "b", "a") / unreachable(f, ip(f, "a", "b") / udp(dport=5353)),
        at_pod(B),
        REDIRECT,
    )
    same_error(out.packet, to_pod(A) / ip(f, "svc", "a"), ip(f, "a", "svc") / udp(), f)


@pytest.mark.parametrize("family", FAMILIES)
def test_error_of_a_client_about_a_reply_reaches_the_backend(world, family):
    f = family
    world.publish(base())
    send(world, "from_pod", from_pod(A) / ip(f, "a", "svc") / udp(), at_pod(A), REDIRECT)
    send(world, "from_pod", from_pod(B) / ip(f, "b", "a") / udp(5353, 40000), at_pod(B), REDIRECT)
    out = send(
        world,
        "from_pod",
        from_pod(A) / ip(f, "a", "svc") / unreachable(f, ip(f, "svc", "a") / udp(53, 40000)),
        at_pod(A),
        REDIRECT,
    )
    same_error(out.packet, to_pod(B) / ip(f, "a", "b"), ip(f, "b", "a") / udp(5353, 40000), f)


@pytest.mark.parametrize("family", FAMILIES)
def test_error_of_a_pod_about_a_masqueraded_reply_leaves_as_the_node(world, family):
    f = family
    world.publish(base())
    first = send(world, "from_pod", from_pod(A) / ip(f, "a", "world") / udp(), at_pod(A), REDIRECT)
    port = chosen(first.packet, "udp", f)
    out = send(
        world,
        "from_pod",
        from_pod(A) / ip(f, "a", "world") / unreachable(f, ip(f, "world", "a") / udp(53, 40000)),
        at_pod(A),
        REDIRECT,
    )
    same_error(
        out.packet,
        to_world() / ip(f, "masq", "world", ttl=63),
        ip(f, "world", "masq") / udp(53, port),
        f,
    )


def same_error(found: bytes, head, quoted, family: int) -> None:
    """The frame is `head` and an unreachable that quotes `quoted`; the outer checksums are
    right. A quoted UDP or ICMP checksum stays as its sender's NAT saw it, so it is not compared.
    """
    frame = layers(found)
    start = 14 + (20 if family == 4 else 40)
    wanted = bytes(head / unreachable(family, quoted))
    at = start + 8 + (20 if family == 4 else 40)
    inner_checksum = at + (2 if quoted.haslayer(ICMP) or b"ping" in bytes(quoted) else 6)
    blank = slice(inner_checksum, inner_checksum + 2)

    def without(raw: bytes) -> bytes:
        raw = bytearray(raw)
        raw[blank] = bytes(2)
        raw[start + 2 : start + 4] = bytes(2)
        return bytes(raw)

    assert without(found) == without(wanted), frame.show2(dump=True)
    # The ICMP checksum is right for what is really there.
    rebuilt = frame.copy()
    icmp = rebuilt.getlayer(2)
    kept = icmp.cksum if hasattr(icmp, "cksum") else icmp.chksum
    recomputed = type(frame)(bytes(frame.__class__(src=frame.src, dst=frame.dst) / _fresh(frame)))
    inner = recomputed.getlayer(2)
    assert kept == (inner.cksum if hasattr(inner, "cksum") else inner.chksum)


def _fresh(frame):
    """The IP packet again with its ICMP checksum computed, the quote as raw bytes."""
    network = frame.payload.copy()
    icmp = network.payload.copy()
    quote = bytes(network.payload)[8:]
    icmp.remove_payload()
    if isinstance(network, IP):
        del icmp.chksum
    else:
        assert isinstance(network, IPv6)
        del icmp.cksum
    network.remove_payload()
    return network / icmp / Raw(quote)


@pytest.mark.parametrize("family", FAMILIES)
def test_unrelated_error_is_judged_as_a_protocol_without_ports(world, family):
    f = family
    quote = ip(f, "a", "b") / udp(1, 2)
    frame = wire() / ip(f, "remote", "a") / unreachable(f, quote)
    world.publish(base().isolate(A, 1, {(4, 0): 31}))
    outcome = send(world, "from_net", frame, UNDERLAY, REDIRECT)
    assert [e["reason"] for e in outcome.events] == [31]
    world.clear()
    world.publish(base().isolate(A, 1, {(4, 1): 31}))
    outcome = send(world, "from_net", frame, UNDERLAY, DROP)
    assert [(e["cause"], e["reason"]) for e in outcome.events] == [("policy", 77)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("source", "slot", "target"),
    [
        pytest.param("a", A, "remote", id="to somebody else"),
        pytest.param("c", 2, "b", id="by somebody else"),
    ],
)
def test_a_quote_is_no_pass(world, family, source, slot, target):
    """A pod quotes a live connection a → b … to whom it may not talk, or one of others."""
    f = family
    world.publish(base())
    send(world, "from_pod", from_pod(B) / ip(f, "b", "a") / udp(9, 10), at_pod(B), REDIRECT)
    world.publish(base().isolate(slot, 2))
    outcome = send(
        world,
        "from_pod",
        from_pod(slot) / ip(f, source, target) / unreachable(f, ip(f, "b", "a") / udp(9, 10)),
        at_pod(slot),
        DROP,
    )
    assert [e["cause"] for e in outcome.events] == ["unrelated-error"]


def test_addresses_of_the_scene_are_distinct():
    for names in ADDRESSES.values():
        assert len(set(names.values())) == len(names) - 1  # host and masq are one

"""Records and counters: what a run tells, exactly, and what a dry run leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scapy.layers.l2 import ARP

from lockgate.observer.records import events_of
from tests.bytecode.goldens import (
    ADDRESSES,
    CLASS,
    FAMILIES,
    IDS,
    A,
    B,
    at_pod,
    base,
    echo,
    from_pod,
    ip,
    syn,
    to_pod,
    udp,
    wire,
)
from tests.bytecode.world import (
    DROP,
    DRY_MARK,
    EGRESS,
    IFINDEX_BASE,
    INGRESS,
    NEXT,
    REMEMBERED,
    UNDERLAY,
)

EVENTS, LOST, FORWARDED, CAUSE = 0, 1, 2, 8  # enum counter


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_verdict(world, family):
    known = ADDRESSES[family]
    world.publish(base().isolate(B, INGRESS, {(CLASS["a"], 2): 6}))
    frame = bytes(from_pod(A) / ip(family, "a", "svc") / syn())
    egress, ingress = world.run("from_pod", frame, at_pod(A)).events
    assert ingress.pop("time") >= egress.pop("time") > 0
    common = {
        "saddr": known["a"],
        "daddr": known["b"],
        "sport": 40000,
        "dport": 8080,
        "proto": 6,
        "type": 1,
        "verdict": 1,
        "tcp_flags": 2,
        "cause": "none",
        "place": 1,
        "captured": 0,
        "src_endpoint": IDS["a"],
        "dst_endpoint": IDS["b"],
        "service": 21,
        "ifindex": IFINDEX_BASE + A,
        "length": len(frame) - 14,
        "epoch": world.publisher.epoch,
        "line": 0,
    }
    unisolated = 0x80000000
    assert egress == common | {
        "direction": EGRESS,
        "class": CLASS["b"],
        "reason": 0,
        "pending": unisolated,
    }
    assert ingress == common | {
        "direction": INGRESS,
        "class": CLASS["a"],
        "reason": 6,
        "pending": 0,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_icmp_shows_type_and_code_for_ports(world, family):
    world.publish(base())
    outcome = world.run("from_pod", bytes(from_pod(A) / ip(family, "a", "b") / echo(family)),
                        at_pod(A))  # fmt: skip
    first = outcome.events[0]
    assert (first["sport"], first["dport"]) == (8 if family == 4 else 128, 0)


def test_a_drop_names_its_line(world):
    world.publish(base())
    [event] = world.run("from_pod", bytes(from_pod(A) / ip(4, "c", "b") / syn()), at_pod(A)).events
    assert event["line"] > 0 and event["type"] == 2 and event["direction"] == 0


@pytest.mark.parametrize(("want", "have"), [(16, 16), (128, 128), (4000, 128)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_bytes_ride_along(world, family, want, have):
    world.publish(base())
    world.state.view["capture"][0] = want
    frame = bytes(from_pod(A) / ip(family, "a", "b") / udp()) + bytes(range(100))
    outcome = world.run("from_pod", frame, at_pod(A))
    assert outcome.events == []  # they are in the other ring
    records = world.ring_raw.read()
    events, heads = events_of(records["event"], records["head"])
    assert events["direction"].tolist() == [EGRESS, INGRESS] and len(heads) == 2
    for event, row in zip(events, heads, strict=True):
        captured = int(event["captured"])
        head = row.tobytes()
        assert captured == min(have, len(frame))
        assert head[:captured] == frame[:captured] and not any(head[captured:])


def test_a_short_packet_is_captured_whole(world):
    world.publish(base())
    world.state.view["capture"][0] = 128
    frame = bytes(from_pod(A) / ip(4, "a", "b") / syn())
    world.run("from_pod", frame, at_pod(A))
    record = world.ring_raw.read()[0]
    assert int(record["event"]["captured"]) == len(frame)


@pytest.mark.parametrize("capture", [0, 64], ids=["events", "events_raw"])
def test_losses_are_counted_exactly(world, capture):
    """A ring that nobody reads: what is not in it is in the counter."""
    world.publish(base())
    world.state.view["capture"][0] = capture
    runs = 1000
    fd = world.object.prog_fd("from_pod")
    from lockgate.bpf import syscall

    context = syscall.skb_context(ifindex=at_pod(A))
    for n in range(runs):
        frame = bytearray(FRAME)
        frame[34:36] = (1024 + n).to_bytes(2, "big")
        syscall.prog_test_run(fd, bytes(frame), context)
    ring = world.ring_raw if capture else world.ring
    records = ring.read()
    got = len(events_of(records["event"] if capture else records)[0])
    counters = world.counters()
    assert counters[LOST] > 0
    assert got == counters[EVENTS] and got + counters[LOST] == 2 * runs
    assert counters[FORWARDED] == runs


FRAME = bytes(from_pod(A) / ip(4, "a", "b") / syn())


def test_drops_are_counted_by_cause(world):
    world.publish(base())
    number = {name: n for n, name in world.causes.items()}
    for _ in range(3):
        world.run("from_pod", bytes(from_pod(A) / ip(4, "c", "b") / syn()), at_pod(A))
    world.run("from_pod", FRAME, at_pod(9))
    counters = world.counters()
    assert counters[CAUSE + number["spoofed-source"]] == 3
    assert counters[CAUSE + number["not-ready"]] == 1
    assert counters[FORWARDED] == 0


DRY = [
    pytest.param("from_pod", from_pod(A) / ip(4, "a", "b") / syn(), at_pod(A), id="local"),
    pytest.param("from_pod", from_pod(A) / ip(4, "a", "world") / udp(), at_pod(A), id="world"),
    pytest.param("from_pod", from_pod(A) / ip(6, "a", "svc") / syn(), at_pod(A), id="service"),
    pytest.param("from_pod", from_pod(A) / ip(4, "a", "svc") / syn(dport=90), at_pod(A),
                 id="refused"),
    pytest.param("from_pod", from_pod(A) / ip(4, "c", "b") / syn(), at_pod(A), id="spoofed"),
    pytest.param("from_pod", from_pod(A) / ip(4, "a", "b") / syn(), at_pod(9), id="not ready"),
    pytest.param("from_pod", from_pod(A) / ip(4, "a", "b", flags="MF") / udp(), at_pod(A),
                 id="fragment"),
    pytest.param("from_pod", from_pod(A) / ip(4, "a", "224.0.0.1") / udp(), at_pod(A),
                 id="multicast"),
    pytest.param("from_pod", from_pod(A) / ip(4, "a", "unroutable") / udp(), at_pod(A),
                 id="no route"),
    pytest.param("from_net", wire() / ip(6, "remote", "a") / syn(), UNDERLAY, id="from the net"),
    pytest.param("to_pod", to_pod(A) / ip(6, "host", "a") / syn(), at_pod(A), id="to the pod"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "frame", "at"), DRY)
def test_a_dry_run_leaves_nothing(world, program, frame, at):
    services = {key: replace(one, affinity=10) for key, one in base().services.items()}
    world.publish(base().but(services=services))
    outcome = world.run(program, bytes(frame), at, DRY_MARK, (0xFF,) * 5)
    assert outcome.verdict == DROP and outcome.events == []
    assert outcome.cb[0] != 0xFF  # it answered
    assert {name: len(getattr(world, name)) for name in REMEMBERED} == dict.fromkeys(REMEMBERED, 0)
    assert not world.counters().any() and len(world.ring_raw.read()) == 0


def test_a_dry_run_does_not_disturb_a_live_connection(world):
    """It judges as if new, though the connection is known."""
    world.publish(base())
    world.run("from_pod", FRAME, at_pod(A))
    before = world.tracked()
    outcome = world.run("from_pod", FRAME, at_pod(A), DRY_MARK)
    assert outcome.cb[0] == 1 | (1 << EGRESS | 1 << INGRESS) << 16
    assert world.tracked() == before


@pytest.mark.parametrize(
    ("own", "verdict"), [pytest.param(1, 1, id="own socket"), pytest.param(0, 0, id="forwarded")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dry_run_says_whose_socket(world, family, own, verdict):
    world.publish(base().isolate(A, INGRESS))
    frame = bytes(to_pod(A) / ip(family, "host", "a") / syn())
    outcome = world.run("to_pod", frame, at_pod(A), DRY_MARK, (own,))
    assert outcome.cb[0] & 1 == verdict


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("b", 1 << 28 | B),
        ("remote", 2 << 28 | 1),
        ("far", 2 << 28 | 2),
        ("world", 2 << 28 | 3),
        ("host", 3 << 28),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dry_run_tells_the_way(world, family, target, wanted):
    world.publish(base())
    frame = bytes(from_pod(A) / ip(family, "a", target) / syn())
    assert world.run("from_pod", frame, at_pod(A), DRY_MARK).cb[3] == wanted


def test_other_marks_are_no_dry_runs(world):
    world.publish(base())
    assert world.run("from_pod", FRAME, at_pod(A), DRY_MARK ^ 1).verdict != DROP
    assert len(world.tracked()) == 1


NOT_READY = 22  # enum cause
WITHOUT_STATE = [
    pytest.param(ip(4, "a", "b") / syn(), (ADDRESSES[4]["a"], 40000), id="IPv4"),
    pytest.param(ip(6, "a", "b") / udp(), (ADDRESSES[6]["a"], 40000), id="IPv6"),
    pytest.param(ARP(psrc=ADDRESSES[4]["a"]), ("::", 0), id="ARP"),
    pytest.param(ip(4, "a", "b", ihl=4) / syn(), ("::", 0), id="malformed"),
]


@pytest.mark.parametrize(("packet", "source"), WITHOUT_STATE)
def test_a_pod_that_is_not_published_is_refused_and_the_record_says_so(world, packet, source):
    world.publish(base())
    outcome = world.run("from_pod", bytes(from_pod(A) / packet), at_pod(9))
    assert outcome.verdict == DROP
    [event] = outcome.events
    assert (event["type"], event["cause"], event["place"]) == (2, "not-ready", 1)
    assert event["ifindex"] == at_pod(9) and event["src_endpoint"] == 0 and event["line"] > 0
    assert (event["saddr"], event["sport"]) == source
    assert world.counters()[CAUSE + NOT_READY] == 1


def test_nothing_is_published_yet(world):
    """Epoch 0: pods are refused, the node's own traffic is left alone."""
    world.publish(base())
    epoch = int(world.state.view["epoch"][0])
    world.state.view["epoch"][0] = 0
    try:
        outcome = world.run("from_pod", FRAME, at_pod(A))
        assert outcome.verdict == DROP
        [event] = outcome.events
        assert (event["cause"], event["place"], event["src_endpoint"]) == ("not-ready", 1, IDS["a"])
        assert world.counters()[CAUSE + NOT_READY] == 1
        frame = bytes(wire() / ip(4, "remote", "a") / syn())
        assert world.run("from_net", frame, UNDERLAY).verdict == NEXT
    finally:
        world.state.view["epoch"][0] = epoch

"""The short way of known connections (bpf/fast.h) does what the long way does.

The object is loaded a second time over the same maps, with the short way switched off.
Each packet meets the same entry twice, once by each way: answer, frame, context, entries
and events must be the same.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from lockgate.bpf import clock, syscall
from lockgate.bpf.maps import PerCpuArray
from lockgate.bpf.object import Object
from lockgate.objects.address import parse_address
from tests.bytecode.goldens import ADDRESSES, CLASS, FAMILIES, IDS, A, B, at_pod, base
from tests.bytecode.world import (
    DRY_MARK,
    INGRESS,
    NEXT,
    OBJECT,
    OUTSIDE,
    REDIRECT,
    TCP,
    UDP,
    UNDERLAY,
    World,
    host_mac,
    mac_bytes,
    pod_mac,
)

NEW, ESTABLISHED, CLOSING, CLOSED = 1, 2, 3, 4  # enum ct_state
ORIGIN_HI, EXEMPT, NAT_REPLY = 1, 2, 8  # enum ct_flag
FIN, SYN, RST, ACK = 1, 2, 4, 16
TO_LOCAL, TO_HOP, TO_HOST = 1, 2, 3  # enum target_kind
GSO_SIZE = 176  # offset of __sk_buff.gso_size
PORTS = 40000, 80


def target(kind: int, index: int = 0) -> int:
    return kind << 28 | index


@dataclass(frozen=True)
class Case:
    """A packet of a connection and the connection's entry. `source`, `target`: names of ends."""

    program: str = "from_pod"
    at: int = at_pod(A)
    family: int = 4
    source: str = "a"
    destination: str = "b"
    # The frame
    proto: int = TCP
    tcp_flags: int = ACK
    source_mac: str = pod_mac(A)
    ttl: int = 64
    first: int | None = None  # first byte of the IP header
    next: int | None = None  # protocol field, if it shall not be true
    fragment: int = 0  # IPv4: flags and offset
    data_offset: int = 0x50
    payload: int = 4
    length: int = 0  # added to the true length in the IP header
    gso: int = 0
    mark: int = 0
    # The entry
    state: int = ESTABLISHED
    flags: int = 0
    reply: bool = False
    age: int = 3
    old_epoch: bool = False
    way: int = target(TO_LOCAL, B)
    back: int = target(TO_LOCAL, A)
    # What becomes of it: source, port, port of the destination, seen how many seconds ago
    becomes: tuple[str, int, int, int] | None = None

    def frame(self) -> bytes:
        src, dst = (parse_address(self.address(n)) for n in (self.source, self.destination))
        ports = struct.pack("!HH", *PORTS)
        if self.proto == TCP:
            l4 = ports + struct.pack("!IIBBHHH", 7, 9, self.data_offset, self.tcp_flags, 99, 1, 0)
        else:
            l4 = ports + struct.pack("!HH", 8 + self.payload, 0)
        body = l4 + bytes(self.payload)
        proto = self.proto if self.next is None else self.next
        if self.family == 4:
            first = 0x45 if self.first is None else self.first
            length = 20 + len(body) + self.length
            sum_ = (
                self.ttl * 2579 + self.payload * 31 + 0xFFF0
            ) & 0xFFFF  # any will do: it is mended
            head = struct.pack(
                "!BBHHHBBH4s4s", first, 0, length & 0xFFFF, 1, self.fragment, self.ttl, proto, sum_,
                src[12:], dst[12:],
            )  # fmt: skip
        else:
            first = 0x60 if self.first is None else self.first
            length = max(0, len(body) + self.length)
            head = struct.pack("!BBHHBB16s16s", first, 0, 0, length, proto, self.ttl, src, dst)
        kind = b"\x08\x00" if self.family == 4 else b"\x86\xdd"
        return mac_bytes(host_mac(A)) + mac_bytes(self.source_mac) + kind + head + body

    def address(self, name: str) -> str:
        return ADDRESSES[self.family].get(name, name)

    def entry(self, world: World, now: int) -> tuple[np.ndarray, np.ndarray]:
        """Key and value, as bpf/conntrack.h makes them."""
        ends = [
            (parse_address(self.address(name)), port)
            for name, port in zip((self.source, self.destination), PORTS, strict=True)
        ]
        # The order of the addresses is that of their words, upper half first.
        low, high = sorted(
            ends, key=lambda e: (*struct.unpack("<QQ", e[0])[::-1], struct.pack("!H", e[1])[::-1])
        )
        key = np.zeros((), world.dtype("ct_key"))
        key["lo"] = np.frombuffer(low[0], np.uint8)
        key["hi"] = np.frombuffer(high[0], np.uint8)
        key["lo_port"], key["hi_port"] = low[1], high[1]
        key["proto"] = self.proto
        value = np.zeros((), world.dtype("ct"))
        sender_high = high == ends[0]
        value["seen"] = (now - self.age) & 0xFFFFFFFF
        value["epoch"] = world.publisher.epoch - self.old_epoch
        value["state"] = self.state
        value["flags"] = self.flags | (ORIGIN_HI if sender_high != self.reply else 0)
        ids = [IDS.get(self.source, 0), IDS.get(self.destination, 0)]
        value["src_endpoint"], value["dst_endpoint"] = ids[::-1] if self.reply else ids
        value["target"] = (self.back, self.way) if self.reply else (self.way, self.back)
        value["tag"] = tag_of(key)
        return key, value

    def translation(self, world: World, now: int) -> tuple[np.ndarray, np.ndarray]:
        """Key and value in `nat`."""
        assert self.becomes is not None
        source, sport, dport, age = self.becomes
        key, value = np.zeros((), world.dtype("tuple")), np.zeros((), world.dtype("nat"))
        for one, name, ports in (
            (key, self.source, PORTS),
            (value["to"], source, (sport, dport)),
        ):
            one["saddr"] = np.frombuffer(parse_address(self.address(name)), np.uint8)
            one["daddr"] = np.frombuffer(parse_address(self.address(self.destination)), np.uint8)
            one["sport"], one["dport"], one["proto"] = *ports, self.proto
        value["seen"] = now - age
        return key, value


def tag_of(key: np.ndarray) -> int:
    """ct_tag() in bpf/conntrack.h."""
    _, lo, _, hi, ends = struct.unpack("<5Q", key.tobytes())
    factor, whole = 0x9E3779B97F4A7C15, (1 << 64) - 1
    x = lo * factor & whole
    x = (x ^ x >> 32 ^ hi) * factor & whole
    x = (x ^ x >> 32 ^ ends) * factor & whole
    return int(x >> 48)


class Ways:
    """The same packet by the short and by the long way."""

    def __init__(self, world: World) -> None:
        self.world, self.long = world, Object(OBJECT)
        for name in self.long.maps:
            if not name.startswith("."):
                self.long.reuse_map(name, world.object.map_fd(name))
        self.long.set_rodata({"config_fast": 0} | clock.constants())
        self.long.load()
        self.packets = PerCpuArray.of(world.object, "packets", world.dtype("packet"))

    def close(self) -> None:
        self.packets.close()
        self.long.close()

    def run(self, loaded: Object, case: Case) -> tuple[dict[str, Any], bool]:
        """All that a run did, times apart, and whether it took the long way."""
        world = self.world
        world.clear()
        # The long way writes down what it read of each packet: have another's there.
        mark = world.run("from_net", b"\0" * 12 + b"\x08\x00" + b"\x45" + bytes(59), UNDERLAY)
        assert mark.verdict == NEXT
        values = self.packets.values()
        # The programs' clock may be a second behind ours.
        now, before = int(values["now_s"].max()), values.tobytes()
        key, value = case.entry(world, now)
        world.connections.set(key, value)
        if case.becomes is not None:
            world.nat.set(*case.translation(world, now))
        context = bytearray(syscall.skb_context(mark=case.mark, ifindex=case.at))
        struct.pack_into("<I", context, GSO_SIZE, case.gso)
        done = syscall.prog_test_run(
            loaded.prog_fd(case.program), case.frame(), bytes(context), name=case.program
        )
        long = self.packets.values().tobytes() != before
        tracked = [
            (name, {**fields, "seen": now - fields["seen"] <= 1})
            for name, fields in world.tracked()
        ]
        events = [{**event, "time": 0} for event in world.events()]
        found = {
            "answer": done.retval,
            "frame": done.data.hex(),
            "cb": done.cb,
            "entries": tracked,
            "events": events,
            "counters": world.counters().tolist(),
        }
        return found, long

    def compare(self, case: Case) -> tuple[dict[str, Any], bool]:
        """What both ways did, and whether the short way took it."""
        short, long = self.run(self.world.object, case)
        other, _ = self.run(self.long, case)
        assert short == other, case
        return short, not long


@pytest.fixture
def ways(world: World) -> Iterator[Ways]:
    scene = base()
    world.publish(scene.isolate(B, INGRESS, {(CLASS["a"], 1): 5}))
    found = Ways(world)
    yield found
    found.close()


def in_family(case: Case, family: int) -> Case:
    return replace(case, family=family)


HOP = target(TO_HOP, 1)
FROM_NET = Case(
    "from_net", UNDERLAY, source="remote", destination="a", way=target(TO_LOCAL, A), back=HOP
)
TO_POD = replace(FROM_NET, program="to_pod", at=at_pod(A), source="host", back=target(TO_HOST))

SHORT = {
    "pod to pod": (Case(), REDIRECT),
    "pod to pod, udp": (Case(proto=UDP), REDIRECT),
    "a reply": (Case(reply=True), REDIRECT),
    "the first reply": (Case(state=NEW, reply=True, tcp_flags=SYN | ACK), REDIRECT),
    "a fin": (Case(tcp_flags=FIN | ACK), REDIRECT),
    "a reset": (Case(tcp_flags=RST | ACK), REDIRECT),
    "closing": (Case(state=CLOSING, tcp_flags=FIN | ACK, flags=32), REDIRECT),
    "pod to another node": (Case(destination="remote", way=HOP), REDIRECT),
    "pod to its node": (Case(destination="host", way=target(TO_HOST)), NEXT),
    "another node to a pod": (FROM_NET, REDIRECT),
    "the node to its pod": (TO_POD, NEXT),
    "a service's answer": (
        Case(flags=NAT_REPLY, reply=True, becomes=("svc", 443, PORTS[1], 0)),
        REDIRECT,
    ),
    "a service's answer, port and all": (
        Case(flags=NAT_REPLY, reply=True, becomes=("svc", PORTS[0], PORTS[1], 0)),
        REDIRECT,
    ),
    "a service's answer to another node": (
        Case(
            destination="remote",
            way=HOP,
            flags=NAT_REPLY,
            reply=True,
            becomes=("svc", 443, PORTS[1], 0),
        ),
        REDIRECT,
    ),
    "a segment to be cut": (Case(destination="remote", way=HOP, gso=1300, payload=3000), REDIRECT),
}

LONG = {
    "dry run": Case(mark=DRY_MARK),
    "older epoch": Case(old_epoch=True),
    "timed out": Case(state=CLOSED, age=60),
    "syn": Case(tcp_flags=SYN),
    "translated, who knows to what": Case(flags=NAT_REPLY, reply=True),
    "translated, the first in a second": Case(
        flags=NAT_REPLY, reply=True, becomes=("svc", 443, PORTS[1], 1)
    ),
    "translated for a twin": Case(flags=NAT_REPLY, reply=True, becomes=("svc", 443, 1024, 0)),
    "translated, udp": Case(
        proto=UDP, flags=NAT_REPLY, reply=True, becomes=("svc", 443, PORTS[1], 0)
    ),
    "masqueraded": Case(flags=4, becomes=("masq", 443, PORTS[1], 0)),
    "a service's answer to its node": Case(
        destination="host",
        way=target(TO_HOST),
        flags=NAT_REPLY,
        reply=True,
        becomes=("svc", 443, PORTS[1], 0),
    ),
    "translated, from a card": replace(FROM_NET, flags=NAT_REPLY),
    "spoofed mac": Case(source_mac=pod_mac(B)),
    "spoofed source": Case(source="c"),
    "multicast": Case(destination="224.0.0.9"),
    "ttl at its end": Case(destination="remote", way=HOP, ttl=1),
    "too big": Case(destination="remote", way=HOP, payload=1400),
    "no way": Case(way=0),
    "dropping hop": Case(destination="unroutable", way=target(TO_HOP, 4)),
    "hop without MACs": Case(destination="far", way=target(TO_HOP, 2)),
    "pod that went": Case(way=target(TO_LOCAL, 9)),
    "options": Case(first=0x46, payload=40),
    "fragment": Case(fragment=0x2000),
    "later fragment": Case(fragment=0x0004),
    "other version": Case(first=0x55),
    "shorter than it says": Case(length=1),
    "header beyond its length": Case(length=-27, payload=20),
    "data offset": Case(data_offset=0x40),
    "other protocol": Case(next=47),
    "own address from a card": replace(FROM_NET, source="b", back=target(TO_LOCAL, B)),
    "from outside": replace(FROM_NET, at=OUTSIDE),
}
ONLY_IPV4 = {"multicast", "options", "fragment", "later fragment"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SHORT)
def test_the_short_way_takes(ways, name, family):
    case, answer = SHORT[name]
    found, short = ways.compare(in_family(case, family))
    assert short and found["answer"] == answer
    assert [fields["seen"] for _, fields in found["entries"]] == [True]


@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for n in LONG for f in FAMILIES if f == 4 or n not in ONLY_IPV4]
)
def test_the_short_way_leaves(ways, name, family):
    _, short = ways.compare(in_family(LONG[name], family))
    assert not short


def random_case(rng: random.Random) -> Case:
    """Mostly a plain packet of a living connection, with a few things changed."""
    kinds = {
        "from_pod": Case(),
        "from_net": FROM_NET,
        "to_pod": TO_POD,
    }
    case = kinds[rng.choices(list(kinds), (4, 2, 1))[0]]
    ways = [target(TO_LOCAL, A), target(TO_LOCAL, B), target(TO_LOCAL, 9), HOP, target(TO_HOST), 0]
    ways += [target(TO_HOP, n) for n in (2, 3, 4)]
    changes: dict[str, Any] = {
        "at": rng.choice([at_pod(A), at_pod(B), UNDERLAY, OUTSIDE]),
        "source": rng.choice(["a", "b", "c", "remote", "host"]),
        "destination": rng.choice(["a", "b", "remote", "far", "node", "host"]),
        "proto": UDP,
        "tcp_flags": rng.randrange(64),
        "source_mac": pod_mac(rng.randrange(3)),
        "ttl": rng.choice([0, 1, 2, 255]),
        "first": rng.randrange(256),
        "next": rng.choice([0, 1, 6, 17, 43, 44, 47, 51, 58, 60, 132]),
        "fragment": rng.choice([0x4000, 0x2000, 0x8000, rng.randrange(1 << 16)]),
        "data_offset": rng.randrange(256),
        "payload": rng.choice([0, 1, 12, 500, 1326, 1346, 1359, 1360, 1361, 1460, 3000]),
        "length": rng.randrange(-60, 4),
        "gso": rng.choice([1, 536, 1300, 1339, 1340, 1341, 1360, 1448]),
        "mark": rng.choice([1, DRY_MARK]),
        "state": rng.choice([NEW, ESTABLISHED, CLOSING, CLOSED]),
        "flags": rng.randrange(256) & ~(ORIGIN_HI | 4),  # a masquerade may choose another port
        "reply": True,
        "age": rng.choice([0, 9, 12, 58, 62, 178, 182, 3598, 3602, 432002]),
        "old_epoch": True,
        "way": rng.choice(ways),
        "back": rng.choice(ways),
    }
    names = rng.sample(sorted(changes), rng.choice([0, 1, 1, 2, 2, 3, 5]))
    if case.program == "to_pod" and "at" in names:
        names.remove("at")
    case = replace(case, family=rng.choice(FAMILIES), **{name: changes[name] for name in names})
    pods = [at_pod(A), at_pod(B)]
    if (case.at in pods) != (case.program != "from_net"):  # each program at its own interfaces
        case = replace(case, at=UNDERLAY if case.program == "from_net" else at_pod(A))
    return case


@pytest.mark.parametrize("seed", range(4))
def test_both_ways_agree(ways, seed):
    rng, taken = random.Random(f"ways/{seed}"), 0
    for _ in range(1000):
        _, short = ways.compare(random_case(rng))
        taken += short
    assert 200 < taken < 800  # the comparison sees both


def test_a_wrong_way_is_noticed(ways):
    """The comparison can fail: the long way meets an entry that leads elsewhere."""
    found, short = ways.compare(Case())
    other, _ = ways.run(ways.long, Case(way=HOP))
    assert short and found != other


def test_a_closed_connection_begins_again_in_its_entry(world):
    """No move through the half-open map: none is deleted, none evicted."""
    world.publish(base())
    ways = Ways(world)
    found, _ = ways.compare(Case(state=CLOSED, flags=16 | 32 | 128, tcp_flags=SYN))
    ways.close()
    ((name, fields),) = found["entries"]
    assert (name, fields["state"], fields["flags"] & ~ORIGIN_HI) == ("connections", NEW, 0)


@pytest.mark.parametrize("way", ["the same connection again", "the reply that opens it"])
def test_an_element_that_changed_hands_is_left_to_its_new_owner(world, way):
    """An LRU map gives elements to other keys while a program holds them. Then the tag is not
    that of the key that was looked up: nothing of it is taken for ours, nothing written to it."""
    world.publish(base())
    case = Case(state=CLOSED, tcp_flags=SYN) if way.startswith("the same") else Case(reply=True)
    now = int(time.clock_gettime(time.CLOCK_MONOTONIC))
    key, value = case.entry(world, now)
    value["tag"] ^= 1
    table = world.connections
    if case.reply:
        value["state"], table = NEW, world.half_open
    table.set(key, value)
    context = syscall.skb_context(ifindex=case.at)
    syscall.prog_test_run(world.object.prog_fd(case.program), case.frame(), context)
    ((name, fields),) = world.tracked()
    assert (name, fields["tag"]) == ("half_open", int(value["tag"]) if case.reply else tag_of(key))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"reply": True}, id="the other side begins"),
        pytest.param({"way": HOP}, id="the way is another"),
        pytest.param({"flags": EXEMPT}, id="it was exempt"),
    ],
)
def test_a_closed_connection_of_another_kind_goes(world, change):
    world.publish(base())
    ways = Ways(world)
    found, _ = ways.compare(Case(state=CLOSED, tcp_flags=SYN, **change))
    ways.close()
    ((name, fields),) = found["entries"]
    assert (name, fields["state"]) == ("half_open", NEW)

"""What the firewall passes and drops, packet by packet, and what it remembers and tells."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from socket import AF_INET, AF_INET6

import numpy as np
import pytest

from lockgate.agent.firewall_tables import Change, FirewallFull
from lockgate.bpf import syscall
from lockgate.compile.firewall import Facts, Rule, builtin_rules
from lockgate.compile.prefixes import parse
from lockgate.objects.address import parse_address
from tests.bytecode.firewall_world import FirewallWorld, frame

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

CLIENT, NODE, POD, OTHER = "198.51.100.9", "192.0.2.1", "10.0.1.2", "192.0.2.2"
CLIENT6, NODE6, POD6, OTHER6 = "2001:db8:c::9", "2001:db8:1::1", "fd00:1::2", "2001:db8:1::2"
DENY, ALLOW = Rule("object", "deny", (), 0, "a", 0), Rule("object", "allow", (), 0, "a", 1)
TCP, UDP, ICMP, ICMP6, SCTP, IGMP = 6, 17, 1, 58, 132, 2
LOCAL, HOST = 1, 4  # enum peer_kind
ACK, SYN, RST, FIN = 0x10, 0x02, 0x04, 0x01
FACTS = Facts(
    frozenset((f"{NODE}/32", f"{NODE6}/128", "10.0.1.0/24", "fd00:1::/64")),
    frozenset((f"{OTHER}/32", f"{OTHER6}/128", "10.0.2.0/24", "fd00:2::/64")),
    frozenset(("203.0.113.6/32",)),
)


@pytest.fixture(scope="module")
def _world() -> Iterator[FirewallWorld]:
    made = FirewallWorld(1000)
    yield made
    made.close()


@pytest.fixture
def world(_world: FirewallWorld) -> FirewallWorld:
    """Nothing but what is built in, at a card of the world."""
    _world.clear()
    _world.inside(False)
    change = Change()
    change.added = [(rule, prefixes, 0.0) for rule, (prefixes, _) in builtin_rules(FACTS).items()]
    _world.tables.apply(change)
    return _world


@pytest.fixture
def closed(world: FirewallWorld) -> FirewallWorld:
    """The default is Drop."""
    world.tables.rules.set_default(True)
    return world


def icmp(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("!BBHI", kind, 0, 0, 0) + body


def with_(packet: bytes, at: int, value: bytes) -> bytes:
    return packet[:at] + value + packet[at + len(value) :]


def tcp(flags: int) -> bytes:
    return frame(CLIENT, NODE, TCP, flags=flags)


# ---- Whatever the entries say ------------------------------------------------------

HEAD4 = 14
BAD: dict[str, tuple[bytes, str]] = {
    "an IPv4 header cut short": (frame(CLIENT, NODE)[:20], "malformed"),
    "longer than the frame": (with_(frame(CLIENT, NODE), HEAD4 + 2, b"\0\x60"), "malformed"),
    "a header of 16 bytes": (with_(frame(CLIENT, NODE), HEAD4, b"\x44"), "malformed"),
    "another version": (with_(frame(CLIENT, NODE), HEAD4, b"\x65"), "malformed"),
    "UDP cut short": (frame(CLIENT, NODE, UDP, payload=bytes(7)), "malformed"),
    "UDP longer than its packet": (
        frame(CLIENT, NODE, UDP, payload=struct.pack("!HHHH", 1, 2, 9, 0)),
        "malformed",
    ),
    "UDP shorter than its header": (
        frame(CLIENT6, NODE6, UDP, payload=struct.pack("!HHHH", 1, 2, 7, 0)),
        "malformed",
    ),
    "TCP with a data offset of 4": (
        with_(tcp(SYN), HEAD4 + 20 + 12, b"\x40"),
        "malformed",
    ),
    "TCP without a flag": (tcp(0), "malformed"),
    "TCP with SYN and FIN": (tcp(SYN | FIN), "malformed"),
    "TCP with SYN and RST": (tcp(SYN | RST), "malformed"),
    "a fragment that ends beyond 65,535": (
        with_(frame(CLIENT, NODE, ICMP, later=True), HEAD4 + 6, b"\x1f\xff"),
        "malformed",
    ),
    "a fragment within the TCP header": (
        with_(frame(CLIENT, NODE, TCP, later=True), HEAD4 + 6, b"\x00\x01"),
        "malformed",
    ),
    "IPv6 from an IPv4 address": (frame("::ffff:198.51.100.9", NODE6), "malformed"),
    "to a loopback address": (frame(CLIENT, "127.0.0.1"), "malformed"),
    "to ::1": (frame(CLIENT6, "::1"), "malformed"),
    "two fragment headers": (
        frame(
            CLIENT6,
            NODE6,
            44,
            payload=b"\x2c\0\0\x01\0\0\0\x01" + b"\x11\0\0\x01\0\0\0\x01" + bytes(8),
        ),
        "extension-header",
    ),
    "from loopback": (frame("127.0.0.1", NODE), "spoofed-source"),
    "from ::1": (frame("::1", NODE6), "spoofed-source"),
    "from a multicast address": (frame("224.0.0.9", NODE), "spoofed-source"),
    "from an IPv6 multicast address": (frame("ff02::1", NODE6), "spoofed-source"),
    "from the broadcast address": (frame("255.255.255.255", NODE), "spoofed-source"),
    "from 240.0.0.0/4": (frame("250.1.2.3", NODE), "spoofed-source"),
    "from 0.0.0.0/8": (frame("0.1.2.3", NODE), "spoofed-source"),
    "from nowhere to one": (frame("0.0.0.0", NODE), "spoofed-source"),
    "from :: to one": (frame("::", NODE6), "spoofed-source"),
    "from itself": (frame(CLIENT, CLIENT), "spoofed-source"),
    "from the node": (frame(NODE, CLIENT), "spoofed-source"),
    "from a pod of the node": (frame(POD, NODE), "spoofed-source"),
    "from another node, by a card of the world": (frame(OTHER, NODE), "spoofed-source"),
    "from a pod elsewhere, by a card of the world": (frame("fd00:2::9", NODE6), "spoofed-source"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_never_comes_in_whole_or_true(world: FirewallWorld, name: str) -> None:
    packet, cause = BAD[name]
    world.add(ALLOW, "0.0.0.0/0", "::/0")
    assert world.run(packet).cause == cause


GOOD: dict[str, bytes] = {
    "UDP": frame(CLIENT, NODE),
    "padded": frame(CLIENT, NODE) + bytes(10),
    "TCP over IPv6": frame(CLIENT6, NODE6, TCP),
    "from nowhere to all": frame("0.0.0.0", "255.255.255.255", dport=67),
    "from :: to multicast": frame("::", "ff02::1:ff00:1", ICMP6),
    "no IP": bytes(12) + b"\x08\x06" + bytes(28),
    "a protocol without ports": frame(CLIENT, NODE, 47),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_default_allows(world: FirewallWorld, name: str) -> None:
    assert world.run(GOOD[name]).cause == ""


def test_members_pass_by_cards_that_lead_to_them_and_no_entry_denies_them(
    closed: FirewallWorld,
) -> None:
    closed.add(DENY, "0.0.0.0/0", "::/0", f"{OTHER}/32", "10.0.2.9/32")
    closed.inside(True)
    for source, target in ((OTHER, NODE), (OTHER6, NODE6), ("10.0.2.9", POD)):
        assert closed.run(frame(source, target)).cause == ""
    assert closed.run(frame(CLIENT, NODE)).cause == "firewall"
    assert closed.run(frame("203.0.113.6", NODE)).cause == "", "an API server"


# ---- The default of Drop -------------------------------------------------------------


def connection(
    world: FirewallWorld, map_: str, client: str, server: str, sport: int, dport: int, proto: int
) -> None:
    """One that `client`, of this node, began."""
    table = getattr(world, map_)
    key = np.zeros(1, table.key_dtype)
    ends = [(parse_address(client), sport), (parse_address(server), dport)]

    def rank(end: tuple[bytes, int]) -> tuple[int, int, int]:
        low, high = struct.unpack("<QQ", end[0])
        return high, low, int.from_bytes(end[1].to_bytes(2, "big"), "little")

    low, high = sorted(ends, key=rank)
    key["lo"], key["hi"] = (np.frombuffer(end[0], np.uint8) for end in (low, high))
    key["lo_port"], key["hi_port"] = low[1], high[1]
    key["proto"] = proto
    value = np.zeros(1, table.value_dtype)
    value["seen"] = int(time.monotonic())
    value["state"] = 2  # CT_ESTABLISHED
    if high == ends[0]:
        value["flags"] = 1  # CT_ORIGIN_HI
    table.set(key[0], value[0])


@pytest.mark.parametrize("proto", [TCP, UDP])
@pytest.mark.parametrize("map_", ["connections", "half_open"])
@pytest.mark.parametrize(("pod", "server"), [(POD, CLIENT), (POD6, CLIENT6)], ids=["4", "6"])
def test_answers_to_pods_pass_and_what_others_begin_does_not(
    closed: FirewallWorld, map_: str, pod: str, server: str, proto: int
) -> None:
    answer = frame(server, pod, proto, sport=53, dport=4444, flags=SYN | ACK)
    assert closed.run(answer).cause == "firewall"
    connection(closed, map_, pod, server, 4444, 53, proto)
    assert closed.run(answer).cause == ""
    assert (
        closed.run(frame(server, pod, proto, sport=53, dport=4445, flags=ACK)).cause == "firewall"
    )
    connection(closed, map_, server, pod, 53, 4446, proto)
    theirs = frame(server, pod, proto, sport=53, dport=4446, flags=ACK)
    assert closed.run(theirs).cause == "firewall", "that began elsewhere"


def test_answers_to_masqueraded_pods_pass(closed: FirewallWorld) -> None:
    connection(closed, "connections", POD, CLIENT, 4444, 80, TCP)
    answer = frame(CLIENT, NODE, TCP, sport=80, dport=12345, flags=SYN | ACK)
    assert closed.run(answer).cause == "firewall"
    key, value = np.zeros(1, closed.nat.key_dtype), np.zeros(1, closed.nat.value_dtype)
    for tuple_, target, port in ((key, NODE, 12345), (value["to"], POD, 4444)):
        tuple_["saddr"] = np.frombuffer(parse_address(CLIENT), np.uint8)
        tuple_["daddr"] = np.frombuffer(parse_address(target), np.uint8)
        tuple_["sport"], tuple_["dport"], tuple_["proto"] = 80, port, TCP
    closed.nat.set(key[0], value[0])
    assert closed.run(answer).cause == ""


@pytest.mark.parametrize("family", [AF_INET, AF_INET6], ids=["4", "6"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_what_is_for_connected_sockets_of_the_node_passes(
    closed: FirewallWorld, family: socket.AddressFamily, kind: socket.SocketKind
) -> None:
    """Over addresses of this namespace that are no loopback ones: packets from those never pass."""
    proto = TCP if kind == socket.SOCK_STREAM else UDP
    own, peer = ("192.168.199.1", "192.168.199.2") if family == AF_INET else ("fd99::1", "fd99::2")
    with (
        closed.addresses(own, peer),
        socket.socket(family, kind) as server,
        socket.socket(family, kind) as client,
    ):
        server.bind((peer, 0))
        client.bind((own, 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        port = server.getsockname()[1]
        answer = frame(peer, own, proto, sport=port, dport=client.getsockname()[1], flags=ACK)
        assert closed.run(answer).cause == "firewall", "not connected"
        client.connect((peer, port))
        assert closed.run(answer).cause == ""
        stranger = frame(peer, own, proto, sport=port + 1, dport=client.getsockname()[1], flags=ACK)
        assert closed.run(stranger).cause == "firewall"
        begins = frame(own, peer, proto, sport=1, dport=port, flags=ACK)
        assert closed.run(begins).cause == "firewall", "who only listens is no connection"


LIFE: dict[str, bytes] = {
    "ARP": bytes(12) + b"\x08\x06" + bytes(28),
    "NDP": with_(frame(CLIENT6, NODE6, ICMP6, payload=icmp(136, bytes(16))), 14 + 7, b"\xff"),
    "a router's advertisement": frame("fe80::1", "ff02::1", ICMP6, payload=icmp(134)),
    "MLD": frame("fe80::1", "ff02::1", ICMP6, payload=icmp(130, bytes(16))),
    "DHCP's answer": frame("203.0.113.1", NODE, UDP, sport=67, dport=68),
    "DHCPv6's answer": frame("fe80::1", "fe80::2", UDP, sport=547, dport=546),
    "IGMP": frame("203.0.113.1", "224.0.0.1", IGMP),
    "an echo reply": frame(CLIENT, NODE, ICMP, payload=icmp(0)),
    "an echo reply of IPv6": frame(CLIENT6, NODE6, ICMP6, payload=icmp(129)),
    "a later fragment": frame(CLIENT, NODE, UDP, later=True),
}
NO_LIFE: dict[str, bytes] = {
    "UDP": frame(CLIENT, NODE),
    "TCP": tcp(SYN),
    "an ACK of nothing": tcp(ACK),
    "an echo request": frame(CLIENT, NODE, ICMP),
    "routed NDP": frame(CLIENT6, NODE6, ICMP6, payload=icmp(136, bytes(16))),
    "DHCP's answer to another port": frame("203.0.113.1", NODE, UDP, sport=67, dport=69),
    "SCTP": frame(CLIENT, NODE, SCTP),
    "GRE": frame(CLIENT, NODE, 47),
}


@pytest.mark.parametrize("name", LIFE)
def test_the_node_keeps_what_it_lives_by(closed: FirewallWorld, name: str) -> None:
    assert closed.run(LIFE[name]).cause == ""


@pytest.mark.parametrize("name", NO_LIFE)
def test_the_default_drops(closed: FirewallWorld, name: str) -> None:
    assert closed.run(NO_LIFE[name]).cause == "firewall"


@pytest.mark.parametrize(
    ("ours", "client", "router", "proto", "kind"),
    [(NODE, CLIENT, "203.0.113.1", ICMP, 3), (NODE6, CLIENT6, "2001:db8:ff::1", ICMP6, 2)],
    ids=["4", "6"],
)
def test_errors_pass_where_the_answer_to_what_they_quote_would(
    closed: FirewallWorld, ours: str, client: str, router: str, proto: int, kind: int
) -> None:
    quoted = frame(ours, client, TCP, sport=443, dport=5555, flags=ACK)[14:]
    error = frame(router, ours, proto, payload=icmp(kind, quoted))
    assert closed.run(error).cause == "firewall"
    length = "128" if ":" in client else "32"
    closed.add(Rule("object", "allow", (("TCP", 443, 443),), 0, "b", 0), f"{client}/{length}")
    assert closed.run(error).cause == ""
    other = frame(ours, client, TCP, sport=444, dport=5555, flags=ACK)[14:]
    assert closed.run(frame(router, ours, proto, payload=icmp(kind, other))).cause == "firewall"
    assert (
        closed.run(frame(router, ours, proto, payload=icmp(kind, quoted[:10]))).cause == "firewall"
    )


@pytest.mark.parametrize(
    ("outer", "target", "client", "inner", "proto"),
    [
        ("198.18.7.9", POD, CLIENT, "203.0.113.80", 4),
        ("100::7:9", POD6, CLIENT6, "2001:db8:80::1", 41),
    ],
    ids=["4", "6"],
)
def test_what_a_balancer_sends_on_is_judged_as_what_is_inside(
    closed: FirewallWorld, outer: str, target: str, client: str, inner: str, proto: int
) -> None:
    packet = frame(outer, target, proto, payload=frame(client, inner, TCP, dport=443)[14:])
    closed.add(Rule("object", "allow", (("TCP", 443, 443),), 0, "b", 0), "0.0.0.0/0", "::/0")
    assert closed.run(packet).cause == "firewall", "by a card of the world that is no one's packet"
    closed.inside(True)
    assert closed.run(packet).cause == ""
    closed.add(DENY, f"{client}/{128 if ':' in client else 32}")
    assert closed.run(packet).cause == "firewall"


def test_a_port_behind_extension_headers_inside_is_the_packets(world: FirewallWorld) -> None:
    world.add(Rule("object", "deny", (("TCP", 443, 443),), 0, "b", 0), "::/0")
    world.inside(True)
    for dport, cause in ((443, "firewall"), (80, "")):
        tcp_ = frame(CLIENT6, "2001:db8:80::1", TCP, dport=dport)[54:]
        options = struct.pack("!BBHI", TCP, 0, 0x0104, 0)  # PadN
        inner = frame(CLIENT6, "2001:db8:80::1", 60, payload=options + tcp_)[14:]
        assert world.run(frame("100::7:9", POD6, 41, payload=inner)).cause == cause


@pytest.mark.parametrize(
    ("client", "kind"), [("10.0.1.3", LOCAL), (NODE, HOST), ("fd00:1::3", LOCAL)]
)
def test_who_asked_another_nodes_port_from_here_is_no_liar_inside(
    closed: FirewallWorld, client: str, kind: int
) -> None:
    """The other node's balancer chose a backend of this one."""
    six = ":" in client
    packet = frame(client, OTHER6 if six else OTHER, TCP, dport=30080)[14:]
    packet = frame("100::7:9" if six else "198.18.7.9", POD6 if six else POD, 41 if six else 4,
                   payload=packet)  # fmt: skip
    closed.inside(True)
    assert closed.run(packet).cause == "spoofed-source", "nobody of this node has the address"
    peer = np.zeros(1, closed.peers.value_dtype)
    peer["view"]["kind"] = kind
    closed.peers.set(np.frombuffer(parse_address(client), np.uint8), peer[0])
    assert closed.run(packet).cause == ""
    assert closed.run(frame(client, OTHER6 if six else OTHER, TCP)).cause == "spoofed-source"


# ---- Rates, lifetimes, counters, records ------------------------------------------------


def test_each_source_has_its_own_rate(world: FirewallWorld) -> None:
    rate = Rule("object", "allow", (), 100, "a", 0)
    world.add(rate, "0.0.0.0/0", "::/0")
    passed = sum(world.run(frame(CLIENT, NODE)).cause == "" for _ in range(200))
    # A quarter of a second's worth, and what comes back meanwhile.
    assert 25 <= passed <= 80
    assert world.run(frame(CLIENT, NODE)).cause == "firewall-rate"
    assert world.run(frame("198.51.100.10", NODE)).cause == ""
    for low in range(100):  # one /64 is one source
        last = world.run(frame(f"2001:db8:c:1::{low + 1:x}", NODE6)).cause
    assert last == "firewall-rate"
    assert world.run(frame("2001:db8:c:2::1", NODE6)).cause == ""


def test_an_entry_expires_by_itself_and_the_next_less_specific_one_counts(
    world: FirewallWorld,
) -> None:
    world.add(DENY, "198.51.100.0/24")
    world.add(ALLOW, f"{CLIENT}/32", expires=time.time() + 1.2)
    assert world.run(frame(CLIENT, NODE)).cause == ""
    deadline = time.monotonic() + 10
    while world.run(frame(CLIENT, NODE)).cause == "" and time.monotonic() < deadline:
        time.sleep(0.05)  # nobody tells of it
    assert world.run(frame(CLIENT, NODE)).cause == "firewall"
    assert len(world.tables.numbers_of(ALLOW)) == 1, "it expired without the agent"
    assert world.tables.expire(time.time() + 1) == 1
    assert len(world.tables.numbers_of(ALLOW)) == 0


def test_counters_are_exact_and_stay_when_entries_are_made_anew(world: FirewallWorld) -> None:
    world.add(DENY, "198.51.100.0/24", "2001:db8:c::/48")
    packets = [
        frame(CLIENT, NODE),
        frame(CLIENT6, NODE6, payload=bytes(2) + b"\0\x50\0\x0a\0\0\0\0"),
    ]
    for _ in range(5):
        for packet in packets:
            world.run(packet)
    world.add(ALLOW, "198.51.0.0/16")
    world.add(Rule("command", "deny"), "198.51.100.0/24")
    world.run(packets[0])
    world.tables.settle()
    world.run(packets[0])
    world.tables = world.open_tables()
    numbers = world.tables.numbers_of(DENY)
    texts = [world.tables.prefixes(numbers).text(n) for n in range(len(numbers))]
    found = dict(zip(texts, world.tables.counters(numbers).tolist(), strict=True))
    assert found == {"198.51.100.0/24": [7, 7 * 28], "2001:db8:c::/48": [5, 5 * 50]}


def test_a_drop_is_told_with_its_rule_and_counted_by_cause(world: FirewallWorld) -> None:
    world.add(DENY, f"{CLIENT}/32")
    before = world.counters_map.values().sum(axis=1)
    context = struct.pack("<6I", 0, len(tcp(SYN)), 0, 1, 0, 0)
    syscall.prog_test_run(world.object.prog_fd("xdp_net"), tcp(SYN), context)
    event = world.ring.read()[-1]
    enum = world.schema.enum
    assert int(event["place"]) == 5 and int(event["type"]) == 2
    assert world.causes[int(event["cause"])] == "firewall"
    assert int(event["reason"]) == world.reasons[DENY]
    assert event["saddr"].tobytes() == parse_address(CLIENT)
    assert (int(event["sport"]), int(event["dport"])) == (40000, 80)
    assert (int(event["tcp_flags"]), int(event["length"])) == (SYN, 40)
    after = world.counters_map.values().sum(axis=1)
    cause = enum("counter")["COUNT_CAUSE"] + enum("cause")["CAUSE_FIREWALL"]
    assert after[cause] - before[cause] == 1


# ---- Tables -------------------------------------------------------------------------------


def test_more_than_there_is_room_for_is_refused_whole(world: FirewallWorld) -> None:
    world.add(DENY, f"{CLIENT}/32")
    change = Change()
    many = [f"10.{n >> 8 & 255}.{n & 255}.{n >> 16}/32" for n in range(world.tables.room + 1)]
    change.added.append((DENY, parse(many)[0].unique(), 0.0))
    with pytest.raises(FirewallFull, match="do not fit"):
        world.tables.apply(change)
    assert world.run(frame(CLIENT, NODE)).cause == "firewall"
    assert len(world.tables.numbers_of(DENY)) == 1


@pytest.mark.parametrize(
    "harm",
    [
        lambda w: w.maps.slots.view.__setitem__(slice(0xC63364, 0xC63365), 0),
        lambda w: w.maps.entries.view["next"].__setitem__(slice(1, None), 0),
        lambda w: w.maps.prefixes.delete_many(w.maps.prefixes.keys()),
        lambda w: w.maps.filter6.view["length"].__setitem__(slice(None), 0),
    ],
    ids=["slots", "next", "hash", "filter"],
)
def test_a_change_that_was_broken_off_is_put_right_at_the_next_start(
    world: FirewallWorld, harm: Callable[[FirewallWorld], None]
) -> None:
    world.add(DENY, "198.51.100.0/24", f"{CLIENT}/32", "2001:db8::/32", f"{CLIENT6}/128")
    world.add(
        Rule("object", "allow", (("TCP", 1, 9),), 0, "b", 0), f"{CLIENT}/32", f"{CLIENT6}/128"
    )
    harm(world)
    world.tables = world.open_tables()
    change = Change()
    for rule, prefixes in (
        (DENY, parse(["198.51.100.0/24", f"{CLIENT}/32", "2001:db8::/32", f"{CLIENT6}/128"])[0]),
    ):
        change.added.append((rule, prefixes.unique(), 0.0))
    world.tables.apply(change)
    for source, target in ((CLIENT, NODE), (CLIENT6, NODE6), ("198.51.100.77", NODE)):
        assert world.run(frame(source, target)).cause == "firewall"


def test_after_many_entries_that_do_not_match_the_default_decides(world: FirewallWorld) -> None:
    port = (("TCP", 1, 1),)
    for index in range(120):
        world.add(Rule("object", "allow", port, 0, "a", index), f"{CLIENT}/32")
    world.add(DENY, "198.51.100.0/24")
    assert world.run(frame(CLIENT, NODE)).cause == "firewall"
    for index in range(120, 140):
        world.add(Rule("object", "allow", port, 0, "a", index), f"{CLIENT}/32")
    assert world.run(frame(CLIENT, NODE)).cause == ""

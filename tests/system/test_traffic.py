"""Packets between pods, nodes and the world, over nodes whose own stacks forward nothing."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.system.harness import Cluster, Place, connected, until

ICMP_ECHO = {4: 8, 6: 128}
MARK = os.urandom(16)


# ---- Who talks to whom ----------------------------------------------------------------

# name: (client, server, who the server sees); "masquerade" = the client's node, on the outside.
WAYS = {
    "pod to pod, one node": ("traffic/a", "traffic/b", "client"),
    "pod to pod, two nodes": ("traffic/a", "traffic/c", "client"),
    "pod to pod, back again": ("traffic/c", "traffic/a", "client"),
    "node to its pod": ("node-1", "traffic/a", "client"),
    "node to another node's pod": ("node-1", "traffic/c", "client"),
    "pod to its node": ("traffic/a", "node-1", "client"),
    "pod to another node": ("traffic/a", "node-2", "client"),
    "pod to the outside": ("traffic/a", "outside", "masquerade"),
    "pod of the other node to the outside": ("traffic/c", "outside", "masquerade"),
}


class Ends:
    """Two places of a cluster and the address of each, in one family."""

    def __init__(self, cluster: Cluster, client: str, server: str, family: int) -> None:
        self.client, self.client_ip = place(cluster, client, family)
        self.server, self.server_ip = place(cluster, server, family)
        self.node = cluster.pod(client).node if "/" in client else client
        prefix = "172.31.0." if family == 4 else "fd00:172:31::"
        self.masquerade = f"{prefix}{10 + int(self.node[-1])}" if self.node[-1].isdigit() else ""


def place(cluster: Cluster, name: str, family: int) -> tuple[Place, str]:
    if name == "outside":
        return cluster.outside(), cluster.outside_ip(family)
    if "/" in name:
        pod = cluster.pod(name)
        return pod, pod.ip(family)
    return cluster.node(name), cluster.node_ip(name, family)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("way", WAYS)
def test_tcp_passes_and_the_server_sees_the_right_client(
    traffic: Cluster, way: str, family: int
) -> None:
    client, server, seen = WAYS[way]
    ends = Ends(traffic, client, server, family)
    with connected(ends.client, ends.server, ends.server_ip, 0) as (near, far):
        assert far.getpeername()[0] == (ends.masquerade if seen == "masquerade" else ends.client_ip)
        assert near.getpeername()[0] == ends.server_ip
        exchange(near, far, 300_000)
        exchange(far, near, 300_000)


@pytest.mark.parametrize("size", [100, 4000], ids=["small", "fragmented"])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("way", WAYS)
def test_udp_passes_in_one_piece_and_in_fragments(
    traffic: Cluster, way: str, family: int, size: int
) -> None:
    client, server, seen = WAYS[way]
    ends = Ends(traffic, client, server, family)
    with udp(ends.server, family) as far, udp(ends.client, family) as near:
        sent = os.urandom(size)
        near.sendto(sent, (ends.server_ip, far.getsockname()[1]))
        got, sender = far.recvfrom(65536)
        assert got == sent
        assert sender[0] == (ends.masquerade if seen == "masquerade" else ends.client_ip)
        far.sendto(got[::-1], sender)
        back, answerer = near.recvfrom(65536)
        assert back == sent[::-1]
        assert answerer[:2] == (ends.server_ip, far.getsockname()[1])


@pytest.mark.parametrize("size", [56, 4000], ids=["small", "fragmented"])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("way", WAYS)
def test_ping_is_answered(traffic: Cluster, way: str, family: int, size: int) -> None:
    client, server, _ = WAYS[way]
    ends = Ends(traffic, client, server, family)
    assert ping(ends.client, ends.server_ip, size)


@pytest.mark.parametrize("family", [4, 6])
def test_the_outside_reaches_a_pod_where_it_has_a_route(traffic: Cluster, family: int) -> None:
    pod, outside = traffic.pod("traffic/a"), traffic.outside()
    gateway = "172.31.0.11" if family == 4 else "fd00:172:31::11"
    address = pod.ip(family)
    outside.run("ip", "route", "replace", address, "via", gateway)
    try:
        with connected(outside, pod, address, 0) as (near, far):
            assert far.getpeername()[0] == traffic.outside_ip(family)
            exchange(near, far, 100_000)
            exchange(far, near, 100_000)
        with udp(pod, family) as far, udp(outside, family) as near:
            near.sendto(b"x" * 4000, (address, far.getsockname()[1]))
            got, sender = far.recvfrom(65536)
            assert len(got) == 4000
            far.sendto(got, sender)
            assert near.recvfrom(65536)[1][0] == address
        assert ping(outside, address, 4000)
    finally:
        outside.run("ip", "route", "del", address, "via", gateway)


@pytest.mark.parametrize("family", [4, 6])
def test_pings_of_two_pods_with_one_identifier_do_not_mix(traffic: Cluster, family: int) -> None:
    a, b = traffic.pod("traffic/a"), traffic.pod("traffic/b")
    outside = traffic.outside_ip(family)
    with echo_socket(a, family) as first, echo_socket(b, family) as second:
        for sender, word in ((first, b"first"), (second, b"second")):
            sender.sendto(echo(family, 77, word), (outside, 0))
        assert echo_reply(first, family, 77) == b"first"
        assert echo_reply(second, family, 77) == b"second"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("number", [11, 12], ids=["its own", "another"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_a_pod_reaches_a_node_at_its_outside_address(
    traffic: Cluster, kind: int, number: int, family: int
) -> None:
    address = f"172.31.0.{number}" if family == 4 else f"fd00:172:31::{number}"
    pod, node = traffic.pod("traffic/a"), traffic.node(f"node-{number - 10}")
    if kind == socket.SOCK_STREAM:
        with connected(pod, node, address, 0) as (near, far):
            exchange(near, far, 10_000)
            exchange(far, near, 10_000)
        return
    with node.socket(family_number(family), kind) as far, udp(pod, family) as near:
        far.bind((address, 0))
        near.sendto(b"x" * 4000, (address, far.getsockname()[1]))
        got, sender = far.recvfrom(65536)
        far.sendto(got, sender)
        assert near.recvfrom(65536)[1][0] == address


def test_nothing_of_ours_is_in_the_nodes_firewall(traffic: Cluster) -> None:
    for node in traffic.node_names:
        place = traffic.node(node)
        rules = place.run("nft", "list", "ruleset").stdout
        assert rules.split().count("table") == 1, rules
        assert "table inet foreign" in rules
        for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            assert place.run("cat", f"/proc/sys/net/{path}").stdout.strip() == "0"


# ---- Errors through the masquerade ------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("server", ["traffic/b", "traffic/c", "node-1", "node-2", "outside"])
def test_a_closed_udp_port_is_told(traffic: Cluster, server: str, family: int) -> None:
    pod = traffic.pod("traffic/a")
    _, address = place(traffic, server, family)
    with udp(pod, family) as near:
        near.connect((address, 9))
        near.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            near.recv(100)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("server", ["traffic/b", "traffic/c", "node-1", "node-2", "outside"])
def test_a_closed_tcp_port_refuses_at_once(traffic: Cluster, server: str, family: int) -> None:
    pod = traffic.pod("traffic/a")
    _, address = place(traffic, server, family)
    with pod.socket(family_number(family)) as near, pytest.raises(ConnectionRefusedError):
        near.connect((address, 9))


@pytest.mark.parametrize("family", [4, 6])
def test_the_outside_hears_of_a_pods_closed_port(traffic: Cluster, family: int) -> None:
    """The pod's error about an answer of the outside goes back through the masquerade."""
    pod, outside = traffic.pod("traffic/a"), traffic.outside()
    with udp(outside, family) as far:
        with udp(pod, family) as near:
            near.sendto(b"hello", (traffic.outside_ip(family), far.getsockname()[1]))
            _, sender = far.recvfrom(100)
        far.connect(sender[:2])
        far.send(b"too late")
        with pytest.raises(ConnectionRefusedError):
            far.recv(100)


@pytest.mark.parametrize("family", [4, 6])
def test_a_trace_of_the_route_shows_each_hop(traffic: Cluster, beyond: Place, family: int) -> None:
    pod = traffic.pod("traffic/a")
    with udp(pod, family) as near:
        listen_to_errors(near, family)
        seen = []
        for hops in (1, 2, 3):
            set_hops(near, family, hops)
            near.sendto(MARK, (BEYOND[family], 33434))
            kind, code, offender, quoted = next_error(near, family)
            assert quoted == MARK or not quoted
            seen.append((kind, code, offender))
    exceeded = 11 if family == 4 else 3
    assert [kind for kind, _, _ in seen[:2]] == [exceeded, exceeded]
    assert seen[1][2] == traffic.outside_ip(family)
    unreachable = (3, 3) if family == 4 else (1, 4)
    assert seen[2] == (*unreachable, BEYOND[family])


# ---- Path MTU -----------------------------------------------------------------------------

BEYOND = {4: "198.51.100.2", 6: "fd00:198:51:100::2"}


@pytest.fixture(scope="module")
def beyond(traffic: Cluster) -> Iterator[Place]:
    """A host behind the outside, over a link of 1300 bytes: the outside routes to it. Its TCP
    does not tell of the narrow link, so senders learn of it from the router."""
    name = f"{traffic.state.outside_netns}2"
    outside = traffic.outside()
    os.system(f"ip netns add {name}")
    here = Place(traffic.state.netns_path(name).with_name(name), outside.cgroup)
    try:
        outside.run(
            "ip",
            "link",
            "add",
            "far0",
            "mtu",
            "1300",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "mtu",
            "1300",
            "netns",
            name,
        )
        for who, device, number in ((outside, "far0", 1), (here, "eth0", 2)):
            who.run("ip", "addr", "add", f"198.51.100.{number}/24", "dev", device)
            who.run("ip", "addr", "add", f"fd00:198:51:100::{number}/64", "dev", device, "nodad")
            who.run("ip", "link", "set", device, "up")
        here.run("ip", "route", "add", "default", "via", "198.51.100.1", "advmss", "1460")
        here.run("ip", "route", "add", "::/0", "via", "fd00:198:51:100::1", "advmss", "1440")
        outside.sysctl(net__ipv4__ip_forward=1, net__ipv6__conf__all__forwarding=1)
        # All traces of one test come within a second.
        for who in (outside, here):
            who.sysctl(net__ipv4__icmp_ratelimit=0, net__ipv6__icmp__ratelimit=0)
        yield here
    finally:
        here.close()
        outside.run("ip", "link", "del", "far0", check=False)
        outside.sysctl(net__ipv4__ip_forward=0, net__ipv6__conf__all__forwarding=0)
        os.system(f"ip netns del {name}")


@pytest.mark.parametrize("family", [4, 6])
def test_tcp_goes_on_over_a_narrower_link_beyond_the_outside(
    traffic: Cluster, beyond: Place, family: int
) -> None:
    pod = traffic.pod("traffic/a")
    with connected(pod, beyond, BEYOND[family], 0) as (near, far):
        assert far.getpeername()[0] == ("172.31.0.11" if family == 4 else "fd00:172:31::11")
        exchange(near, far, 500_000)
        assert path_mtu(near, family) == 1300
        exchange(far, near, 500_000)


@pytest.mark.parametrize("family", [4, 6])
def test_udp_is_told_the_mtu_beyond_the_outside(
    traffic: Cluster, beyond: Place, family: int
) -> None:
    pod = traffic.pod("traffic/b")
    with udp(pod, family) as near:
        near.connect((BEYOND[family], 9))
        dont_fragment(near, family)
        near.send(b"x" * 1350)
        with pytest.raises(OSError) as caught:
            near.recv(100)
        assert caught.value.errno == errno.EMSGSIZE
        assert path_mtu(near, family) == 1300


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("link", ["underlay0", "outside0"])
def test_tcp_goes_on_when_a_card_of_the_node_becomes_narrower(
    traffic: Cluster, link: str, family: int
) -> None:
    """Large segments are under way before, and the node itself tells the pod the MTU."""
    pod, node = traffic.pod("traffic/a"), traffic.node("node-1")
    server = "outside" if link == "outside0" else "traffic/c"
    far_place, address = place(traffic, server, family)
    with connected(pod, far_place, address, 0) as (near, far):
        exchange(near, far, 100_000)
        node.run("ip", "link", "set", link, "mtu", "1400")
        try:
            until(lambda: narrowed(pod, address, 1400), "a too big for 1450 bytes")
            exchange(near, far, 500_000)
            assert path_mtu(near, family) == 1400
            exchange(far, near, 100_000)
            with udp(far_place, family) as sink, udp(pod, family) as source:
                source.sendto(b"x" * 4000, (address, sink.getsockname()[1]))
                assert len(sink.recv(65536)) == 4000
        finally:
            node.run("ip", "link", "set", link, "mtu", "1500")
    pod.run("ip", "route", "flush", "cache")
    pod.run("ip", "-6", "route", "flush", "cache")
    until(lambda: not traffic.agent_status("node-1").get("errors"), "the agent is content")


# ---- How ------------------------------------------------------------------------------------


def family_number(family: int) -> int:
    return socket.AF_INET6 if family == 6 else socket.AF_INET


def udp(where: Place, family: int) -> socket.socket:
    made = where.socket(family_number(family), socket.SOCK_DGRAM)
    made.bind(("", 0))
    return made


def exchange(source: socket.socket, sink: socket.socket, size: int) -> None:
    """`size` random bytes through a connection, all of them and in order."""
    sent = os.urandom(size)
    thread = threading.Thread(target=source.sendall, args=(sent,), daemon=True)
    thread.start()
    got = bytearray()
    while len(got) < size:
        part = sink.recv(1 << 20)
        assert part, f"closed after {len(got)} of {size} bytes"
        got += part
    thread.join()
    assert got == sent


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1]))
    total += data[-1] << 8 if len(data) & 1 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def echo(family: int, identifier: int, payload: bytes) -> bytes:
    """The kernel sums an ICMPv6 message itself."""
    head = struct.pack("!BBHHH", ICMP_ECHO[family], 0, 0, identifier, 1)
    total = checksum(head + payload)
    return struct.pack("!BBHHH", ICMP_ECHO[family], 0, total, identifier, 1) + payload


def echo_socket(where: Place, family: int) -> socket.socket:
    protocol = socket.IPPROTO_ICMPV6 if family == 6 else socket.IPPROTO_ICMP
    return where.socket(family_number(family), socket.SOCK_RAW, protocol)


def echo_reply(near: socket.socket, family: int, identifier: int) -> bytes:
    """The payload of the next answer to `identifier`; TimeoutError when none comes."""
    while True:
        got = near.recv(65536)
        if family == 4:
            got = got[(got[0] & 15) * 4 :]
        kind, _, _, ident, _ = struct.unpack("!BBHHH", got[:8])
        if kind == (129 if family == 6 else 0) and ident == identifier:
            return got[8:]


def ping(where: Place, address: str, size: int) -> bool:
    family = 6 if ":" in address else 4
    payload = os.urandom(size)
    identifier = int.from_bytes(os.urandom(2), "big")
    with echo_socket(where, family) as near:
        near.sendto(echo(family, identifier, payload), (address, 0))
        return echo_reply(near, family, identifier) == payload


def listen_to_errors(near: socket.socket, family: int) -> None:
    if family == 4:
        near.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
    else:
        near.setsockopt(socket.IPPROTO_IPV6, 25, 1)  # IPV6_RECVERR


def set_hops(near: socket.socket, family: int, hops: int) -> None:
    if family == 4:
        near.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)
    else:
        near.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, hops)


def next_error(near: socket.socket, family: int) -> tuple[int, int, str, bytes]:
    """ICMP type, code, who said so, the payload it speaks of (struct sock_extended_err)."""

    def read() -> tuple[bytes, list[tuple[int, int, bytes]]] | None:
        try:
            data, control, _, _ = near.recvmsg(2048, 512, 0x2000 | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return None  # the error itself, reported once more
        return data, control

    data, control = until(lambda: read(), "an ICMP error")  # type: ignore[misc]
    for level, kind, value in control:
        if (level, kind) in ((socket.IPPROTO_IP, 11), (socket.IPPROTO_IPV6, 25)):
            _, origin, icmp_type, code = struct.unpack("=IBBB", value[:7])
            assert origin in (2, 3)
            address = value[20:24] if family == 4 else value[24:40]
            return icmp_type, code, socket.inet_ntop(family_number(family), address), data
    raise AssertionError(control)


def dont_fragment(near: socket.socket, family: int) -> None:
    # IP_MTU_DISCOVER and IPV6_MTU_DISCOVER = PMTUDISC_DO
    level, name = (socket.IPPROTO_IP, 10) if family == 4 else (socket.IPPROTO_IPV6, 23)
    near.setsockopt(level, name, 2)


def path_mtu(near: socket.socket, family: int) -> int:
    level, name = (socket.IPPROTO_IP, 14) if family == 4 else (socket.IPPROTO_IPV6, 24)
    return near.getsockopt(level, name)


def narrowed(pod: Place, address: str, mtu: int) -> bool:
    """Has the pod been told of `mtu` towards the address? Asks by a packet that is too big."""
    family = 6 if ":" in address else 4
    with udp(pod, family) as near:
        near.connect((address, 9))
        dont_fragment(near, family)
        try:
            near.send(b"x" * 1450)
            near.settimeout(0.2)
            near.recv(10)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                return path_mtu(near, family) == mtu
        return False

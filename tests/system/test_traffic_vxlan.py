"""Real traffic between nodes that reach one another only through VXLAN (routing vxlan)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_interface

import pytest

from tests.system.conftest import FAR, NEAR, _pod, _service
from tests.system.harness import Cluster, Place, connected, need_root, unique_name, until
from tests.system.test_traffic import dont_fragment, narrowed, ping

pytestmark = pytest.mark.skipif(need_root(), reason="needs root")

FAMILIES = (4, 6)
PORT = 8472
TUNNEL_ID = 0x6C67
TUNNEL_MTU = 1450


@pytest.fixture(scope="module")
def tunnels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Pods `a` and `b` on node-1, `c` on node-2, which answer on 8080; service `remote` (c)."""
    folder = tmp_path_factory.mktemp("tunnels")
    documents = [
        '{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "traffic"}}',
        _pod("a", NEAR, 8080),
        _pod("b", NEAR, 8080),
        _pod("c", FAR, 8080),
        _service("remote", "c"),
    ]
    (folder / "traffic.yaml").write_text("\n---\n".join(documents))
    with Cluster(folder, unique_name("tv"), routing="vxlan") as cluster:
        yield cluster


def outer_packets(cluster: Cluster, node: str) -> int:
    """VXLAN packets that the node's device sent."""
    shown = cluster.node(node).run("ip", "-s", "-j", "link", "show", "lg-vxlan").stdout
    return int(json.loads(shown)[0]["stats64"]["tx"]["packets"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["pod", "service", "from the node", "to the node", "from far away"])
def test_each_way_through_the_tunnel(tunnels: Cluster, way: str, family: int) -> None:
    a, c = tunnels.pod("traffic/a"), tunnels.pod("traffic/c")
    near, far = tunnels.node(NEAR), tunnels.node(FAR)
    client, server, address = {
        "pod": (a, c, c.ip(family)),
        "service": (a, c, tunnels.service_ip("traffic/remote", family)),
        "from the node": (near, c, c.ip(family)),
        "to the node": (a, far, tunnels.node_ip(FAR, family)),
        "from far away": (far, a, a.ip(family)),
    }[way]
    before = outer_packets(tunnels, NEAR)
    if way == "service":
        with client.socket(_family(family)) as here:
            here.connect((address, 80))
            assert b"c" in here.recv(100)
    else:
        with connected(client, server, address, 0) as (here, there):
            here.sendall(b"ping")
            assert there.recv(10) == b"ping"
            there.sendall(b"pong")
            assert here.recv(10) == b"pong"
    assert outer_packets(tunnels, NEAR) > before


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments_reach_a_process_of_the_other_node(tunnels: Cluster, family: int) -> None:
    a, far = tunnels.pod("traffic/a"), tunnels.node(FAR)
    address = tunnels.node_ip(FAR, family)
    with far.socket(_family(family), socket.SOCK_DGRAM) as there:
        there.bind((address, 0))
        with a.socket(_family(family), socket.SOCK_DGRAM) as here:
            here.sendto(b"x" * 4000, (address, there.getsockname()[1]))
            got, sender = there.recvfrom(65536)
            assert len(got) == 4000 and sender[0] == a.ip(family)
            there.sendto(got, sender)
            assert len(here.recv(65536)) == 4000


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_megabytes_arrive_whole_in_large_segments(tunnels: Cluster, family: int) -> None:
    a, c = tunnels.pod("traffic/a"), tunnels.pod("traffic/c")
    data = bytes(range(256)) * 40960
    before = outer_packets(tunnels, NEAR)
    with connected(a, c, c.ip(family), 0) as (here, there):
        sender = threading.Thread(target=here.sendall, args=(data,))
        sender.start()
        got = hashlib.sha256()
        left = len(data)
        while left:
            part = there.recv(1 << 16)
            assert part
            got.update(part)
            left -= len(part)
        sender.join()
    assert got.digest() == hashlib.sha256(data).digest()
    # Segments of many packets each went into the tunnel, and were cut behind it.
    assert outer_packets(tunnels, NEAR) - before < len(data) / TUNNEL_MTU / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_pods_know_the_narrower_way(tunnels: Cluster, family: int) -> None:
    a, c = tunnels.pod("traffic/a"), tunnels.pod("traffic/c")
    shown = json.loads(a.run("ip", "-j", "link", "show", "eth0").stdout)
    assert shown[0]["mtu"] == TUNNEL_MTU
    room = TUNNEL_MTU - (28 if family == 4 else 48)
    with a.socket(_family(family), socket.SOCK_DGRAM) as near:
        with c.socket(_family(family), socket.SOCK_DGRAM) as far:
            far.bind(("", 0))
            dont_fragment(near, family)
            near.connect((c.ip(family), far.getsockname()[1]))
            near.send(bytes(room))
            assert len(far.recv(4096)) == room
            with pytest.raises(OSError):
                near.send(bytes(room + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_with_a_wider_link_is_told_the_tunnels_mtu(tunnels: Cluster, family: int) -> None:
    """As one that runs since before there were tunnels."""
    b, c = tunnels.pod("traffic/b"), tunnels.pod("traffic/c")
    (route,) = json.loads(tunnels.node(NEAR).run("ip", "-j", "route", "show", b.ip(4)).stdout)
    host = route["dev"]
    tunnels.node(NEAR).run("ip", "link", "set", host, "mtu", "1500")
    b.run("ip", "link", "set", "eth0", "mtu", "1500")
    try:
        until(lambda: narrowed(b, c.ip(family), TUNNEL_MTU), "the tunnel's MTU to be told")
    finally:
        tunnels.node(NEAR).run("ip", "link", "set", host, "mtu", str(TUNNEL_MTU))
        b.run("ip", "link", "set", "eth0", "mtu", str(TUNNEL_MTU))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_ping_passes_in_fragments(tunnels: Cluster, family: int) -> None:
    assert ping(tunnels.pod("traffic/a"), tunnels.pod("traffic/c").ip(family), 4000)


# ---- Who may send into the tunnel --------------------------------------------------


def vxlan_frame(inner: bytes, number: int = TUNNEL_ID) -> bytes:
    """RFC 7348 5: the UDP payload."""
    return struct.pack("!II", 0x08000000, number << 8) + inner


def syn(source: str, destination: str, port: int) -> bytes:
    """An Ethernet frame as our programs make them."""
    from scapy.layers.l2 import Ether

    frame = Ether(dst="0a:6c:00:00:00:01", src="02:00:00:00:00:09", type=0x0800)
    return bytes(frame) + plain_syn(source, destination, port)


def plain_syn(source: str, destination: str, port: int) -> bytes:
    from scapy.layers.inet import IP, TCP

    return bytes(IP(src=source, dst=destination) / TCP(sport=port, dport=8080))


def send(place: Place, to: str, payload: bytes) -> None:
    with place.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(payload, (to, PORT))


def dropped(cluster: Cluster, cause: str = "spoofed-source") -> int:
    return int(cluster.agent_status(NEAR)["drops"].get(cause, 0))


@contextlib.contextmanager
def raw(place: Place, to: str, via: str) -> Iterator[socket.socket]:
    """A socket for whole IPv4 packets, any source, that go to `to` by a way of their own."""
    place.run("ip", "route", "replace", f"{to}/32", "via", via)
    try:
        with place.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
            sender.connect((to, 0))
            yield sender
    finally:
        place.run("ip", "route", "del", f"{to}/32", "via", via)


STRANGERS = [
    ("an outsider in a pod's name", "outside", "c", TUNNEL_ID),
    ("an outsider in its own name", "outside", "outside", TUNNEL_ID),
    ("a node in the name of a pod here", FAR, "b", TUNNEL_ID),
    ("a node with another network's number", FAR, "c", TUNNEL_ID + 1),
]


@pytest.mark.parametrize(
    ("sender", "source", "number"), [s[1:] for s in STRANGERS], ids=[s[0] for s in STRANGERS]
)
def test_nobody_speaks_through_the_tunnel_for_others(
    tunnels: Cluster, sender: str, source: str, number: int
) -> None:
    a = tunnels.pod("traffic/a")
    outside = sender == "outside"
    place = tunnels.outside() if outside else tunnels.node(FAR)
    to = "172.31.0.11" if outside else tunnels.node_ip(NEAR)
    claimed = tunnels.outside_ip() if source == "outside" else tunnels.pod(f"traffic/{source}").ip()
    before = dropped(tunnels)
    send(place, to, vxlan_frame(syn(claimed, a.ip(), 4321), number))
    until(lambda: dropped(tunnels) > before, "the packet to be dropped as spoofed")
    assert not [
        f
        for f in tunnels.flows(NEAR)
        if f["verdict"] == "allow" and f["source"].get("port") == 4321
    ]


def test_nobody_outside_passes_for_a_node_to_the_tunnel(tunnels: Cluster) -> None:
    """Whatever its source address: nodes are on another card."""
    from scapy.layers.inet import IP, UDP

    a, c = tunnels.pod("traffic/a"), tunnels.pod("traffic/c")
    here, there = tunnels.node_ip(NEAR), tunnels.node_ip(FAR)
    inner = vxlan_frame(syn(c.ip(), a.ip(), 4324))
    before = dropped(tunnels, "tunnel-stranger")
    with raw(tunnels.outside(), here, "172.31.0.11") as sender:
        sender.send(bytes(IP(src=there, dst=here) / UDP(sport=4324, dport=PORT) / inner))
    until(lambda: dropped(tunnels, "tunnel-stranger") > before, "the packet to be dropped")


def test_nobody_speaks_for_a_pod_behind_the_tunnel_beside_it(tunnels: Cluster) -> None:
    """The pod's own node does not, so nobody else on its link does."""
    a, c, here = tunnels.pod("traffic/a"), tunnels.pod("traffic/c"), tunnels.node_ip(NEAR)
    before = dropped(tunnels)
    with raw(tunnels.node(FAR), a.ip(), here) as sender:
        sender.send(plain_syn(c.ip(), a.ip(), 4325))
    until(lambda: dropped(tunnels) > before, "the packet to be dropped as spoofed")


def test_a_pod_does_not_speak_through_the_tunnel_as_its_node(tunnels: Cluster) -> None:
    """Masqueraded towards an address of the other node's that no Node object tells of, as that of
    a load balancer, its packets bear its own node's address."""
    a, c, near = tunnels.pod("traffic/a"), tunnels.pod("traffic/c"), tunnels.node(NEAR)
    (card,) = json.loads(near.run("ip", "-j", "addr", "show", "to", tunnels.node_ip(NEAR)).stdout)
    own = next(one for one in card["addr_info"] if one.get("local") == tunnels.node_ip(NEAR))
    network = ip_interface(f"{own['local']}/{own['prefixlen']}").network
    shared = f"{network[77]}/{own['prefixlen']}"
    before = dropped(tunnels)
    near.run("ip", "addr", "add", shared, "dev", card["ifname"])
    try:
        send(c, str(network[77]), vxlan_frame(syn(tunnels.node_ip(FAR), a.ip(), 4323)))
        until(lambda: dropped(tunnels) > before, "the packet to be dropped as spoofed")
    finally:
        near.run("ip", "addr", "del", shared, "dev", card["ifname"])


def test_a_node_speaks_for_its_own_pods(tunnels: Cluster) -> None:
    """The frame of the tests above, from where it may come: it reaches the pod."""
    a, c = tunnels.pod("traffic/a"), tunnels.pod("traffic/c")
    before = dropped(tunnels)
    forwarded = int(tunnels.agent_status(NEAR)["forwarded"])
    send(tunnels.node(FAR), tunnels.node_ip(NEAR), vxlan_frame(syn(c.ip(), a.ip(), 4322)))
    until(lambda: int(tunnels.agent_status(NEAR)["forwarded"]) > forwarded, "the SYN to pass")
    assert dropped(tunnels) == before


# ---- Questions and restarts ----------------------------------------------------------


def test_explain_follows_the_tunnel(tunnels: Cluster) -> None:
    answer = json.loads(
        tunnels.lockgate("explain", "traffic/a", "traffic/c", "8080", "--json").stdout
    )
    answer = answer[0] if isinstance(answer, list) else answer
    assert answer["verdict"] == "allow"


def test_a_restart_changes_nothing(tunnels: Cluster) -> None:
    a, c = tunnels.pod("traffic/a"), tunnels.pod("traffic/c")
    before = device(tunnels, NEAR)
    epoch = tunnels.agent_status(NEAR)["epoch"]

    def another() -> bool:
        with contextlib.suppress(OSError):
            status = tunnels.agent_status(NEAR)
            return bool(status["applied"] and status["started"] > began)
        return False

    with connected(a, c, c.ip(), 0) as (here, there):
        began = time.time()
        os.kill(agent_pid(tunnels, NEAR), signal.SIGKILL)
        here.sendall(b"while nobody watches")
        assert there.recv(100) == b"while nobody watches"
        until(another, "another agent", 20)
        here.sendall(b"and after")
        assert there.recv(100) == b"and after"
    assert device(tunnels, NEAR) == before
    assert tunnels.agent_status(NEAR)["epoch"] == epoch


def device(cluster: Cluster, node: str) -> str:
    """lg-vxlan and its program as the kernel shows them, without what counts."""
    return cluster.node(node).run("ip", "-d", "link", "show", "lg-vxlan").stdout


def agent_pid(cluster: Cluster, node: str) -> int:
    path = cluster.state.cgroup(node) / "agent" / "cgroup.procs"
    return int(path.read_text().split()[0])


def _family(number: int) -> socket.AddressFamily:
    return socket.AF_INET6 if number == 6 else socket.AF_INET

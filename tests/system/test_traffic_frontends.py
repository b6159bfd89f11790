"""Clients outside the cluster at frontends, in real traffic: three nodes that forward nothing.

The servers are the test's own sockets, so that what they see of their client is seen. Pod `near`
is on node-1, where the clients' packets arrive, `far` on node-2, `client` on node-3.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import FOREIGN_FIREWALL, _pod
from tests.system.harness import Cluster, Place, Pod, manifest, need_root, unique_name
from tests.system.test_traffic import ping

pytestmark = pytest.mark.skipif(need_root(), reason="needs root")

PORT, TARGET = 80, 9000
NODE_IPS = {f"node-{n}": {4: f"172.30.0.{10 + n}", 6: f"fd00:172:30::{10 + n}"} for n in (1, 2, 3)}
NODES = ("node-1", "node-2", "node-3")
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
FAMILIES = (4, 6)
#: Service → its address by family and its node port.
FRONTENDS = {
    f"{where}-{mode}": (
        {4: f"203.0.113.{number}", 6: f"2001:db8:113::{number}"},
        30000 + number,
    )
    for number, (where, mode) in enumerate(
        ((w, m) for w in ("near", "far", "process", "remote-process") for m in ("dsr", "snat")), 1
    )
}


def frontend(name: str) -> list[str]:
    where, _, mode = name.rpartition("-")
    addresses, node_port = FRONTENDS[name]
    spec = {
        "type": "NodePort",
        "ipFamilyPolicy": "PreferDualStack",
        "externalIPs": list(addresses.values()),
        "ports": [
            {
                "name": kind,
                "port": PORT,
                "protocol": kind.upper(),
                "targetPort": TARGET,
                "nodePort": node_port,
            }
            for kind in KINDS
        ],
    }
    if where in ("near", "far"):
        spec["selector"] = {"app": where}
    service = json.loads(manifest("Service", "edge", name, spec))
    service["metadata"]["annotations"] = {"lockgate.dev/forwarding": mode}
    documents = [json.dumps(service)]
    node = {"process": "node-1", "remote-process": "node-2"}.get(where)
    for family in FAMILIES if node else ():
        address = NODE_IPS[node or ""][family]
        piece = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": "edge",
                "name": f"{name}-{family}",
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": f"IPv{family}",
            "ports": [{"name": kind, "port": TARGET, "protocol": kind.upper()} for kind in KINDS],
            "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        }
        documents.append(json.dumps(piece))
    return documents


def build(folder: Path, name: str, routing: str) -> Cluster:
    documents = ['{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "edge"}}']
    for pod, node in (("near", "node-1"), ("far", "node-2"), ("client", "node-3")):
        documents.append(_pod(pod, node, 8080, namespace="edge"))
    for name_ in FRONTENDS:
        documents += frontend(name_)
    (folder / "edge.yaml").write_text("\n---\n".join(documents))
    return Cluster(folder, unique_name(name), nodes=3, routing=routing)


@pytest.fixture(scope="module", params=["direct", "vxlan"])
def edge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("edge")
    with build(folder, f"te{request.param[0]}", request.param) as cluster:
        for node in cluster.node_names:
            place = cluster.node(node)
            place.sysctl(net__ipv4__ip_forward=0, net__ipv6__conf__all__forwarding=0)
            place.run("nft", "-f", "-", input=FOREIGN_FIREWALL)
        outside = cluster.outside()
        outside.run("ip", "route", "add", "203.0.113.0/24", "via", "172.31.0.11")
        outside.run("ip", "route", "add", "2001:db8:113::/64", "via", "fd00:172:31::11")
        for family, gateway in ((4, "172.31.0.11"), (6, "fd00:172:31::11")):
            outside.run("ip", "route", "add", NODE_IPS["node-1"][family], "via", gateway)
        yield cluster


def number(family: int) -> socket.AddressFamily:
    return socket.AF_INET6 if family == 6 else socket.AF_INET


def server_of(cluster: Cluster, name: str) -> Place:
    where = name.rpartition("-")[0]
    if where in ("near", "far"):
        return cluster.pod(f"edge/{where}")
    return cluster.node({"process": "node-1", "remote-process": "node-2"}[where])


@contextlib.contextmanager
def serving(place: Place, kind: str, family: int, own: str) -> Iterator[socket.socket]:
    with place.socket(number(family), KINDS[kind]) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == 6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # A process's answers have to come from the address that was asked.
        server.bind((own, TARGET))
        if kind == "tcp":
            server.listen()
        yield server


def talk(
    client: Place, server: Place, kind: str, family: int, address: str, port: int, size: int = 100
) -> str:
    """One exchange, checked byte by byte; the client's address as the server saw it."""
    sent = os.urandom(size)
    own = server.ip(family) if isinstance(server, Pod) else NODE_IPS[server.netns.name[-6:]][family]
    with (
        serving(server, kind, family, own) as far,
        client.socket(number(family), KINDS[kind]) as near,
    ):
        if kind == "udp":
            near.settimeout(1)
            far.settimeout(1)
        near.connect((address, port))
        if kind == "udp":
            # One that is too big for the way is not sent again: it tells what fits.
            got, sender = again(lambda: near.send(sent), lambda: far.recvfrom(65536))
            assert got == sent
            back = again(lambda: far.sendto(sent[::-1], sender), lambda: near.recv(65536))
            assert back == sent[::-1]
            return str(sender[0])
        there, sender = far.accept()
        with there:
            there.settimeout(10)
            exchange(near, there, sent)
            exchange(there, near, sent)
        return str(sender[0])


def again(send: Callable[[], Any], receive: Callable[[], Any], times: int = 5) -> Any:
    """What comes of sending it, at the last of some times."""
    for _ in range(times):
        try:
            send()
            return receive()
        except TimeoutError:
            pass
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
    raise AssertionError(f"nothing came of sending it {times} times")


def exchange(source: socket.socket, sink: socket.socket, data: bytes) -> None:
    thread = threading.Thread(target=source.sendall, args=(data,))
    thread.start()
    found, left = hashlib.sha256(), len(data)
    while left:
        part = sink.recv(1 << 18)
        assert part
        found.update(part)
        left -= len(part)
    thread.join()
    assert found.digest() == hashlib.sha256(data).digest()


def sees(cluster: Cluster, name: str, family: int) -> set[str]:
    """Who the server sees of a client outside."""
    where, _, mode = name.rpartition("-")
    if mode == "snat" and where in ("far", "remote-process"):
        return {NODE_IPS["node-1"][family]}
    return {cluster.outside_ip(family)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", ["address", "node port"])
@pytest.mark.parametrize("name", FRONTENDS)
def test_each_frontend_from_outside(
    edge: Cluster, name: str, at: str, kind: str, family: int
) -> None:
    addresses, node_port = FRONTENDS[name]
    node = NODE_IPS["node-1"][family]
    address, port = (addresses[family], PORT) if at == "address" else (node, node_port)
    seen = talk(edge.outside(), server_of(edge, name), kind, family, address, port)
    assert seen in sees(edge, name, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FRONTENDS)
def test_ten_megabytes_each_way(edge: Cluster, name: str, family: int) -> None:
    """In large segments, cut and put together on the way."""
    address = FRONTENDS[name][0][family]
    talk(edge.outside(), server_of(edge, name), "tcp", family, address, PORT, 10 << 20)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FRONTENDS)
def test_fragments_both_ways(edge: Cluster, name: str, family: int) -> None:
    address = FRONTENDS[name][0][family]
    talk(edge.outside(), server_of(edge, name), "udp", family, address, PORT, 8000)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["pod", "node"])
@pytest.mark.parametrize("name", FRONTENDS)
def test_another_nodes_port_from_inside(
    edge: Cluster, name: str, who: str, kind: str, family: int
) -> None:
    """The answer comes from a third node, in the name of the one that was asked."""
    client = edge.pod("edge/client") if who == "pod" else edge.node("node-3")
    address, port = NODE_IPS["node-1"][family], FRONTENDS[name][1]
    seen = talk(client, server_of(edge, name), kind, family, address, port)
    own = edge.pod("edge/client").ip(family) if who == "pod" else NODE_IPS["node-3"][family]
    assert seen in {own, *(sees(edge, name, family) if "snat" in name else ())}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backend_that_asks_another_nodes_port_reaches_itself(edge: Cluster, family: int) -> None:
    far = edge.pod("edge/far")
    for kind in KINDS:
        address, port = NODE_IPS["node-1"][family], FRONTENDS["far-dsr"][1]
        seen = talk(far, far, kind, family, address, port)
        assert seen == address


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_hears_the_pod_beside_it_in_another_nodes_name(
    edge: Cluster, kind: str, family: int
) -> None:
    """Also where the node's stack takes packets by their way back only (rp_filter)."""
    node = edge.node("node-2")
    # Beside a tunnel it has to be off: the answer comes by the pod's link.
    node.sysctl(net__ipv4__conf__all__rp_filter=2 * (edge.routing == "direct"))
    address, port = NODE_IPS["node-1"][family], FRONTENDS["far-dsr"][1]
    seen = talk(node, edge.pod("edge/far"), kind, family, address, port)
    assert seen == NODE_IPS["node-2"][family]
    node.sysctl(net__ipv4__conf__all__rp_filter=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_ping_and_unknown_ports(edge: Cluster, family: int) -> None:
    address = FRONTENDS["near-dsr"][0][family]
    assert ping(edge.outside(), address, 56)
    assert ping(edge.outside(), address, 4000)
    for kind in KINDS:
        with edge.outside().socket(number(family), KINDS[kind]) as near:
            with pytest.raises(ConnectionRefusedError):
                near.connect((address, 81))
                near.send(b"x")
                near.recv(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FRONTENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_backend_that_does_not_listen_refuses(
    edge: Cluster, name: str, kind: str, family: int
) -> None:
    with edge.outside().socket(number(family), KINDS[kind]) as near:
        with pytest.raises(ConnectionRefusedError):
            near.connect((FRONTENDS[name][0][family], PORT))
            near.send(b"x")
            near.recv(1)

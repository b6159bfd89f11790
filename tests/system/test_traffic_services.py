"""Service addresses in real traffic: at the socket, per packet, and when backends come and go."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import HashMap
from lockgate.bpf.pins import pin_names
from lockgate.paths import bpf_object
from tests.system.harness import Cluster, Place, Pod, manifest, until
from tests.system.test_traffic import echo, echo_reply, echo_socket, family_number, udp

# name: (who asks, by socket hooks?). A bare place is in no cgroup of the node: what it sends is
# translated packet by packet.
CLIENTS = ["pod", "bare", "node"]
SERVICES = {"local": "b", "remote": "c"}
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def client_of(cluster: Cluster, who: str) -> Place:
    if who == "node":
        return cluster.node("node-1")
    pod = cluster.pod("traffic/a")
    return cluster.bare(pod) if who == "bare" else pod


def ask(near: socket.socket) -> bytes:
    """A line to a pod's own server, and its answer: the pod's name."""
    near.sendall(b"who are you?\n")
    return near.recv(1000).split()[0]


# ---- Connecting --------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("who", CLIENTS)
def test_a_connection_to_a_service_reaches_a_backend_and_shows_the_service(
    traffic: Cluster, who: str, service: str, kind: str, family: int
) -> None:
    address = traffic.service_ip(f"traffic/{service}", family)
    with client_of(traffic, who).socket(family_number(family), KINDS[kind]) as near:
        near.connect((address, 80))
        assert near.getpeername()[:2] == (address, 80)
        assert ask(near) == SERVICES[service].encode()
        assert near.getpeername()[:2] == (address, 80)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", CLIENTS)
def test_an_ipv6_socket_reaches_an_ipv4_service_by_its_mapped_address(
    traffic: Cluster, who: str, kind: str
) -> None:
    address = f"::ffff:{traffic.service_ip('traffic/remote', 4)}"
    with client_of(traffic, who).socket(socket.AF_INET6, KINDS[kind]) as near:
        near.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        near.connect((address, 80))
        assert near.getpeername()[:2] == (address, 80)
        assert ask(near) == b"c"


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "mapped"])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("who", CLIENTS)
def test_answers_to_an_unconnected_socket_come_from_the_service(
    traffic: Cluster, who: str, family: int, mapped: bool, service: str
) -> None:
    if mapped and family == 6:
        pytest.skip("only IPv4 addresses are mapped")
    address = traffic.service_ip(f"traffic/{service}", family)
    address = f"::ffff:{address}" if mapped else address
    with client_of(traffic, who).socket(
        family_number(6 if mapped else family), socket.SOCK_DGRAM
    ) as near:
        near.sendto(b"who?\n", (address, 80))
        answer, sender = near.recvfrom(1000)
        assert answer.split()[0] == SERVICES[service].encode()
        assert sender[:2] == (address, 80)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["pod", "bare"])
def test_a_pod_reaches_itself_through_its_service(
    traffic: Cluster, who: str, kind: str, family: int
) -> None:
    address = traffic.service_ip("traffic/self", family)
    with client_of(traffic, who).socket(family_number(family), KINDS[kind]) as near:
        near.connect((address, 80))
        assert ask(near) == b"a"
        assert near.getpeername()[:2] == (address, 80)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", CLIENTS)
def test_a_service_without_backends_refuses_at_once(
    traffic: Cluster, who: str, kind: str, family: int
) -> None:
    address = traffic.service_ip("traffic/empty", family)
    with client_of(traffic, who).socket(family_number(family), KINDS[kind]) as near:
        with pytest.raises(ConnectionRefusedError):
            near.connect((address, 80))
            ask(near)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", CLIENTS)
def test_a_backend_that_does_not_listen_refuses(
    traffic: Cluster, who: str, kind: str, family: int
) -> None:
    """The error that the backend sends finds its way back to the service's client."""
    address = traffic.service_ip("traffic/closed", family)
    with client_of(traffic, who).socket(family_number(family), KINDS[kind]) as near:
        with pytest.raises(ConnectionRefusedError):
            near.connect((address, 80))
            ask(near)


@pytest.mark.parametrize("service", [*SERVICES, "self"])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("who", CLIENTS)
def test_fragments_reach_a_service(traffic: Cluster, who: str, family: int, service: str) -> None:
    if who == "node" and service == "self":
        pytest.skip("only a pod can be its own backend")
    address = traffic.service_ip(f"traffic/{service}", family)
    with client_of(traffic, who).socket(family_number(family), socket.SOCK_DGRAM) as near:
        near.sendto(b"who?" * 1000, (address, 80))
        answer, sender = near.recvfrom(65536)
        assert answer.split()[0] == {**SERVICES, "self": "a"}[service].encode()
        assert sender[:2] == (address, 80)


@pytest.mark.parametrize("family", [4, 6])
def test_a_datagram_to_a_service_without_backends_is_refused(traffic: Cluster, family: int) -> None:
    address = traffic.service_ip("traffic/empty", family)
    with udp(traffic.pod("traffic/a"), family) as near, pytest.raises(ConnectionRefusedError):
        near.sendto(b"x", (address, 80))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", CLIENTS)
def test_a_port_that_the_service_does_not_have_is_refused(
    traffic: Cluster, who: str, kind: str, family: int
) -> None:
    address = traffic.service_ip("traffic/local", family)
    with client_of(traffic, who).socket(family_number(family), KINDS[kind]) as near:
        with pytest.raises(OSError) as caught:
            near.connect((address, 81))
            ask(near)
    assert caught.value.errno == errno.ECONNREFUSED, caught.value
    if who != "node":  # that is told by the socket, without a packet
        causes = {f["cause"] for f in until(lambda: flows_to(traffic, address, 81), "a record")}
        assert causes == {"unknown-service-port"}


def flows_to(cluster: Cluster, address: str, port: int) -> list[dict[str, Any]]:
    return [
        flow
        for flow in cluster.flows()
        if flow["destination"]["ip"] == address and flow["destination"].get("port") == port
    ]


def test_the_flow_log_names_the_service_that_was_asked(traffic: Cluster) -> None:
    for who in ("pod", "bare"):
        with client_of(traffic, who).socket() as near:
            near.connect((traffic.service_ip("traffic/remote"), 80))
            port = near.getsockname()[1]
            ask(near)
        found = until(
            lambda port=port: [f for f in traffic.flows() if f["source"].get("port") == port],
            f"a record of port {port}",
        )
        named = [f["service"] for f in found if f["node"] == "node-1"]
        assert named
        assert all((s["namespace"], s["name"]) == ("traffic", "remote") for s in named)


# ---- Backends that come and go -----------------------------------------------------------------


def moving(*backends: str, **more: str) -> list[str]:
    """Pods m1 and m2, and a service with these of them as backends, and more in its spec."""
    documents = []
    for name, node in (("m1", "node-1"), ("m2", "node-2")):
        ports = [{"containerPort": 8080, "protocol": p} for p in ("TCP", "UDP")]
        spec = {"nodeName": node, "containers": [{"name": "main", "ports": ports}]}
        role = "serving" if name in backends else "idle"
        documents.append(manifest("Pod", "traffic", name, spec, role=role))
    spec = {
        "selector": {"role": "serving"},
        "ipFamilyPolicy": "PreferDualStack",
        "ports": [
            {"name": p.lower(), "port": 80, "protocol": p, "targetPort": 8080}
            for p in ("TCP", "UDP")
        ],
        **more,
    }
    return [*documents, manifest("Service", "traffic", "moving", spec)]


@pytest.fixture
def moved(traffic: Cluster) -> Iterator[Cluster]:
    traffic.save("moving.yaml", *moving("m1"))
    until(lambda: backends(traffic) == ["m1"], "m1 serves")
    yield traffic
    traffic.save("moving.yaml")


def backends(cluster: Cluster) -> list[str]:
    return sorted(
        {
            endpoint["targetRef"]["name"]
            for one in cluster.objects("endpoints")
            if one["metadata"].get("labels", {}).get("kubernetes.io/service-name") == "moving"
            for endpoint in one["endpoints"]
            if endpoint.get("conditions", {}).get("ready", True)
        }
    )


def forget_connections(cluster: Cluster, node: str) -> None:
    """As if the LRU had evicted all, or nobody had said anything for too long."""
    schema = Schema.from_object(bpf_object())
    for name, key, value in (
        ("connections", "ct_key", "ct"),
        ("half_open", "ct_key", "ct"),
        ("nat", "tuple", "nat"),
    ):
        path = cluster.state.pins() / node / pin_names(schema)[name]
        with HashMap.open(str(path), schema.dtype(key), schema.dtype(value)) as table:
            table.delete_many(table.keys())


@pytest.mark.parametrize("entries", ["kept", "forgotten"])
@pytest.mark.parametrize("end", ["relabelled", "deleted"])
def test_udp_clients_follow_when_their_backend_goes(moved: Cluster, end: str, entries: str) -> None:
    """Connected and unconnected ones, at the socket and per packet, of both families; whether
    their connection is still known then or not. With the last backend they are refused."""
    clients = []
    for family in (4, 6):
        address = moved.service_ip("traffic/moving", family), 80
        for who in CLIENTS:
            # No hook sees what a connected socket of the node itself sends: see the next test.
            for is_connected in (True, False) if who != "node" else (False,):
                near = client_of(moved, who).socket(family_number(family), socket.SOCK_DGRAM)
                if is_connected:
                    near.connect(address)
                clients.append((near, address, f"{who} IPv{family} connected={is_connected}"))

    def asked(near: socket.socket, address: tuple[str, int]) -> tuple[bytes, tuple[str, int]]:
        near.sendto(b"who?\n", address) if not has_peer(near) else near.send(b"who?\n")
        answer, sender = near.recvfrom(1000)
        return answer.split()[0], sender[:2]

    def serve(*names: str, deleted: int = 0) -> None:
        moved.save("moving.yaml", *moving(*names)[deleted:])
        until(lambda: backends(moved) == list(names), f"{names} serve")
        moved.wait()
        if entries == "forgotten":
            forget_connections(moved, "node-1")

    assert [asked(near, address) for near, address, _ in clients] == [
        (b"m1", address) for _, address, _ in clients
    ]
    wrong: list[Any] = []
    for name in ("m2", "m1") if end == "relabelled" else ("m2",):
        serve(name, deleted=end == "deleted")
        for near, address, what in clients:
            near.settimeout(1)
            try:
                for _ in range(4):
                    if (got := asked(near, address)) != (name.encode(), address):
                        wrong.append((what, got))
            except OSError as error:
                wrong.append((what, name, error))
    serve(deleted=end == "deleted")
    for near, address, what in clients:
        for _ in range(2):
            if "bare" in what and not has_peer(near):
                break  # no stack tells an ICMP error to a socket without a peer
            try:
                wrong.append((what, asked(near, address)))
            except ConnectionRefusedError:
                pass
            except OSError as error:
                wrong.append((what, error))
        near.close()
    assert not wrong


def late_answer(pod: Pod, family: int, near: socket.socket) -> bytes:
    """What the pod's server says now to an earlier question of the client, as that receives it."""
    with pod.socket(family_number(family), socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        if family == 6:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_CHECKSUM, 6)
        host, port = near.getsockname()[:2]
        # RFC 768: ports, length, checksum; 0 = none, as IPv4 allows.
        raw.sendto(struct.pack("!4H", 8080, port, 8 + 4, 0) + b"late", (host, 0))
    return near.recv(100)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("old", "new"), [("m1", "m2"), ("m2", "m1")], ids=["near", "far"])
def test_a_late_answer_of_a_backend_that_went_does_not_take_its_client_back(
    moved: Cluster, old: str, new: str, family: int
) -> None:
    """The old one is of the client's node, or of another."""

    def serve(name: str) -> None:
        moved.save("moving.yaml", *moving(name))
        until(lambda: backends(moved) == [name], f"{name} serves")
        moved.wait()

    serve(old)
    with moved.pod("traffic/a").socket(family_number(family), socket.SOCK_DGRAM) as near:
        near.connect((moved.service_ip("traffic/moving", family), 80))
        assert ask(near) == old.encode()
        serve(new)
        for _ in range(2):
            assert ask(near) == new.encode()
            assert late_answer(moved.pod(f"traffic/{old}"), family, near) == b"late"
            assert [ask(near) for _ in range(3)] == [new.encode()] * 3
            moved.save("moving.yaml", *moving(new, sessionAffinity="ClientIP"))
            moved.wait()


@pytest.mark.parametrize("family", [4, 6])
def test_a_socket_on_a_port_whose_last_one_followed_reaches_its_own_service(
    moved: Cluster, family: int
) -> None:
    """A backend went from one service, and is another's."""
    ports = [{"port": 80, "protocol": "UDP", "targetPort": 8080}]
    spec = {"selector": {"role": "idle"}, "ipFamilyPolicy": "PreferDualStack", "ports": ports}
    port = 0
    for name, service in (("m1", "moving"), ("m2", "moving"), ("m1", "waiting")):
        if service == "moving":
            documents = [*moving(name), manifest("Service", "traffic", "waiting", spec)]
            moved.save("moving.yaml", *documents)
            until(lambda name=name: backends(moved) == [name], f"{name} serves")
            moved.wait()
        if name == "m1":
            near = moved.pod("traffic/a").socket(family_number(family), socket.SOCK_DGRAM)
            near.bind(("", port))
            near.connect((moved.service_ip(f"traffic/{service}", family), 80))
        assert [ask(near) for _ in range(3)] == [name.encode()] * 3
        port = near.getsockname()[1]
        if name == "m2":
            near.close()
    near.close()


@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "mapped"])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("end", ["relabelled", "deleted"])
def test_a_connected_udp_socket_of_the_node_is_ended_when_its_backend_goes(
    moved: Cluster, end: str, family: int, mapped: bool
) -> None:
    """Its owner connects again; nobody else's is touched."""
    if mapped and family == 6:
        pytest.skip("only IPv4 addresses are mapped")
    node, kind = moved.node("node-1"), family_number(6 if mapped else family)

    def connect(to: str, place: Place = node) -> socket.socket:
        near = place.socket(kind, socket.SOCK_DGRAM)
        near.connect(((f"::ffff:{to}" if mapped else to), 80 if to != m1 else 8080))
        return near

    address = moved.service_ip("traffic/moving", family)
    m1 = moved.pod("traffic/m1").ip(family)
    with (
        connect(address) as near,
        connect(moved.service_ip("traffic/local", family)) as other,
        connect(m1) as itself,
        connect(address, client_of(moved, "pod")) as pods,
    ):
        assert [ask(s) for s in (near, other, itself, pods)] == [b"m1", b"b", b"m1", b"m1"]
        moved.save("moving.yaml", *moving("m2")[end == "deleted" :])
        with pytest.raises(ConnectionAbortedError):
            near.recv(1)
        with pytest.raises(OSError) as caught:
            near.send(b"x")
        assert caught.value.errno == errno.EDESTADDRREQ
        near.connect(((f"::ffff:{address}" if mapped else address), 80))
        assert [ask(s) for s in (near, other, pods)] == [b"m2", b"b", b"m2"]
        assert end == "deleted" or ask(itself) == b"m1"


def has_peer(near: socket.socket) -> bool:
    try:
        near.getpeername()
    except OSError:
        return False
    return True


def test_a_tcp_connection_to_a_backend_that_left_the_service_goes_on(moved: Cluster) -> None:
    """As with kube-proxy: a backend that is no longer ready keeps what it has."""
    for who in ("pod", "bare"):
        moved.save("moving.yaml", *moving("m1"))
        until(lambda: backends(moved) == ["m1"], "m1 serves")
        with client_of(moved, who).socket() as near:
            near.connect((moved.service_ip("traffic/moving"), 80))
            assert ask(near) == b"m1"
            moved.save("moving.yaml", *moving("m2"))
            until(lambda: backends(moved) == ["m2"], "m2 serves")
            moved.wait()
            near.sendall(b"still here?")
            near.shutdown(socket.SHUT_WR)
            assert near.recv(1) == b"", "the backend heard the end, and ended"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", CLIENTS)
def test_a_client_of_a_service_with_affinity_keeps_its_backend(
    moved: Cluster, who: str, kind: str, family: int
) -> None:
    address = moved.service_ip("traffic/moving", family), 80

    def publish(affinity: str, *serving: str) -> None:
        moved.save("moving.yaml", *moving(*serving, sessionAffinity=affinity))
        until(lambda: backends(moved) == list(serving), f"{serving} serve")
        moved.wait()

    def answers(count: int) -> set[bytes]:
        found = set()
        for _ in range(count):
            with client_of(moved, who).socket(family_number(family), KINDS[kind]) as near:
                near.connect(address)
                found.add(ask(near))
        return found

    publish("ClientIP", "m1", "m2")
    (kept,) = answers(20)
    other = "m2" if kept == b"m1" else "m1"
    publish("ClientIP", other)
    assert answers(5) == {other.encode()}
    publish("ClientIP", "m1", "m2")
    assert answers(20) == {other.encode()}
    publish("None", "m1", "m2")
    assert answers(64) == {b"m1", b"m2"}


def test_a_ping_to_a_service_goes_nowhere_and_its_record_says_so(traffic: Cluster) -> None:
    address = traffic.service_ip("traffic/local")
    with echo_socket(traffic.pod("traffic/a"), 4) as near:
        near.sendto(echo(4, 99, b"x"), (address, 0))
        found = until(
            lambda: [
                flow
                for flow in traffic.flows("node-1", cause="unknown-service-port")
                if flow["destination"]["ip"] == address and flow["protocol"] == "ICMP"
            ],
            "a record of the echo request",
        )
        assert {flow["verdict"] for flow in found} == {"deny"}
        near.settimeout(0.05)
        with pytest.raises(TimeoutError):
            echo_reply(near, 4, 99)

"""What services and pods may ask for besides NodePorts and external IPs, in real traffic: load
balancers' addresses with source ranges, hostPorts, other types under an open connection."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import _pod
from tests.system.harness import Cluster, Place, Pod, manifest, need_root, unique_name
from tests.system.test_traffic_frontends import (
    FAMILIES,
    KINDS,
    NODE_IPS,
    PORT,
    TARGET,
    exchange,
    number,
    serving,
    talk,
)
from tests.system.test_traffic_services import ask

pytestmark = pytest.mark.skipif(need_root(), reason="needs root")

HOST_PORT, NODE_PORT = 8081, 30077
WORLD = {4: "172.31.0.1", 6: "fd00:172:31::1"}
STRANGER = {4: "172.31.0.99", 6: "fd00:172:31::99"}
CLIENTS = ("pod", "node", "outside")


def service(name: str, **spec: Any) -> str:
    ports = [
        {"name": kind, "port": PORT, "protocol": kind.upper(), "targetPort": TARGET}
        for kind in KINDS
    ]
    whole = {"selector": {"app": "far"}, "ipFamilyPolicy": "PreferDualStack", "ports": ports}
    return manifest("Service", "kinds", name, whole | spec)


def with_host_port() -> str:
    pod = json.loads(_pod("near", "node-1", namespace="kinds"))
    pod["spec"]["containers"][0]["ports"] = [
        {"containerPort": 8080, "hostPort": HOST_PORT, "protocol": kind.upper()} for kind in KINDS
    ]
    return json.dumps(pod)


SWITCHED = {
    kind: service(
        "switched",
        type=kind,
        ports=[
            {"name": "tcp", "port": PORT, "targetPort": TARGET}
            | ({} if kind == "ClusterIP" else {"nodePort": NODE_PORT})
        ],
    )
    for kind in ("ClusterIP", "NodePort", "LoadBalancer")
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("kinds")
    documents = [
        '{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kinds"}}',
        with_host_port(),
        _pod("far", "node-2", namespace="kinds"),
        _pod("client", "node-1", namespace="kinds"),
        service("balanced", type="LoadBalancer"),
        service(
            "ranged",
            type="LoadBalancer",
            loadBalancerSourceRanges=[f"{WORLD[4]}/32", f"{WORLD[6]}/128"],
        ),
        service("borrowed", externalIPs=list(WORLD.values())),
    ]
    (folder / "kinds.yaml").write_text("\n---\n".join(documents))
    (folder / "switched.yaml").write_text(SWITCHED["NodePort"])
    with Cluster(folder, unique_name("tk"), nodes=2) as cluster:
        outside = cluster.outside()
        for family, gateway in ((4, "172.31.0.11"), (6, "fd00:172:31::11")):
            outside.run("ip", "route", "add", NODE_IPS["node-1"][family], "via", gateway)
        outside.run("ip", "addr", "add", f"{STRANGER[4]}/32", "dev", "lo")
        outside.run("ip", "addr", "add", f"{STRANGER[6]}/128", "dev", "lo", "nodad")
        for node in cluster.node_names:
            for family, prefix in ((4, "172.31.0.1"), (6, "fd00:172:31::1")):
                route = ("ip", f"-{family}", "route", "add", STRANGER[family], "via", prefix)
                cluster.node(node).run(*route)
        yield cluster


def client_of(cluster: Cluster, who: str) -> Place:
    if who == "outside":
        return cluster.outside()
    return cluster.pod("kinds/client") if who == "pod" else cluster.node("node-1")


def balancers(cluster: Cluster, name: str, family: int) -> str:
    """The load balancer's address of a service."""
    for one in cluster.objects("services"):
        if one["metadata"]["name"] == name:
            ingress = one["status"]["loadBalancer"]["ingress"]
            return next(str(i["ip"]) for i in ingress if (":" in i["ip"]) == (family == 6))
    raise AssertionError(name)


def hears(
    client: Place, server: Pod, kind: str, family: int, address: str, source: str = ""
) -> bool:
    """Does the server hear a client that asks there? Of UDP, the first datagram."""
    with (
        serving(server, kind, family, server.ip(family)) as far,
        client.socket(number(family), KINDS[kind]) as near,
    ):
        near.settimeout(2)
        far.settimeout(2)
        near.bind((source, 0))
        try:
            near.connect((address, PORT))
            if kind == "udp":
                near.send(b"question")
                return far.recv(100) == b"question"
            far.accept()[0].close()
        except TimeoutError:
            return False
        return True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", CLIENTS)
def test_a_load_balancers_address(kinds: Cluster, who: str, kind: str, family: int) -> None:
    address = balancers(kinds, "balanced", family)
    talk(client_of(kinds, who), kinds.pod("kinds/far"), kind, family, address, PORT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_who_is_not_in_the_ranges_is_not_heard(kinds: Cluster, kind: str, family: int) -> None:
    """Pods are like clients outside; a node's own processes are not asked where they are."""
    far, outside = kinds.pod("kinds/far"), kinds.outside()
    ranged = balancers(kinds, "ranged", family)
    assert hears(outside, far, kind, family, ranged)
    assert not hears(outside, far, kind, family, ranged, STRANGER[family])
    assert not hears(kinds.pod("kinds/client"), far, kind, family, ranged)
    assert hears(kinds.node("node-1"), far, kind, family, ranged)
    balanced = balancers(kinds, "balanced", family)
    assert hears(outside, far, kind, family, balanced, STRANGER[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", CLIENTS)
def test_a_host_port(kinds: Cluster, who: str, kind: str, family: int) -> None:
    with client_of(kinds, who).socket(number(family), KINDS[kind]) as near:
        near.settimeout(5)
        near.connect((NODE_IPS["node-1"][family], HOST_PORT))
        assert ask(near) == b"near"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", ["pod", "node"])
def test_of_an_address_outside_a_service_has_the_ports_that_it_names(
    kinds: Cluster, who: str, family: int
) -> None:
    """Whoever asks for the address of something outside does not cut others off from it."""
    client, address = client_of(kinds, who), WORLD[family]
    talk(client, kinds.pod("kinds/far"), "tcp", family, address, PORT)
    with (
        kinds.outside().socket(number(family), KINDS["tcp"]) as there,
        client.socket(number(family), KINDS["tcp"]) as near,
    ):
        there.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        there.bind((address, PORT + 1))
        there.listen()
        near.settimeout(5)
        near.connect((address, PORT + 1))
        with there.accept()[0] as accepted:
            exchange(near, accepted, b"question")
            exchange(accepted, near, b"answer")
    with client.socket(number(family), KINDS["tcp"]) as near:
        with pytest.raises(ConnectionRefusedError):
            near.connect((kinds.service_ip("kinds/borrowed", family), PORT + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_goes_on_while_its_service_gets_another_type(
    kinds: Cluster, family: int
) -> None:
    """From NodePort to LoadBalancer and back, and, as it is remembered, even to ClusterIP."""
    far, address = kinds.pod("kinds/far"), NODE_IPS["node-1"][family]
    with (
        serving(far, "tcp", family, far.ip(family)) as server,
        kinds.outside().socket(number(family), KINDS["tcp"]) as near,
    ):
        near.settimeout(5)
        near.connect((address, NODE_PORT))
        with server.accept()[0] as there:
            for kind in ("LoadBalancer", "ClusterIP", "NodePort"):
                kinds.save("switched.yaml", SWITCHED[kind])
                exchange(near, there, kind.encode())
                exchange(there, near, kind.encode())

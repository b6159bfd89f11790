"""A node with a second card to the world, over which the routers in front and its default route
balance: clients come by either, and meet the same services and the same firewall."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import _pod
from tests.system.harness import Cluster, manifest, need_root, unique_name, until
from tests.system.test_cluster_firewall import command
from tests.system.test_traffic_frontends import FAMILIES, KINDS, number, talk

pytestmark = pytest.mark.skipif(need_root(), reason="needs root")

NODE, NODE_PORT, OTHER_PORT = "node-1", 30080, 30081
#: The node's and the router's address on the second card; the router's and the node's on the first.
HERE = {4: "203.0.113.2", 6: "2001:db8:5::2"}
ROUTER = {4: "203.0.113.1", 6: "2001:db8:5::1"}
FIRST = {4: "172.31.0.1", 6: "fd00:172:31::1"}
SOURCE = {4: "172.31.0.11", 6: "fd00:172:31::11"}


def service(name: str, port: int, app: str) -> str:
    ports = [
        {"name": kind, "port": 80, "nodePort": port, "protocol": kind.upper(), "targetPort": 9000}
        for kind in KINDS
    ]
    spec = {"type": "NodePort", "ipFamilyPolicy": "PreferDualStack", "ports": ports}
    return manifest("Service", "uplinks", name, spec | {"selector": {"app": app}})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("uplinks")
    documents = [
        json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "uplinks"}}),
        _pod("near", "node-1", namespace="uplinks"),
        _pod("far", "node-2", namespace="uplinks"),
        service("near", NODE_PORT, "near"),
        service("far", OTHER_PORT, "far"),
    ]
    (folder / "uplinks.yaml").write_text("\n---\n".join(documents))
    with Cluster(folder, unique_name("up"), nodes=2) as made:
        connect(made)
        yield made


def connect(cluster: Cluster) -> None:
    """The second card, and half of what leaves by it."""
    node, router = cluster.node(NODE), cluster.outside()
    peer = ("type", "veth", "peer", "name", "second", "netns", str(router.netns))
    node.run("ip", "link", "add", "second0", *peer)
    for place, card, addresses in ((node, "second0", HERE), (router, "second", ROUTER)):
        place.run("ip", "link", "set", card, "up")
        place.run("ip", "addr", "add", f"{addresses[4]}/24", "dev", card)
        place.run("ip", "addr", "add", f"{addresses[6]}/64", "dev", card, "nodad")
    for family in FAMILIES:
        ways = [
            ("nexthop", "via", way[family], "dev", card)
            for way, card in ((FIRST, "outside0"), (ROUTER, "second0"))
        ]
        node.run("ip", f"-{family}", "route", "replace", "default", *ways[0], *ways[1])
    until(lambda: "second0" in cards(cluster), "the agent takes the card in")


def cards(cluster: Cluster) -> dict[str, Any]:
    """What XDP does at each."""
    return {one["card"]: one for one in cluster.agent_status(NODE)["xdp"]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("server", ["near", "far"])
@pytest.mark.parametrize("source", ["of the second link", "of the first"])
def test_a_node_port_asked_by_the_second_card(
    cluster: Cluster, source: str, server: str, kind: str, family: int
) -> None:
    """Served here, or encapsulated to the other node; the answer leaves by the first card."""
    client, pod = cluster.outside(), cluster.pod(f"uplinks/{server}")
    port = NODE_PORT if server == "near" else OTHER_PORT
    if source == "of the first":
        length = 32 if family == 4 else 128
        client.run(
            "ip",
            "route",
            "add",
            f"{HERE[family]}/{length}",
            "via",
            HERE[family],
            "dev",
            "second",
            "src",
            FIRST[family],
        )
    try:
        talk(client, pod, kind, family, HERE[family], port)
    finally:
        if source == "of the first":
            client.run("ip", "route", "del", f"{HERE[family]}/{length}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_to_what_a_pod_asked_comes_by_the_second_card(
    cluster: Cluster, kind: str, family: int
) -> None:
    """It left by the first, masqueraded as the first card's address."""
    router, length = cluster.outside(), 32 if family == 4 else 128
    node = SOURCE[family]
    router.run("ip", "route", "add", f"{node}/{length}", "via", HERE[family], "dev", "second")
    before = received(cluster)
    try:
        with (
            router.socket(number(family), KINDS[kind]) as server,
            cluster.pod("uplinks/near").socket(number(family), KINDS[kind]) as client,
        ):
            server.bind((FIRST[family], 7778))
            if kind == "tcp":
                server.listen()
            client.connect((FIRST[family], 7778))
            if kind == "udp":
                client.send(b"question")
                question, there = server.recvfrom(100)
                server.sendto(b"answer", there)
            else:
                accepted, there = server.accept()
                with accepted:
                    client.send(b"question")
                    question = accepted.recv(100)
                    accepted.send(b"answer")
            assert (question, client.recv(100)) == (b"question", b"answer")
            assert there[0] == node
    finally:
        router.run("ip", "route", "del", f"{node}/{length}")
    assert received(cluster) > before, "the answer came by the second card"


def received(cluster: Cluster) -> int:
    """Frames that came by it."""
    told = cluster.node(NODE).run("cat", "/proc/self/net/dev").stdout
    line = next(line for line in told.splitlines() if line.strip().startswith("second0:"))
    return int(line.split()[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_card_has_the_firewall_too(cluster: Cluster, family: int) -> None:
    length = 32 if family == 4 else 128
    node, router = cluster.node(NODE), cluster.outside()

    def arrives(to: str) -> bool:
        with (
            node.socket(number(family), KINDS["udp"]) as server,
            router.socket(number(family), KINDS["udp"]) as client,
        ):
            server.bind((to, 7777))
            server.settimeout(0.3)
            client.sendto(b"hello", (to, 7777))
            try:
                return server.recv(100) == b"hello"
            except TimeoutError:
                return False

    assert arrives(HERE[family])
    command(cluster, "add", "deny", f"{ROUTER[family]}/{length}")
    try:
        assert cards(cluster)["second0"]["mode"] != "none"
        assert not arrives(HERE[family])
    finally:
        command(cluster, "del", "--all")
    assert arrives(HERE[family])


def test_a_card_that_goes_is_forgotten_and_the_other_serves(cluster: Cluster) -> None:
    cluster.node(NODE).run("ip", "link", "del", "second0")
    until(lambda: "second0" not in cards(cluster), "the agent lets go of it")
    far = cluster.pod("uplinks/far")
    talk(cluster.outside(), far, "tcp", 4, "172.31.0.11", OTHER_PORT)

"""The firewall while its program is exchanged: for one with a balancer or without, at another card,
of another agent, with larger tables."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from lockgate.agent.firewall_maps import sizes
from lockgate.bpf import syscall
from lockgate.bpf.object import Object
from lockgate.compile.tables import SVC_FRONTEND
from lockgate.net import namespaces
from lockgate.paths import xdp_object
from tests.system.harness import Cluster, manifest, unique_name, until
from tests.system.test_cluster_firewall import FAMILIES, HERE, NODE, command
from tests.system.test_edge import Agent, Node

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

#: Some addresses of one /24, and of one /32: those are looked up in the hash.
WORLD = {4: ("172.31.0.97", "172.31.0.98"), 6: ("fd00:172:31::97", "fd00:172:31::98")}


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    try:
        with namespaces.inside(namespaces.path_of(made.name)):
            yield made
    finally:
        made.close()


def maps(agent: Agent) -> dict[str, int]:
    """Ids of the firewall's maps, by name."""
    found = agent.edge.object()
    return {name: syscall.map_info(found.map_fd(name)).id for name in agent.edge.sizes}


def ask_for(agent: Agent, entries: int) -> None:
    agent.edge.firewall, agent.edge.sizes = True, sizes(entries)


def test_all_maps_of_the_firewall_have_a_size() -> None:
    with Object(xdp_object()) as made:
        assert set(sizes(1)) == {name for name in made.maps if name.startswith("fw_")}


def test_programs_that_follow_each_other_share_the_maps(node: Node) -> None:
    programs = set()
    with Agent(node) as agent:
        ask_for(agent, 10)
        agent.serve(node.cards(), None)
        first = maps(agent)
        for flags in (SVC_FRONTEND, None):
            for cards in (node.cards(), node.cards(outside="old0")):
                agent.serve(cards, flags)
                assert maps(agent) == first
                programs |= {node.there(name)[1] for name in ("outside0", "old0")} - {0}
    assert len(programs) >= 3, "natively and not, with a balancer and without"
    with Agent(node) as second:
        ask_for(second, 10)
        second.serve(node.cards())
        assert maps(second) == first


def test_larger_tables_have_nothing_of_those_in_force(node: Node) -> None:
    with Agent(node) as agent:
        ask_for(agent, 10)
        agent.serve(node.cards())
        small = maps(agent)
        agent.edge.sizes = sizes(20_000)
        assert not set(maps(agent).values()) & set(small.values())
        agent.edge.sizes = sizes(10)  # they could not be filled
        agent.serve(node.cards(outside="old0"))
        assert maps(agent) == small


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("programs")
    container = {"name": "c", "ports": [{"containerPort": 80}]}
    pod = manifest("Pod", "default", "web", {"containers": [container]}, app="web")
    (folder / "pods.yaml").write_text(pod)
    with Cluster(folder, unique_name("fw"), nodes=2) as made:
        yield made


def hears(cluster: Cluster, source: str) -> bool:
    """Does the node, from that address of the world?"""
    family = FAMILIES[6 if ":" in source else 4]
    target = HERE[6 if ":" in source else 4], 8055
    with (
        cluster.node(NODE).socket(family, socket.SOCK_DGRAM) as server,
        cluster.outside().socket(family, socket.SOCK_DGRAM) as client,
    ):
        server.bind(target)
        server.settimeout(0.3)
        client.bind((source, 0))
        client.sendto(b"hello", target)
        try:
            return server.recv(100) == b"hello"
        except TimeoutError:
            return False


def test_what_is_denied_stays_so_when_services_come_and_go(cluster: Cluster) -> None:
    outside = cluster.outside()
    for both in WORLD.values():
        for address in both:
            length = "/64 nodad" if ":" in address else "/24"
            outside.run("ip", "address", "add", *f"{address}{length}".split(), "dev", "br0")
    denied, let_in = zip(*WORLD.values(), strict=True)
    command(cluster, "add", "deny", *denied)
    service = {"type": "NodePort", "selector": {"app": "web"}, "ports": [{"port": 80}]}
    objects = manifest("Service", "default", "web", service)
    for mode, saved in (("native", None), ("generic", (objects,)), ("native", ())):
        if saved is not None:
            cluster.save("service.yaml", *saved)
        assert cluster.agent_status(NODE)["xdp"][0]["mode"] == mode
        for source in let_in:
            until(lambda source=source: hears(cluster, source), source)  # type: ignore[misc]
        assert not [source for source in denied if hears(cluster, source)], mode

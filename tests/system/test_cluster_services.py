"""Services of a standalone cluster: what they get, what agents make of it, and the world's way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import HashMap, MappedArray
from lockgate.bpf.pins import node_folder, pin_names
from lockgate.compile.tables import SVC_FRONTEND, SVC_OPEN, SVC_PRESENT
from lockgate.objects.address import parse_address
from lockgate.paths import bpf_object
from lockgate.standalone.state import bpffs
from tests.system.harness import Cluster, unique_name, until
from tests.system.test_cluster import answering, document, pod, shell, workload

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ZONE = "topology.kubernetes.io/zone"
NODES = [document("Node", name, labels={ZONE: zone}) for name, zone in (("a", "z1"), ("b", "z2"))]
C = document("Node", "c", labels={ZONE: "z1"})
SCHEMA = Schema.from_object(bpf_object())


def service(**spec: Any) -> str:
    whole = {
        "type": "LoadBalancer",
        "selector": {"app": "web"},
        "ipFamilyPolicy": "PreferDualStack",
        "ports": [{"port": 80, "nodePort": 30080}],
        **spec,
    }
    return document("Service", "web", spec=whole)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "nodes.yaml").write_text("---\n".join(NODES))
    texts = [
        document("Namespace", "lab"),
        workload("DaemonSet", "web", answering((80, "TCP"))),
        service(),
    ]
    (folder / "web.yaml").write_text("---\n".join(texts))
    with Cluster(folder, unique_name("ts")) as made:
        yield made


def shown(cluster: Cluster) -> Any:
    """The one service as `lockgate get` has it."""
    (one,) = json.loads(cluster.lockgate("get", "services", "--json").stdout)
    return one


def view(cluster: Cluster, node: str, address: str, port: int, protocol: int = 6) -> Any:
    """What packets on a node find of a service; None for nothing."""
    pins, names = node_folder(bpffs(), cluster.name, node), pin_names(SCHEMA)
    state = MappedArray.open(str(pins / names["state"]), SCHEMA.dtype("node_state"))
    services = HashMap.open(
        str(pins / names["services"]), SCHEMA.dtype("service_key"), SCHEMA.dtype("service")
    )
    key = np.zeros((), SCHEMA.dtype("service_key"))
    key["addr"] = np.frombuffer(parse_address(address), np.uint8)
    key["port"], key["proto"] = port, protocol
    found = services.get(key)
    if found is None:
        return None
    record = found["view"][int(state.view["epoch"][0]) & 1]
    return record if record["flags"] & SVC_PRESENT else None


def ways(cluster: Cluster, family: str, net: str) -> set[str]:
    """Over which nodes the world reaches load balancers' addresses."""
    outside = cluster.outside()
    lines = outside.run("ip", family, "route", "show", net).stdout.split()
    return {lines[i + 1] for i, word in enumerate(lines) if word == "via"}


def test_what_a_load_balancer_service_comes_to(cluster: Cluster) -> None:
    told = shown(cluster)
    four, six = told["loadBalancer"]
    assert four.startswith("172.31.255.") and six.startswith("fd00:172:31:255::")
    assert [port["nodePort"] for port in told["ports"]] == [30080]
    for node, own in (("a", "172.31.0.11"), ("b", "172.31.0.12")):
        for address, port in ((four, 80), (six, 80), (own, 30080)):
            found = view(cluster, node, address, port)
            assert found is not None and found["flags"] & SVC_FRONTEND
            assert (found["owner_count"], found["slot_bits"]) == (2, 14)
        assert view(cluster, node, own, 0, 0)["flags"] & SVC_OPEN
        assert not view(cluster, node, four, 0, 0)["flags"] & SVC_OPEN
    assert view(cluster, "a", "172.31.0.12", 30080) is None

    # A node more: its pod is an owner, and the world is led over it.
    folder = cluster.folder
    four_net, six_net = "172.31.255.0/24", "fd00:172:31:255::/112"
    until(lambda: ways(cluster, "-4", four_net) == {"172.31.0.11", "172.31.0.12"})
    (folder / "nodes.yaml").write_text("---\n".join([*NODES, C]))
    cluster.wait()
    until(lambda: len(ways(cluster, "-4", four_net)) == len(ways(cluster, "-6", six_net)) == 3)
    until(lambda: view(cluster, "a", four, 80)["owner_count"] == 3)

    # And less again: first the world, then the owners.
    (folder / "nodes.yaml").write_text("---\n".join(NODES))
    cluster.wait()
    assert ways(cluster, "-4", four_net) == {"172.31.0.11", "172.31.0.12"}
    assert ways(cluster, "-6", six_net) == {"fd00:172:31::11", "fd00:172:31::12"}
    assert view(cluster, "b", six, 80)["owner_count"] == 2


def test_traffic_distribution_reaches_the_nodes(cluster: Cluster) -> None:
    told = shown(cluster)
    (address, *_) = told["clusterIPs"]
    assert view(cluster, "a", address, 80)["count"] == 2
    web = cluster.folder / "web.yaml"
    text = web.read_text().replace(service(), service(trafficDistribution="PreferSameNode"))
    web.write_text(text)
    cluster.wait()
    until(lambda: view(cluster, "a", address, 80)["count"] == 1)
    told = shown(cluster)
    # Outside, topology does not count.
    assert view(cluster, "a", told["loadBalancer"][0], 80)["owner_count"] == 2


def test_a_pod_that_ends_serves_where_nobody_else_does(cluster: Cluster) -> None:
    slow = {
        "terminationGracePeriodSeconds": 4,
        "containers": [{"name": "main", **shell("trap '' TERM; while :; do sleep 0.1; done")}],
    }
    cluster.save(
        "slow.yaml",
        pod("slow", slow, app="slow"),
        document("Service", "slow", {"selector": {"app": "slow"}, "ports": [{"port": 80}]}),
    )
    address = cluster.service_ip("lab/slow")
    assert view(cluster, "b", address, 80)["count"] == 1
    cluster.save(
        "slow.yaml",
        document("Service", "slow", {"selector": {"app": "slow"}, "ports": [{"port": 80}]}),
        wait=False,
    )

    def conditions() -> Any:
        for one in cluster.objects("endpoints"):
            if one["metadata"]["labels"]["kubernetes.io/service-name"] == "slow":
                return [endpoint["conditions"] for endpoint in one["endpoints"]]
        return []

    ending = [{"ready": False, "serving": True, "terminating": True}]
    until(lambda: conditions() == ending)
    assert view(cluster, "b", address, 80)["count"] == 1
    cluster.wait()
    assert conditions() == [] and view(cluster, "b", address, 80)["count"] == 0

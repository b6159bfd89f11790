"""A node joins while everything runs, and goes for good: its pods are reached, commands on a laptop
see them, and connections of others notice neither."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster import Cluster, images
from cluster.commands import until
from cluster.install import IMAGE
from lockgate.access.kubernetes import KubernetesAccess
from lockgate.kube.client import Settings
from tests.cluster import matrix
from tests.cluster.traffic import PORT, Traffic
from tests.system.harness import ROOT

POD = """
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: default, labels: {name: NAME}}
spec:
  nodeName: NODE
  terminationGracePeriodSeconds: 0
  containers: [{name: a, image: "localhost/lockgate-pod:1", args: [answer, tcp/8080]}]
---
"""
CLOSED = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: default}
spec:
  podSelector: {matchLabels: {name: newcomer}}
  policyTypes: [Ingress]
"""


def pods(cluster: Cluster, **nodes: str) -> dict[str, tuple[Path, list[str]]]:
    """A pod of each name on the node given for it: network namespace and addresses."""
    cluster.apply("".join(POD.replace("NAME", n).replace("NODE", on) for n, on in nodes.items()))
    names = [f"pod/{name}" for name in nodes]
    cluster.kubectl("wait", "--for=condition=Ready", *names, "--timeout=60s", timeout=70)
    found = matrix.objects(cluster).pods
    return {
        name: (matrix.place_of(cluster, found["default", name])[0], found["default", name].ips)
        for name in nodes
    }


@pytest.fixture(scope="module")
def follower(real: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `lockgate flows -f` prints, begun before the node is there."""
    told = tmp_path_factory.mktemp("flows") / "told"
    command = [sys.executable, "-m", "lockgate.cli.main", "flows", "-f", "--json"]
    command += ["--verdict", "deny", "--namespace", "default", "--kubeconfig", real.kubeconfig]
    with told.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out)
        yield told
        assert process.poll() is None, "it goes on until Ctrl-C"
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def traffic(real: Cluster) -> Iterator[Traffic]:
    """Between pods of the two nodes that stay."""
    ends = pods(real, stays="node-1", answers="node-2")
    client, (server, ips) = ends["stays"][0], ends["answers"]
    with Traffic([(server, PORT)], [(client, ip, PORT) for ip in ips], []) as running:
        running.more(5)
        yield running
        running.more(5)
    real.kubectl("delete", "pod", "stays", "answers")


@pytest.fixture(scope="module")
def joined(real: Cluster, follower: Path, traffic: Traffic) -> Iterator[str]:
    """The name of a third node, which is Ready."""
    real.apply(CLOSED)
    node = real.join()
    real.load_image(IMAGE, [node])
    real.load_image(images.build_answering(real.binaries), [node])
    real.wait_ready(90)
    yield node
    if node in real.nodes:
        real.leave(node)
    real.kubectl("delete", "networkpolicy", "closed")


@pytest.fixture(scope="module")
def newcomer(real: Cluster, joined: str) -> tuple[Path, list[str]]:
    """A pod on the node that joined."""
    return pods(real, newcomer=joined)["newcomer"]


def test_pods_of_a_node_that_joined_reach_those_of_others(
    real: Cluster, newcomer: tuple[Path, list[str]], traffic: Traffic
) -> None:
    place = newcomer[0]
    ips = matrix.objects(real).pods["default", "answers"].ips
    with Traffic([], [(place, ip, PORT) for ip in ips], []) as running:
        running.more(5)
    traffic.more(5)


def test_who_follows_flows_is_told_of_a_node_that_joined_later(
    real: Cluster, joined: str, newcomer: tuple[Path, list[str]], follower: Path
) -> None:
    place = matrix.place_of(real, matrix.objects(real).pods["default", "stays"])[0]

    def told() -> bool:
        records = [json.loads(line) for line in follower.read_text().splitlines()]
        return any(
            one["node"] == joined and one["destination"].get("pod") == "newcomer" for one in records
        )

    with Traffic([], [], [(place, newcomer[1][0], PORT)]) as denied:
        until("a record of the new node", told, 30)
        assert not denied.errors


def test_logs_of_every_node_are_at_hand(real: Cluster, joined: str) -> None:
    with_kubeconfig = KubernetesAccess(Settings(kubeconfig=str(real.kubeconfig)), "the test's")
    with closing(with_kubeconfig) as access:
        assert access.nodes() == real.nodes
        for node in real.nodes:
            for role in ("agent", "observer"):
                assert access.logs(node, role, 1000).strip(), f"{role} of {node}"


def test_a_node_that_left_is_missed_by_nobody(
    real: Cluster, joined: str, newcomer: tuple[Path, list[str]], traffic: Traffic
) -> None:
    real.leave(joined)
    traffic.more(20)

    def well() -> bool:
        command = [sys.executable, "-m", "lockgate.cli.main", "status", "--json"]
        command += ["--kubeconfig", str(real.kubeconfig)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout)
        return [node["name"] for node in found["nodes"]] == real.nodes and not found["problems"]

    until("status to be well without it", well, 60, pause=0.5)

"""A pod of its node's own files, with a network: its kubelet knows it by another uid than the API
server knows the object that mirrors it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from cluster import Cluster
from cluster.commands import Failed, until

FILE = "/etc/kubernetes/manifests/static.json"
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "static", "namespace": "default"},
    "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "a", "image": "localhost/agnhost:1", "args": ["netexec"]}],
    },
}
NAME = "static-node-1"


@pytest.fixture
def static(real: Cluster) -> Iterator[str]:
    """Its address."""
    real.node_exec("node-1", "tee", FILE, input=json.dumps(POD))
    try:
        yield until("the static pod", lambda: address(real), 90)
    finally:
        real.node_exec("node-1", "rm", FILE)
        until("its end", lambda: NAME not in real.kubectl("get", "pods", "-o", "name"), 90)


def address(cluster: Cluster) -> str:
    """That of the pod, "" before it is ready."""
    try:
        status = cluster.json("get", "pod", NAME)["status"]
    except Failed:
        return ""
    ready = any(
        c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ())
    )
    return str(status["podIP"]) if ready else ""


def test_a_static_pod_has_a_network_and_keeps_it_when_its_mirror_is_made_anew(
    real: Cluster, static: str
) -> None:
    def answers() -> bool:
        url = f"http://{static}:8080/hostname"
        said = real.pod_exec("visitors", "customer", "curl", "-s", "--max-time", "3", url)
        return said.strip() == NAME

    assert answers()
    before = real.json("get", "pod", NAME)["metadata"]["uid"]
    real.kubectl("delete", "pod", NAME, "--grace-period=0")

    def mirrored_again() -> bool:
        return bool(address(real)) and real.json("get", "pod", NAME)["metadata"]["uid"] != before

    until("another mirror", mirrored_again, 90)
    assert address(real) == static and answers()

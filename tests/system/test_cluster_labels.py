"""Flow records have the labels that pods had when the packet was judged."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.system.harness import Cluster, connected, manifest, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

FILE = "labels.yaml"


def save(cluster: Cluster, node: str, **labels: str) -> None:
    container = {"name": "main", "image": "i"}
    spec = {"nodeName": node, "containers": [container]}
    cluster.save(FILE, manifest("Pod", "traffic", "changing", spec, **labels))


@pytest.mark.parametrize(
    ("node", "first"), [("node-1", 7301), ("node-2", 7311)], ids=["local", "of another node"]
)
def test_a_flow_has_the_labels_of_then_whatever_comes_later(
    traffic: Cluster, node: str, first: int
) -> None:
    ports = range(first, first + 3)

    def told() -> list[dict[str, Any]]:
        # A connection within the node is told by both verdicts.
        verdicts = traffic.flows(node="node-1", pod="traffic/changing", direction="ingress")
        return [f["source"]["labels"] for f in verdicts if f["destination"].get("port") in ports]

    stages = [{"stage": "first"}, {"stage": "second", "more": "yes"}, {"stage": "first"}]
    save(traffic, node, **stages[0])
    traffic.lockgate("wait")
    before = traffic.pod("traffic/changing").pid
    try:
        for number, (port, labels) in enumerate(zip(ports, stages, strict=True)):
            save(traffic, node, **labels)
            near, far = traffic.pod("traffic/changing"), traffic.pod("traffic/b")
            assert near.pid == before, "new labels are no new pod"
            with connected(near, far, far.ip(), port):
                pass
            wanted = stages[: number + 1]
            until(lambda wanted=wanted: told() == wanted, f"flows with {wanted}, got {told()}")
    finally:
        traffic.save(FILE)
    assert told() == stages, "also of a pod that is gone"

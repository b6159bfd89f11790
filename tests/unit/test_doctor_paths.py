"""Which ways through a cluster `lockgate doctor` tries."""

from __future__ import annotations

from typing import Any

import pytest

from lockgate.cli.paths import plan
from tests.unit.test_explain_served import cluster


def tried(node: str, **given: Any) -> dict[str, list[str]]:
    """The connections of each kind that is not in every cluster, as from a node."""
    return {
        path.kind: [f"{target.address}:{target.port}" for target in path.candidates]
        for path in plan(cluster(**given), [node], {}, {})
        if path.family == 4 and path.kind.split(" → ")[1] not in ("service", "pod", "outside")
    }


def test_every_kind_of_address_of_a_service() -> None:
    found = tried("n1")
    assert found["pod → load balancer"] == found["node → load balancer"] == ["192.0.2.1:80"]
    assert found["pod → external IP"] == ["192.0.2.9:80"]
    assert found["pod → node port"] == ["172.16.0.1:30080"]
    assert found["node → node port, other node"] == ["172.16.0.2:30080", "172.16.0.3:30080"]


@pytest.mark.parametrize(
    ("spec", "absent"),
    [
        ({"external_ips": []}, "external IP"),
        ({"type": "NodePort"}, "load balancer"),
        ({"type": "ClusterIP"}, "node port"),
    ],
)
def test_none_is_tried_that_is_not_there(spec: dict[str, Any], absent: str) -> None:
    assert f"pod → {absent}" not in tried("n1", **spec)


def test_a_node_that_may_not_serve_is_not_tried() -> None:
    """Silence is right there."""
    found = tried("n1", external_traffic_policy="Local")
    assert found["pod → node port, other node"] == ["172.16.0.2:30080"]

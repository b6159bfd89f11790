"""`lockgate up --limit NAME=N`: what a pod may use up in a second."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.system.harness import Cluster, manifest, unique_name, until
from tests.system.test_cluster_end import run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

CONTAINER = {"containers": [{"name": "c", "image": "i"}]}
FEW, MANY = 8, 100  # a second, and at once


def test_a_pod_begins_as_many_connections_as_it_was_given(tmp_path: Path) -> None:
    pods = [manifest("Pod", "default", name, CONTAINER) for name in ("near", "far")]
    (tmp_path / "pods.yaml").write_text("\n---\n".join(pods))
    name, options = unique_name("cl"), ("--limit", f"connections={FEW}")
    with Cluster(tmp_path, name, nodes=1, options=options) as cluster:
        near, far = cluster.pod("default/near"), cluster.pod("default/far")
        with near.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for port in range(7000, 7000 + MANY):
                client.sendto(b"hello", (far.ip(), port))
        rate = "new-connection-rate"
        dropped = until(lambda: cluster.flows(cause=rate), "drops of what was too many")
        assert {one["source"]["pod"] for one in dropped} == {"near"}
        allowed = cluster.flows(verdict="allow", protocol="udp")
        assert allowed, "the first ones pass"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("connections", "expected NAME=N, got 'connections'"),
        ("connections=many", "expected NAME=N, got 'connections=many'"),
        ("packets=5", "unknown field `packets`"),
        ("events=1000000001", "<= 1000000000 - at `$.events`"),
    ],
)
def test_a_limit_that_is_none_is_named(tmp_path: Path, given: str, said: str) -> None:
    done = run("up", str(tmp_path), "--limit", given, code=2)
    assert said in done.stderr

"""`lockgate up --capture BYTES`: flow records that carry the first bytes of their packets."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.harness import Cluster, connected, manifest, unique_name, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PORT = 8080
CONTAINER = {"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": PORT}]}]}
ETHERNET, IPV4, IPV6, TCP_PORTS = 14, 20, 40, 4


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("capture")
    pods = [manifest("Pod", "default", name, CONTAINER) for name in ("near", "far")]
    (folder / "pods.yaml").write_text("\n---\n".join(pods))
    with Cluster(folder, unique_name("cp"), nodes=1, options=("--capture", "64")) as made:
        yield made


def flow_of_a_connection(cluster: Cluster, family: int, port: int) -> dict[str, Any]:
    near, far = cluster.pod("default/near"), cluster.pod("default/far")
    with connected(near, far, far.ip(family), port):
        pass
    return until(lambda: cluster.flows(port=port), f"a flow to port {port}")[0]


def test_a_flow_has_its_packets_first_bytes_for_as_long_as_that_is_switched_on(cluster):
    near, far = cluster.pod("default/near"), cluster.pod("default/far")
    for family, header in ((4, IPV4), (6, IPV6)):
        flow = flow_of_a_connection(cluster, family, 7000 + family)
        packet = bytes.fromhex(flow["packet"])
        assert len(packet) == 64, "so many as were asked for"
        for address in (near.ip(family), far.ip(family)):
            assert ipaddress.ip_address(address).packed in packet
        ports = packet[ETHERNET + header : ETHERNET + header + TCP_PORTS]
        assert ports == flow["source"]["port"].to_bytes(2) + (7000 + family).to_bytes(2)

    # Another setting comes into force with the agent that takes over.
    name = cluster.node_names[0]
    settings = cluster.state.node(name) / "agent.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"capture": 0}))
    before = cluster.agent_status(name)
    (agent,) = [n["agent"] for n in cluster.status()["nodes"]]
    os.kill(agent["pid"], signal.SIGKILL)

    def taken_over() -> bool:
        try:
            return bool(cluster.agent_status(name)["started"] != before["started"])
        except OSError:
            return False

    until(taken_over, "another agent")
    assert "packet" not in flow_of_a_connection(cluster, 4, 7010)

"""Tunnels between the nodes of a running cluster: the chart with `routing: vxlan`, and back."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster import Cluster
from cluster.commands import until
from cluster.helm import helm
from cluster.install import MANIFEST
from lockgate.net.namespaces import inside
from tests.cluster.test_joining import pods
from tests.cluster.traffic import FORBIDDEN, PORT, Traffic
from tests.system.harness import ROOT

ONLY_PORT = f"""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: only-port, namespace: default}}
spec:
  podSelector: {{matchLabels: {{name: answers}}}}
  ingress: [{{ports: [{{port: {PORT}}}]}}]
"""
MUCH = 1 << 20  # bytes in one direction: more than a packet of any size


def chart(routing: str) -> str:
    """What `helm upgrade --set routing=…` would apply."""
    command = [helm(), "template", "lockgate", ROOT / "deploy/chart", "--set", f"routing={routing}"]
    command += ["--namespace", "kube-system", "--kube-version", "1.30"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def apply(cluster: Cluster, manifest: str | Path) -> None:
    """Until agents with the new settings are ready on every node."""
    cluster.apply(manifest)
    done = ("rollout", "status", "daemonset/lockgate", "--timeout=90s")
    cluster.kubectl("-n", "kube-system", *done, timeout=100)


def tunnelled(cluster: Cluster, node: str) -> int:
    """Packets that the node's VXLAN device has sent; -1 if there is none."""
    links = json.loads(cluster.node_exec(node, "ip", "-s", "-j", "link"))
    return next((x["stats64"]["tx"]["packets"] for x in links if x["ifname"] == "lg-vxlan"), -1)


def mtu(netns: Path) -> int:
    with inside(netns):
        text = subprocess.run(
            ["ip", "-j", "link", "show", "eth0"], check=True, capture_output=True, text=True
        ).stdout
    return int(json.loads(text)[0]["mtu"])


@pytest.fixture(scope="module")
def ends(real: Cluster) -> Iterator[dict[str, tuple[Path, list[str]]]]:
    """A pod of each node, from before the change; `answers` is isolated."""
    real.apply(ONLY_PORT)
    yield pods(real, asks="node-1", answers="node-2")
    real.kubectl("delete", "networkpolicy/only-port", "pod/asks", "pod/answers")


def much(wire: socket.socket, far: socket.socket) -> None:
    """Full packets go both ways. The ends' MTU is what it was when they began."""
    for sender, receiver in ((wire, far), (far, wire)):
        sender.settimeout(60)
        receiver.settimeout(60)
        for _ in range(MUCH // 16384):
            sender.sendall(bytes(16384))
            left = 16384
            while left:
                part = receiver.recv(left)
                assert part, "the other side hung up"
                left -= len(part)


def test_the_chart_changes_the_ways_between_nodes_and_open_connections_go_on(
    real: Cluster, ends: dict[str, tuple[Path, list[str]]]
) -> None:
    asks, (answers, ips) = ends["asks"][0], ends["answers"]
    ways = [(asks, ip, PORT) for ip in ips]
    denied = [(asks, ip, FORBIDDEN) for ip in ips]
    servers = [(answers, PORT), (answers, FORBIDDEN)]

    def work() -> None:
        with Traffic(servers, ways, denied) as running:
            running.more(10)
        assert running.errors == []

    # Between the restarts of two nodes' agents they disagree, and TCP waits.
    wire, far = connected(asks, answers, ips[-1])
    with closing(wire), closing(far):
        try:
            assert [tunnelled(real, node) for node in real.nodes] == [-1, -1]
            apply(real, chart("vxlan"))
            until("tunnels", lambda: all(tunnelled(real, n) >= 0 for n in real.nodes), 20)
            before = [tunnelled(real, node) for node in real.nodes]
            much(wire, far)
            work()
            assert all(
                tunnelled(real, node) > n for node, n in zip(real.nodes, before, strict=True)
            )
            (netns, own) = pods(real, newcomer="node-1")["newcomer"]
            assert (mtu(asks), mtu(netns)) == (1500, 1450)
            with Traffic([(netns, PORT)], [(answers, ip, PORT) for ip in own], []) as running:
                running.more(3)
            assert running.errors == []
        finally:
            apply(real, MANIFEST)
            real.kubectl("delete", "pod/newcomer", "--ignore-not-found")
        until("no tunnels", lambda: all(tunnelled(real, n) < 0 for n in real.nodes), 20)
        much(wire, far)
        work()


def connected(client: Path, server: Path, address: str) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection to PORT."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(server):
        listener = socket.create_server((address, PORT), family=family)
    with inside(client):
        wire = socket.socket(family)
    wire.settimeout(10)
    with closing(listener):
        wire.connect((address, PORT))
        return wire, listener.accept()[0]

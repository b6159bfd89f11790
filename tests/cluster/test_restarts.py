"""What happens to agents, and to the API server, happens to no packet: connections that stay,
that begin and that are denied go on, each of them accounted for."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from cluster import Cluster, processes
from cluster.commands import until
from lockgate.access.kubernetes import KubernetesAccess
from lockgate.kube.client import Settings
from tests.cluster import matrix
from tests.cluster.traffic import FORBIDDEN, PORT, Traffic

PODS = """
apiVersion: v1
kind: Namespace
metadata: {name: traffic}
---
apiVersion: v1
kind: Service
metadata: {name: far, namespace: traffic}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {name: far}
  ports: [{port: 80, targetPort: PORT}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: far, namespace: traffic}
spec:
  podSelector: {matchLabels: {name: far}}
  ingress:
  - from: [{podSelector: {}}]
    ports: [{port: PORT}]
"""
POD = """
---
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: traffic, labels: {name: NAME}}
spec:
  nodeName: NODE
  containers: [{name: a, image: "localhost/lockgate-pod:1", args: [answer, tcp/8080]}]
"""


@pytest.fixture(scope="module")
def pods(real: Cluster) -> dict[str, tuple[Path, list[str]]]:
    """Two pods on node-1 and one on node-2: network namespace and addresses."""
    text = PODS.replace("PORT", str(PORT))
    for name, node in (("client", "node-1"), ("near", "node-1"), ("far", "node-2")):
        text += POD.replace("NAME", name).replace("NODE", node)
    real.apply(text)
    wait = ("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s")
    real.kubectl("-n", "traffic", *wait, timeout=70)
    objects = matrix.objects(real)
    return {
        name: (matrix.place_of(real, pod)[0], pod.ips)
        for (namespace, name), pod in objects.pods.items()
        if namespace == "traffic"
    }


@pytest.fixture
def traffic(real: Cluster, pods: dict[str, tuple[Path, list[str]]]) -> Iterator[Traffic]:
    """To a pod of the same node, of the other one, and to a service; both families."""
    service = real.json("-n", "traffic", "get", "service", "far")["spec"]["clusterIPs"]
    client, (near, near_ips), (far, far_ips) = pods["client"][0], pods["near"], pods["far"]
    ways = [(client, ip, PORT) for ip in (*near_ips, *far_ips)]
    ways += [(client, ip, 80) for ip in service]
    denied = [(client, ip, FORBIDDEN) for ip in far_ips]
    servers = [(near, PORT), (far, PORT), (far, FORBIDDEN)]
    with Traffic(servers, ways, denied) as running:
        running.more(5)
        yield running
        running.more(5)
    assert running.errors == []


def agent(cluster: Cluster, node: str) -> int | None:
    """The agent's process of a node."""
    for pid in processes.pids(cluster.state.cgroup(node) / "kubepods"):
        with suppress(OSError):  # it may have ended since
            if b"lockgate.agent\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def other(cluster: Cluster, node: str, than: int | None) -> bool:
    """Is there another agent than that, and ready?"""
    return agent(cluster, node) not in (None, than) and ready(cluster)


def ready(cluster: Cluster) -> bool:
    status = cluster.json("-n", "kube-system", "get", "daemonset", "lockgate")["status"]
    return bool(status.get("numberReady") == len(cluster.nodes))


def problems(cluster: Cluster, node: str) -> str:
    """What the agent of a node says is wrong."""
    command = ("curl", "-s", "--unix-socket", "/run/lockgate/agent.sock", "http://node/v1/status")
    return "; ".join(json.loads(cluster.node_exec(node, *command))["errors"])


def test_an_agent_that_is_killed_loses_no_connection(real: Cluster, traffic: Traffic) -> None:
    before = {node: agent(real, node) for node in real.nodes}
    for pid in before.values():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    traffic.more(20)
    for node, pid in before.items():
        until(f"an agent on {node}", lambda n=node, p=pid: other(real, n, p), 60)
    traffic.more(20)
    with closing(KubernetesAccess(Settings(kubeconfig=str(real.kubeconfig)), "")) as access:
        for node in real.nodes:
            ended, _, now = access.logs(node, "agent", 1000).partition("--- restarted ---\n")
            assert ended.strip() and now.strip(), f"{node}: logs before and after the restart"


def test_a_pod_of_the_daemonset_that_is_deleted_loses_no_connection(
    real: Cluster, traffic: Traffic
) -> None:
    before = {node: agent(real, node) for node in real.nodes}
    what = ("delete", "pod", "-l", "app.kubernetes.io/name=lockgate", "--wait=false")
    real.kubectl("-n", "kube-system", *what)
    traffic.more(20)
    for node, pid in before.items():
        until(f"an agent on {node}", lambda n=node, p=pid: other(real, n, p), 60)
    traffic.more(20)


def test_a_rolling_update_loses_no_connection(real: Cluster, traffic: Traffic) -> None:
    real.kubectl("-n", "kube-system", "rollout", "restart", "daemonset/lockgate")
    done = ("rollout", "status", "daemonset/lockgate", "--timeout=90s")
    real.kubectl("-n", "kube-system", *done, timeout=100)
    traffic.more(20)


def test_without_an_api_server_everything_goes_on_even_with_another_agent(
    real: Cluster, traffic: Traffic
) -> None:
    before = agent(real, "node-2")
    assert before is not None
    real.stop("kube-apiserver")
    try:
        traffic.more(20)
        os.kill(before, signal.SIGKILL)
        until("another agent", lambda: agent(real, "node-2") not in (None, before), 60)
        until("it to look", lambda: "API server away" in problems(real, "node-2"), 60)
        traffic.more(20)
    finally:
        real.start("kube-apiserver")
        real.wait_api()
    traffic.more(20)
    until("the agents to be ready", lambda: ready(real), 60)
    # What was asked for meanwhile is in force soon.
    real.kubectl("-n", "traffic", "label", "pod", "far", "seen=again", "--overwrite")
    traffic.more(20)

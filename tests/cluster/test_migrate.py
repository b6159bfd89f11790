"""From the bridge plugin and kube-proxy to Lockgate, node by node, and a node back, as
docs/migrate.md says, under traffic that accounts for every connection."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster import Cluster, cni
from cluster.commands import until
from cluster.install import IMAGE, MANIFEST
from tests.cluster import matrix
from tests.cluster.traffic import FORBIDDEN, PORT, Traffic
from tests.system.harness import ROOT

#: `resident` is on each node and is not evicted; `web` moves when its node is drained.
PODS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: resident, namespace: shop}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: resident}
  ports: [{port: 80, targetPort: PORT}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: resident, namespace: shop}
spec:
  selector: {matchLabels: {app: resident}}
  template:
    metadata: {labels: {app: resident}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: a, image: "localhost/agnhost:1", args: [netexec]}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: a, image: "localhost/agnhost:1", args: [netexec]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: resident, namespace: shop}
spec:
  podSelector: {matchLabels: {app: resident}}
  ingress:
  - from: [{podSelector: {}}]
    ports: [{port: PORT}, {port: 8080}]
""".replace("PORT", str(PORT))
OURS = "05-lockgate.conflist"
pytestmark = pytest.mark.timeout(600)
NOT_YET = "lockgate.dev/not-yet"


@dataclass
class Place:
    """A pod: its network namespace and addresses."""

    netns: Path
    ips: list[str] = field(default_factory=list)


@pytest.fixture
def bridged() -> Iterator[Cluster]:
    """Two nodes with the bridge plugin, host-local and kube-proxy, and pods on them."""
    if os.geteuid() != 0:
        pytest.fail("needs root")
    with Cluster.up(f"m{os.getpid()}", cni="bridge") as cluster:
        cluster.load_image(IMAGE)
        cluster.apply(PODS)
        ready(cluster)
        yield cluster


def ready(cluster: Cluster) -> None:
    for what in ("daemonset/resident", "deployment/web"):
        wait = ("rollout", "status", what, "--timeout=60s")
        cluster.kubectl("-n", "shop", *wait, timeout=70)


def residents(cluster: Cluster) -> dict[str, Place]:
    """By node."""
    objects = matrix.objects(cluster)
    return {
        pod.spec.node_name: Place(matrix.place_of(cluster, pod)[0], pod.ips)
        for pod in objects.pods.values()
        if pod.metadata.labels.get("app") == "resident"
    }


@contextmanager
def talking(cluster: Cluster, guarded: tuple[str, ...], settling: float = 0) -> Iterator[Traffic]:
    """Residents of both nodes talk to each other, to themselves by a service, in both families, on
    connections that stay and on new ones. Into those on the `guarded` nodes only what the policy
    allows. At the end no connection was lost, refused or let through that should not. `settling`:
    seconds for kube-proxy, which hears of new pods a second or more after they are ready."""
    pods = residents(cluster)
    service = cluster.json("-n", "shop", "get", "service", "resident")["spec"]["clusterIPs"]
    ways, denied = [], []
    for node, there in pods.items():
        (here,) = (one for name, one in pods.items() if name != node)
        ways += [(here.netns, ip, PORT) for ip in there.ips]
        ways += [(there.netns, ip, 80) for ip in service]
        if node in guarded:
            denied += [(here.netns, ip, FORBIDDEN) for ip in there.ips]
    servers = [(one.netns, port) for one in pods.values() for port in (PORT, FORBIDDEN)]
    with Traffic(servers, ways, denied, settling) as running:
        running.more(5)
        yield running
        running.more(5)
    assert running.errors == []


def daemonset_rolled_out(cluster: Cluster, nodes: int) -> bool:
    status = cluster.json("-n", "kube-system", "get", "daemonset", "lockgate")["status"]
    return bool(status["desiredNumberScheduled"] == nodes == status.get("numberReady", 0))


def evict(cluster: Cluster, node: str) -> None:
    cluster.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", timeout=90)


def restart_residents(cluster: Cluster, node: str) -> None:
    where = ("-n", "shop", "-l", "app=resident", "--field-selector", f"spec.nodeName={node}")
    cluster.kubectl("delete", "pod", *where, timeout=60)

    # `rollout status` may still count the pod that is gone.
    def back() -> bool:
        (pod,) = cluster.json("get", "pods", *where)["items"] or ({},)
        conditions = pod.get("status", {}).get("conditions", ())
        return any((one["type"], one["status"]) == ("Ready", "True") for one in conditions)

    until(f"the resident of {node}", back, 60)


def take_the_bridge_away(cluster: Cluster, node: str) -> None:
    """What docs/migrate.md lists for this plugin."""
    cluster.stop("kube-proxy", node)
    cluster.node_exec(node, cluster.binaries.path("kube-proxy"), "--cleanup")
    cluster.node_exec(node, "rm", "-f", "/etc/cni/net.d/10-bridge.conflist")
    cluster.node_exec(node, "ip", "link", "delete", "cni0")
    books = "rm -rf /var/lib/cni/networks/bridge /var/lib/cni/results/bridge-*"
    cluster.node_exec(node, "sh", "-c", books)


def command(cluster: Cluster, *words: str) -> str:
    """What `lockgate` prints."""
    said = [ROOT / ".venv/bin/lockgate", *words, "--kubeconfig", cluster.kubeconfig]
    return subprocess.run(said, capture_output=True, text=True, timeout=60, check=True).stdout


def go_back(cluster: Cluster, node: str, networks: list[str]) -> None:
    """What docs/migrate.md says under "Going back", for this plugin."""
    stayed = tuple(one for one in cluster.nodes if one != node)
    where = ("--field-selector", f"spec.nodeName={node}", "-o", "name")
    agent = ("-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=lockgate", *where)
    evict(cluster, node)
    with talking(cluster, tuple(cluster.nodes)) as traffic:
        cluster.kubectl("label", "node", node, f"{NOT_YET}=")
        until("the agent's end", lambda: not cluster.kubectl(*agent), 60)
        traffic.more(20)
    manifest = command(cluster, "uninstall", "--manifest", "--node", node, "--force")
    cluster.apply(manifest)
    cleaner = ("-n", "kube-system", "get", "pod", f"lockgate-uninstall-{node}")

    def finished() -> str:
        phase = str(cluster.json(*cleaner)["status"]["phase"])
        return phase if phase in ("Succeeded", "Failed") else ""

    assert until("the node to be cleaned", finished, 60) == "Succeeded"
    assert configurations(cluster, node) == []
    cni.write_bridge(cluster.node_path(node, "/etc/cni/net.d"), networks)
    cluster.route_by_nodes([node])
    cluster.start("kube-proxy", node)
    restart_residents(cluster, node)
    cluster.kubectl("delete", "-f", "-", input=manifest)
    with talking(cluster, stayed, settling=30) as traffic:
        cluster.kubectl("uncordon", node)
        traffic.more(20)


def findings(cluster: Cluster, node: str, *checks: str) -> list[str]:
    """What `lockgate doctor` says of a node that is not well."""
    command = [ROOT / ".venv/bin/lockgate", "doctor", "--json"]
    command += ["--kubeconfig", cluster.kubeconfig]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout, done.stderr
    return [
        one["text"]
        for one in json.loads(done.stdout)
        if one.get("node") == node and one["check"] in checks and one["severity"] != "ok"
    ]


def configurations(cluster: Cluster, node: str) -> list[str]:
    return cluster.node_exec(node, "ls", "/etc/cni/net.d").split()


def test_a_cluster_moves_from_the_bridge_plugin_node_by_node(bridged: Cluster) -> None:
    cluster = bridged
    first, second = cluster.nodes
    ranges = cluster.pod_ranges()
    assert ranges is not None
    cluster.kubectl("label", "nodes", "--all", f"{NOT_YET}=")
    cluster.apply(MANIFEST)
    until("the DaemonSet, on no node", lambda: daemonset_rolled_out(cluster, 0), 30)

    status = subprocess.run(
        [ROOT / ".venv/bin/lockgate", "status", "--kubeconfig", cluster.kubeconfig],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert f"{first}: no pod of Lockgate runs here: it has the label {NOT_YET}" in status.stdout

    for number, node in enumerate((first, second), 1):
        moved = (first,) * (number - 1)
        assert configurations(cluster, node) == ["10-bridge.conflist"]
        with talking(cluster, moved, settling=30) as traffic:
            evict(cluster, node)
            cluster.kubectl("label", "node", node, f"{NOT_YET}-")
            until("Lockgate", lambda n=number: daemonset_rolled_out(cluster, n), 180)
            until("its configuration", lambda n=node: OURS in configurations(cluster, n), 30)
            # Pods that stayed are the bridge's, and do not notice.
            traffic.more(20)
        (told,) = [text for text in findings(cluster, node, "cni") if "wired" in text]
        assert "shop/resident-" in told
        restart_residents(cluster, node)
        with talking(cluster, (*moved, node), settling=30) as traffic:
            take_the_bridge_away(cluster, node)
            traffic.more(20)
            cluster.kubectl("uncordon", node)
        assert findings(cluster, node, "cni", "kube-proxy") == []

    ready(cluster)
    for node in cluster.nodes:
        assert configurations(cluster, node) == [OURS]
        links = cluster.node_exec(node, "ip", "-br", "link")
        assert "cni0" not in links and "@if" in links and "lg" in links
        assert cluster.node_exec(node, "nft", "list", "ruleset") == ""
        files = cluster.node_exec(node, "find", "/var/lib/cni", "/etc/cni", "-name", "*bridge*")
        assert files == ""
        for family in ("-4", "-6"):
            assert "cni0" not in cluster.node_exec(node, "ip", family, "route")

    go_back(cluster, second, ranges[second])
    ready(cluster)
    assert configurations(cluster, second) == ["10-bridge.conflist"]
    links = cluster.node_exec(second, "ip", "-br", "link")
    assert "cni0" in links and "lg" not in links

"""The cluster that the other tests of this tier stand on: Kubernetes does here what it does
elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import Cluster, processes
from cluster.commands import until

PODS = """
apiVersion: v1
kind: Namespace
metadata: {name: kubernetes}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: kubernetes}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: DoNotSchedule
        labelSelector: {matchLabels: {app: web}}
      containers:
      - name: web
        image: localhost/agnhost:1
        args: [netexec, --http-port=8080]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: kubernetes}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
"""


@pytest.fixture(scope="module")
def pods(bare: Cluster) -> list[dict[str, str]]:
    """Two pods, one on each node: name, node, ip."""
    bare.apply(PODS)
    bare.kubectl("-n", "kubernetes", "rollout", "status", "deployment/web", "--timeout=60s")
    items = bare.json("-n", "kubernetes", "get", "pods", "-l", "app=web")["items"]
    return [
        {
            "name": item["metadata"]["name"],
            "node": item["spec"]["nodeName"],
            "ip": item["status"]["podIP"],
        }
        for item in items
    ]


def test_control_plane_and_nodes_run(bare: Cluster) -> None:
    assert bare.running() == {
        "control": ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"],
        "node-1": ["containerd", "kubelet", "kube-proxy"],
        "node-2": ["containerd", "kubelet", "kube-proxy"],
    }
    assert bare.kubectl("get", "--raw", "/readyz") == "ok"


def test_each_node_has_pod_ranges_and_addresses_of_both_families(bare: Cluster) -> None:
    for number, item in enumerate(bare.json("get", "nodes")["items"], 1):
        four, six = sorted(item["spec"]["podCIDRs"])
        assert four.startswith("10.244.") and four.endswith("/24")
        assert six.startswith("fd00:10:244:") and six.endswith("/64")
        addresses = [a["address"] for a in item["status"]["addresses"] if a["type"] == "InternalIP"]
        assert addresses == [f"172.30.0.{10 + number}", f"fd00:172:30::{10 + number}"]


def test_pods_of_different_nodes_reach_one_another(
    bare: Cluster, pods: list[dict[str, str]]
) -> None:
    one, two = pods
    assert one["node"] != two["node"]
    answer = bare.pod_exec(
        "kubernetes", one["name"], "curl", "-s", f"http://{two['ip']}:8080/hostname"
    )
    assert answer == two["name"]


def test_services_have_names_and_addresses(bare: Cluster, pods: list[dict[str, str]]) -> None:
    url = "http://web.kubernetes.svc.cluster.local/hostname"

    def answer() -> str:
        return bare.pod_exec("kubernetes", pods[0]["name"], "curl", "-s", "-m", "10", url)

    assert until("an answer of the service", answer, 30) in {pod["name"] for pod in pods}


def test_logs_exec_and_cp_work(bare: Cluster, pods: list[dict[str, str]], tmp_path: Path) -> None:
    name = pods[0]["name"]
    assert "Started HTTP server" in bare.kubectl("-n", "kubernetes", "logs", name)
    source = tmp_path / "file"
    source.write_text("carried")
    bare.kubectl("cp", source, f"kubernetes/{name}:/tmp/file")
    assert bare.pod_exec("kubernetes", name, "cat", "/tmp/file") == "carried"


def test_the_api_server_reaches_pods_and_takes_their_tokens(
    bare: Cluster, pods: list[dict[str, str]]
) -> None:
    name = pods[0]["name"]
    proxied = f"/api/v1/namespaces/kubernetes/pods/{name}:8080/proxy/hostname"
    assert bare.kubectl("get", "--raw", proxied) == name
    token = "/var/run/secrets/kubernetes.io/serviceaccount"
    asked = (
        f'curl -s --cacert {token}/ca.crt -H "Authorization: Bearer $(cat {token}/token)"'
        " https://172.30.0.10:6443/api/v1/namespaces/kubernetes/pods"
    )
    refused = bare.pod_exec("kubernetes", name, "sh", "-c", asked)
    assert "system:serviceaccount:kubernetes:default" in refused and "forbidden" in refused


def test_a_node_is_apart_from_this_machine(bare: Cluster) -> None:
    assert bare.node_exec("node-1", "hostname").strip() == "node-1"
    pins = bare.node_path("node-1", "/sys/fs/bpf/mine")
    pins.mkdir()
    assert not bare.node_path("node-2", "/sys/fs/bpf/mine").exists()
    assert not Path("/sys/fs/bpf/mine").exists()
    assert bare.node_path("node-1", "/run/lockgate").is_dir()
    assert "lockgate-cluster" not in bare.node_exec("node-1", "cat", "/proc/self/cgroup")


def test_pods_are_in_their_nodes_cgroup(bare: Cluster, pods: list[dict[str, str]]) -> None:
    for pod in pods:
        below = bare.state.cgroup(pod["node"]) / "kubepods"
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes.pids(below)]
        assert any(command.startswith(b"/agnhost\0netexec") for command in commands)


def test_the_api_server_comes_back_with_what_it_knew(
    bare: Cluster, pods: list[dict[str, str]]
) -> None:
    bare.stop("kube-apiserver")
    assert "kube-apiserver" not in bare.running()["control"]
    bare.start("kube-apiserver")
    bare.wait_api()

    def known() -> bool:
        items = bare.json("-n", "kubernetes", "get", "pods", "-l", "app=web")["items"]
        return {item["metadata"]["name"] for item in items} == {pod["name"] for pod in pods}

    assert until("the pods", known, 20)

"""Lockgate on a real cluster: installed as users do, the shop on it, judged by connections."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from cluster import Cluster, shop
from cluster.commands import Failed, until
from cluster.state import API_SERVICE4
from lockgate.standalone.underlay import OUTSIDE4
from tests.cluster import matrix

ON_HOST = """
apiVersion: v1
kind: Pod
metadata: {name: on-host, namespace: default}
spec:
  hostNetwork: true
  nodeName: node-1
  containers:
  - {name: a, image: "localhost/agnhost:1", args: [netexec, --http-port=8099, --udp-port=8099]}
"""

CLOSED = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: visitors}
spec:
  podSelector: {matchLabels: {app: customer}}
  policyTypes: [Egress]
"""


@pytest.fixture(scope="module")
def on_host(real: Cluster) -> str:
    """A pod on node-1's own network."""
    real.apply(ON_HOST)
    real.kubectl("wait", "--for=condition=Ready", "pod/on-host", "--timeout=60s", timeout=70)
    return "on-host"


def curl(cluster: Cluster, namespace: str, pod: str, url: str) -> str:
    """What is answered; Failed with curl's exit code when nothing is."""
    return cluster.pod_exec(namespace, pod, "curl", "-sk", "--max-time", "3", url)


def test_nodes_are_ready_with_a_network_and_nothing_else_brings_one(real: Cluster) -> None:
    for item in real.json("get", "nodes")["items"]:
        conditions = {c["type"]: c["status"] for c in item["status"]["conditions"]}
        assert conditions["Ready"] == "True" and conditions["NetworkUnavailable"] == "False"
        node = item["metadata"]["name"]
        configured = real.node_exec(node, "ls", "/etc/cni/net.d").split()
        assert configured == ["05-lockgate.conflist"]
        assert real.node_exec(node, "iptables-save") + real.node_exec(node, "ip6tables-save") == ""


def test_every_pod_of_the_shop_is_ready(real: Cluster) -> None:
    pods = real.json("get", "pods", "-A")["items"]
    assert sum(pod["metadata"]["namespace"] in _of_the_shop() for pod in pods) == 26
    assert shop.not_ready(real) == []


def _of_the_shop() -> set[str]:
    return {"shop", "payments", "monitoring", "visitors"}


def test_every_connection_is_as_the_specification_says(real: Cluster) -> None:
    checks = matrix.plan(matrix.objects(real))
    assert len(checks) > 2500
    assert matrix.differences(real, checks) == []
    found = {check.result.result for check in checks if check.result}
    assert {"ok", "timeout"} <= found


@pytest.mark.parametrize(
    "url",
    ["http://web.shop/", "http://web.shop.svc.cluster.local/", "https://kubernetes.default/livez"],
)
def test_pods_find_services_by_name(real: Cluster, url: str) -> None:
    assert curl(real, "visitors", "customer", url)


def test_pods_reach_a_pod_on_the_hosts_network_and_it_reaches_them(
    real: Cluster, on_host: str
) -> None:
    for address in ("172.30.0.11", "[fd00:172:30::11]"):
        host = curl(real, "visitors", "customer", f"http://{address}:8099/hostname")
        assert host == "node-1"
    objects = matrix.objects(real)
    for pod in objects.pods.values():
        if pod.metadata.labels.get("app") == "node-exporter":
            for ip in pod.ips:
                url = f"http://[{ip}]:9100/" if ":" in ip else f"http://{ip}:9100/"
                assert curl(real, "default", on_host, url).strip() == pod.metadata.name


def test_a_pod_on_the_hosts_network_reaches_services(real: Cluster, on_host: str) -> None:
    assert '"major"' in curl(real, "default", on_host, f"https://{API_SERVICE4}/version")
    web = real.json("-n", "shop", "get", "service", "web")["spec"]["clusterIPs"]
    for ip in web:
        url = f"http://[{ip}]/" if ":" in ip else f"http://{ip}/"
        assert curl(real, "default", on_host, url).startswith("web-")


@pytest.mark.parametrize("pod", ["visitors/customer", "default/on-host"])
@pytest.mark.parametrize("address", ["10.96.200.200", "[fd00:10:96::cccc]"])
def test_there_is_no_way_to_an_address_of_no_service(
    real: Cluster, on_host: str, pod: str, address: str
) -> None:
    nowhere = "[2001:db8::1]" if ":" in address else "192.0.2.1"  # RFC 3849, RFC 5737
    for there, leaves in ((nowhere, True), (address, False)):
        seen = _strays(real)
        with pytest.raises(Failed):
            curl(real, *pod.split("/"), f"http://{there}/")
        assert (_strays(real) != seen) is leaves, there


def _strays(cluster: Cluster) -> str:
    """Counters of the machine outside: packets that came to it and are not for it."""
    names = ("IpInAddrErrors", "Ip6InAddrErrors", "Ip6InNoRoutes")
    netns = f"--net=/run/netns/{cluster.state.outside_netns}"
    command = ["nsenter", netns, "nstat", "-asz", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_world_sees_the_nodes_address(real: Cluster) -> None:
    objects = matrix.objects(real)
    node = objects.pods["visitors", "customer"].spec.node_name
    program = (
        "import socket; s = socket.create_server(('', 8077)); print('up', flush=True);"
        "wire, who = s.accept(); wire.recv(100);"
        "wire.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\n' + who[0].encode())"
    )
    netns = f"--net=/run/netns/{real.state.outside_netns}"
    command = ["nsenter", netns, "python3", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "up\n"
        try:
            seen = curl(real, "visitors", "customer", f"http://{OUTSIDE4}:8077/")
        finally:
            server.kill()
    assert seen == f"172.31.0.{10 + int(node.removeprefix('node-'))}"


def test_a_policy_is_in_force_when_it_was_applied_and_not_when_it_was_deleted(
    real: Cluster,
) -> None:
    def reaches() -> bool:
        address = real.json("-n", "shop", "get", "service", "web")["spec"]["clusterIP"]
        try:
            return bool(curl(real, "visitors", "customer", f"http://{address}/"))
        except Failed:
            return False

    assert reaches()
    real.apply(CLOSED)
    try:
        until("the policy", lambda: not reaches(), 20)
    finally:
        real.kubectl("-n", "visitors", "delete", "networkpolicy", "closed")
    until("the way", reaches, 20)


def test_the_command_line_works_with_a_kubeconfig(real: Cluster) -> None:
    lockgate = Path(__file__).parents[2] / ".venv/bin/lockgate"
    command = [lockgate, "flows", "--kubeconfig", real.kubeconfig, "--verdict", "deny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    intruder = [r for r in records if r["source"].get("pod") == "intruder"]
    assert intruder and all(record["policies"] for record in intruder)

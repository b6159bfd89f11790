"""Clients outside a real cluster: node ports, load balancers, host ports, and the firewall."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import Cluster
from cluster.commands import Failed, run, until
from cluster.load_balancers import LoadBalancers
from lockgate.standalone.underlay import OUTSIDE4, OUTSIDE6, outside_address
from tests.cluster.test_remote import ask

NODE_PORT, HOST_PORT = 30980, 8955
WEB = f"""
apiVersion: v1
kind: Namespace
metadata: {{name: edge}}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: web, namespace: edge}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: a
        image: localhost/agnhost:1
        args: [netexec, --http-port=8080]
        ports: [{{containerPort: 8080, hostPort: {HOST_PORT}}}]
        readinessProbe: {{httpGet: {{path: /hostname, port: 8080}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: edge}}
spec:
  type: LoadBalancer
  ipFamilyPolicy: RequireDualStack
  selector: {{app: web}}
  ports: [{{port: 80, targetPort: 8080, nodePort: {NODE_PORT}}}]
"""
FIREWALL = """
apiVersion: lockgate.dev/v1alpha1
kind: Firewall
metadata: {name: edge}
spec:
  rules:
  - {action: Deny, from: [%s], ports: [{protocol: TCP, port: %d}]}
"""
#: The machine outside, as packets to the first node have it.
THERE = {4: OUTSIDE4, 6: OUTSIDE6}


@pytest.fixture(scope="module")
def web(real: Cluster) -> Iterator[dict[int, str]]:
    """Addresses of the load balancer of a service with a pod on each node, by family."""
    with LoadBalancers(real.state):
        real.apply(WEB)
        real.kubectl("-n", "edge", "rollout", "status", "ds/web", "--timeout=90s", timeout=100)

        def given() -> list[dict[str, str]]:
            status = real.json("-n", "edge", "get", "service", "web")["status"]
            return status["loadBalancer"].get("ingress") or []

        until("an address in each family", lambda: len(given()) == 2, 30)
        yield {6 if ":" in one["ip"] else 4: one["ip"] for one in given()}
        real.kubectl("-n", "edge", "delete", "service", "web")  # it waits for its load balancer
        real.kubectl("delete", "namespace", "edge", "--wait=false")


def fetch(cluster: Cluster, address: str, port: int, page: str = "hostname") -> str:
    """What the machine outside gets. Failed with curl's exit code."""
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{port}/{page}"
    return run(*cluster.outside_command("curl", "-s", "--max-time", "2", url))


def answers(cluster: Cluster, address: str, port: int) -> bool:
    try:
        return bool(fetch(cluster, address, port))
    except Failed:
        return False


@pytest.mark.parametrize("family", [4, 6])
def test_every_way_in_leads_to_every_pod_and_tells_it_who_asks(
    real: Cluster, web: dict[int, str], family: int
) -> None:
    pods = {pod["metadata"]["name"] for pod in real.json("-n", "edge", "get", "pods")["items"]}
    assert len(pods) == 2
    ways = [(web[family], 80)]
    ways += [(outside_address(number, family == 6), NODE_PORT) for number in (1, 2)]
    for address, port in ways:
        until("an answer", lambda a=address, p=port: answers(real, a, p), 20)
        assert {fetch(real, address, port) for _ in range(30)} == pods
        client = fetch(real, address, port, "clientip").rpartition(":")[0].strip("[]")
        assert client == THERE[family]


@pytest.mark.parametrize("family", [4, 6])
def test_a_host_port_leads_to_the_pod_of_its_node(
    real: Cluster, web: dict[int, str], family: int
) -> None:
    where = {
        pod["spec"]["nodeName"]: pod["metadata"]["name"]
        for pod in real.json("-n", "edge", "get", "pods")["items"]
    }
    for number in (1, 2):
        address = outside_address(number, family == 6)
        assert fetch(real, address, HOST_PORT) == where[f"node-{number}"]


def test_the_trace_leads_to_the_pod_that_answers(real: Cluster, web: dict[int, str]) -> None:
    url = f"http://{web[4]}/hostname"
    for port in range(23_000, 23_005):
        options = ("-s", "--max-time", "2", "--local-port", str(port))
        name = run(*real.outside_command("curl", *options, url))
        told = ask(real, "service", "trace", f"{OUTSIDE4}:{port}", f"{web[4]}:80")
        assert told["verdict"] == "allow"
        assert told["steps"][-1]["name"] == f"edge/{name}", told


def rules(cluster: Cluster) -> list[dict[str, Any]]:
    found = ask(cluster, "firewall", "list")["rules"]
    return [rule for rule in found if rule["source"] != "builtin"]


@pytest.mark.parametrize("family", [4, 6])
def test_a_firewall_of_the_api_is_in_force_on_every_node(
    real: Cluster, web: dict[int, str], family: int
) -> None:
    address = outside_address(1, family == 6)
    until("an answer", lambda: answers(real, address, NODE_PORT), 20)
    block = f"{THERE[family]}/{32 if family == 4 else 128}"
    real.apply(FIREWALL % (json.dumps(block), NODE_PORT))
    try:
        for number in (1, 2):
            there = outside_address(number, family == 6)
            until("it is denied", lambda t=there: not answers(real, t, NODE_PORT), 20)
            assert answers(real, there, HOST_PORT), "another port"
        (rule,) = rules(real)
        assert (rule["name"], rule["nodes"]) == ("edge", ["node-1", "node-2"])
        drop = ask(real, "flows", "--cause", "firewall", "--limit", "1")
        assert drop["policy"] == {"kind": "Firewall", "namespace": "", "name": "edge"}
        assert (drop["source"]["ip"], drop["rule"]) == (THERE[family], "rules[0]")
    finally:
        real.kubectl("delete", "firewalls.lockgate.dev", "edge")
    until("it is over", lambda: answers(real, address, NODE_PORT), 20)
    assert rules(real) == []


def test_commands_to_the_firewall_reach_every_node(real: Cluster, web: dict[int, str]) -> None:
    address = outside_address(2, False)
    added = ask(real, "firewall", "add", "deny", f"{OUTSIDE4}/32", "--port", f"tcp/{NODE_PORT}")
    assert {node: one["added"] for node, one in added.items()} == {"node-1": 1, "node-2": 1}
    try:
        assert not answers(real, address, NODE_PORT)
    finally:
        gone = ask(real, "firewall", "del", f"{OUTSIDE4}/32")
    assert {node: one["deleted"] for node, one in gone.items()} == {"node-1": 1, "node-2": 1}
    assert answers(real, address, NODE_PORT)


def test_what_is_wrong_with_a_firewall_the_api_server_says(real: Cluster) -> None:
    with pytest.raises(Failed, match=r"spec\.rules\[0\]\.ports\[0\]\.port"):
        real.apply(FIREWALL % ("192.0.2.1", 70_000))

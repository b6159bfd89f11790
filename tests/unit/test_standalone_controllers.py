"""Manifests to pods, nodes, addresses and slices, without a cluster."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from lockgate.objects.model import Condition, Pod, PodIP, PodStatus
from lockgate.objects.parse import parse
from lockgate.standalone.controllers import (
    Memory,
    Plan,
    endpoint_slices,
    hosts_text,
)
from lockgate.standalone.controllers import plan as make_plan
from lockgate.standalone.nodes import make_nodes


def workload(kind: str, name: str, replicas: int, extra: str = "", image: str = "x") -> str:
    version = "batch/v1" if kind == "Job" else "apps/v1"
    count = "" if kind in ("DaemonSet", "Job") else f"replicas: {replicas}"
    restart = "restartPolicy: Never" if kind == "Job" else ""
    return f"""
apiVersion: {version}
kind: {kind}
metadata: {{name: {name}}}
spec:
  {count}
  {extra}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      {restart}
      containers:
        - {{name: c, image: {image}, ports: [{{name: http, containerPort: 8080}}]}}
---
"""


def service(name: str, **spec: object) -> str:
    spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": "http"}], **spec}
    body = msgspec.json.encode(spec).decode()
    return f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {body}\n---\n"


def planned(text: str, memory: Memory | None = None, nodes: int = 2) -> Plan:
    objects = parse(text, "test.yaml").objects
    return make_plan(objects, make_nodes(objects, nodes), memory or Memory())


def running(plan: Plan, ready: bool = True) -> dict[tuple[str, str], Pod]:
    """The plan's pods with addresses, as if they ran."""
    return {
        key: msgspec.structs.replace(
            pod,
            status=PodStatus(
                phase="Running",
                pod_ips=[PodIP(ip=f"10.244.1.{n}"), PodIP(ip=f"fd00::{n}")],
                conditions=[Condition(type="Ready", status=str(ready))],
            ),
        )
        for n, (key, pod) in enumerate(sorted(plan.pods.items()), 2)
    }


@pytest.mark.parametrize(
    ("kind", "extra", "names"),
    [
        ("Deployment", "", ["web-0", "web-1", "web-2"]),
        ("StatefulSet", "serviceName: web", ["web-0", "web-1", "web-2"]),
        ("ReplicaSet", "", ["web-0", "web-1", "web-2"]),
        ("DaemonSet", "", ["web-node-1", "web-node-2"]),
        ("Job", "completions: 2", ["web-0", "web-1"]),
        ("Job", "parallelism: 4", ["web-0", "web-1", "web-2", "web-3"]),
    ],
)
def test_replicas_become_pods_with_stable_names(kind: str, extra: str, names: list[str]) -> None:
    plan = planned(workload(kind, "web", 3, extra))
    assert sorted(name for _, name in plan.pods) == names
    pod = plan.pods["default", names[0]]
    assert pod.metadata.labels["app"] == "web"
    assert [(o.kind, o.name, o.controller) for o in pod.metadata.owner_references] == [
        (kind, "web", True)
    ]


def test_pods_of_one_owner_are_spread_over_the_nodes() -> None:
    plan = planned(workload("Deployment", "a", 5) + workload("Deployment", "b", 5))
    spread = Counter((name[0], pod.spec.node_name) for (_, name), pod in plan.pods.items())
    assert all(count in (2, 3) for count in spread.values())
    assert set(Counter(pod.spec.node_name for pod in plan.pods.values()).values()) == {5}


def test_a_change_elsewhere_moves_no_pod_and_no_address() -> None:
    memory = Memory()
    text = workload("Deployment", "web", 3) + service("web")
    before = planned(text, memory)
    after = planned(workload("Deployment", "aaa", 4) + service("aaa") + text, memory)
    for key, pod in before.pods.items():
        assert after.pods[key] == pod
    assert after.services["default", "web"] == before.services["default", "web"]


def test_a_changed_spec_is_another_pod_and_changed_labels_are_not() -> None:
    memory = Memory()
    first = planned(workload("Deployment", "web", 1), memory).pods["default", "web-0"]
    text = workload("Deployment", "web", 1).replace(
        "labels: {app: web}", "labels: {app: web, v: two}"
    )
    relabelled = planned(text, memory).pods["default", "web-0"]
    changed = planned(workload("Deployment", "web", 1, image="y"), memory).pods["default", "web-0"]
    assert relabelled.metadata.uid == first.metadata.uid
    assert relabelled.metadata.labels == {"app": "web", "v": "two"}
    assert changed.metadata.uid != first.metadata.uid
    assert changed.spec.node_name == first.spec.node_name


def test_a_name_used_again_is_another_pod() -> None:
    memory = Memory()
    first = planned(workload("Deployment", "web", 1), memory).pods["default", "web-0"]
    planned("", memory)
    again = planned(workload("Deployment", "web", 1), memory).pods["default", "web-0"]
    assert again.metadata.uid != first.metadata.uid


@pytest.mark.parametrize(
    ("spec", "node"),
    [
        ("nodeName: node-2", "node-2"),
        ("nodeSelector: {kubernetes.io/hostname: node-2}", "node-2"),
        ("nodeName: nowhere", None),
        ("nodeSelector: {disk: fast}", None),
    ],
)
def test_node_name_and_selector_are_honoured(spec: str, node: str | None) -> None:
    plan = planned(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n"
        f"spec:\n  {spec}\n  containers: [{{name: c}}]\n"
    )
    if node:
        assert plan.pods["default", "p"].spec.node_name == node
        assert not plan.unscheduled
    else:
        assert ("default", "p") in plan.unscheduled
        assert "stays Pending" in plan.warnings[0]


def test_probes_that_are_not_run_are_named_once_a_workload() -> None:
    text = workload("Deployment", "web", 2).replace(
        "ports: [", "readinessProbe: {exec: {command: [x]}}, ports: ["
    )
    assert planned(text).warnings == [
        "Deployment default/web: the readinessProbe of container c is neither httpGet nor"
        " tcpSocket: it is not run, and counts as passed"
    ]
    known = text.replace("exec: {command: [x]}", "tcpSocket: {port: http}")
    assert planned(known).warnings == []


@pytest.mark.parametrize(
    ("spec", "families", "count"),
    [
        ({}, ["IPv4"], 1),
        ({"ipFamilyPolicy": "SingleStack"}, ["IPv4"], 1),
        ({"ipFamilyPolicy": "PreferDualStack"}, ["IPv4", "IPv6"], 2),
        ({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}, ["IPv6", "IPv4"], 2),
        ({"ipFamilies": ["IPv6"]}, ["IPv6"], 1),
        ({"clusterIP": "None"}, ["IPv4"], 0),
        ({"type": "NodePort"}, ["IPv4"], 1),
    ],
)
def test_services_get_addresses_of_their_families(
    spec: dict[str, object], families: list[str], count: int
) -> None:
    item = planned(service("web", **spec)).services["default", "web"]
    assert item.spec.ip_families == families
    assert len(item.cluster_ips) == count
    for family, address in zip(families, item.cluster_ips, strict=False):
        assert address.startswith("fd00:10:96::" if family == "IPv6" else "10.96.")


@pytest.mark.parametrize(
    ("cidrs", "spec", "families", "warnings"),
    [
        (["10.1.0.0/24"], {}, ["IPv4"], 0),
        (["10.1.0.0/24"], {"ipFamilyPolicy": "PreferDualStack"}, ["IPv4"], 0),
        (["10.1.0.0/24"], {"ipFamilyPolicy": "RequireDualStack"}, ["IPv4", "IPv6"], 1),
        (["10.1.0.0/24"], {"ipFamilies": ["IPv6"]}, ["IPv6"], 1),
        (["fd01::/64"], {}, ["IPv6"], 0),
        (["fd01::/64"], {"ipFamilyPolicy": "PreferDualStack"}, ["IPv6"], 0),
        (["fd01::/64"], {"clusterIP": "None"}, ["IPv6"], 0),
        (["fd01::/64", "10.1.0.0/24"], {}, ["IPv6"], 0),
        (["fd01::/64", "10.1.0.0/24"], {"ipFamilyPolicy": "PreferDualStack"}, ["IPv6", "IPv4"], 0),
    ],
)
def test_services_have_the_families_that_nodes_have_unless_they_ask(
    cidrs: list[str], spec: dict[str, object], families: list[str], warnings: int
) -> None:
    text = f"apiVersion: v1\nkind: Node\nmetadata: {{name: n}}\nspec: {{podCIDRs: {cidrs}}}\n---\n"
    plan = planned(text + service("web", **spec))
    assert plan.services["default", "web"].spec.ip_families == families
    assert len(plan.warnings) == warnings


def test_an_address_of_the_manifest_is_kept_and_never_given_to_another() -> None:
    memory = Memory()
    before = planned(service("web"), memory).services["default", "web"].spec.cluster_ip
    after = planned(service("web") + service("new", clusterIP=before), memory).services
    assert after["default", "new"].spec.cluster_ip == before
    assert after["default", "web"].spec.cluster_ip not in ("", before)


def test_missing_namespaces_are_made_with_a_warning_and_default_is_there() -> None:
    text = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: x}\n"
    plan = planned(text + "spec: {containers: [{name: c}]}\n")
    assert set(plan.namespaces) == {"default", "x"}
    assert plan.namespaces["x"].metadata.labels == {"kubernetes.io/metadata.name": "x"}
    assert len(plan.warnings) == 1 and plan.warnings[0].startswith("Namespace x:")


@pytest.mark.parametrize(("ready", "publish"), [(True, False), (False, False), (False, True)])
def test_slices_carry_readiness(ready: bool, publish: bool) -> None:
    plan = planned(
        workload("Deployment", "web", 2)
        + service("web", ipFamilyPolicy="PreferDualStack", publishNotReadyAddresses=publish)
    )
    slices = endpoint_slices(plan.services, running(plan, ready))
    assert {(s.address_type, len(s.endpoints)) for s in slices.values()} == {
        ("IPv4", 2),
        ("IPv6", 2),
    }
    for item in slices.values():
        assert item.service == "web"
        assert [(p.port, p.protocol) for p in item.ports] == [(8080, "TCP")]
        assert all(e.conditions.ready is (ready or publish) for e in item.endpoints)


def test_pods_whose_named_port_differs_are_in_slices_of_their_own() -> None:
    other = (
        workload("Deployment", "other", 1).replace("8080", "9090").replace("app: other", "app: web")
    )
    plan = planned(workload("Deployment", "web", 1) + other + service("web"))
    slices = endpoint_slices(plan.services, running(plan))
    assert sorted(p.port or 0 for s in slices.values() for p in s.ports) == [8080, 9090]


def test_a_pod_being_ended_serves_but_is_not_ready() -> None:
    plan = planned(workload("Deployment", "web", 1) + service("web"))
    pods = running(plan)
    (key, pod), *_ = pods.items()
    ending = msgspec.structs.replace(pod.metadata, deletion_timestamp="2026-01-01T00:00:00Z")
    pods[key] = msgspec.structs.replace(pod, metadata=ending)
    [item] = endpoint_slices(plan.services, pods).values()
    conditions = item.endpoints[0].conditions
    assert (conditions.ready, conditions.serving, conditions.terminating) == (False, True, True)


def test_hosts_have_short_names_at_home_and_pod_names_of_headless_services() -> None:
    plan = planned(
        workload("StatefulSet", "db", 1, "serviceName: db")
        + service("db", clusterIP="None")
        + service("web", clusterIP="10.96.0.7")
    )
    slices = endpoint_slices(plan.services, running(plan)).values()
    home = hosts_text("default", plan.services, slices)
    away = hosts_text("elsewhere", plan.services, slices)
    full = "web.default.svc.cluster.local web.default.svc web.default"
    assert f"10.96.0.7 {full} web\n" in home
    assert f"10.96.0.7 {full}\n" in away
    assert " db-0.db.default.svc.cluster.local " in home

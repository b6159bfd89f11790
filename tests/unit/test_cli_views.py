"""What `lockgate get` prints of objects: fields have the names of the Kubernetes API."""

from __future__ import annotations

import pytest

from lockgate.cli.views import as_table, endpoint_rows, pod_rows, service_rows
from lockgate.objects.model import (
    Cluster,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    LoadBalancerIngress,
    LoadBalancerStatus,
    ObjectMeta,
    ObjectReference,
    Pod,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
)

LABELS = {"kubernetes.io/service-name": "web"}
POD = ObjectReference(kind="Pod", namespace="shop", name="web-0", uid="u")

CASES = [
    (
        "nobody says whether it is ready: it is",
        Endpoint(["10.0.0.1"]),
        {"addresses": ["10.0.0.1"], "conditions": {"ready": True}, "nodeName": None},
        "10.0.0.1",
    ),
    (
        "a pod's",
        Endpoint(["10.0.0.1"], EndpointConditions(ready=True), "node-1", POD),
        {
            "addresses": ["10.0.0.1"],
            "conditions": {"ready": True},
            "nodeName": "node-1",
            "targetRef": {"kind": "Pod", "namespace": "shop", "name": "web-0", "uid": "u"},
        },
        "10.0.0.1",
    ),
    (
        "one that ends and still serves",
        Endpoint(["fd00::1"], EndpointConditions(False, True, True), "node-1"),
        {
            "addresses": ["fd00::1"],
            "conditions": {"ready": False, "serving": True, "terminating": True},
            "nodeName": "node-1",
        },
        "fd00::1 (not ready)",
    ),
]


@pytest.mark.parametrize(
    ("endpoint", "wanted", "shown"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_an_endpoint_is_told_as_in_an_endpoint_slice(endpoint, wanted, shown):
    meta = ObjectMeta(namespace="shop", name="web-x1", labels=LABELS)
    one = EndpointSlice(metadata=meta, endpoints=[endpoint], ports=[EndpointPort(80, "http")])
    rows = endpoint_rows(Cluster(slices={("shop", "web-x1"): one}))
    assert rows == [
        {
            "namespace": "shop",
            "name": "web-x1",
            "service": "web",
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
            "endpoints": [{"targetRef": None} | wanted],
        }
    ]
    assert as_table("endpoints", rows).splitlines()[-1].rstrip().endswith(f" {shown}")


WEB = ServicePort(port=80, node_port=30080)
IN_USE = ServiceStatus(load_balancer=LoadBalancerStatus(ingress=[LoadBalancerIngress("192.0.2.1")]))
SERVICES = [
    ("ClusterIP", {"type": "ClusterIP", "ports": [ServicePort(port=80)]}, None, "-  80/TCP"),
    ("NodePort", {"type": "NodePort", "ports": [WEB]}, None, "-  80:30080/TCP"),
    (
        "waits for an address",
        {"type": "LoadBalancer", "ports": [WEB]},
        None,
        "pending 80:30080/TCP",
    ),
    ("has one", {"type": "LoadBalancer", "ports": [WEB]}, IN_USE, "192.0.2.1 80:30080/TCP"),
    (
        "externalIPs",
        {"external_ips": ["192.0.2.9"], "ports": [ServicePort(port=53, protocol="UDP")]},
        None,
        "192.0.2.9 53/UDP",
    ),
    (
        "ExternalName",
        {"type": "ExternalName", "cluster_ip": "", "external_name": "db.example"},
        None,
        "db.example -",
    ),
]


@pytest.mark.parametrize(
    ("spec", "status", "shown"), [case[1:] for case in SERVICES], ids=[case[0] for case in SERVICES]
)
def test_addresses_and_ports_of_a_service_are_shown_as_by_kubectl(spec, status, shown):
    service = Service(
        metadata=ObjectMeta(namespace="shop", name="web"),
        spec=ServiceSpec(**({"cluster_ip": "10.96.0.1"} | spec)),
        status=status or ServiceStatus(),
    )
    rows = service_rows(Cluster(services={("shop", "web"): service}))
    line = as_table("services", rows).splitlines()[-1]
    address = "10.96.0.1" if rows[0]["clusterIPs"] else "-"
    assert line.split() == ["shop", "web", service.spec.type, address, *shown.split(), "none"]


@pytest.mark.parametrize(
    ("phase", "deleted", "word"),
    [
        ("", None, "Pending"),
        ("Running", None, "Running"),
        ("Running", "2026-01-01T00:00:00Z", "Terminating"),
    ],
)
def test_the_status_of_a_pod(phase: str, deleted: str | None, word: str) -> None:
    meta = ObjectMeta("web-0", "shop", deletion_timestamp=deleted)
    cluster = Cluster(pods={("shop", "web-0"): Pod(meta, status=PodStatus(phase))})
    (row,) = rows = pod_rows(cluster)
    assert (row["phase"], row["deletionTimestamp"]) == (phase, deleted)
    assert as_table("pods", rows).splitlines()[1].split()[3] == word

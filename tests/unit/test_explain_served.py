"""Questions about services from outside: to which backends they lead, and as whom."""

from __future__ import annotations

from typing import Any

import pytest

from lockgate.explain.frontends import with_forwarding
from lockgate.explain.names import Names
from lockgate.explain.question import Question
from lockgate.objects.model import (
    FORWARDING,
    Cluster,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    LoadBalancerIngress,
    LoadBalancerStatus,
    Node,
    NodeAddress,
    NodeStatus,
    ObjectMeta,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
)

PODS = {"a": ("n1", "10.0.1.1"), "b": ("n2", "10.0.2.1"), "asks": ("n3", "10.0.3.9")}
OUTSIDE = "198.51.100.7"


def cluster(says: str = "", ending: str = "", backends: str = "ab", **spec: Any) -> Cluster:
    nodes = {
        f"n{n}": Node(
            metadata=ObjectMeta(name=f"n{n}"),
            status=NodeStatus(addresses=[NodeAddress(type="InternalIP", address=f"172.16.0.{n}")]),
        )
        for n in (1, 2, 3)
    }
    pods = {
        ("shop", name): Pod(
            metadata=ObjectMeta(namespace="shop", name=name, uid=name),
            spec=PodSpec(node_name=node),
            status=PodStatus(phase="Running", pod_ips=[PodIP(ip=ip)]),
        )
        for name, (node, ip) in PODS.items()
    }
    given = {
        "type": "LoadBalancer",
        "cluster_ips": ["10.96.0.1"],
        "external_ips": ["192.0.2.9"],
        "ports": [ServicePort(port=80, node_port=30080)],
    }
    service = Service(
        metadata=ObjectMeta(
            namespace="shop", name="web", annotations={FORWARDING: says} if says else {}
        ),
        spec=ServiceSpec(**(given | spec)),
        status=ServiceStatus(
            load_balancer=LoadBalancerStatus(ingress=[LoadBalancerIngress(ip="192.0.2.1")])
        ),
    )
    ends = EndpointConditions(ready=False, serving=True, terminating=True)
    one = EndpointSlice(
        metadata=ObjectMeta(
            namespace="shop", name="web-1", labels={"kubernetes.io/service-name": "web"}
        ),
        endpoints=[
            Endpoint(
                addresses=[PODS[name][1]],
                node_name=PODS[name][0],
                conditions=ends if name in ending else EndpointConditions(),
            )
            for name in backends
        ],
        ports=[EndpointPort(port=8080)],
    )
    return Cluster(
        nodes=nodes,
        pods=pods,
        services={("shop", "web"): service},
        slices={("shop", "web-1"): one},
    )


def led(known: Cluster, source: str, target: str, port: int) -> list[str]:
    """`SOURCE>BACKEND` of each attempt, or why there is none."""
    found = Names(known).attempts(Question(source, target, port))
    return [one.unserved or f"{one.source.ip}>{one.backend}" for one in found]


A, B = "10.0.1.1:8080", "10.0.2.1:8080"


@pytest.mark.parametrize("address", ["192.0.2.1", "192.0.2.9"])
def test_all_backends_and_as_itself(address: str) -> None:
    assert led(cluster(), OUTSIDE, address, 80) == [f"{OUTSIDE}>{A}", f"{OUTSIDE}>{B}"]


def test_a_node_port_is_asked_at_its_node() -> None:
    local = cluster(external_traffic_policy="Local")
    assert led(local, OUTSIDE, "172.16.0.1", 30080) == [f"{OUTSIDE}>{A}"]
    assert led(local, OUTSIDE, "172.16.0.3", 30080) == ["no-local-backend"]
    assert led(cluster(), OUTSIDE, "172.16.0.3", 30080) == [f"{OUTSIDE}>{A}", f"{OUTSIDE}>{B}"]


def test_other_ports_of_a_node_are_the_nodes() -> None:
    found = Names(cluster()).attempts(Question(OUTSIDE, "172.16.0.1", 22))
    assert [(one.backend, one.unserved) for one in found] == [(None, None)]


def test_the_agents_setting_counts_where_the_service_does_not_say_it() -> None:
    question = Question(OUTSIDE, "192.0.2.1", 80)
    for says, usual, like in (("", "snat", "snat"), ("", "dsr", "dsr"), ("dsr", "snat", "dsr")):
        found = Names(with_forwarding(cluster(says), usual)).attempts(question)
        assert found == Names(cluster(like)).attempts(question)
    assert Names(cluster("snat")).attempts(question) != Names(cluster("dsr")).attempts(question)


def test_with_snat_another_node_may_be_who_comes() -> None:
    assert led(cluster("snat"), OUTSIDE, "192.0.2.1", 80) == [
        f"{OUTSIDE}>{A}",
        f"172.16.0.2>{A}",
        f"172.16.0.1>{B}",
        f"{OUTSIDE}>{B}",
    ]
    assert led(cluster("snat"), OUTSIDE, "172.16.0.2", 30080) == [
        f"172.16.0.2>{A}",
        f"{OUTSIDE}>{B}",
    ]


def test_those_that_end_are_not_asked_about_unless_nobody_else_is_there() -> None:
    assert led(cluster(ending="a"), OUTSIDE, "192.0.2.1", 80) == [f"{OUTSIDE}>{B}"]
    assert led(cluster(ending="ab"), OUTSIDE, "192.0.2.1", 80) == [
        f"{OUTSIDE}>{A}",
        f"{OUTSIDE}>{B}",
    ]
    assert led(cluster(ending="a"), "shop/asks", "10.96.0.1", 80) == [f"10.0.3.9>{B}"]


def test_source_ranges_hold_at_the_balancers_address() -> None:
    ranged = cluster(load_balancer_source_ranges=["203.0.113.0/24"])
    assert led(ranged, OUTSIDE, "192.0.2.1", 80) == ["source-range"]
    assert led(ranged, "203.0.113.5", "192.0.2.1", 80)[0] == f"203.0.113.5>{A}"
    assert led(ranged, OUTSIDE, "192.0.2.9", 80)[0] == f"{OUTSIDE}>{A}"


def test_no_backend_is_told() -> None:
    assert led(cluster(backends=""), OUTSIDE, "192.0.2.1", 80) == ["no-backend"]
    assert led(cluster(backends=""), "shop/asks", "192.0.2.1", 80) == ["no-backend"]


def test_a_pod_asks_at_external_addresses_as_in_the_cluster() -> None:
    local = cluster(external_traffic_policy="Local")
    assert led(local, "shop/asks", "192.0.2.1", 80) == [f"10.0.3.9>{A}", f"10.0.3.9>{B}"]


def test_internal_traffic_policy_holds_at_the_cluster_ip() -> None:
    local = cluster(internal_traffic_policy="Local")
    assert led(local, "shop/a", "10.96.0.1", 80) == [f"10.0.1.1>{A}"]
    assert led(local, "shop/asks", "svc/shop/web", 80) == ["no-local-backend"]

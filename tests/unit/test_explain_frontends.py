"""Where services are asked, and what a name of such a place means."""

from __future__ import annotations

from typing import Any

import pytest

from lockgate.explain.frontends import Frontends, forwarding, frontends_of, parse_frontend
from lockgate.explain.question import QuestionError
from lockgate.objects.model import (
    FORWARDING,
    Cluster,
    LoadBalancerIngress,
    LoadBalancerStatus,
    Node,
    NodeAddress,
    NodeStatus,
    ObjectMeta,
    Pod,
    PodIP,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
)

HTTP = ServicePort(name="http", port=80, node_port=30080)
DNS = ServicePort(name="dns", port=53, protocol="UDP", node_port=30053)


def service(
    name: str = "web", *, ingress: tuple[str, ...] = (), says: str = "", **spec: Any
) -> Service:
    given = {"type": "LoadBalancer", "cluster_ips": ["10.96.0.1", "fd96::1"], "ports": [HTTP]}
    return Service(
        metadata=ObjectMeta(
            namespace="shop", name=name, annotations={FORWARDING: says} if says else {}
        ),
        spec=ServiceSpec(**(given | spec)),
        status=ServiceStatus(
            load_balancer=LoadBalancerStatus(ingress=[LoadBalancerIngress(ip=ip) for ip in ingress])
        ),
    )


def cluster(*services: Service) -> Cluster:
    nodes = {
        name: Node(
            metadata=ObjectMeta(name=name),
            status=NodeStatus(
                addresses=[
                    NodeAddress(type="InternalIP", address=f"172.16.0.{number}"),
                    NodeAddress(type="InternalIP", address=f"fd16::{number}"),
                    NodeAddress(type="Hostname", address=name),
                ]
            ),
        )
        for number, name in enumerate(("n1", "n2"), 1)
    }
    return Cluster(nodes=nodes, services={("shop", one.metadata.name): one for one in services})


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (service(type="ClusterIP"), "10.96.0.1:80/TCP [fd96::1]:80/TCP"),
        (
            service(type="NodePort", cluster_ips=["10.96.0.1"]),
            "10.96.0.1:80/TCP 172.16.0.1:30080/TCP 172.16.0.2:30080/TCP",
        ),
        (
            service(
                ingress=("192.0.2.1", "2001:db8::1"),
                cluster_ips=["fd96::1"],
                ports=[ServicePort(port=80)],
                external_ips=["2001:db8:0::9", "192.0.2.9"],
            ),
            "[fd96::1]:80/TCP [2001:db8::1]:80/TCP [2001:db8::9]:80/TCP",
        ),
        (service(type="ClusterIP", cluster_ips=["None"]), ""),
    ],
    ids=["ClusterIP", "NodePort", "LoadBalancer of one family, without node ports", "headless"],
)
def test_the_frontends_of_a_service(one: Service, expected: str) -> None:
    assert " ".join(f.text for f in frontends_of(cluster(one), one)) == expected


def test_what_a_pod_has_is_no_services() -> None:
    one = service(
        type="ClusterIP", cluster_ips=["10.96.0.1"], external_ips=["10.1.0.7", "192.0.2.9"]
    )
    both = cluster(one)
    for phase, wanted in (("Running", []), ("Succeeded", ["10.1.0.7:80/TCP"])):
        both.pods["shop", "own"] = Pod(
            metadata=ObjectMeta(namespace="shop", name="own"),
            status=PodStatus(phase=phase, pod_ips=[PodIP("10.1.0.7")]),
        )
        texts = [found.text for found in frontends_of(both, one)]
        assert texts == ["10.96.0.1:80/TCP", *wanted, "192.0.2.9:80/TCP"]
        assert (Frontends(both).at("10.1.0.7", 80, "TCP") is not None) == bool(wanted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1", ("192.0.2.1", 0, "")),
        ("192.0.2.1:80", ("192.0.2.1", 80, "")),
        ("192.0.2.1:80/tcp", ("192.0.2.1", 80, "TCP")),
        ("2001:db8::1", ("2001:db8::1", 0, "")),
        ("[2001:db8::1]", ("2001:db8::1", 0, "")),
        ("[2001:db8::1]:80/udp", ("2001:db8::1", 80, "UDP")),
        ("shop/web", ("shop/web", 0, "")),
        ("svc/shop/web:80/UDP", ("svc/shop/web", 80, "UDP")),
        ("shop/tcp:80", ("shop/tcp", 80, "")),
        ("shop/tcp", ("shop/tcp", 0, "")),
        ("svc/shop/udp", ("svc/shop/udp", 0, "")),
        ("shop/udp/udp", ("shop/udp", 0, "UDP")),
        ("svc/shop/web/sctp", ("svc/shop/web", 0, "SCTP")),
        ("2001:db8::1/sctp", ("2001:db8::1", 0, "SCTP")),
    ],
)
def test_what_is_written(text: str, expected: tuple[str, int, str]) -> None:
    assert parse_frontend(text) == expected


FOUND = cluster(
    service(ports=[HTTP, DNS], ingress=("192.0.2.1",)),
    service("one", type="ClusterIP", cluster_ips=["10.96.0.2"]),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1:80", ("192.0.2.1", 80, "TCP")),
        ("192.0.2.1/udp", ("192.0.2.1", 53, "UDP")),
        ("shop/web:80", ("192.0.2.1", 80, "TCP")),
        ("shop/web:30080", ("172.16.0.1", 30080, "TCP")),
        ("svc/shop/one", ("10.96.0.2", 80, "TCP")),
        ("10.96.0.2", ("10.96.0.2", 80, "TCP")),
        ("172.16.0.2:30053", ("172.16.0.2", 30053, "UDP")),
        ("192.0.2.1:81", ("192.0.2.1", 81, "TCP")),
        ("203.0.113.7:8888", ("203.0.113.7", 8888, "TCP")),
        ("203.0.113.7:9/tcp", ("203.0.113.7", 9, "TCP")),
    ],
)
def test_a_frontend_is_found_by_what_is_written(text: str, expected: tuple[str, int, str]) -> None:
    assert Frontends(FOUND).find(text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("192.0.2.1", "192.0.2.1: which port? It has 80/TCP, 53/UDP"),
        ("shop/web:81", "shop/web:81: no such port of a service there; 80/TCP, 53/UDP, 30080/TCP"),
        ("192.0.2.1/sctp", "192.0.2.1/sctp: no such port of a service there; 80/TCP, 53/UDP is"),
        ("shop/web:80/icmp", "shop/web:80/icmp: expected one of TCP, UDP, SCTP after '/'"),
        ("203.0.113.7", "203.0.113.7: no such port of a service there; none is"),
        ("shop/none:80", "shop/none: expected an address"),
        ("192.0.2.1:0", "expected a port from 1 to 65535"),
    ],
)
def test_what_cannot_be_found_is_told(text: str, told: str) -> None:
    with pytest.raises(QuestionError) as error:
        Frontends(FOUND).find(text)
    assert str(error.value).startswith(told) or told in str(error.value)


@pytest.mark.parametrize(
    ("one", "mode"),
    [
        (service(says="snat"), "snat"),
        (service(says="dsr"), "dsr"),
        (service(), ""),
        (service(says="else"), ""),
        (service(says="snat", type="ClusterIP"), ""),
        (service(says="snat", type="ClusterIP", external_ips=["192.0.2.9"]), "snat"),
    ],
)
def test_the_mode_is_said_by_the_annotation(one: Service, mode: str) -> None:
    assert forwarding(one) == mode

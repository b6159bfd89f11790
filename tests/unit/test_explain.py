"""Questions: names, packets, and the specification's answers as they are printed."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from scapy.utils import checksum

from lockgate.explain.engine import explain
from lockgate.explain.packet import addresses_of, first_packet
from lockgate.explain.question import Question, QuestionError, parse_port, parse_question
from lockgate.explain.spec import SpecEngine
from lockgate.objects.address import parse_address
from lockgate.objects.model import (
    Cluster,
    Container,
    ContainerPort,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
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
)


def pod(namespace: str, name: str, node: str, *ips: str, phase: str = "Running") -> Pod:
    return Pod(
        metadata=ObjectMeta(namespace=namespace, name=name, uid=name, labels={"app": name}),
        spec=PodSpec(
            node_name=node,
            containers=[Container(name="c", ports=[ContainerPort(container_port=80)])],
        ),
        status=PodStatus(phase=phase, pod_ips=[PodIP(ip=ip) for ip in ips]),
    )


def service(name: str, *ips: str, target: int = 80) -> tuple[Service, EndpointSlice]:
    meta = ObjectMeta(namespace="shop", name=name)
    backends = [Endpoint(addresses=["10.0.1.2"]), Endpoint(addresses=["10.0.2.3"])]
    labels = {"kubernetes.io/service-name": name}
    return (
        Service(
            metadata=meta,
            spec=ServiceSpec(
                cluster_ips=list(ips) or ["None"], ports=[ServicePort(port=8080, protocol="TCP")]
            ),
        ),
        EndpointSlice(
            metadata=ObjectMeta(namespace="shop", name=f"{name}-1", labels=labels),
            endpoints=backends if name != "empty" else [],
            ports=[EndpointPort(port=target)],
        ),
    )


def cluster() -> Cluster:
    pods = [
        pod("shop", "web", "n1", "10.0.1.1", "fd00:1::1"),
        pod("shop", "api", "n1", "10.0.1.2", "fd00:1::2"),
        pod("shop", "db", "n2", "10.0.2.3"),
        pod("shop", "done", "n2", "10.0.2.9", phase="Succeeded"),
        pod("shop", "young", "n2"),
    ]
    policy = NetworkPolicy(
        metadata=ObjectMeta(namespace="shop", name="db"),
        spec=NetworkPolicySpec(
            pod_selector=LabelSelector(match_labels={"app": "db"}),
            ingress=[
                NetworkPolicyIngressRule(
                    from_=[
                        NetworkPolicyPeer(pod_selector=LabelSelector(match_labels={"app": "api"}))
                    ],
                    ports=[NetworkPolicyPort(port=80)],
                )
            ],
        ),
    )
    found = [service("all", "10.9.0.1"), service("empty", "10.9.0.2"), service("headless")]
    return Cluster(
        namespaces={"shop": Namespace(metadata=ObjectMeta(name="shop"))},
        nodes={
            name: Node(
                metadata=ObjectMeta(name=name),
                status=NodeStatus(addresses=[NodeAddress(type="InternalIP", address=ip)]),
            )
            for name, ip in (("n1", "172.16.0.1"), ("n2", "172.16.0.2"))
        },
        pods={one.key: one for one in pods},
        services={("shop", one.metadata.name): one for one, _ in found},
        slices={("shop", one.metadata.name): one for _, one in found},
        policies={policy.key: policy},
    )


DB = {"kind": "NetworkPolicy", "namespace": "shop", "name": "db"}


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [
        ("shop/web", "shop/api", 80, {"verdict": "allow", "direction": None, "policy": None}),
        (
            "shop/api",
            "shop/db",
            80,
            {"verdict": "allow", "direction": "ingress", "policy": DB, "rule": "ingress[0]"},
        ),
        (
            "shop/web",
            "shop/db",
            80,
            {
                "verdict": "deny",
                "direction": "ingress",
                "policy": DB,
                "rule": None,
                "policies": [{**DB, "rules": []}],
            },
        ),
        ("172.16.0.2", "shop/db", 80, {"verdict": "allow", "direction": None}),
        ("172.16.0.1", "shop/db", 80, {"verdict": "deny", "direction": "ingress"}),
        ("shop/db", "shop/db", 9, {"verdict": "allow", "direction": None}),
        # Of the backends the one that is denied answers.
        ("shop/web", "svc/shop/all", 8080, {"verdict": "deny", "backend": "10.0.2.3:80"}),
        ("shop/web", "shop/all", 8080, {"verdict": "deny", "backend": "10.0.2.3:80"}),
        ("shop/web", "10.9.0.1", 8080, {"verdict": "deny", "backend": "10.0.2.3:80"}),
        ("shop/api", "svc/shop/all", 8080, {"verdict": "allow", "backend": "10.0.1.2:80"}),
        ("shop/web", "svc/shop/all", 81, {"verdict": "deny", "cause": "unknown-service-port"}),
        (
            "shop/web",
            "svc/shop/empty",
            8080,
            {"verdict": "deny", "cause": "no-backend", "direction": None, "policy": None},
        ),
        # Without a ClusterIP nothing is translated: the port is the one that was asked.
        ("shop/api", "svc/shop/headless", 80, {"verdict": "allow", "backend": "10.0.1.2:80"}),
        ("shop/api", "svc/shop/headless", 81, {"verdict": "deny", "backend": "10.0.2.3:81"}),
    ],
)
def test_answer(source: str, target: str, port: int, expected: dict[str, Any]) -> None:
    (answer,) = explain(SpecEngine(cluster()), [Question(source, target, port)])
    found = answer.json()
    assert answer.error is None
    assert (found["from"], found["to"], found["port"]) == (source, target, port)
    assert {key: found.get(key) for key in expected} == expected


#: Conditions of two endpoints: n1's 10.0.1.2 and n2's 10.0.2.3.
READY, UNREADY = EndpointConditions(), EndpointConditions(ready=False)
ENDING = EndpointConditions(ready=False, serving=True, terminating=True)
GONE = EndpointConditions(ready=False, serving=False, terminating=True)


@pytest.mark.parametrize(
    ("spec", "conditions", "source", "expected"),
    [
        pytest.param({}, (READY, UNREADY), "shop/web", "10.0.1.2:80", id="who is not ready"),
        pytest.param({}, (GONE, ENDING), "shop/web", "10.0.2.3:80", id="none ready: who serves"),
        pytest.param({}, (ENDING, READY), "shop/api", "10.0.2.3:80", id="ready before ending"),
        pytest.param({}, (GONE, UNREADY), "shop/web", "no-backend", id="nobody"),
        pytest.param(
            {"publish_not_ready_addresses": True},
            (UNREADY, UNREADY),
            "shop/web",
            "10.0.2.3:80",
            id="published unready",
        ),
        pytest.param(
            {"internal_traffic_policy": "Local"},
            (READY, READY),
            "shop/web",
            "10.0.1.2:80",
            id="its own node's, of a pod",
        ),
        pytest.param(
            {"internal_traffic_policy": "Local"},
            (READY, READY),
            "172.16.0.2",
            "10.0.2.3:80",
            id="its own node's, of a node",
        ),
        pytest.param(
            {"internal_traffic_policy": "Local"},
            (GONE, READY),
            "shop/web",
            "no-backend",
            id="none on its own node",
        ),
    ],
)
def test_the_backend_is_one_that_the_node_would_choose(
    spec: dict[str, Any],
    conditions: tuple[EndpointConditions, EndpointConditions],
    source: str,
    expected: str,
) -> None:
    known, key, its = cluster(), ("shop", "all"), ("shop", "all-1")
    service, slice_ = known.services[key], known.slices[its]
    known.services[key] = replace(service, spec=replace(service.spec, **spec))
    ends = zip(slice_.endpoints, conditions, ("n1", "n2"), strict=True)
    endpoints = [replace(one, conditions=has, node_name=node) for one, has, node in ends]
    known.slices[its] = replace(slice_, endpoints=endpoints)
    (answer,) = explain(SpecEngine(known), [Question(source, "svc/shop/all", 8080)])
    assert (answer.backend or answer.cause) == expected


@pytest.mark.parametrize(
    ("source", "target", "sentence"),
    [
        ("shop/web", "127.0.0.1", "127.0.0.1: every pod is that itself"),
        ("shop/web", "::1", "::1: every pod is that itself"),
        ("shop/gone", "shop/db", "no pod or service shop/gone"),
        ("shop/web", "svc/shop/web", "no service shop/web"),
        ("web", "shop/db", "web: expected NAMESPACE/POD"),
        ("shop/done", "shop/db", "pod shop/done has finished (Succeeded)"),
        ("shop/young", "shop/db", "pod shop/young has no address yet"),
        ("fd00::9", "shop/db", "fd00::9 and shop/db do not share one address family"),
    ],
)
def test_question_that_cannot_be_asked(source: str, target: str, sentence: str) -> None:
    asked = [Question(source, target, 80), Question("shop/web", "shop/api", 80)]
    failed, answered = explain(SpecEngine(cluster()), asked)
    assert failed.error is not None and failed.error.startswith(sentence)
    assert failed.json()["verdict"] is None
    assert answered.verdict == "allow"


def test_family_chooses_among_addresses() -> None:
    (answer,) = explain(SpecEngine(cluster()), [Question("shop/web", "shop/api", 80, "TCP", 6)])
    assert (answer.source_ip, answer.destination_ip) == ("fd00:1::1", "fd00:1::2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", (80, "TCP")),
        ("53/udp", (53, "UDP")),
        ("9/SCTP", (9, "SCTP")),
        ("icmp", (None, "ICMP")),
    ],
)
def test_port(text: str, expected: tuple[int | None, str]) -> None:
    assert parse_port(text) == expected


@pytest.mark.parametrize("text", ["", "0", "65536", "80/", "80/quic", "http", "-1", "８0"])
def test_port_refused(text: str) -> None:
    with pytest.raises(QuestionError):
        parse_port(text)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"from": "a/b"},
        {"from": "a/b", "to": "c/d"},
        {"from": "a/b", "to": "c/d", "port": "80"},
        {"from": "a/b", "to": "c/d", "port": True},
        {"from": "a/b", "to": "c/d", "port": 80, "protocol": "quic"},
        {"from": "a/b", "to": "c/d", "port": 80, "family": 5},
        {"from": 1, "to": "c/d", "port": 80},
    ],
)
def test_batch_question_refused(value: Any) -> None:
    with pytest.raises(QuestionError):
        parse_question(value)


@pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP", "ICMP"])
@pytest.mark.parametrize("ends", [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")])
def test_first_packet_has_right_headers_and_checksums(protocol: str, ends: tuple[str, str]) -> None:
    source, destination = map(parse_address, ends)
    frame = first_packet(source, destination, protocol, 443)
    parsed: Packet = Ether(frame)
    network = parsed[IPv6] if ":" in ends[0] else parsed[IP]
    assert (network.src, network.dst) == ends
    assert addresses_of(frame) == (source, destination)
    # A packet that scapy builds anew, checksums and lengths computed, is the same.
    again = parsed.copy()
    for name in ("len", "chksum", "plen", "cksum"):
        current = again
        while current:
            if name in getattr(current, "fields", {}):
                del current.fields[name]
                current.raw_packet_cache = None
            current = current.payload
    assert bytes(again) == frame
    if ":" not in ends[0]:
        assert checksum(frame[14:34]) == 0


def test_first_packet_refuses_two_families() -> None:
    with pytest.raises(ValueError, match="families"):
        first_packet(parse_address("10.0.0.1"), parse_address("fd00::1"), "TCP", 80)

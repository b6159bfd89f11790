"""The specification of services, statement by statement, with answers written by hand.

Three nodes: a and b in zone z1, c in z2. Service shop/web has an endpoint on each, 10.0.N.1:8080,
N = 1, 2, 3; who asks is on node a. Cases change the service, its endpoints, or who asks what.
"""

from __future__ import annotations

from typing import Any

import pytest

from lockgate.objects.model import (
    Cluster,
    Container,
    ContainerPort,
    Endpoint,
    EndpointConditions,
    EndpointHints,
    EndpointPort,
    EndpointSlice,
    ForNode,
    ForZone,
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
from lockgate.spec.services import Client, Frontend, choose

POD, HOST, OUT = "pod", "node", "outside"
CLIENTS = {POD: "10.0.1.9", HOST: "192.0.2.1", OUT: "198.51.100.7"}
CLUSTER_IP, EXTERNAL, BALANCER = "10.96.0.1", "203.0.113.1", "203.0.113.2"
NODE_A, NODE_B, CARD = "192.0.2.1", "192.0.2.2", "192.0.2.201"
A, B, C = "10.0.1.1:8080", "10.0.2.1:8080", "10.0.3.1:8080"
ALL = {A, B, C}
READY: dict[str, bool] = {}
UNREADY = {"ready": False, "serving": False, "terminating": False}
ENDING = {"ready": False, "serving": True, "terminating": True}
ENDED = {"ready": False, "serving": False, "terminating": True}

SPEC: dict[str, Any] = {
    "type": "LoadBalancer",
    "cluster_ips": [CLUSTER_IP],
    "external_ips": [EXTERNAL],
    "ports": [
        ServicePort(port=80, name="http", node_port=30080),
        ServicePort(port=53, name="dns", protocol="UDP", node_port=30053),
    ],
}


def node(name: str, ip: str, zone: str) -> Node:
    return Node(
        metadata=ObjectMeta(name=name, labels={"topology.kubernetes.io/zone": zone}),
        status=NodeStatus(addresses=[NodeAddress("InternalIP", ip)]),
    )


def service(name: str = "web", labels: dict[str, str] | None = None, **spec: Any) -> Service:
    ingress = spec.pop("ingress", [LoadBalancerIngress(BALANCER)])
    return Service(
        metadata=ObjectMeta(name=name, namespace="shop", labels=labels or {}),
        spec=ServiceSpec(**{**SPEC, **spec}),
        status=ServiceStatus(LoadBalancerStatus(ingress)),
    )


def slice_(endpoints: list[Endpoint], name: str = "web-1", labels: dict | None = None) -> Any:
    return EndpointSlice(
        metadata=ObjectMeta(
            name=name,
            namespace="shop",
            labels={"kubernetes.io/service-name": "web", **(labels or {})},
        ),
        endpoints=endpoints,
        ports=[EndpointPort(8080, "http"), EndpointPort(8080, "dns", "UDP")],
    )


def pod(name: str, ip: str, ports: list[ContainerPort], on: str = "a", **spec: Any) -> Pod:
    return Pod(
        metadata=ObjectMeta(name=name, namespace="shop"),
        spec=PodSpec(containers=[Container("c", ports=ports)], node_name=on, **spec),
        status=PodStatus(phase="Running", pod_ips=[PodIP(ip)]),
    )


def cluster(
    web: Service | None = None,
    conditions: tuple[dict[str, bool], ...] = (READY, READY, READY),
    hints: tuple[EndpointHints, ...] = (EndpointHints(),) * 3,
    more: tuple[Any, ...] = (),
    slice_labels: dict[str, str] | None = None,
) -> Cluster:
    endpoints = [
        Endpoint(
            [f"10.0.{n + 1}.1"],
            EndpointConditions(**conditions[n]),
            node_name="abc"[n],
            hints=hints[n],
        )
        for n in range(len(conditions))
    ]
    found = Cluster(
        nodes={
            "a": node("a", NODE_A, "z1"),
            "b": node("b", NODE_B, "z1"),
            "c": node("c", "192.0.2.3", "z2"),
        },
        slices={("shop", "web-1"): slice_(endpoints, labels=slice_labels)},
    )
    for item in (web or service(), *more):
        key = item.metadata.namespace, item.metadata.name
        table = {Service: found.services, Pod: found.pods, EndpointSlice: found.slices}[type(item)]
        table[key] = item
    return found


def zones(*names: str) -> EndpointHints:
    return EndpointHints(for_zones=[ForZone(name) for name in names])


def nodes(*names: str) -> EndpointHints:
    return EndpointHints(for_nodes=[ForNode(name) for name in names])


def both(zone: str, on: str) -> EndpointHints:
    return EndpointHints(for_zones=[ForZone(zone)], for_nodes=[ForNode(on)])


def say(of: Cluster, who: str, where: str, client: str = "") -> Any:
    """What a case's answer is compared with: backends, those that end with "!", or verdict and
    cause. `where` is address:port, or address:port/UDP."""
    place, _, protocol = where.partition("/")
    address, _, port = place.rpartition(":")
    frontend = Frontend(address.strip("[]"), int(port), protocol or "TCP")
    found = choose(of, "a", Client(who, client or CLIENTS[who]), frontend, [CARD])
    if found.verdict == "serve":
        return {f"{one.address}:{one.port}" + "!" * one.ends for one in found.backends}
    return f"{found.verdict} {found.cause}".strip()


NO_LOCAL, NO_BACKEND = "drop no-local-backend", "refuse no-backend"
UNKNOWN = "refuse unknown-service-port"
WEB, DNS = f"{CLUSTER_IP}:80", f"{CLUSTER_IP}:53/UDP"
EXT, LB, NP = f"{EXTERNAL}:80", f"{BALANCER}:80", f"{NODE_A}:30080"
LOCAL_IN = service(internal_traffic_policy="Local")
LOCAL_OUT = service(external_traffic_policy="Local")
RANGED = service(load_balancer_source_ranges=["198.51.100.0/24", "2001:db8::/32"])
HTTP = [ContainerPort(8080, host_port=8000)]

CASES: dict[str, tuple[Cluster, str, str, Any]] = {
    # Who may ask where
    "a pod at a cluster IP": (cluster(), POD, WEB, ALL),
    "the node at a cluster IP": (cluster(), HOST, WEB, ALL),
    "outside at a cluster IP: it is none for them": (cluster(), OUT, WEB, "none"),
    "the port of another protocol is another port": (
        cluster(),
        POD,
        f"{CLUSTER_IP}:80/UDP",
        UNKNOWN,
    ),
    "each port its own": (cluster(), POD, DNS, ALL),
    "an unknown port of a cluster IP": (cluster(), POD, f"{CLUSTER_IP}:81", UNKNOWN),
    "an address that is nobody's": (cluster(), POD, "203.0.113.99:80", "none"),
    "externalIPs, a pod": (cluster(), POD, EXT, ALL),
    "externalIPs, outside": (cluster(), OUT, EXT, ALL),
    "an unknown port of an external IP": (cluster(), OUT, f"{EXTERNAL}:81", UNKNOWN),
    "a pod, at a port of it that the service did not ask for": (
        cluster(),
        POD,
        f"{EXTERNAL}:81",
        "none",
    ),
    "the node, at another port of a load balancer's": (cluster(), HOST, f"{BALANCER}:22", "none"),
    "an external IP that is a pod's is the pod's": (
        cluster(more=(pod("taken", EXTERNAL, [], on="b"),)),
        OUT,
        EXT,
        "none",
    ),
    "for pods too": (cluster(more=(pod("taken", EXTERNAL, [], on="b"),)), POD, EXT, "none"),
    "an external IP that a pod on its host's network has": (
        cluster(more=(pod("hosts", EXTERNAL, [], on="b", host_network=True),)),
        OUT,
        EXT,
        ALL,
    ),
    "a load balancer's address, a pod": (cluster(), POD, LB, ALL),
    "a load balancer's address, outside": (cluster(), OUT, LB, ALL),
    "a balancer that is a proxy delivers elsewhere": (
        cluster(service(ingress=[LoadBalancerIngress(BALANCER, "Proxy")])),
        OUT,
        LB,
        "none",
    ),
    "mode VIP is the default": (
        cluster(service(ingress=[LoadBalancerIngress(BALANCER, "VIP")])),
        OUT,
        LB,
        ALL,
    ),
    "status counts only with type LoadBalancer": (
        cluster(service(type="NodePort")),
        OUT,
        LB,
        "none",
    ),
    "NodePort at the Node's address, outside": (cluster(), OUT, NP, ALL),
    "NodePort at a card's address": (cluster(), OUT, f"{CARD}:30080", ALL),
    "NodePort, a pod": (cluster(), POD, NP, ALL),
    "NodePort of another node is asked there": (cluster(), POD, f"{NODE_B}:30080", "none"),
    "NodePort without the type": (cluster(service(type="ClusterIP")), OUT, NP, "none"),
    "NodePort of the other protocol": (cluster(), OUT, f"{NODE_A}:30053/UDP", ALL),
    "other ports of a node are the host's": (cluster(), OUT, f"{NODE_A}:22", "none"),
    "NodePort at loopback, the node": (cluster(), HOST, "127.0.0.1:30080", ALL),
    "NodePort at loopback, a pod: its own loopback": (cluster(), POD, "127.0.0.1:30080", "none"),
    "NodePort at loopback of the other family": (cluster(), HOST, "[::1]:30080", "none"),
    "a family without cluster IP has no NodePort": (
        cluster(service(cluster_ips=["fd00::1"])),
        OUT,
        NP,
        "none",
    ),
    "a family without cluster IP has no external IP": (
        cluster(service(external_ips=["2001:db8::1"])),
        OUT,
        "[2001:db8::1]:80",
        "none",
    ),
    "an external IP that is a node's: its other ports stay": (
        cluster(service(external_ips=[NODE_B])),
        POD,
        f"{NODE_B}:22",
        "none",
    ),
    "an external IP that is a node's": (
        cluster(service(external_ips=[NODE_B])),
        POD,
        f"{NODE_B}:80",
        ALL,
    ),
    "a loopback external IP is none": (
        cluster(service(external_ips=["127.0.0.1"])),
        HOST,
        "127.0.0.1:80",
        "none",
    ),
    # Whose it is
    "of two cluster IPs the first by name": (
        cluster(more=(service("aaa", external_ips=[]),)),
        POD,
        WEB,
        NO_BACKEND,
    ),
    "of two external ports the first by name": (
        cluster(more=(service("aaa", cluster_ips=["10.96.0.2"], ingress=[]),)),
        OUT,
        EXT,
        NO_BACKEND,
    ),
    "nobody takes a balancer's address by an external IP": (
        cluster(
            more=(service("aaa", cluster_ips=["10.96.0.2"], external_ips=[BALANCER], ingress=[]),)
        ),
        OUT,
        LB,
        ALL,
    ),
    "external IPs are shared by port": (
        cluster(
            more=(
                service("aaa", cluster_ips=["10.96.0.2"], ports=[ServicePort(port=81)], ingress=[]),
            )
        ),
        OUT,
        EXT,
        ALL,
    ),
    "nobody takes a cluster IP by an external IP": (
        cluster(more=(service("aaa", cluster_ips=["10.96.0.2"], external_ips=[CLUSTER_IP]),)),
        POD,
        WEB,
        ALL,
    ),
    "a service's label for another proxy": (
        cluster(service(labels={"service.kubernetes.io/service-proxy-name": "x"})),
        POD,
        WEB,
        "none",
    ),
    "a slice's label for nobody": (
        cluster(slice_labels={"service.kubernetes.io/headless": ""}),
        POD,
        WEB,
        NO_BACKEND,
    ),
    "headless services have no frontend, external IPs included": (
        cluster(service(cluster_ips=["None"], cluster_ip="None", type="ClusterIP")),
        OUT,
        EXT,
        "none",
    ),
    "ExternalName": (cluster(service(type="ExternalName")), POD, WEB, "none"),
    # Conditions
    "who is not ready gets nothing": (
        cluster(conditions=(READY, UNREADY, READY)),
        POD,
        WEB,
        {A, C},
    ),
    "outside: who is not ready keeps what it has": (
        cluster(conditions=(READY, UNREADY, ENDED)),
        OUT,
        EXT,
        {A, B + "!", C + "!"},
    ),
    "outside, UDP: only if it serves": (
        cluster(conditions=(READY, UNREADY, ENDING)),
        OUT,
        f"{EXTERNAL}:53/UDP",
        {A, C + "!"},
    ),
    "terminating: others before it": (cluster(conditions=(READY, ENDING, ENDED)), POD, WEB, {A}),
    "nobody is ready: who serves while it ends": (
        cluster(conditions=(UNREADY, ENDING, ENDED)),
        POD,
        WEB,
        {B},
    ),
    "outside: the same": (
        cluster(conditions=(UNREADY, ENDING, ENDED)),
        OUT,
        EXT,
        {A + "!", B, C + "!"},
    ),
    "nobody serves": (cluster(conditions=(UNREADY, ENDED)), POD, WEB, NO_BACKEND),
    "nobody serves, outside": (cluster(conditions=(UNREADY, ENDED)), OUT, EXT, NO_BACKEND),
    "no endpoints": (cluster(conditions=()), OUT, EXT, NO_BACKEND),
    "publishNotReadyAddresses": (
        cluster(service(publish_not_ready_addresses=True), (READY, UNREADY, ENDED)),
        POD,
        WEB,
        ALL,
    ),
    # Traffic policies
    "internal Local": (cluster(LOCAL_IN), POD, WEB, {A}),
    "internal Local, the node": (cluster(LOCAL_IN), HOST, WEB, {A}),
    "internal Local, nobody here": (cluster(LOCAL_IN, (UNREADY, READY)), POD, WEB, NO_LOCAL),
    "internal Local, nobody anywhere": (
        cluster(LOCAL_IN, (UNREADY, UNREADY)),
        POD,
        WEB,
        NO_BACKEND,
    ),
    "internal Local: who ends here before who is ready elsewhere": (
        cluster(LOCAL_IN, (ENDING, READY)),
        POD,
        WEB,
        {A},
    ),
    "internal Local is about cluster IPs": (cluster(LOCAL_IN), POD, EXT, ALL),
    "internal Local does not concern outside": (cluster(LOCAL_IN), OUT, EXT, ALL),
    "external Local": (cluster(LOCAL_OUT), OUT, LB, {A}),
    "external Local at a NodePort": (cluster(LOCAL_OUT), OUT, NP, {A}),
    "external Local, nobody here": (cluster(LOCAL_OUT, (UNREADY, READY)), OUT, LB, NO_LOCAL),
    "external Local, nobody anywhere": (cluster(LOCAL_OUT, (UNREADY,)), OUT, LB, NO_BACKEND),
    "external Local, who ends here": (
        cluster(LOCAL_OUT, (ENDING, READY)),
        OUT,
        LB,
        {A},
    ),
    "external Local: a pod is served as with Cluster": (cluster(LOCAL_OUT), POD, LB, ALL),
    "external Local: the node too": (cluster(LOCAL_OUT), HOST, NP, ALL),
    "external Local: at loopback too": (cluster(LOCAL_OUT), HOST, "127.0.0.1:30080", ALL),
    "external Local is not about cluster IPs": (cluster(LOCAL_OUT), POD, WEB, ALL),
    # Source ranges
    "in the ranges": (cluster(RANGED), OUT, LB, ALL),
    "not in the ranges": (cluster(RANGED), POD, LB, "drop source-range"),
    "ranges are not for the node": (cluster(RANGED), HOST, LB, ALL),
    "ranges are for balancers' addresses: external IP": (cluster(RANGED), POD, EXT, ALL),
    "ranges are for balancers' addresses: NodePort": (cluster(RANGED), POD, NP, ALL),
    "ranges of the other family only": (
        cluster(service(load_balancer_source_ranges=["2001:db8::/32"])),
        OUT,
        LB,
        "drop source-range",
    ),
    "anybody, as the other family says it": (
        cluster(service(load_balancer_source_ranges=["::/0"])),
        OUT,
        LB,
        ALL,
    ),
    "anybody of the other family, ranges of this one": (
        cluster(service(load_balancer_source_ranges=["::/0", "192.0.2.0/24"])),
        OUT,
        LB,
        "drop source-range",
    ),
    # Topology
    "zone": (cluster(hints=(zones("z1"), zones("z1"), zones("z2"))), POD, WEB, {A, B}),
    "zone, at an external IP": (
        cluster(hints=(zones("z1"), zones("z1"), zones("z2"))),
        POD,
        EXT,
        {A, B},
    ),
    "zone does not count outside": (
        cluster(hints=(zones("z1"), zones("z1"), zones("z2"))),
        OUT,
        EXT,
        ALL,
    ),
    "one has no hint": (cluster(hints=(zones("z1"), EndpointHints(), zones("z2"))), POD, WEB, ALL),
    "none is hinted for here": (cluster(hints=(zones("z2"),) * 3), POD, WEB, ALL),
    "hints of who is not ready do not count": (
        cluster(
            conditions=(READY, UNREADY, READY), hints=(zones("z1"), EndpointHints(), zones("z2"))
        ),
        POD,
        WEB,
        {A},
    ),
    "hinted for here, but not ready": (
        cluster(conditions=(UNREADY, READY, READY), hints=(zones("z1"), zones("z2"), zones("z2"))),
        POD,
        WEB,
        {B, C},
    ),
    "who ends has no topology": (
        cluster(
            conditions=(ENDING, ENDING, UNREADY), hints=(zones("z1"), zones("z2"), zones("z2"))
        ),
        POD,
        WEB,
        {A, B},
    ),
    "node before zone": (
        cluster(hints=(both("z1", "a"), both("z1", "b"), both("z2", "c"))),
        POD,
        WEB,
        {A},
    ),
    "none for this node: its zone": (
        cluster(hints=(both("z1", "x"), both("z1", "b"), both("z2", "c"))),
        POD,
        WEB,
        {A, B},
    ),
    "node hints without zone hints, none for here": (
        cluster(hints=(nodes("b"), nodes("b"), nodes("c"))),
        POD,
        WEB,
        ALL,
    ),
    "internal Local knows no topology": (
        cluster(LOCAL_IN, hints=(zones("z2"), zones("z1"), zones("z1"))),
        POD,
        WEB,
        {A},
    ),
    # hostPort
    "hostPort, outside": (
        cluster(more=(pod("p", "10.0.1.5", HTTP),)),
        OUT,
        f"{NODE_A}:8000",
        {"10.0.1.5:8080"},
    ),
    "hostPort at loopback": (
        cluster(more=(pod("p", "10.0.1.5", HTTP),)),
        HOST,
        "127.0.0.1:8000",
        {"10.0.1.5:8080"},
    ),
    "hostPort of a pod elsewhere": (
        cluster(more=(pod("p", "10.0.1.5", HTTP, "b"),)),
        OUT,
        f"{NODE_A}:8000",
        "none",
    ),
    "hostPort of a hostNetwork pod is the host's own": (
        cluster(more=(pod("p", NODE_A, HTTP, host_network=True),)),
        OUT,
        f"{NODE_A}:8000",
        "none",
    ),
    "hostPort in the other family": (
        cluster(more=(pod("p", "fd00::5", HTTP),)),
        OUT,
        f"{NODE_A}:8000",
        "none",
    ),
    "hostIP: there": (
        cluster(more=(pod("p", "10.0.1.5", [ContainerPort(8080, host_port=80, host_ip=CARD)]),)),
        OUT,
        f"{CARD}:80",
        {"10.0.1.5:8080"},
    ),
    "hostIP: only there": (
        cluster(more=(pod("p", "10.0.1.5", [ContainerPort(8080, host_port=80, host_ip=CARD)]),)),
        OUT,
        f"{NODE_A}:80",
        "none",
    ),
    "hostIP 127.0.0.1, the node": (
        cluster(
            more=(pod("p", "10.0.1.5", [ContainerPort(80, host_port=80, host_ip="127.0.0.1")]),)
        ),
        HOST,
        "127.0.0.1:80",
        {"10.0.1.5:80"},
    ),
    "hostIP 127.0.0.1, outside": (
        cluster(
            more=(pod("p", "10.0.1.5", [ContainerPort(80, host_port=80, host_ip="127.0.0.1")]),)
        ),
        OUT,
        f"{NODE_A}:80",
        "none",
    ),
    "hostIP 0.0.0.0": (
        cluster(more=(pod("p", "10.0.1.5", [ContainerPort(80, host_port=80, host_ip="0.0.0.0")]),)),
        OUT,
        f"{CARD}:80",
        {"10.0.1.5:80"},
    ),
    "hostIP of somebody else": (
        cluster(more=(pod("p", "10.0.1.5", [ContainerPort(80, host_port=80, host_ip="8.8.8.8")]),)),
        POD,
        "8.8.8.8:80",
        "none",
    ),
    "a NodePort before a hostPort": (
        cluster(more=(pod("p", "10.0.1.5", [ContainerPort(80, host_port=30080)]),)),
        OUT,
        NP,
        ALL,
    ),
    "of two hostPorts the first's that has the family": (
        cluster(more=(pod("q", "10.0.1.6", HTTP), pod("p", "fd00::5", HTTP))),
        OUT,
        f"{NODE_A}:8000",
        {"10.0.1.6:8080"},
    ),
    "of two hostPorts the first pod's by name": (
        cluster(more=(pod("q", "10.0.1.6", HTTP), pod("p", "10.0.1.5", HTTP))),
        OUT,
        f"{NODE_A}:8000",
        {"10.0.1.5:8080"},
    ),
    # Slices
    "many slices are one service": (
        cluster(more=(slice_([Endpoint(["10.0.9.1"])], "web-2"),)),
        POD,
        WEB,
        ALL | {"10.0.9.1:8080"},
    ),
    "named target ports may differ by slice": (
        cluster(
            more=(
                EndpointSlice(
                    metadata=slice_([], "web-2").metadata,
                    endpoints=[Endpoint(["10.0.9.1"])],
                    ports=[EndpointPort(9090, "http")],
                ),
            )
        ),
        POD,
        WEB,
        ALL | {"10.0.9.1:9090"},
    ),
    "in two slices at once, ready in one": (
        cluster(
            conditions=(UNREADY, READY, READY), more=(slice_([Endpoint(["10.0.1.1"])], "web-2"),)
        ),
        OUT,
        EXT,
        ALL,
    ),
}


@pytest.mark.parametrize(("of", "who", "where", "wanted"), CASES.values(), ids=CASES)
def test_services_mean(of: Cluster, who: str, where: str, wanted: Any) -> None:
    assert say(of, who, where) == wanted


def test_whose_the_backends_are_is_told() -> None:
    at = Frontend(CLUSTER_IP, 80, "TCP")
    found = choose(cluster(), "a", Client("pod", CLIENTS[POD]), at)
    assert found.holder == ("Service", "shop", "web")


@pytest.mark.parametrize(
    ("of", "who", "where", "kept"),
    [
        pytest.param(cluster(conditions=(UNREADY, ENDED)), OUT, EXT, {A, B}, id="outside"),
        pytest.param(
            cluster(LOCAL_OUT, (UNREADY, READY)), OUT, LB, {A}, id="outside, of this node only"
        ),
        pytest.param(
            cluster(conditions=({"ready": False, "serving": True}, ENDED)),
            OUT,
            f"{EXTERNAL}:53/UDP",
            {A},
            id="UDP, if it serves",
        ),
        pytest.param(cluster(conditions=(UNREADY, ENDED)), POD, WEB, set(), id="not inside"),
    ],
)
def test_where_none_takes_new_connections_those_that_end_are_told(
    of: Cluster, who: str, where: str, kept: set[str]
) -> None:
    place, _, protocol = where.partition("/")
    address, _, port = place.rpartition(":")
    asked = Frontend(address, int(port), protocol or "TCP")
    found = choose(of, "a", Client(who, CLIENTS[who]), asked)
    assert found.verdict != "serve" and all(one.ends for one in found.backends)
    assert {f"{one.address}:{one.port}" for one in found.backends} == kept

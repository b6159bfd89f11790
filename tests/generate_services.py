"""Random services with everything that they can say, and clients that ask, for comparing
implementations with the specification. Few names, addresses and ports, so that they collide."""

from __future__ import annotations

from random import Random
from typing import Any, Literal

import msgspec

from lockgate.objects.address import parse_address
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
    NodeSpec,
    NodeStatus,
    ObjectMeta,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Protocol,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
    SessionAffinityConfig,
)
from lockgate.spec.services import Client, Frontend

__all__ = ["CARDS", "NODES", "change", "client", "cluster", "frontend", "service", "slices"]

replace = msgspec.structs.replace
NODES = ("a", "b", "c")
ZONES = {"a": "z1", "b": "z1", "c": "z2"}
NAMES = ("api", "web", "zoo")
NAMESPACES = ("red", "shop")
PORTS = (53, 80, 8080)
NODE_PORTS = (30000, 30001, 80)
HOST_PORTS = (80, 8000, 30000)
PROTOCOLS: tuple[Protocol, ...] = ("TCP", "TCP", "UDP", "SCTP")
CLUSTER_IPS = (["10.96.0.1"], ["10.96.0.2", "fd00:96::2"], ["fd00:96::3"], ["10.96.0.3"], ["None"])
OUTSIDE_IPS = (
    *("203.0.113.1", "203.0.113.2", "2001:db8::1", "10.96.0.2"),
    *("192.0.2.2", "192.0.2.1", "203.0.113.201", "10.0.1.1", "10.0.2.1"),  # of nodes, and of pods
)
#: What the node's cards have besides its InternalIPs.
CARDS = ("192.0.2.201", "2001:db8:1::201", "fe80::1")
RANGES = ("198.51.100.0/24", "198.51.100.7/32", "10.0.0.0/8", "2001:db8:ffff::/48", "0.0.0.0/0")
CLIENTS = ("198.51.100.7", "198.51.100.200", "203.0.113.77", "2001:db8:ffff::7", "fd00:1::9")


def _node(name: str) -> Node:
    number = NODES.index(name) + 1
    return Node(
        metadata=ObjectMeta(name=name, labels={"topology.kubernetes.io/zone": ZONES[name]}),
        spec=NodeSpec(pod_cidrs=[f"10.0.{number}.0/24", f"fd00:{number}::/64"]),
        status=NodeStatus(
            addresses=[
                NodeAddress("InternalIP", f"192.0.2.{number}"),
                NodeAddress("InternalIP", f"fd00:ff::{number}"),
                NodeAddress("Hostname", name),
                *([NodeAddress("ExternalIP", "203.0.113.201")] if name == "a" else []),
            ]
        ),
    )


def pod(rng: Random, number: int, node: str) -> Pod:
    place = NODES.index(node) + 1
    ips = [f"10.0.{place}.{number + 1}", f"fd00:{place}::{number + 1:x}"]
    host = rng.random() < 0.1
    if host:
        ips = [f"192.0.2.{place}", f"fd00:ff::{place}"]
    ports = [
        ContainerPort(
            rng.choice(PORTS),
            protocol=rng.choice(PROTOCOLS),
            host_port=rng.choice(HOST_PORTS) if rng.random() < 0.4 else 0,
            host_ip=rng.choice(("", "", "", "0.0.0.0", "127.0.0.1", CARDS[0], "8.8.8.8")),
        )
        for _ in range(rng.randint(0, 2))
    ]
    weight = rng.choice((None, None, "1", "50", "nonsense"))
    return Pod(
        metadata=ObjectMeta(
            namespace=rng.choice(NAMESPACES),
            name=f"pod-{number}",
            uid=f"uid-{number}-{rng.randrange(3)}",
            annotations={} if weight is None else {"lockgate.dev/weight": weight},
        ),
        spec=PodSpec(
            containers=[Container("main", ports=ports)], node_name=node, host_network=host
        ),
        status=PodStatus(
            phase=rng.choice(["Running"] * 6 + ["Failed"]),
            pod_ips=[PodIP(ip) for ip in ips[: rng.choice((1, 2, 2))]],
        ),
    )


def service(rng: Random, name: str, namespace: str) -> Service:
    kind = rng.choice(("ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer", "ExternalName"))
    ports = [
        ServicePort(
            port=rng.choice(PORTS),
            name=f"p{index}",
            protocol=rng.choice(PROTOCOLS),
            node_port=rng.choice((0, *NODE_PORTS)),
        )
        for index in range(rng.randint(1, 2))
    ]
    some = [ip for ip in OUTSIDE_IPS if rng.random() < 0.3]
    ingress = [
        LoadBalancerIngress(ip, rng.choice(("", "VIP", "Proxy")))
        for ip in OUTSIDE_IPS
        if rng.random() < 0.3
    ]
    other = {"service.kubernetes.io/service-proxy-name": "x"} if rng.random() < 0.05 else {}
    annotations = {
        "lockgate.dev/forwarding": rng.choice((None, None, "dsr", "snat", "nonsense")),
        "lockgate.dev/slots": rng.choice((None, None, None, "1024", "65536", "1000")),
    }
    return Service(
        metadata=ObjectMeta(
            name=name,
            namespace=namespace,
            labels=other,
            annotations={key: text for key, text in annotations.items() if text is not None},
        ),
        spec=ServiceSpec(
            type=kind,
            cluster_ips=rng.choice(CLUSTER_IPS),
            ports=ports,
            external_ips=some + (["127.0.0.1"] if rng.random() < 0.1 else []),
            publish_not_ready_addresses=rng.random() < 0.1,
            internal_traffic_policy=rng.choice(("", "Cluster", "Local")),
            external_traffic_policy=rng.choice(("", "Cluster", "Local")),
            load_balancer_source_ranges=[r for r in RANGES if rng.random() < 0.2],
            session_affinity=rng.choice(("", "None", "ClientIP")),
            session_affinity_config=SessionAffinityConfig(),
        ),
        status=ServiceStatus(LoadBalancerStatus(ingress)),
    )


def _hints(rng: Random, kind: str, node: str) -> EndpointHints:
    if kind == "none" or rng.random() < 0.05:
        return EndpointHints()
    zones = [ForZone(rng.choice((ZONES[node], ZONES[node], "z1", "z2")))]
    nodes = [ForNode(node)] if kind == "node" else []
    return EndpointHints(for_zones=zones, for_nodes=nodes)


def _conditions(rng: Random, mood: str) -> EndpointConditions:
    if mood == "ready" or (mood == "mixed" and rng.random() < 0.4):
        return EndpointConditions(ready=rng.choice((True, None)))
    if mood == "down":
        return EndpointConditions(False, False, rng.choice((True, False, None)))
    return EndpointConditions(
        *rng.choice(((False, True, True), (False, False, True), (False,) * 3))
    )


def slices(rng: Random, of: Service, pods: list[Pod]) -> list[EndpointSlice]:
    """One or two in each family; some say the same of an endpoint, some not."""
    found = []
    mood = rng.choice(("ready", "mixed", "mixed", "ending", "down"))
    kind = rng.choice(("none", "none", "zone", "node"))
    families: tuple[Literal["IPv4", "IPv6"], ...] = ("IPv4", "IPv6")
    for family in families:
        ips = [
            (ip, one.spec.node_name)
            for one in pods
            for ip in one.ips
            if (":" in ip) == (family == "IPv6")
        ]
        ips.append(("198.51.100.99" if family == "IPv4" else "2001:db8:99::1", ""))
        for number in range(rng.choice((0, 1, 1, 2))):
            labels = {"kubernetes.io/service-name": of.metadata.name}
            if rng.random() < 0.05:
                labels["service.kubernetes.io/headless"] = ""
            found.append(
                EndpointSlice(
                    metadata=ObjectMeta(
                        namespace=of.metadata.namespace,
                        name=f"{of.metadata.name}-{family.lower()}-{number}",
                        labels=labels,
                    ),
                    address_type=family,
                    endpoints=[
                        Endpoint(
                            [ip],
                            _conditions(rng, mood),
                            node_name=node,
                            hints=_hints(rng, kind, node or "a"),
                        )
                        for ip, node in ips
                        if rng.random() < 0.5
                    ],
                    ports=[
                        EndpointPort(rng.choice((*PORTS, None)), port.name, port.protocol)
                        for port in of.spec.ports
                        if rng.random() < 0.9
                    ],
                )
            )
    return found


def _put(into: Cluster, item: Any) -> None:
    tables: dict[type, dict[Any, Any]] = {
        Service: into.services,
        EndpointSlice: into.slices,
        Pod: into.pods,
    }
    tables[type(item)][item.metadata.namespace, item.metadata.name] = item


def cluster(rng: Random) -> Cluster:
    """Three nodes in two zones, dual stack."""
    found = Cluster(nodes={name: _node(name) for name in NODES})
    for number in range(rng.randint(3, 9)):
        _put(found, pod(rng, number, rng.choice(NODES)))
    for name in NAMES[: rng.randint(1, 3)]:
        one = service(rng, name, rng.choice(NAMESPACES))
        _put(found, one)
        for item in slices(rng, one, list(found.pods.values())):
            _put(found, item)
    return found


def change(rng: Random, of: Cluster) -> tuple[str, Any]:
    """One object comes, goes or is another: its table and key."""
    match rng.randrange(5):
        case 0:
            one = service(rng, rng.choice(NAMES), rng.choice(NAMESPACES))
            _put(of, one)
            return "services", (one.metadata.namespace, one.metadata.name)
        case 1 if of.services:
            key = rng.choice(sorted(of.services))
            del of.services[key]
            return "services", key
        case 2 if of.services:
            home = of.services[rng.choice(sorted(of.services))]
            for item in slices(rng, home, list(of.pods.values()))[:1]:
                _put(of, item)
                return "slices", (item.metadata.namespace, item.metadata.name)
        case 3:
            name = rng.choice(NODES)
            node = of.nodes.pop(name, None)
            if node is None or rng.random() < 0.7:
                of.nodes[name] = replace(
                    _node(name),
                    metadata=ObjectMeta(
                        name=name, labels={"topology.kubernetes.io/zone": rng.choice(("z1", "z2"))}
                    ),
                )
            return "nodes", name
        case _:
            pass
    one_pod = pod(rng, rng.randrange(9), rng.choice(NODES))
    key = one_pod.key
    if key in of.pods and rng.random() < 0.4:
        del of.pods[key]
    else:
        _put(of, one_pod)
    return "pods", key


def frontend(rng: Random, of: Cluster) -> Frontend:
    addresses = [ip for ips in CLUSTER_IPS for ip in ips if ip != "None"]
    addresses += [*OUTSIDE_IPS, *CARDS[:2], "127.0.0.1", "::1", "203.0.113.201", "192.0.2.3"]
    ports = [*PORTS, *NODE_PORTS, *HOST_PORTS, 7]
    return Frontend(rng.choice(addresses), rng.choice(ports), rng.choice(PROTOCOLS))


def client(rng: Random, address: str) -> Client:
    place: Any = rng.choice(("pod", "node", "outside", "outside"))
    six = ":" in address
    own = {"pod": ("10.0.1.9", "fd00:1::9"), "node": ("192.0.2.1", "fd00:ff::1")}
    if place in own:
        return Client(place, own[place][six])
    return Client(place, rng.choice([ip for ip in CLIENTS if (":" in ip) == six]))


def cards() -> frozenset[bytes]:
    return frozenset(map(parse_address, CARDS))

"""Random small clusters and packets, for comparing implementations with the specification.

Plain functions on a `random.Random`: the same seed gives the same cluster.
Few names, labels, ports and addresses, so that rules overlap often.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal, NamedTuple, TypeVar

from lockgate.objects.model import (
    Cluster,
    Container,
    ContainerPort,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    IPBlock,
    LabelSelector,
    LabelSelectorRequirement,
    Namespace,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
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
)

__all__ = ["Packet", "cluster", "packet"]

NODES = ("a", "b")
NAMESPACES = ("red", "green", "blue")
LABELS = {"app": ("web", "db", "cache"), "tier": ("front", "back"), "env": ("prod", "test")}
PORTS = (53, 80, 81, 82, 8080, 9000)
PORT_NAMES = ("http", "dns", "admin")
PROTOCOLS: tuple[Protocol, ...] = ("TCP", "UDP", "SCTP")
OPERATORS: tuple[Literal["In", "NotIn", "Exists", "DoesNotExist"], ...] = (
    "In",
    "NotIn",
    "Exists",
    "DoesNotExist",
)
POLICY_TYPES: tuple[list[Literal["Ingress", "Egress"]], ...] = (
    [],
    ["Ingress"],
    ["Egress"],
    ["Ingress", "Egress"],
    ["Ingress", "Egress"],
)
OUTSIDE = ("198.51.100.7", "198.51.100.130", "203.0.113.9", "2001:db8:ffff::7", "2001:db8:fffe::1")
CIDRS = (
    "0.0.0.0/0",
    "::/0",
    "10.0.0.0/8",
    "10.0.1.0/24",
    "10.0.1.77/25",  # host bits are masked
    "10.0.2.2/32",
    "198.51.100.0/24",
    "198.51.100.128/25",
    "192.0.2.0/29",
    "128.0.0.0/1",
    "fd00::/8",
    "fd00:0:0:1::/64",
    "fd00:0:0:2::3/128",
    "2001:db8::/32",
    "2001:db8:ffff::/47",
)

T = TypeVar("T")


class Packet(NamedTuple):
    """The fields of lockgate.spec.Packet, in its order; protocols without ports have none."""

    source: str
    destination: str
    protocol: str
    port: int | None
    from_own_node: bool = False


def _some(rng: Random, values: Sequence[T], least: int, most: int) -> list[T]:
    return rng.sample(list(values), min(len(values), rng.randint(least, most)))


def _labels(rng: Random) -> dict[str, str]:
    return {key: rng.choice(values) for key, values in LABELS.items() if rng.random() < 0.6}


def _selector(rng: Random) -> LabelSelector:
    match rng.randrange(4):
        case 0:
            return LabelSelector()
        case 1:
            key = rng.choice(list(LABELS))
            return LabelSelector(match_labels={key: rng.choice(LABELS[key])})
        case _:
            requirements = []
            for key in _some(rng, list(LABELS), 1, 2):
                operator = rng.choice(OPERATORS)
                values = _some(rng, LABELS[key], 1, 2) if "In" in operator else []
                requirements.append(
                    LabelSelectorRequirement(key=key, operator=operator, values=values)
                )
            return LabelSelector(match_expressions=requirements)


def _namespace_selector(rng: Random) -> LabelSelector:
    if rng.random() < 0.4:
        return LabelSelector(match_labels={"kubernetes.io/metadata.name": rng.choice(NAMESPACES)})
    return _selector(rng)


def _peer(rng: Random) -> NetworkPolicyPeer:
    match rng.randrange(5):
        case 0:
            return NetworkPolicyPeer(pod_selector=_selector(rng))
        case 1:
            return NetworkPolicyPeer(namespace_selector=_namespace_selector(rng))
        case 2:
            return NetworkPolicyPeer(
                pod_selector=_selector(rng), namespace_selector=_namespace_selector(rng)
            )
        case _:
            cidr = rng.choice(CIDRS)
            family = [c for c in CIDRS if (":" in c) == (":" in cidr)]
            except_ = _some(rng, family, 0, 2) if rng.random() < 0.5 else []
            return NetworkPolicyPeer(ip_block=IPBlock(cidr=cidr, except_=except_))


def _port(rng: Random) -> NetworkPolicyPort:
    protocol = rng.choice(PROTOCOLS)
    match rng.randrange(6):
        case 0:
            return NetworkPolicyPort(protocol=protocol)
        case 1 | 2:
            return NetworkPolicyPort(protocol=protocol, port=rng.choice(PORT_NAMES))
        case 3:
            first, last = sorted(rng.choices(PORTS, k=2))
            return NetworkPolicyPort(protocol=protocol, port=first, end_port=last)
        case _:
            return NetworkPolicyPort(protocol=protocol, port=rng.choice(PORTS))


def _policy(rng: Random, number: int) -> NetworkPolicy:
    def peers() -> list[NetworkPolicyPeer]:
        return [_peer(rng) for _ in range(rng.choice((0, 1, 1, 2)))]

    def ports() -> list[NetworkPolicyPort]:
        return [_port(rng) for _ in range(rng.choice((0, 0, 1, 2, 3)))]

    ingress = [
        NetworkPolicyIngressRule(from_=peers(), ports=ports()) for _ in range(rng.randint(0, 3))
    ]
    egress = [NetworkPolicyEgressRule(to=peers(), ports=ports()) for _ in range(rng.randint(0, 3))]
    types = rng.choice(POLICY_TYPES)
    return NetworkPolicy(
        metadata=ObjectMeta(namespace=rng.choice(NAMESPACES), name=f"policy-{number}"),
        spec=NetworkPolicySpec(
            pod_selector=_selector(rng), policy_types=list(types), ingress=ingress, egress=egress
        ),
    )


def _pod(rng: Random, number: int) -> Pod:
    node = rng.randrange(len(NODES))
    host_network = rng.random() < 0.1
    if host_network:
        ips = [f"192.0.2.{node + 1}", f"fd00:0:0:ff::{node + 1}"]
    else:
        ips = [f"10.0.{node + 1}.{number + 2}", f"fd00:0:0:{node + 1}::{number + 2:x}"]
        ips = rng.choice([ips, ips, ips, ips[:1], ips[1:]])
    ports = [
        ContainerPort(container_port=rng.choice(PORTS), name=name, protocol=rng.choice(PROTOCOLS))
        for name in _some(rng, PORT_NAMES, 0, 3)
    ]
    return Pod(
        metadata=ObjectMeta(
            namespace=rng.choice(NAMESPACES),
            name=f"pod-{number}",
            uid=f"uid-{number:03}",
            labels=_labels(rng),
            deletion_timestamp="2026-01-01T00:00:00Z" if rng.random() < 0.1 else None,
        ),
        spec=PodSpec(
            containers=[Container(name="main", ports=ports)],
            node_name=NODES[node],
            host_network=host_network,
        ),
        status=PodStatus(
            phase=rng.choice(["Running"] * 9 + ["Succeeded", "Failed"]),
            pod_ip=ips[0],
            pod_ips=[PodIP(ip=ip) for ip in ips],
        ),
    )


def _service(rng: Random, number: int, pods: Sequence[Pod]) -> tuple[Service, list[EndpointSlice]]:
    namespace, name = rng.choice(NAMESPACES), f"service-{number}"
    protocol = rng.choice(PROTOCOLS)
    meta = ObjectMeta(namespace=namespace, name=name)
    ports = [ServicePort(name="main", port=rng.choice(PORTS), protocol=protocol)]
    ips = [f"10.96.0.{number + 10}", f"fd00:0:0:96::{number + 10:x}"]
    service = Service(
        metadata=meta,
        spec=ServiceSpec(
            cluster_ip=ips[0],
            cluster_ips=ips,
            ports=ports,
            publish_not_ready_addresses=rng.random() < 0.2,
        ),
    )
    own = [p for p in pods if p.metadata.namespace == namespace and not p.finished]
    slices = []
    families: tuple[Literal["IPv4", "IPv6"], ...] = ("IPv4", "IPv6")
    for family in families:
        endpoints = [
            Endpoint(
                addresses=[ip],
                conditions=EndpointConditions(ready=rng.choice([True, True, None, False])),
                node_name=pod.spec.node_name,
            )
            for pod in own
            for ip in pod.ips
            if (":" in ip) == (family == "IPv6")
        ]
        slices.append(
            EndpointSlice(
                metadata=ObjectMeta(
                    namespace=namespace,
                    name=f"{name}-{family.lower()}",
                    labels={"kubernetes.io/service-name": name},
                ),
                address_type=family,
                endpoints=endpoints,
                ports=[EndpointPort(port=rng.choice(PORTS), name="main", protocol=protocol)],
            )
        )
    return service, slices


def cluster(rng: Random, pods: int = 12, policies: int = 8, services: int = 2) -> Cluster:
    """Two nodes, three namespaces, dual stack; every feature of NetworkPolicy may occur."""
    found = Cluster()
    for number, name in enumerate(NODES, 1):
        found.nodes[name] = Node(
            metadata=ObjectMeta(name=name),
            spec=NodeSpec(pod_cidrs=[f"10.0.{number}.0/24", f"fd00:0:0:{number}::/64"]),
            status=NodeStatus(
                addresses=[
                    NodeAddress(type="InternalIP", address=f"192.0.2.{number}"),
                    NodeAddress(type="InternalIP", address=f"fd00:0:0:ff::{number}"),
                ]
            ),
        )
    for name in NAMESPACES:
        labels = {**_labels(rng), "kubernetes.io/metadata.name": name}
        found.namespaces[name] = Namespace(metadata=ObjectMeta(name=name, labels=labels))
    for number in range(pods):
        pod = _pod(rng, number)
        found.pods[pod.key] = pod
    for number in range(rng.randint(policies // 2, policies + policies // 2)):
        policy = _policy(rng, number)
        found.policies[policy.key] = policy
    for number in range(services):
        service, slices = _service(rng, number, list(found.pods.values()))
        found.services[service.metadata.namespace, service.metadata.name] = service
        for slice_ in slices:
            found.slices[slice_.metadata.namespace, slice_.metadata.name] = slice_
    if found.policies and rng.random() < 0.3:
        key, policy = rng.choice(list(found.policies.items()))
        found.policies[key] = _unreadable(policy)
    return found


def _unreadable(policy: NetworkPolicy) -> NetworkPolicy:
    """As it comes from the API server when its rules can't be read."""
    types = policy.spec.policy_types or (["Ingress"] + ["Egress"] * bool(policy.spec.egress))
    spec = NetworkPolicySpec(pod_selector=policy.spec.pod_selector, policy_types=types)
    return NetworkPolicy(metadata=policy.metadata, spec=spec, unreadable=True)


def packet(rng: Random, within: Cluster) -> Packet:
    """The first packet of a connection between two addresses of one family, one a pod's."""
    pods = [ip for pod in within.pods.values() if not pod.spec.host_network for ip in pod.ips]
    nodes = [a.address for node in within.nodes.values() for a in node.status.addresses]
    one = rng.choice(pods)
    others = [ip for ip in (*pods, *pods, *nodes, *OUTSIDE) if (":" in ip) == (":" in one)]
    other = rng.choice(others)
    source, destination = (one, other) if rng.random() < 0.5 else (other, one)
    protocol = rng.choice((*PROTOCOLS, *PROTOCOLS, "ICMP"))
    if protocol == "ICMP":
        return Packet(source, destination, "ICMPv6" if ":" in source else "ICMP", None)
    port = rng.choice((*PORTS, *PORTS, 0, 79, 83, 4096, 65535))
    return Packet(source, destination, protocol, port)

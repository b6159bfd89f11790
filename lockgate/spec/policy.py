"""What NetworkPolicy (networking.k8s.io/v1) means: the specification of Lockgate's verdicts.

`judge` says whether the first packet of a connection may pass and which rules say so. Written for
the reader, from the text of the API; nothing here is fast. It judges

- after service translation: the destination is a backend and its port. A ClusterIP is an address
  like any other, which ipBlocks may name and selectors never match;
- the cluster as it is now: a changed label, policy or pod changes the next answer;
- first packets only. Replies of an allowed connection, related ICMP errors and later fragments
  share the answer of that packet and are never asked about; nor are ARP and NDP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockgate.objects.address import contains, parse_address
from lockgate.objects.model import (
    Cluster,
    LabelSelector,
    LabelSelectorRequirement,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    Pod,
)
from lockgate.spec.answer import Answer, Direction, Judgement, Packet, Rule

__all__ = ["Answer", "Judgement", "Packet", "Rule", "judge", "pod_at", "selects"]


@dataclass(frozen=True)
class Peer:
    """The end of a connection that rules speak of: an address, and the pod that has it."""

    address: str
    pod: Pod | None


def judge(cluster: Cluster, packet: Packet) -> Answer:
    """The verdict on a connection: the source's egress AND the destination's ingress.

    Exempt are a pod to itself and a node to its own pods; a pod to its own node is not.
    """
    source, destination = pod_at(cluster, packet.source), pod_at(cluster, packet.destination)
    if source is not None and destination is not None and source.key == destination.key:
        return Answer("allow")
    if packet.from_own_node:
        return Answer("allow")
    egress = ingress = None
    if source is not None:
        peer = Peer(packet.destination, destination)
        egress = _judge_pod(cluster, source, "egress", peer, destination, packet)
    if destination is not None:
        peer = Peer(packet.source, source)
        ingress = _judge_pod(cluster, destination, "ingress", peer, destination, packet)
    if egress is not None and not egress.allowed:
        return Answer("deny", "egress", egress, ingress)
    if ingress is not None and not ingress.allowed:
        return Answer("deny", "ingress", egress, ingress)
    direction: Direction | None = None
    if ingress is not None and ingress.isolated:
        direction = "ingress"
    elif egress is not None and egress.isolated:
        direction = "egress"
    return Answer("allow", direction, egress, ingress)


def pod_at(cluster: Cluster, address: str) -> Pod | None:
    """The pod that has the address. Finished pods have none; hostNetwork pods only the node's.

    When an address was given out again before the old pod is gone, the pod that is not being
    deleted has it, then the first by namespace and name.
    """
    wanted = parse_address(address)
    holders = [
        pod
        for pod in cluster.pods.values()
        if not pod.finished
        and not pod.spec.host_network
        and any(parse_address(ip) == wanted for ip in pod.ips)
    ]
    order = sorted(holders, key=lambda p: (p.metadata.deletion_timestamp is not None, p.key))
    return order[0] if order else None


def _judge_pod(
    cluster: Cluster,
    subject: Pod,
    direction: Direction,
    peer: Peer,
    destination: Pod | None,
    packet: Packet,
) -> Judgement:
    """What the policies that select `subject` say about the packet; `peer` is its other end."""
    policies: list[tuple[str, str]] = []
    unreadable: list[tuple[str, str]] = []
    rules: list[Rule] = []
    for key, policy in sorted(cluster.policies.items()):
        if not _isolates(policy, subject, direction):
            continue
        policies.append(key)
        if policy.unreadable:  # it isolates; what it allows nobody knows
            unreadable.append(key)
            continue
        for index, (peers, ports) in enumerate(_rules(policy, direction)):
            # No peers: any peer. No ports: any port of any protocol.
            if peers and not any(_is_peer(cluster, policy, item, peer) for item in peers):
                continue
            if ports and not any(_is_port(item, destination, packet) for item in ports):
                continue
            rules.append((*key, direction, index))
    allowed = bool(rules) or not policies
    return Judgement(bool(policies), allowed, tuple(rules), tuple(policies), tuple(unreadable))


def _isolates(policy: NetworkPolicy, pod: Pod, direction: Direction) -> bool:
    """A policy isolates the pods of its own namespace that it selects, in its policyTypes."""
    types: Sequence[str] = policy.spec.policy_types
    if not types:
        types = ("Ingress", "Egress") if policy.spec.egress else ("Ingress",)
    return (
        direction.capitalize() in types
        and policy.metadata.namespace == pod.metadata.namespace
        and selects(policy.spec.pod_selector, pod.metadata.labels)
    )


def _rules(
    policy: NetworkPolicy, direction: Direction
) -> list[tuple[list[NetworkPolicyPeer], list[NetworkPolicyPort]]]:
    if direction == "ingress":
        return [(rule.from_, rule.ports) for rule in policy.spec.ingress]
    return [(rule.to, rule.ports) for rule in policy.spec.egress]


def _is_peer(cluster: Cluster, policy: NetworkPolicy, item: NetworkPolicyPeer, peer: Peer) -> bool:
    if item.ip_block is not None:  # any address, pods' too; `except` only narrows this item
        block = item.ip_block
        excepted = any(contains(cidr, peer.address) for cidr in block.except_)
        return contains(block.cidr, peer.address) and not excepted
    pod = peer.pod
    if pod is None or (item.pod_selector is None and item.namespace_selector is None):
        return False  # selectors match pods only: no nodes, hostNetwork pods or outside addresses
    if item.namespace_selector is None:
        in_namespace = pod.metadata.namespace == policy.metadata.namespace
    else:
        labels = _namespace_labels(cluster, pod.metadata.namespace)
        in_namespace = selects(item.namespace_selector, labels)
    return in_namespace and selects(item.pod_selector or LabelSelector(), pod.metadata.labels)


def _namespace_labels(cluster: Cluster, name: str) -> dict[str, str]:
    """Every namespace carries its name as a label, whether its object was seen yet or not."""
    known = cluster.namespaces.get(name)
    return {**(known.metadata.labels if known else {}), "kubernetes.io/metadata.name": name}


def _is_port(item: NetworkPolicyPort, destination: Pod | None, packet: Packet) -> bool:
    if item.protocol != packet.protocol:
        return False
    if item.port is None:
        return True  # every port of the protocol
    if packet.port is None:
        return False
    if isinstance(item.port, str):
        return packet.port == _named_port(destination, item.port, item.protocol)
    return item.port <= packet.port <= (item.port if item.end_port is None else item.end_port)


def _named_port(pod: Pod | None, name: str, protocol: str) -> int | None:
    """The number that the pod gives the name: the first container port of name and protocol."""
    for container in pod.spec.containers if pod is not None else ():
        for port in container.ports:
            if (port.name, port.protocol) == (name, protocol):
                return port.container_port
    return None


def selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether labels satisfy all requirements; the empty selector selects everything."""
    return all(labels.get(k) == v for k, v in selector.match_labels.items()) and all(
        _satisfies(requirement, labels) for requirement in selector.match_expressions
    )


def _satisfies(requirement: LabelSelectorRequirement, labels: Mapping[str, str]) -> bool:
    present = requirement.key in labels
    listed = present and labels[requirement.key] in requirement.values
    return {
        "In": listed,
        "NotIn": not listed,  # a missing key is in no list
        "Exists": present,
        "DoesNotExist": not present,
    }[requirement.operator]

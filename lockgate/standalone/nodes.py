"""Node objects from manifests: names, numbers, addresses and pod CIDRs. Pure.

The number of a node gives the underlay addresses (172.30.0.10 + N) and the pod CIDRs where the
manifest has none. A node keeps it while it runs, whatever comes and goes beside it; numbers are
given in turn, so that who remembers one that went finds no other node behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network

import msgspec

from lockgate.objects.model import Node, NodeAddress, NodeSpec, NodeStatus, Object, ObjectMeta

__all__ = ["MOST", "make_nodes", "node_number", "overlap", "refused"]

#: 172.30.0.254 is the last one's.
MOST = 244


def make_nodes(
    objects: Iterable[Object], count: int, running: Mapping[str, Node] | None = None, last: int = 0
) -> dict[str, Node]:
    """The nodes that manifests define, else node-1 … node-COUNT; each with addresses of its own.

    A node of `running` has other labels at most; new ones have the numbers after `last`, the
    number that was given last. Without a free one a node is left out: see `refused`.
    """
    running = running or {}
    given = [item for item in objects if isinstance(item, Node)]
    if not given:
        given = [Node(metadata=ObjectMeta(name=f"node-{n}")) for n in range(1, count + 1)]
    taken = {node_number(node) for node in running.values()}
    result: dict[str, Node] = {}
    for node in given:
        name = node.metadata.name
        labels = {
            "kubernetes.io/hostname": name,
            "kubernetes.io/os": "linux",
            **node.metadata.labels,
        }
        metadata = msgspec.structs.replace(node.metadata, labels=labels, uid=f"node-{name}")
        if name in running:
            result[name] = msgspec.structs.replace(running[name], metadata=metadata)
            continue
        turn = (*range(last + 1, MOST + 1), *range(1, last + 1))
        number = next((n for n in turn if n not in taken), None)
        if number is None:
            continue
        taken.add(number)
        last = number
        cidrs = node.pod_cidrs or [f"10.244.{number}.0/24", f"fd00:10:244:{number}::/64"]
        result[name] = msgspec.structs.replace(
            node,
            metadata=metadata,
            spec=NodeSpec(pod_cidr=cidrs[0], pod_cidrs=cidrs),
            status=NodeStatus(
                addresses=[
                    NodeAddress(type="InternalIP", address=f"172.30.0.{10 + number}"),
                    NodeAddress(type="InternalIP", address=f"fd00:172:30::{10 + number}"),
                    NodeAddress(type="ExternalIP", address=f"172.31.0.{10 + number}"),
                    NodeAddress(type="ExternalIP", address=f"fd00:172:31::{10 + number}"),
                    NodeAddress(type="Hostname", address=name),
                ]
            ),
        )
    return result


def refused(
    objects: Iterable[Object], wanted: Mapping[str, Node], running: Mapping[str, Node]
) -> list[str]:
    """What of the manifests cannot be: one sentence each, with node and field. `wanted` is what
    `make_nodes` made of them, beside `running`."""
    told = []
    for item in objects:
        if not isinstance(item, Node):
            continue
        name, cidrs = item.metadata.name, item.pod_cidrs
        if name not in wanted:
            told.append(f"Node {name}: a cluster has {MOST} nodes at most")
        elif name in running and cidrs and cidrs != running[name].spec.pod_cidrs:
            told.append(
                f"Node {name}, field spec.podCIDRs: a node that runs keeps"
                f" {', '.join(running[name].spec.pod_cidrs)}: save the manifests without the node,"
                " then with the other ones"
            )
    before = {name: node for name, node in wanted.items() if name in running}
    for name, node in wanted.items():
        if name in running:
            continue
        for other, beside in before.items():
            if found := overlap(node, beside):
                told.append(f"Node {name}, field spec.podCIDRs: {found} of Node {other}")
                break
        before[name] = node
    return told


def overlap(node: Node, other: Node) -> str:
    """Which of their pod CIDRs overlap, or ""."""
    for mine in node.spec.pod_cidrs:
        for theirs in other.spec.pod_cidrs:
            one, two = _network(mine), _network(theirs)
            if one.version == two.version and one.overlaps(two):
                return f"{mine} overlaps {theirs}"
    return ""


@lru_cache(2 * MOST)
def _network(cidr: str) -> IPv4Network | IPv6Network:
    return ip_network(cidr, strict=False)


def node_number(node: Node) -> int:
    """The N of a node made by `make_nodes`."""
    return int(node.status.addresses[0].address.rpartition(".")[2]) - 10

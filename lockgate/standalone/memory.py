"""What stays as it is from one plan of the cluster to the next."""

from __future__ import annotations

import msgspec

__all__ = ["Key", "Memory"]

Key = tuple[str, str]


class Memory(msgspec.Struct):
    """What stays as it is from one plan to the next. `plan` updates it in place."""

    #: Makes uids differ between runs of a cluster.
    seed: str = "lockgate"
    nodes: dict[Key, str] = {}
    #: Address of a service in each family, by (namespace, name, family).
    addresses: dict[tuple[str, str, str], str] = {}
    #: NodePorts by (namespace, name, name of the port); that of health checks has no letters.
    node_ports: dict[tuple[str, str, str], int] = {}
    #: Load balancers' addresses, by (namespace, name, family).
    balancers: dict[tuple[str, str, str], str] = {}
    #: IP families that were offered to services: they stay, whatever nodes go.
    families: list[str] = []
    #: Pods that were there in the last plan, and how often each name was used anew.
    uids: dict[Key, tuple[bytes, str]] = {}
    incarnations: dict[Key, int] = {}

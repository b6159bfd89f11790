"""Which way leads to another node: over a link that both are on, or through a tunnel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface
from typing import Literal

from lockgate.objects.address import format_cidr, parse_address, parse_cidr
from lockgate.objects.model import Node

__all__ = ["Routing", "Way", "choose_way", "internal_ips", "of_family", "pod_cidrs"]

Routing = Literal["auto", "direct", "vxlan"]


def internal_ips(node: Node) -> list[str]:
    """InternalIPs of a node that can be read, IPv4 and IPv6."""
    found = []
    for entry in node.status.addresses:
        if entry.type == "InternalIP":
            with contextlib.suppress(ValueError):
                parse_address(entry.address)
                found.append(str(ip_address(entry.address)))
    return found


def pod_cidrs(node: Node) -> list[str]:
    """A node's podCIDRs that can be read, of both families, with the host bits cleared. The others
    the compiler names."""
    found = []
    for cidr in node.pod_cidrs:
        with contextlib.suppress(ValueError):
            found.append(format_cidr(*parse_cidr(cidr)))
    return found


@dataclass(frozen=True, slots=True)
class Way:
    """To another node: over the link, by one of the addresses `direct`; or through the tunnel, by
    outer addresses of one family."""

    direct: tuple[str, ...] = ()
    remote: str = ""
    local: str = ""


def choose_way(
    routing: Routing, ips: list[str], mine: list[str], on_link: Iterable[str]
) -> Way | str:
    """The way to the node with these InternalIPs from the one with `mine`, whose card has the
    addresses `on_link` (with prefix length); or why there is none."""
    networks = [ip_interface(address).network for address in on_link]
    near = tuple(ip for ip in ips if any(ip_address(ip) in network for network in networks))
    if routing == "direct":
        if not near:
            return "its InternalIP is on no link of this node's, as routing direct needs: use auto"
        return Way(near)
    if near and routing == "auto":
        return Way(near)
    for sample in ("0.0.0.0", "::"):
        remote, local = of_family(ips, sample), of_family(mine, sample)
        if remote and local:
            return Way(remote=remote, local=local)
    return "it and this node have no InternalIP of the same family, as a tunnel needs"


def of_family(ips: Iterable[str], sample: str) -> str:
    """The first address of the family that `sample` is of, or ""."""
    return next((ip for ip in ips if (":" in ip) == (":" in sample)), "")

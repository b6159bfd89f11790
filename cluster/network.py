"""The cluster's networks, and the link by which this machine reaches the API server."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import Iterator, Sequence

from cluster.commands import Failed, run
from cluster.state import CONTROL, State
from lockgate.net import namespaces
from lockgate.standalone import underlay

__all__ = ["build", "disconnect", "host_address", "interface", "link_nodes_by_routes", "remove"]

# For tests of networks (RFC 2544): nobody routes it.
_HOST_LINKS = ipaddress.ip_network("198.18.0.0/15")


def build(state: State, nodes: Sequence[tuple[str, int]]) -> str:
    """Namespaces and links for the control plane and for nodes given as (name, number); what
    is there is left alone. Returns the API server's address for this machine. Raises Failed."""
    try:
        underlay.build(state, [(CONTROL, 0), *nodes])
    except (underlay.UnderlayError, OSError) as error:
        raise Failed(f"the cluster's networks cannot be made: {error}") from None
    existing = host_address(state)
    if existing is not None:
        return existing
    link = interface(state)
    taken = run("ip", "-4", "-brief", "addr").split()
    links = [(a, b) for a, b in _host_links(state.cluster) if f"{a}/30" not in taken]
    if not links:
        raise Failed(f"every /30 of {_HOST_LINKS} that was tried is taken on this machine")
    here, there = links[0]
    netns = state.netns(CONTROL)
    run("ip", "link", "add", link, "type", "veth", "peer", "name", "host0", "netns", netns)
    run("ip", "addr", "add", f"{here}/30", "dev", link)
    run("ip", "link", "set", link, "up")
    run("ip", "-n", netns, "addr", "add", f"{there}/30", "dev", "host0")
    run("ip", "-n", netns, "link", "set", "host0", "up")
    return there


def host_address(state: State) -> str | None:
    """The address in the namespace `control` at the end of this machine's link, if it is there."""
    if interface(state) not in _interfaces():
        return None
    words = run("ip", "-4", "-brief", "addr", "show", "dev", interface(state)).split()
    return str(ipaddress.ip_interface(words[2]).ip + 1)


def link_nodes_by_routes(
    state: State, nodes: Sequence[tuple[str, Sequence[str], Sequence[str]]], machines: Sequence[str]
) -> None:
    """Give each of `machines` routes by the underlay to the pod ranges of the other nodes, given as
    (name, addresses, ranges). Raises Failed."""
    for machine in machines:
        for name, addresses, ranges in nodes:
            if name == machine:
                continue
            by_family = {ipaddress.ip_address(address).version: address for address in addresses}
            for network in ranges:
                gateway = by_family[ipaddress.ip_network(network).version]
                run("ip", "-n", state.netns(machine), "route", "replace", network, "via", gateway)


def disconnect(state: State, node: str, number: int) -> None:
    """Remove a node's links and network namespace. Raises Failed."""
    for hub in (state.underlay_netns, state.outside_netns):
        run("ip", "-n", hub, "link", "del", f"n{number}")
    namespaces.delete(state.netns(node))


def remove(state: State) -> list[str]:
    """Remove every network namespace of the cluster, and its links with them; their names."""
    removed = []
    prefix = f"lgk-{state.cluster}-"
    # Another cluster's name may begin with ours.
    others = tuple(f"lgk-{path.name}-" for path in state.root.parent.glob(f"{state.cluster}-*"))
    for path in sorted(namespaces.path_of("").glob(f"{prefix}*")):
        if not path.name.startswith(others or ("/",)) and namespaces.delete(path.name):
            removed.append(path.name)
    # A namespace that goes takes its links along, but only after a while: perhaps just now.
    if interface(state) in _interfaces():
        try:
            run("ip", "link", "del", interface(state))
        except Failed:
            if interface(state) in _interfaces():
                raise
    return removed


def interface(state: State) -> str:
    """The name of this machine's end of the link to the control plane."""
    return f"lgk{hashlib.sha256(state.cluster.encode()).hexdigest()[:8]}"


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _host_links(cluster: str) -> Iterator[tuple[str, str]]:
    """(ours, the control plane's) address of /30 networks, from one that depends on the name."""
    count = _HOST_LINKS.num_addresses // 4
    start = int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:4], "big")
    for step in range(64):
        base = _HOST_LINKS.network_address + (start + step) % count * 4
        yield str(base + 1), str(base + 2)

"""Routes of the node's own stack: to other nodes' pods, and none for services.

What the node sends to a pod elsewhere takes the way that the pods' packets take: over the link, or
into the tunnel. Our routes carry a mark that tells them from others; only what differs is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_network

from lockgate.agent.tunnel import TUNNEL_ID
from lockgate.net import dumps
from lockgate.net.dumps import Route
from lockgate.net.links import IFINDEX_BASE, Net
from lockgate.net.netlink import Batch, Tunnel

__all__ = ["StackRoutes"]


@dataclass(slots=True)
class StackRoutes:
    """`write` brings them up to date; from the worker thread, in the node's namespace."""

    #: Ranges without a way; None: what an agent before left.
    _refused: set[str] | None = None

    def write(self, net: Net, services: list[str], wanted: Mapping[str, Route]) -> list[str]:
        """No way to `services`' ranges, and the `wanted` routes by destination; returns what could
        not be done, one sentence each."""
        refused, self._refused = self._refused, None
        if refused is None:
            refused = dumps.own_unreachable()
        wanted_none = {str(ip_network(cidr, strict=False)) for cidr in services}
        for cidr in sorted(wanted_none - refused):
            net.route(cidr, kind="unreachable")
        for cidr in refused - wanted_none:
            net.remove_route(cidr)
        self._refused = wanted_none
        found = dumps.own_unicast(IFINDEX_BASE)
        errors = []
        for destination in set(found) - set(wanted):
            with Batch() as batch:
                batch.remove_route(destination)
                batch.send()
        for destination, route in wanted.items():
            if found.get(destination) == route:
                continue
            tunnel = Tunnel(TUNNEL_ID, route.remote, route.local) if route.remote else None
            with Batch() as batch:
                try:
                    batch.route(destination, route.ifindex, route.gateway, route.source, tunnel)
                    batch.send()
                except OSError as error:
                    errors.append(str(error))
        return errors

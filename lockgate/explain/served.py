"""Which backends a client may be given, over all nodes where its packets may come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

from lockgate.explain.frontends import Frontend, forwarding
from lockgate.objects.model import Cluster, EndpointSlice, Service
from lockgate.spec import services as spec
from lockgate.spec.services import Choice, Client, choose

__all__ = ["Backend", "Served"]


class Backend(NamedTuple):
    """`seen_as`: as whom the client comes to it; None as itself, else as a node (SNAT)."""

    address: str
    port: int
    seen_as: tuple[str | None, ...]


class Served:
    """Asks the specification, which is told of nothing but the one service."""

    def __init__(
        self, cluster: Cluster, slices: Mapping[tuple[str, str], Sequence[EndpointSlice]]
    ) -> None:
        self._cluster, self._slices = cluster, slices
        self._alone = lru_cache(4096)(self._only)
        self._choose = lru_cache(65536)(self._choice)

    def backends(
        self, service: Service, at: Frontend, client: str, home: str | None, is_pod: bool
    ) -> tuple[list[Backend], str]:
        """Those for new connections, or why there are none. `home`: the client's node, if it is a
        pod or a node."""
        where = at.address, at.port, at.protocol
        key = service.metadata.namespace, service.metadata.name
        # A load balancer's source ranges are all that asks who the client is.
        who = client if at.kind == "balancer" else ""
        if at.kind == "cluster" or (home and at.node in ("", home)):
            place = "pod" if is_pod or home is None else "node"
            choice = self._choose(key, home or "", place, who or client, where)
            return _taking(choice), choice.cause
        found: dict[str, Choice] = {}
        for node in [at.node] if at.node else sorted(self._cluster.nodes):
            found[node] = self._choose(key, node, "outside", who, where)
        serving = {node: one for node, one in found.items() if one.verdict == "serve"}
        if not serving:
            return [], next((one.cause for one in found.values() if one.cause), "no-backend")
        nodes = self._nodes_of(key) if forwarding(service) == "snat" else {}
        together: dict[tuple[str, int], list[str | None]] = {}
        for node, choice in serving.items():
            for one in _taking(choice):
                seen = together.setdefault((one.address, one.port), [])
                as_whom = node if nodes.get(one.address, node) != node else None
                # One node stands for all others.
                if as_whom is None and None not in seen:
                    seen.append(None)
                elif as_whom is not None and not any(seen):
                    seen.append(as_whom)
        return [Backend(*end, tuple(seen)) for end, seen in sorted(together.items())], ""

    # ---- Inside ----------------------------------------------------------------------

    def _only(self, key: tuple[str, str]) -> Cluster:
        slices = {(key[0], one.metadata.name): one for one in self._slices.get(key, ())}
        services = {key: self._cluster.services[key]}
        return msgspec.structs.replace(self._cluster, services=services, slices=slices, pods={})

    def _choice(
        self, key: tuple[str, str], node: str, place: str, client: str, where: tuple[str, int, str]
    ) -> Choice:
        alone = self._alone(key)
        return choose(
            alone,
            node,
            Client(place, client),  # type: ignore[arg-type]
            spec.Frontend(*where),
        )

    def _nodes_of(self, key: tuple[str, str]) -> dict[str, str]:
        """The nodes of endpoints, by address."""
        return {
            endpoint.addresses[0]: endpoint.node_name
            for one in self._slices.get(key, ())
            for endpoint in one.endpoints
        }


def _taking(choice: Choice) -> list[Backend]:
    """Those that take new connections."""
    found = sorted((one.address, one.port) for one in choice.backends if not one.ends)
    return [Backend(*end, (None,)) for end in found]

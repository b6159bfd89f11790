"""Endpoints of one port of a service → who serves whom (docs/services.md, steps 1 to 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lockgate.compile.cidr import pack
from lockgate.objects.model import EndpointHints, EndpointSlice, ObjectMeta, Service, ServicePort

__all__ = ["Candidate", "Spot", "candidates", "near", "of_others", "owners", "spots", "taking"]

#: Services and slices with one of these labels are for others (kube-proxy leaves them alone too).
_OTHERS = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")

#: Address and port.
Spot = tuple[bytes, int]


class Candidate(NamedTuple):
    """An endpoint, as far as choices depend on it. `ending`: it serves while it ends."""

    spot: Spot
    ready: bool
    ending: bool
    serves: bool
    here: bool
    hints: EndpointHints


def of_others(meta: ObjectMeta) -> bool:
    """Is it for another proxy, or for none?"""
    return any(label in meta.labels for label in _OTHERS)


def candidates(
    service: Service,
    port: ServicePort,
    family: str,
    slices: Iterable[EndpointSlice],
    node: str,
    errors: list[str],
) -> list[Candidate]:
    """All endpoints of the port, of IPv4 or IPv6.

    The slices' ports are what targetPort came to (EndpointSlice.ports, matched by name).
    An endpoint without a ready condition counts as ready, as the API says.
    """
    found = []
    everyone = service.spec.publish_not_ready_addresses
    for slice_ in slices:
        if slice_.address_type != family:
            continue
        numbers = [
            p.port for p in slice_.ports if p.name == port.name and p.protocol == port.protocol
        ]
        for endpoint in slice_.endpoints:
            # Addresses beyond the first are undefined (EndpointSlice.endpoints.addresses).
            try:
                address = pack(endpoint.addresses[0])
            except (IndexError, ValueError) as error:
                namespace, name = slice_.metadata.namespace, slice_.metadata.name
                errors.append(f"EndpointSlice {namespace}/{name}: endpoints.addresses: {error}")
                continue
            conditions = endpoint.conditions
            ready = everyone or conditions.ready is not False
            serves = everyone or conditions.ready is True or conditions.serving is not False
            here = endpoint.node_name == node
            ending = bool(conditions.terminating) and serves
            found += [
                Candidate((address, number), ready, ending, serves, here, endpoint.hints)
                for number in numbers
                if number
            ]
    return found


def taking(of: list[Candidate]) -> list[Candidate]:
    """Those that take new connections."""
    return [one for one in of if one.ready] or [one for one in of if one.ending]


def near(of: list[Candidate], node: str, zone: str) -> list[Candidate]:
    """Of those that take new connections the ones for clients on this node, in this zone."""
    if not of or not of[0].ready:
        return of
    if all(one.hints.for_nodes for one in of):
        found = [one for one in of if any(hint.name == node for hint in one.hints.for_nodes)]
        if found:
            return found
    if all(one.hints.for_zones for one in of):
        found = [one for one in of if any(hint.name == zone for hint in one.hints.for_zones)]
        if found:
            return found
    return of


def spots(of: Iterable[Candidate]) -> list[Spot]:
    """Each once, in order."""
    return sorted({one.spot for one in of})


def owners(of: list[Candidate], takes: list[Candidate], udp: bool) -> list[tuple[Spot, bool]]:
    """Who may have a slot, in order, and whether it ends. Whoever does not take new connections
    keeps those that it has; UDP has none that one could tell from new ones, so there it must
    serve."""
    open_ = {one.spot for one in takes}
    every = open_ | {one.spot for one in of if one.serves or not udp}
    return [(spot, spot not in open_) for spot in sorted(every)]

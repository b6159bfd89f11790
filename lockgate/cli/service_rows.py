"""What `lockgate service` tells of services, as plain values. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lockgate.explain.frontends import Frontend, Frontends, forwarding, frontends_of, unserved
from lockgate.objects.model import Cluster, EndpointSlice, Service, ServicePort

__all__ = ["Place", "Row", "counts", "overview", "places"]

Row = dict[str, Any]


def overview(cluster: Cluster, only: Service | None = None) -> Iterator[Row]:
    """A row for each service that has frontends, or for `only` that one."""
    slices: dict[tuple[str, str], list[EndpointSlice]] = {}
    for (namespace, _), one in sorted(cluster.slices.items()):
        slices.setdefault((namespace, one.service), []).append(one)
    everywhere = Frontends(cluster)
    for key, service in sorted(cluster.services.items()):
        if only not in (None, service):
            continue
        frontends = frontends_of(cluster, service, everywhere.taken)
        spec = service.spec
        outside = any(one.kind != "cluster" for one in frontends)
        if only is None and not frontends:
            continue
        yield {
            "namespace": key[0],
            "name": key[1],
            "type": spec.type,
            "frontends": [
                one.json() | {"takenBy": _other(everywhere, service, one)} for one in frontends
            ],
            "unserved": None if frontends else unserved(service),
            "forwarding": forwarding(service) or None,
            "externalTrafficPolicy": (spec.external_traffic_policy or "Cluster")
            if outside
            else None,
            "internalTrafficPolicy": spec.internal_traffic_policy or "Cluster",
            "trafficDistribution": spec.traffic_distribution or None,
            "sourceRanges": spec.load_balancer_source_ranges,
            "affinitySeconds": service.affinity or None,
            "healthCheckNodePort": spec.health_check_node_port or None,
            "endpoints": {
                family: counts(slices.get(key, []), family)
                for family in dict.fromkeys(_family(ip) for ip in service.cluster_ips)
            },
        }


def _other(everywhere: Frontends, service: Service, one: Frontend) -> str | None:
    """The service that has it before this one."""
    found = everywhere.at(one.address, one.port, one.protocol)
    if found is None or found[0] is service:
        return None
    return f"{found[0].metadata.namespace}/{found[0].metadata.name}"


def counts(slices: list[EndpointSlice], family: str) -> Row:
    """Addresses that are ready, and those that end and still serve."""
    ready, ending = set(), set()
    for one in slices:
        for endpoint in one.endpoints if one.address_type == family else ():
            conditions = endpoint.conditions
            if conditions.ready is not False:
                ready.update(endpoint.addresses[:1])
            elif conditions.terminating and conditions.serving is not False:
                ending.update(endpoint.addresses[:1])
    return {"ready": len(ready), "ending": len(ending - ready)}


@dataclass(frozen=True, slots=True)
class Place:
    """Frontends that are alike to clients inside, or outside, the cluster: of one port in one
    family. A node port is asked at each node's own address."""

    of: ServicePort
    family: str
    clients: str  # inside · outside
    frontends: tuple[Frontend, ...]

    def question(self, node: str) -> Row:
        """What a node is asked: what it has in force there."""
        one = next((f for f in self.frontends if f.node in ("", node)), self.frontends[0])
        return {"address": one.address, "port": one.port, "protocol": one.protocol}

    def json(self) -> Row:
        return {
            "port": self.of.port,
            "name": self.of.name or None,
            "protocol": self.of.protocol,
            "family": self.family,
            "clients": self.clients,
        }


def places(cluster: Cluster, service: Service) -> list[Place]:
    """Each once: of a port, in the order of the families."""
    found: dict[tuple[int, str, str, str], list[Frontend]] = {}
    for one in frontends_of(cluster, service):
        clients = "inside" if one.kind == "cluster" else "outside"
        key = one.of.port, one.of.protocol, _family(one.address), clients
        found.setdefault(key, []).append(one)
    return [
        Place(some[0].of, family, clients, tuple(some))
        for (_, _, family, clients), some in sorted(found.items())
    ]


def _family(ip: str) -> str:
    return "IPv6" if ":" in ip else "IPv4"

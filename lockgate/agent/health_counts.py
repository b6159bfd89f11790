"""What load balancers ask about: services with a healthCheckNodePort, and their endpoints here.

Pure. A pod that comes or goes costs the slices of its own service, whatever else there is.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from lockgate.objects.changes import Changed, Name
from lockgate.objects.model import Cluster, EndpointSlice, Service

__all__ = ["Asked", "HealthCounts", "health_port", "ready_here"]

#: What belongs to another proxy is its to answer for, as with kube-proxy.
_OTHERS = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")


def health_port(service: Service) -> int:
    """The port at which every node says whether it serves the service; 0: none. Only balancers
    that must pick nodes with endpoints need it (core/v1 ServiceSpec.healthCheckNodePort)."""
    spec = service.spec
    wanted = (
        spec.type == "LoadBalancer"
        and spec.external_traffic_policy == "Local"
        and not any(label in service.metadata.labels for label in _OTHERS)
    )
    return spec.health_check_node_port if wanted else 0


def ready_here(
    slices: Iterable[EndpointSlice], node: str, family: str, everyone: bool = False
) -> int:
    """How many endpoints on `node` take new connections over `family` (IPv4, IPv6), each address
    once. Those that end do not count, even where they are all that is left. `everyone`: of a
    service with publishNotReadyAddresses."""
    found = {
        endpoint.addresses[0]
        for one in slices
        if one.address_type == family and any(port.port is not None for port in one.ports)
        for endpoint in one.endpoints
        if endpoint.node_name == node and (everyone or endpoint.conditions.ready is not False)
    }
    return len(found)


@dataclass(slots=True, frozen=True)
class Asked:
    """One service that is asked about: at which port; ready endpoints here, by family."""

    port: int
    counts: dict[str, int]


class HealthCounts:
    """Follows the services and slices of one node. In `asked` only counts change in place: it may
    be read by another thread meanwhile."""

    def __init__(self, node: str) -> None:
        self._node = node
        self.asked: dict[Name, Asked] = {}
        #: Slices of those services, and whose each is.
        self._slices: dict[Name, set[Name]] = {}
        self._homes: dict[Name, Name] = {}

    def follow(self, cluster: Cluster, changed: Changed | None) -> bool:
        """What changed in `cluster`; None: anything may have. True when services come or go, or
        their ports or families are others."""
        before = self.asked
        if changed is None:
            self._slices, self._homes = {}, {}
            changed = Changed(services=set(cluster.services))
        again: set[Name] = set()
        new: set[Name] = set()
        for name in changed.services:
            service = cluster.services.get(name)
            if service is None or not health_port(service):
                self._forget(name)
                continue
            again.add(name)
            if name not in self._slices:
                new.add(name)
                self._slices[name] = set()
        if new:  # one pass over all slices, however many are new
            for key, slice_ in cluster.slices.items():
                self._move(key, slice_, new)
        for key in changed.slices:
            again.update(self._move(key, cluster.slices.get(key), self._slices))
        counted = {name: self._count(name, cluster) for name in again if name in self._slices}
        if before.keys() == self._slices.keys() and all(
            before[name].port == one.port and before[name].counts.keys() == one.counts.keys()
            for name, one in counted.items()
        ):
            for name, one in counted.items():
                before[name].counts.update(one.counts)
            return False
        self.asked = {name: counted.get(name) or before[name] for name in sorted(self._slices)}
        return True

    def _forget(self, name: Name) -> None:
        for key in self._slices.pop(name, ()):
            del self._homes[key]

    def _move(self, key: Name, one: EndpointSlice | None, homes: Container[Name]) -> Iterable[Name]:
        """Whose a slice was and is, of the services that are asked about."""
        concerned = []
        old = self._homes.get(key)
        new = (one.metadata.namespace, one.service) if one is not None else None
        if old is not None:
            concerned.append(old)
            if old != new:
                self._slices[old].discard(key)
                del self._homes[key]
        if new is not None and new in homes:
            concerned.append(new)
            self._slices[new].add(key)
            self._homes[key] = new
        return concerned

    def _count(self, name: Name, cluster: Cluster) -> Asked:
        service = cluster.services[name]
        slices = [cluster.slices[key] for key in self._slices[name]]
        everyone = service.spec.publish_not_ready_addresses
        families = dict.fromkeys(_family(ip) for ip in service.cluster_ips)
        return Asked(
            health_port(service),
            {family: ready_here(slices, self._node, family, everyone) for family in families},
        )


def _family(ip: str) -> str:
    return "IPv6" if ":" in ip else "IPv4"

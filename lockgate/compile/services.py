"""Services and EndpointSlices → service entries and backend lists."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping

from lockgate.compile.cidr import pack
from lockgate.compile.tables import (
    PROTOCOL_NUMBER,
    SVC_PRESENT,
    Builder,
    Ids,
    PeerView,
    ServiceView,
    Tables,
)
from lockgate.objects.model import Cluster, EndpointSlice, Service, ServicePort

__all__ = ["compile_services"]

MAX_BACKENDS = 0xFFFF
#: address, __be16 port; then little-endian __u16 flags, __u32 endpoint id
_ADDRESS_PORT = struct.Struct("!16sH")
_FLAGS_ENDPOINT = struct.Struct("<HI")


def _backends(
    service: Service,
    port: ServicePort,
    v4: bool,
    slices: list[EndpointSlice],
    errors: list[str],
) -> list[tuple[bytes, int]]:
    """Addresses and ports that take new connections, sorted.

    The slices' ports are what targetPort came to (EndpointSlice.ports, matched by name).
    An endpoint without a ready condition counts as ready, as the API says.
    """
    found: set[tuple[bytes, int]] = set()
    family = "IPv4" if v4 else "IPv6"
    everyone = service.spec.publish_not_ready_addresses
    for slice_ in slices:
        if slice_.address_type != family:
            continue
        numbers = [
            p.port
            for p in slice_.ports
            if p.name == port.name and p.protocol == port.protocol and p.port is not None
        ]
        if not numbers:
            continue
        for endpoint in slice_.endpoints:
            if endpoint.conditions.ready is False and not everyone:
                continue
            # Addresses beyond the first are undefined (EndpointSlice.endpoints.addresses).
            for address in endpoint.addresses[:1]:
                try:
                    packed = pack(address)
                except ValueError as error:
                    namespace, name = slice_.metadata.namespace, slice_.metadata.name
                    errors.append(f"EndpointSlice {namespace}/{name}: endpoints.addresses: {error}")
                    continue
                found.update((packed, number) for number in numbers)
    return sorted(found)


def compile_services(
    cluster: Cluster, ids: Ids, peers: Mapping[bytes, PeerView], builder: Builder, tables: Tables
) -> None:
    """Fill `tables.services` and `tables.backends`, put the backend lists into the image."""
    slices: dict[tuple[str, str], list[EndpointSlice]] = defaultdict(list)
    for slice_ in cluster.slices.values():
        if slice_.service:
            slices[slice_.metadata.namespace, slice_.service].append(slice_)
    owners: dict[bytes, str] = {}
    for (namespace, name), service in sorted(cluster.services.items()):
        for ip in service.cluster_ips:
            try:
                address = pack(ip)
            except ValueError as error:
                tables.errors.append(f"Service {namespace}/{name}: spec.clusterIPs: {error}")
                continue
            if address in owners:
                tables.errors.append(
                    f"Service {namespace}/{name}: spec.clusterIPs: {ip} is taken by"
                    f" Service {owners[address]}"
                )
                continue
            owners[address] = f"{namespace}/{name}"
            tables.services[address, 0, 0] = ServiceView(0, 0, 0, SVC_PRESENT)
            for port in service.spec.ports:
                protocol = PROTOCOL_NUMBER[port.protocol]
                key = (address, port.port, protocol)
                if key in tables.services:
                    continue
                number = ids.service(namespace, name, port.name, port.protocol, port.port)
                own = slices.get((namespace, name), [])
                chosen = _backends(service, port, ":" not in ip, own, tables.errors)
                if len(chosen) > MAX_BACKENDS:
                    tables.errors.append(
                        f"Service {namespace}/{name}: {len(chosen)} backends, the first"
                        f" {MAX_BACKENDS} serve"
                    )
                    del chosen[MAX_BACKENDS:]
                words = b"".join(
                    _ADDRESS_PORT.pack(backend, target)
                    + _FLAGS_ENDPOINT.pack(0, peers[backend].endpoint if backend in peers else 0)
                    for backend, target in chosen
                )
                at = builder.add(words) if words else 0
                tables.services[key] = ServiceView(number, at, len(chosen), SVC_PRESENT)
                tables.backends.update(
                    (backend, number, target, protocol) for backend, target in chosen
                )

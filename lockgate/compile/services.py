"""Services and EndpointSlices → service entries and backend lists."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lockgate.compile.cidr import pack
from lockgate.compile.tables import (
    PROTOCOL_NUMBER,
    SVC_PRESENT,
    Builder,
    Ids,
    PeerView,
    ServiceView,
)
from lockgate.objects.model import Cluster, EndpointSlice, Service, ServicePort

__all__ = ["Services", "compile_services"]

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


@dataclass(slots=True)
class Entry:
    """What the kernel looks up: a service's address, with or without a port, and its backends."""

    key: tuple[bytes, int, int]
    id: int
    words: bytes
    count: int


#: Addresses and ports of a service's backends, and what could not be read.
Chosen = tuple[list[tuple[bytes, int]], list[str]]


@dataclass(slots=True)
class Made:
    """One port of a service at one address, and the endpoint ids that went into its words."""

    endpoints: tuple[int, ...]
    entry: Entry
    backends: frozenset[tuple[bytes, int, int, int]]


@dataclass(slots=True)
class Part:
    """What one service came to. It serves again as long as its objects are the same."""

    service: Service
    slices: list[EndpointSlice]
    #: By position of the port and family.
    chosen: dict[tuple[int, bool], Chosen] = field(default_factory=dict)
    made: dict[tuple[bytes, int, int], Made] = field(default_factory=dict)

    def backends(self, position: int, v4: bool) -> Chosen:
        """The backends of one port, read once."""
        known = self.chosen.get((position, v4))
        if known is None:
            errors: list[str] = []
            service, port = self.service, self.service.spec.ports[position]
            found = _backends(service, port, v4, self.slices, errors)
            if len(found) > MAX_BACKENDS:
                errors.append(
                    f"Service {service.metadata.namespace}/{service.metadata.name}:"
                    f" {len(found)} backends, the first {MAX_BACKENDS} serve"
                )
                del found[MAX_BACKENDS:]
            known = self.chosen[position, v4] = found, errors
        return known


@dataclass(slots=True)
class Services:
    """The services of a compilation. `people` and `of` are what they were made of."""

    people: object
    of: list[object]
    entries: list[Entry]
    backends: set[tuple[bytes, int, int, int]]
    errors: list[str]
    parts: dict[tuple[str, str], Part] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)
    #: Where the backend lists begin, and the views that point there.
    start: int = -1
    views: dict[tuple[bytes, int, int], ServiceView] = field(default_factory=dict)


def compile_services(
    cluster: Cluster,
    ids: Ids,
    people: object,
    peers: Mapping[bytes, PeerView],
    builder: Builder,
    before: Services | None,
) -> Services:
    """Puts the backend lists into the image. `people` is the same object as long as the pods
    behind `peers` are the same, `before` the result of the compilation before."""
    of: list[object] = [*cluster.services.values(), *cluster.slices.values()]
    of += cluster.nodes.values()
    if before is not None and before.people is people and _same(before.of, of):
        result = before
    else:
        result = _read(cluster, ids, people, of, peers, before)
    start = builder.words
    places = [builder.add(entry.words) if entry.words else 0 for entry in result.entries]
    if result.start != start:
        views = {
            entry.key: ServiceView(entry.id, at, entry.count, SVC_PRESENT)
            for entry, at in zip(result.entries, places, strict=True)
        }
        result = replace(result, start=start, views=views)
    return result


def _same(one: Sequence[object], other: Sequence[object]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _read(
    cluster: Cluster,
    ids: Ids,
    people: object,
    of: list[object],
    peers: Mapping[bytes, PeerView],
    before: Services | None,
) -> Services:
    slices: dict[tuple[str, str], list[EndpointSlice]] = defaultdict(list)
    for slice_ in cluster.slices.values():
        if slice_.service:
            slices[slice_.metadata.namespace, slice_.service].append(slice_)
    result = Services(people, of, [], set(), [])
    seen: set[tuple[bytes, int, int]] = set()
    owners: dict[bytes, str] = {}
    known = before.parts if before is not None else {}
    for (namespace, name), service in sorted(cluster.services.items()):
        own = slices.get((namespace, name), [])
        part = known.get((namespace, name))
        if part is None or part.service is not service or not _same(part.slices, own):
            part = Part(service, own)
        result.parts[namespace, name] = part
        for ip in service.cluster_ips:
            try:
                address = pack(ip)
            except ValueError as error:
                result.errors.append(f"Service {namespace}/{name}: spec.clusterIPs: {error}")
                continue
            if address in owners:
                result.errors.append(
                    f"Service {namespace}/{name}: spec.clusterIPs: {ip} is taken by"
                    f" Service {owners[address]}"
                )
                continue
            owners[address] = f"{namespace}/{name}"
            result.entries.append(Entry((address, 0, 0), 0, b"", 0))
            for position, port in enumerate(service.spec.ports):
                protocol = PROTOCOL_NUMBER[port.protocol]
                key = (address, port.port, protocol)
                if key in seen:
                    continue
                seen.add(key)
                chosen, errors = part.backends(position, ":" not in ip)
                result.errors += errors
                # Most backends are pods, and few pods are new.
                endpoints = tuple([peers[one].endpoint if one in peers else 0 for one, _ in chosen])
                made = part.made.get(key)
                if made is None or made.endpoints != endpoints:
                    number = ids.service(namespace, name, port.name, port.protocol, port.port)
                    made = part.made[key] = _make(key, number, chosen, endpoints)
                result.entries.append(made.entry)
                result.made.append(made)
    if before is not None and _same(
        [made.backends for made in before.made], [made.backends for made in result.made]
    ):
        result.backends = before.backends
    else:
        result.backends = set().union(*(made.backends for made in result.made))
    return result


def _make(
    key: tuple[bytes, int, int],
    number: int,
    chosen: list[tuple[bytes, int]],
    endpoints: tuple[int, ...],
) -> Made:
    words = b"".join(
        _ADDRESS_PORT.pack(backend, target) + _FLAGS_ENDPOINT.pack(0, endpoint)
        for (backend, target), endpoint in zip(chosen, endpoints, strict=True)
    )
    backends = frozenset((backend, number, target, key[2]) for backend, target in chosen)
    return Made(endpoints, Entry(key, number, words, len(chosen)), backends)

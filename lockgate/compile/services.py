"""Services and EndpointSlices → service entries and backend lists, patched by service."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from lockgate.compile.cidr import pack
from lockgate.compile.image import Image
from lockgate.compile.tables import (
    BACKEND_WORDS,
    PROTOCOL_NUMBER,
    SVC_PRESENT,
    BackendKey,
    Ids,
    ServiceKey,
    ServiceView,
)
from lockgate.objects.changes import Name
from lockgate.objects.model import Cluster, EndpointSlice, ObjectMeta, Service, ServicePort

__all__ = ["Services"]

MAX_BACKENDS = 0xFFFF
#: address, __be16 port; then little-endian __u16 flags, __u32 endpoint id
_ADDRESS_PORT = struct.Struct("!16sH")
_FLAGS_ENDPOINT = struct.Struct("<HI")


#: Services and slices with one of these labels are for others (kube-proxy leaves them alone too).
_OTHERS = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")


def _backends(
    service: Service,
    port: ServicePort,
    v4: bool,
    slices: Iterable[EndpointSlice],
    node: str,
    errors: list[str],
) -> list[tuple[bytes, int]]:
    """Addresses and ports that take new connections begun on `node`, sorted: of endpoints that
    are ready, or where none is, of those that still serve while they end.

    The slices' ports are what targetPort came to (EndpointSlice.ports, matched by name).
    An endpoint without a ready condition counts as ready, as the API says.
    """
    ready: set[tuple[bytes, int]] = set()
    ending: set[tuple[bytes, int]] = set()
    family = "IPv4" if v4 else "IPv6"
    everyone = service.spec.publish_not_ready_addresses
    local = service.spec.internal_traffic_policy == "Local"
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
            if local and endpoint.node_name != node:
                continue
            conditions = endpoint.conditions
            if conditions.ready is not False or everyone:
                found = ready
            elif conditions.terminating and conditions.serving is not False:
                found = ending
            else:
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
    return sorted(ready or ending)


@dataclass(slots=True, frozen=True)
class Entry:
    """What the kernel looks up: a service's address, with or without a port, and its backends."""

    key: ServiceKey
    id: int
    words: bytes
    count: int
    affinity: int = 0


@dataclass(slots=True)
class Part:
    """What one service came to."""

    service: Service
    entries: tuple[tuple[ServiceKey, int], ...]  # and the size of their lists, in words
    backends: tuple[BackendKey, ...]
    errors: tuple[str, ...]


class Services:
    """All services. `views` and `backends` are what the kernel looks up; the `before` of each has
    what was touched since `begin`, and what it was then."""

    def __init__(self, image: Image, node: str) -> None:
        self._image = image
        self._node = node
        self.views: dict[ServiceKey, ServiceView] = {}
        self.backends: set[BackendKey] = set()
        self.views_before: dict[ServiceKey, ServiceView | None] = {}
        self.backends_before: dict[BackendKey, bool] = {}
        self.parts: dict[Name, Part] = {}
        #: The slices by their own name, and by the service they are of.
        self.slices: dict[Name, EndpointSlice] = {}
        self._slices_of: dict[Name, tuple[Name, ...]] = {}
        #: Who asks for a cluster IP: the first by name has it.
        self._claims: dict[bytes, tuple[Name, ...]] = {}
        #: The services whose backends have an address.
        self._users: dict[bytes, tuple[Name, ...]] = {}
        self._faulty: set[Name] = set()

    def begin(self) -> None:
        """What is touched from here on is told apart from what is there."""
        self.views_before, self.backends_before = {}, {}

    def change(
        self,
        cluster: Cluster,
        services: Iterable[Name],
        slices: Iterable[Name],
        addresses: Iterable[bytes],
        ids: Ids,
        endpoint: Callable[[bytes], int],
    ) -> None:
        """Read again what these objects, or the pods at these addresses, concern. `endpoint` is
        the id of the pod at an address, or 0."""
        again = set(services)
        for key in slices:
            again.update(self._move(key, cluster.slices.get(key)))
        for address in addresses:
            again.update(self._users.get(address, ()))
        for key in list(again):
            for moved in self._claim(key, self._asked(key), cluster.services.get(key)):
                again.add(moved)
                self._withdraw(moved)
        for key in sorted(again):
            self._make(key, cluster.services.get(key), ids, endpoint)

    def place_again(self) -> None:
        """The image has no lists any more: all services are to be made again."""
        for key, part in self.parts.items():
            for entry, _ in part.entries:
                self.views_before.setdefault(entry, self.views.pop(entry))
            self.parts[key] = replace(part, entries=())

    def errors(self) -> list[str]:
        """What is wrong with services and slices, each named."""
        return [text for key in sorted(self._faulty) for text in self.parts[key].errors]

    def views_delta(self) -> dict[ServiceKey, ServiceView | None]:
        """What is another than at `begin`: what it was then."""
        return {k: was for k, was in self.views_before.items() if self.views.get(k) != was}

    def backends_delta(self) -> dict[BackendKey, bool]:
        """The same of the backends: whether they were there."""
        return {k: was for k, was in self.backends_before.items() if (k in self.backends) != was}

    # ---- Who is concerned ------------------------------------------------------------

    def _move(self, key: Name, slice_: EndpointSlice | None) -> list[Name]:
        """A slice is another, or went (None): the services that it was and is of."""
        concerned = []
        old = self.slices.pop(key, None)
        if old is not None:
            home = old.metadata.namespace, old.service
            _remove(self._slices_of, home, key)
            concerned.append(home)
        if slice_ is not None:
            self.slices[key] = slice_
            if slice_.service and not _of_others(slice_.metadata):
                home = slice_.metadata.namespace, slice_.service
                _add(self._slices_of, home, key)
                concerned.append(home)
        return concerned

    def _asked(self, key: Name) -> Service | None:
        part = self.parts.get(key)
        return None if part is None else part.service

    def _claim(self, key: Name, old: Service | None, new: Service | None) -> list[Name]:
        """Claims of cluster IPs are others now: the services that this concerns."""
        before = set() if old is None else set(_addresses(old))
        after = set() if new is None else set(_addresses(new))
        concerned = [] if before == after else [key]
        for address in before - after:
            _remove(self._claims, address, key)
            concerned += self._claims.get(address, ())
        for address in after - before:
            _add(self._claims, address, key)
            concerned += self._claims[address]
        return concerned

    # ---- One service -----------------------------------------------------------------

    def _make(
        self, key: Name, service: Service | None, ids: Ids, endpoint: Callable[[bytes], int]
    ) -> None:
        old = self.parts.pop(key, None)
        self._faulty.discard(key)
        entries: dict[ServiceKey, Entry] = {}
        errors: list[str] = []
        if service is not None:
            slices = [self.slices[one] for one in sorted(self._slices_of.get(key, ()))]
            entries = self._read(key, service, slices, ids, endpoint, errors)
        rooms = {} if old is None else dict(old.entries)
        for gone in rooms.keys() - entries.keys():
            self._give_back(gone, rooms[gone])
            self._view(gone, None)
        for entry in entries.values():
            at = self._place(entry, rooms.get(entry.key))
            view = ServiceView(entry.id, at, entry.count, SVC_PRESENT, entry.affinity)
            self._view(entry.key, view)
        backends: dict[BackendKey, None] = {}
        for entry in entries.values():
            for at in range(0, len(entry.words), 8 * BACKEND_WORDS):
                backend, port = _ADDRESS_PORT.unpack_from(entry.words, at)
                backends[backend, entry.id, port, entry.key[2]] = None
        self._list(key, () if old is None else old.backends, tuple(backends))
        if service is not None:
            places = tuple((one.key, len(one.words) // 8) for one in entries.values())
            self.parts[key] = Part(service, places, tuple(backends), tuple(errors))
            if errors:
                self._faulty.add(key)

    def _read(
        self,
        name: Name,
        service: Service,
        slices: list[EndpointSlice],
        ids: Ids,
        endpoint: Callable[[bytes], int],
        errors: list[str],
    ) -> dict[ServiceKey, Entry]:
        title = f"Service {'/'.join(name)}"
        affinity = max(0, min(service.affinity, 0x7FFFFFFF))
        found: dict[ServiceKey, Entry] = {}
        for ip in _cluster_ips(service):
            try:
                address = pack(ip)
            except ValueError as error:
                errors.append(f"{title}: spec.clusterIPs: {error}")
                continue
            owner = min(self._claims[address])
            if owner != name or (address, 0, 0) in found:
                errors.append(
                    f"{title}: spec.clusterIPs: {ip} is taken by Service {'/'.join(owner)}"
                )
                continue
            found[address, 0, 0] = Entry((address, 0, 0), 0, b"", 0)
            for port in service.spec.ports:
                key = (address, port.port, PROTOCOL_NUMBER[port.protocol])
                if key in found:
                    continue
                chosen = _backends(service, port, ":" not in ip, slices, self._node, errors)
                if len(chosen) > MAX_BACKENDS:
                    errors.append(
                        f"{title}: {len(chosen)} backends, the first {MAX_BACKENDS} serve"
                    )
                    del chosen[MAX_BACKENDS:]
                number = ids.service(*name, port.name, port.protocol, port.port)
                words = b"".join(
                    _ADDRESS_PORT.pack(backend, target) + _FLAGS_ENDPOINT.pack(0, endpoint(backend))
                    for backend, target in chosen
                )
                found[key] = Entry(key, number, words, len(chosen), affinity)
        return found

    def _withdraw(self, key: Name) -> None:
        """Take a service's entries away, for its addresses may become another's."""
        part = self.parts.get(key)
        if part is not None:
            for entry, size in part.entries:
                self._give_back(entry, size)
                self._view(entry, None)
            self.parts[key] = replace(part, entries=())

    def _place(self, entry: Entry, size: int | None) -> int:
        """Where the list of an entry is, after it was put there; `size`: of the one before."""
        known = self.views.get(entry.key)
        words = len(entry.words) // 8
        if known is not None and size and words and Image.fits(size, words):
            at = known.backends
        else:
            self._give_back(entry.key, size)
            at = self._image.place(words) if words else 0
        if words:
            self._image.write(at, entry.words)
        return at

    def _give_back(self, key: ServiceKey, size: int | None) -> None:
        known = self.views.get(key)
        if known is not None and size:
            self._image.give_back(known.backends, size)

    def _view(self, key: ServiceKey, view: ServiceView | None) -> None:
        known = self.views.get(key)
        if known == view:
            return
        self.views_before.setdefault(key, known)
        if view is None:
            del self.views[key]
        else:
            self.views[key] = view

    def _list(self, key: Name, old: tuple[BackendKey, ...], new: tuple[BackendKey, ...]) -> None:
        if old == new:
            return
        # No other service has the ids of this one's ports.
        for one in set(old).difference(new):
            self.backends_before.setdefault(one, True)
            self.backends.discard(one)
        for one in set(new).difference(old):
            self.backends_before.setdefault(one, False)
            self.backends.add(one)
        before, after = {one[0] for one in old}, {one[0] for one in new}
        for address in before - after:
            _remove(self._users, address, key)
        for address in after - before:
            _add(self._users, address, key)


def _of_others(meta: ObjectMeta) -> bool:
    return any(label in meta.labels for label in _OTHERS)


def _cluster_ips(service: Service) -> list[str]:
    """Those that are ours to serve."""
    return [] if _of_others(service.metadata) else service.cluster_ips


def _addresses(service: Service) -> Iterable[bytes]:
    """The cluster IPs that can be read."""
    for ip in _cluster_ips(service):
        try:
            yield pack(ip)
        except ValueError:
            continue


def _add(table: dict[Any, tuple[Name, ...]], key: Any, name: Name) -> None:
    table[key] = (*table.get(key, ()), name)


def _remove(table: dict[Any, tuple[Name, ...]], key: Any, name: Name) -> None:
    left = tuple(one for one in table.get(key, ()) if one != name)
    if left:
        table[key] = left
    else:
        table.pop(key, None)

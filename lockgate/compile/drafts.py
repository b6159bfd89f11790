"""One service, or one pod with hostPorts → the entries, lists and tables that it comes to."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockgate.compile import choose, ranges
from lockgate.compile.balance import Owner
from lockgate.compile.choose import Candidate, Spot
from lockgate.compile.frontends import Ask
from lockgate.compile.tables import (
    LIVE_INSIDE,
    LIVE_KEEPS,
    LIVE_LOCAL,
    LIVE_OUTSIDE,
    MOST_OWNERS,
    OWNER_ENDS,
    PROTOCOL_NUMBER,
    SVC_FRONTEND,
    SVC_HOST_ONLY,
    SVC_INTERNAL_LOCAL,
    SVC_LOCAL,
    SVC_PRESENT,
    SVC_RANGES,
    SVC_SNAT,
    TARGET_SHIFT,
    TO_HOST,
    UDP,
    BackendKey,
    Ids,
    ServiceKey,
)
from lockgate.objects.address import is_ipv4
from lockgate.objects.changes import Name
from lockgate.objects.model import (
    FORWARDING,
    LEAST_SLOT_BITS,
    MOST_SLOT_BITS,
    SLOT_BITS,
    SLOTS,
    ContainerPort,
    EndpointSlice,
    Pod,
    Service,
    read_slots,
)

__all__ = ["ADDRESS_PORT", "Draft", "ListKey", "Seed", "Surroundings", "of_pod", "of_service"]

#: address, __be16 port; then little-endian __u16 flags, __u32 endpoint id or target
ADDRESS_PORT = struct.Struct("!16sH")
_FLAGS_NUMBER = struct.Struct("<HI")
#: Of the port's index, the family and what it is, a list of one service.
ListKey = int
_INSIDE, _NEAR, _OWNERS, _TABLE = range(4)
#: The name of the port in the ids of hostPorts: no port of a service can have it.
HOST_PORT = "hostPort"


@dataclass(slots=True)
class Surroundings:
    """What entries are made of besides objects of services. By address: the id of the pod there,
    or 0; where packets for it go (`owner.target`); what it weighs."""

    ids: Ids
    node: str
    zone: str
    snat: bool
    own: tuple[bytes, ...]
    endpoint: Callable[[bytes], int]
    target: Callable[[bytes], int]
    weight: Callable[[bytes], int]


@dataclass(slots=True)
class Seed:
    """A view but for where its lists are: keys of `Draft.lists` and `Draft.tables`, 0 for none."""

    id: int
    flags: int
    affinity: int = 0
    backends: ListKey = 0
    count: int = 0
    owners: ListKey = 0
    table: ListKey = 0
    owner_count: int = 0
    ranges: ranges.Set | None = None


@dataclass(slots=True)
class Draft:
    """`backends`: those that are live, with their LIVE_ bits. `hosting`: processes of the node
    serve clients outside. `hinted`: it looks otherwise from another zone. `slot_bits`: what its
    service wants, 1 << slot_bits slots."""

    entries: dict[ServiceKey, Seed] = field(default_factory=dict)
    lists: dict[ListKey, bytes] = field(default_factory=dict)
    tables: dict[ListKey, tuple[Owner, ...]] = field(default_factory=dict)
    backends: dict[BackendKey, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    hosting: bool = False
    hinted: bool = False
    slot_bits: int = SLOT_BITS

    def live(self, backend: BackendKey, bits: int) -> None:
        """One list more has it."""
        self.backends[backend] = self.backends.get(backend, 0) | bits


def of_service(
    name: Name,
    service: Service,
    asks: Sequence[Ask],
    slices: Sequence[EndpointSlice],
    around: Surroundings,
) -> Draft:
    """`asks` are those that it has; the others' are somebody else's."""
    draft = Draft()
    title = f"Service {'/'.join(name)}"
    reader = _Reader(draft, title, service, slices, around)
    for ask in asks:
        draft.entries[ask.key] = reader.seed(name, ask)
    draft.errors = list(dict.fromkeys(draft.errors))
    return draft


def of_pod(
    pod: Pod,
    asks: Sequence[tuple[Ask, ContainerPort]],
    addresses: Sequence[bytes],
    around: Surroundings,
) -> Draft:
    """A pod's hostPorts: the pod is the one backend."""
    draft = Draft()
    for ask, port in asks:
        ipv4, protocol = is_ipv4(ask.key[0]), ask.key[2]
        if ask.key in draft.entries:
            continue
        backend = next(a for a in addresses if is_ipv4(a) == ipv4)
        spot = backend, port.container_port
        number = around.ids.service(*pod.key, HOST_PORT, port.protocol, port.host_port)
        seed = Seed(number, SVC_PRESENT | (SVC_HOST_ONLY if ask.kind == "loopback" else 0))
        seed.backends, seed.count = _key(ask.port, ipv4, _NEAR), 1
        draft.lists[seed.backends] = _backends([spot], around)
        bits = LIVE_INSIDE if ask.kind == "loopback" else LIVE_INSIDE | LIVE_OUTSIDE
        draft.live((backend, number, port.container_port, protocol), bits)
        if ask.kind != "loopback":
            seed.flags |= SVC_FRONTEND
            owners = _key(ask.port, ipv4, _OWNERS)
            if owners not in draft.lists:
                _balance(draft, owners, [(spot, False)], around)
            _with_table(seed, owners, 1)
        draft.entries[ask.key] = seed
    return draft


class _Reader:
    """Makes seeds of one service; what its ports have in common is made once."""

    def __init__(
        self,
        draft: Draft,
        title: str,
        service: Service,
        slices: Sequence[EndpointSlice],
        around: Surroundings,
    ) -> None:
        self._draft, self._title = draft, title
        self._service, self._slices, self._around = service, slices, around
        self._chosen: dict[tuple[int, bool], _Port] = {}
        #: How long lists are that were made.
        self._counts: dict[ListKey, int] = {}
        spec = service.spec
        self._affinity = max(0, min(service.affinity, 0x7FFFFFFF))
        self._inside_local = spec.internal_traffic_policy == "Local"
        self._outside_local = spec.external_traffic_policy == "Local"
        mode = service.metadata.annotations.get(FORWARDING)
        if mode not in (None, "dsr", "snat"):
            self._tell(f"metadata.annotations[{FORWARDING}]: expected dsr or snat, got {mode!r}")
            mode = None
        self._snat = mode == "snat" if mode is not None else around.snat
        slots = service.metadata.annotations.get(SLOTS)
        if slots is not None:
            bits = read_slots(slots)
            if bits is None:
                self._tell(
                    f"metadata.annotations[{SLOTS}]: expected a power of two"
                    f" from {1 << LEAST_SLOT_BITS} to {1 << MOST_SLOT_BITS}, got {slots!r}"
                )
            draft.slot_bits = bits or SLOT_BITS
        self._ranges: ranges.Set | None = None
        if spec.load_balancer_source_ranges:
            field_ = "spec.loadBalancerSourceRanges"
            self._ranges = ranges.read(
                spec.load_balancer_source_ranges, lambda text: self._tell(f"{field_}: {text}")
            )

    def seed(self, name: Name, ask: Ask) -> Seed:
        number, ipv4 = ask.port, is_ipv4(ask.key[0])
        port = self._service.spec.ports[number]
        chosen = self._chosen.get((number, ipv4))
        identity = self._around.ids.service(*name, port.name, port.protocol, port.port)
        if chosen is None:
            chosen = self._chosen[number, ipv4] = self._choose(number, ipv4)
            # What a client of UDP has does not move when it is another zone's or node's turn.
            for one in chosen.every if port.protocol == "UDP" else ():
                if one.serves:
                    self._draft.live((one.spot[0], identity, one.spot[1], UDP), LIVE_KEEPS)
        seed = Seed(identity, SVC_PRESENT, self._affinity)
        if ask.kind == "cluster":
            if self._inside_local:
                self._inside(seed, number, ipv4, _INSIDE, chosen.here)
                if chosen.taking:
                    seed.flags |= SVC_INTERNAL_LOCAL
                return seed
            self._inside(seed, number, ipv4, _NEAR, chosen.near)
            return seed
        self._inside(seed, number, ipv4, _NEAR, chosen.near)
        if ask.kind == "loopback":
            seed.flags |= SVC_HOST_ONLY
            return seed
        seed.flags |= SVC_FRONTEND | (SVC_SNAT if self._snat else 0)
        if self._outside_local and chosen.taking:
            seed.flags |= SVC_LOCAL
        if ask.kind == "balancer" and self._ranges is not None:
            seed.flags |= SVC_RANGES
            seed.ranges = self._ranges
        self._outside(seed, number, ipv4, chosen)
        return seed

    def _choose(self, number: int, ipv4: bool) -> _Port:
        service, around = self._service, self._around
        port = service.spec.ports[number]
        family = "IPv4" if ipv4 else "IPv6"
        every = choose.candidates(
            service, port, family, self._slices, around.node, self._draft.errors
        )
        taking = choose.taking(every)
        near = choose.near(taking, around.node, around.zone)
        if any(one.hints.for_zones for one in taking):
            self._draft.hinted = True
        here = [one for one in every if one.here]
        return _Port(every, taking, near, here)

    def _inside(self, seed: Seed, number: int, ipv4: bool, kind: int, of: list[Candidate]) -> None:
        """The list for clients in the cluster."""
        draft, key = self._draft, _key(number, ipv4, kind)
        if key not in self._counts:
            chosen = choose.spots(choose.taking(of) if kind == _INSIDE else of)
            self._counts[key] = self._limit(chosen)
            if chosen:
                draft.lists[key] = _backends(chosen, self._around)
            protocol = PROTOCOL_NUMBER[self._service.spec.ports[number].protocol]
            bits = LIVE_LOCAL if kind == _INSIDE else LIVE_INSIDE
            for address, target in chosen:
                draft.live((address, seed.id, target, protocol), bits)
        seed.count = self._counts[key]
        seed.backends = key if seed.count else 0

    def _outside(self, seed: Seed, number: int, ipv4: bool, chosen: _Port) -> None:
        """The table for clients outside. Where nobody takes new connections it is of those who
        have some."""
        key = _key(number, ipv4, _OWNERS)
        if key not in self._counts:
            protocol = PROTOCOL_NUMBER[self._service.spec.ports[number].protocol]
            of = chosen.here if self._outside_local else chosen.every
            takes = choose.taking(of) if self._outside_local else chosen.taking
            found = choose.owners(of, takes, protocol == UDP)
            if len(found) > MOST_OWNERS:  # those that end are the first to be left out
                found.sort(key=lambda one: one[1])
                self._limit(found)
                found.sort()
            for (address, target), ends in found:
                bits = LIVE_KEEPS if ends else LIVE_OUTSIDE
                self._draft.live((address, seed.id, target, protocol), bits)
            self._counts[key] = len(found)
            if found:
                _balance(self._draft, key, found, self._around)
        _with_table(seed, key, self._counts[key])

    def _limit(self, found: list[Any]) -> int:
        if len(found) > MOST_OWNERS:
            self._tell(f"{len(found)} backends, the first {MOST_OWNERS} serve")
            del found[MOST_OWNERS:]
        return len(found)

    def _tell(self, text: str) -> None:
        self._draft.errors.append(f"{self._title}: {text}")


@dataclass(slots=True)
class _Port:
    """Of one port and family: all endpoints, those that take new connections, those of them for
    clients here, and all on this node."""

    every: list[Candidate]
    taking: list[Candidate]
    near: list[Candidate]
    here: list[Candidate]


def _key(number: int, ipv4: bool, kind: int) -> ListKey:
    """Never 0."""
    return 1 + (number * 2 + ipv4) * 4 + kind


def _backends(chosen: Sequence[Spot], around: Surroundings) -> bytes:
    return b"".join(
        ADDRESS_PORT.pack(address, port) + _FLAGS_NUMBER.pack(0, around.endpoint(address))
        for address, port in chosen
    )


def _with_table(seed: Seed, owners: ListKey, count: int) -> None:
    if count:
        seed.owners, seed.table, seed.owner_count = owners, owners - _OWNERS + _TABLE, count


def _balance(
    draft: Draft, key: ListKey, found: Sequence[tuple[Spot, bool]], around: Surroundings
) -> None:
    """The owners in order, and what their table is made of."""
    words = []
    for (address, port), ends in found:
        target = around.target(address)
        draft.hosting |= target >> TARGET_SHIFT == TO_HOST
        flags = OWNER_ENDS if ends else 0
        words.append(ADDRESS_PORT.pack(address, port) + _FLAGS_NUMBER.pack(flags, target))
    draft.lists[key] = b"".join(words)
    draft.tables[key - _OWNERS + _TABLE] = tuple(
        Owner(address, port, ends, around.weight(address)) for (address, port), ends in found
    )

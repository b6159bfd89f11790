"""Services, EndpointSlices and hostPorts → service entries, lists and tables, patched by holder.

A *holder* is a service, or a pod of the node with hostPorts. What it came to is a `Part`, made anew
whenever anything of it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lockgate.compile import drafts, frontends
from lockgate.compile.balance import Owner, Table, number_bits, patch, slot_bits, tables
from lockgate.compile.choose import of_others
from lockgate.compile.claims import POD, SERVICE, Claim, Claims, Holder, claim, conflict, title
from lockgate.compile.drafts import Draft, ListKey, Seed, Surroundings
from lockgate.compile.image import Image
from lockgate.compile.live import Live
from lockgate.compile.pods import PodFacts
from lockgate.compile.ranges import Ranges
from lockgate.compile.ranges import Set as RangeSet
from lockgate.compile.tables import (
    SVC_FRONTEND,
    SVC_HOST_ONLY,
    SVC_OPEN,
    SVC_PRESENT,
    TARGET_SHIFT,
    TO_NOWHERE,
    BackendKey,
    ServiceKey,
    ServiceView,
    Words,
)
from lockgate.compile.touched import Touched
from lockgate.objects.changes import Name
from lockgate.objects.model import Cluster, EndpointSlice, Pod, Service

__all__ = ["Services"]

#: Tables of more owners are patched: their owners are kept for that.
_SMALL = 16
#: Holders that are made at once.
_TOGETHER = 256


@dataclass(slots=True)
class Part:
    """What one holder came to. Lists: where they are, and their sizes in words; in `left` where
    those with `owners` were in the image before. Their tables have 1 << slot_bits slots."""

    object: Service | Pod
    claims: tuple[Claim, ...] = ()
    entries: tuple[ServiceKey, ...] = ()
    rooms: dict[ListKey, tuple[int, int]] = field(default_factory=dict)
    owners: dict[ListKey, tuple[Owner, ...]] = field(default_factory=dict)
    ranges: tuple[RangeSet, ...] = ()
    backends: tuple[BackendKey, ...] = ()
    errors: tuple[str, ...] = ()
    slot_bits: int = 0
    left: dict[ListKey, tuple[int, int]] = field(default_factory=dict)


@dataclass(slots=True)
class _Wish:
    """What a holder asks for, before it is known what it gets."""

    object: Service | Pod
    asks: list[Any]
    claims: tuple[Claim, ...]
    errors: list[str]
    addresses: tuple[bytes, ...] = ()


class Services:
    """All holders. `views` and `live` are what the kernel looks up."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._ranges = Ranges(image)
        self.views: Touched[ServiceKey, ServiceView] = Touched()
        self.live = Live()
        self.parts: dict[Holder, Part] = {}
        #: The slices by their own name, and by the service they are of.
        self.slices: dict[Name, EndpointSlice] = {}
        self._slices_of: dict[Name, tuple[Name, ...]] = {}
        self._claims = Claims()
        #: How many entries with a port are at an address.
        self._count: dict[bytes, int] = {}
        self._due: set[bytes] = set()
        self._left: Words | None = None
        self._faulty: set[Holder] = set()
        self._hosting: set[Holder] = set()
        #: Who looks otherwise with other addresses of the node, or from another zone.
        self.at_node: set[Holder] = set()
        self.hinted: set[Holder] = set()

    def begin(self) -> None:
        """What is touched from here on is told apart from what is there."""
        self.views.begin()
        self.live.begin()

    def objects(self, kind: int) -> dict[Name, Any]:
        """What parts were made of."""
        return {key[1:]: part.object for key, part in self.parts.items() if key[0] == kind}

    @property
    def hosting(self) -> bool:
        """Do processes of the node serve clients outside?"""
        return bool(self._hosting)

    def change(
        self,
        cluster: Cluster,
        pods: Mapping[Name, PodFacts],
        again: set[Holder],
        slices: Iterable[Name],
        addresses: Iterable[bytes],
        around: Surroundings,
    ) -> None:
        """Read again what these holders and slices, or what is at these addresses, concern. `pods`
        are those of the node."""
        for name in slices:
            again.update((SERVICE, *one) for one in self._move(name, cluster.slices.get(name)))
        for address in addresses:
            again.update(self.live.users(address))
            again.update(self._claims.at(address))
        wishes: dict[Holder, _Wish | None] = {}
        queue = list(again)
        while queue:
            key = queue.pop()
            if key in wishes:
                continue
            wishes[key] = self._wish(key, cluster, pods, around)
            queue += self._claim(key, wishes[key])
        keys = sorted(wishes)
        for start in range(0, len(keys), _TOGETHER):
            self._make({key: wishes[key] for key in keys[start : start + _TOGETHER]}, around)
        self._read_addresses(around)
        self._left = None

    def _make(self, wishes: Mapping[Holder, _Wish | None], around: Surroundings) -> None:
        made = {
            key: self._draft(key, wish, around) for key, wish in wishes.items() if wish is not None
        }
        ready = self._tables(made)
        for key, wish in wishes.items():
            self._put(key, wish, made.get(key), ready)

    def owners_moved(self, addresses: Iterable[bytes]) -> None:
        """Nodes or pods have, or no longer have, these addresses; or this node may."""
        self._due.update(address for address in addresses if address in self._count)

    def place_again(self, left: Words) -> None:
        """The image has no lists any more: all holders are to be made again. `left`: its words
        before."""
        self._ranges.forget()
        self._left = left
        for part in self.parts.values():
            part.left = {number: part.rooms[number] for number in part.owners}
            part.rooms, part.ranges = {}, ()

    def errors(self) -> list[str]:
        """What is wrong with services, slices and hostPorts, each named."""
        return [text for key in sorted(self._faulty) for text in self.parts[key].errors]

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
            if slice_.service and not of_others(slice_.metadata):
                home = slice_.metadata.namespace, slice_.service
                _add(self._slices_of, home, key)
                concerned.append(home)
        return concerned

    def _wish(
        self, key: Holder, cluster: Cluster, pods: Mapping[Name, PodFacts], around: Surroundings
    ) -> _Wish | None:
        errors: list[str] = []
        if key[0] == POD:
            facts = pods.get(key[1:])
            if facts is None:
                return None
            found = frontends.of_pod(facts.pod, facts.addresses, around.own, errors)
            if not found and not errors:
                return None
            claims = _claims(ask for ask, _ in found)
            return _Wish(facts.pod, found, claims, errors, facts.addresses)
        service = cluster.services.get(key[1:])
        if service is None:
            return None
        if of_others(service.metadata):
            return _Wish(service, [], (), errors)
        asks = frontends.of_service(service, around.own, errors)
        return _Wish(service, asks, _claims(asks), errors)

    def _claim(self, key: Holder, wish: _Wish | None) -> set[Holder]:
        """Its claims are others now: the other holders that this concerns. All their entries are
        away, for they may become somebody else's."""
        part = self.parts.get(key)
        before = part.claims if part is not None else ()
        after = wish.claims if wish is not None else ()
        if before == after:
            return set()
        self._due.update(one[0][0] for one in {*before} ^ {*after} if one[0][1:] == (0, 0))
        if part is not None:
            part.claims = after
        concerned = self._claims.change(key, before, after)
        for one in (key, *concerned):
            self._withdraw(one)
        return concerned

    # ---- One holder ------------------------------------------------------------------

    def _draft(self, key: Holder, wish: _Wish, around: Surroundings) -> Draft:
        errors = wish.errors
        name = key[1:]
        granted = []
        for one in wish.asks:
            ask = one[0] if key[0] == POD else one
            holder = self._claims.holder(ask.key)
            if holder != key:
                errors.append(conflict(key, ask, title(holder)))
            elif ask.kind in ("balancer", "external") and around.endpoint(ask.key[0]):
                errors.append(conflict(key, ask, "a pod that has the address"))
            else:
                granted.append(one)
        if isinstance(wish.object, Pod):
            draft = drafts.of_pod(wish.object, granted, wish.addresses, around)
        else:
            slices = [self.slices[one] for one in sorted(self._slices_of.get(name, ()))]
            first = {ask.key: ask for ask in reversed(granted)}  # of two that are one entry
            draft = drafts.of_service(name, wish.object, list(first.values()), slices, around)
        draft.errors = list(dict.fromkeys(errors)) + draft.errors
        return draft

    def _tables(self, made: Mapping[Holder, Draft]) -> dict[tuple[Holder, ListKey], Words]:
        """The words of all tables; small ones are worked out together."""
        found: dict[tuple[Holder, ListKey], Words] = {}
        small: list[tuple[Holder, ListKey]] = []
        for key, draft in made.items():
            for number, owners in draft.tables.items():
                before = self._before(key, number)
                if before is not None and len(owners) > _SMALL:
                    found[key, number] = patch(before, owners, draft.slot_bits)
                else:
                    small.append((key, number))
        wanted = [(made[key].tables[number], made[key].slot_bits) for key, number in small]
        words = tables(wanted)
        found.update(zip(small, words, strict=True))
        return found

    def _before(self, key: Holder, number: ListKey) -> Table | None:
        part = self.parts.get(key)
        owners = part.owners.get(number) if part is not None else None
        if part is None or owners is None:
            return None
        if self._left is not None:
            at, size = part.left[number]
            return Table(owners, part.slot_bits, self._left[at : at + size])
        at, size = part.rooms[number]
        return Table(owners, part.slot_bits, self._image.words[at : at + size])

    def _put(
        self,
        key: Holder,
        wish: _Wish | None,
        draft: Draft | None,
        ready: Mapping[tuple[Holder, ListKey], Words],
    ) -> None:
        old = self.parts.pop(key, None)
        draft = draft or Draft()
        rooms = {} if old is None else old.rooms
        places: dict[ListKey, tuple[int, int]] = {}
        lists: dict[ListKey, bytes | Words] = {**draft.lists}
        for number in draft.tables:
            lists[number] = ready[key, number]
        for number, words in lists.items():
            places[number] = self._place(words, rooms.pop(number, None))
        for at, size in rooms.values():
            self._image.give_back(at, size)
        sets = tuple({seed.ranges for seed in draft.entries.values() if seed.ranges is not None})
        where = {one: self._ranges.take(one) for one in sets}
        for one in () if old is None else old.ranges:
            self._ranges.give_back(one)
        for entry in () if old is None else old.entries:
            if entry not in draft.entries:
                self._view(entry, None)
        for entry, seed in draft.entries.items():
            self._view(entry, _view(seed, draft, places, where))
        self.live.change(key, () if old is None else old.backends, draft.backends)
        for holders, belongs in (
            (self._faulty, bool(draft.errors)),
            (self._hosting, draft.hosting),
            (self.hinted, draft.hinted),
            (self.at_node, wish is not None and _is_at_node(wish)),
        ):
            if belongs:
                holders.add(key)
            else:
                holders.discard(key)
        if wish is None:
            return
        self.parts[key] = Part(
            wish.object,
            wish.claims,
            tuple(draft.entries),
            places,
            {number: of for number, of in draft.tables.items() if len(of) > _SMALL},
            sets,
            tuple(draft.backends),
            tuple(draft.errors),
            draft.slot_bits,
        )

    def _withdraw(self, key: Holder) -> None:
        """Take a holder's entries away."""
        part = self.parts.get(key)
        if part is not None:
            for entry in part.entries:
                self._view(entry, None)
            part.entries = ()

    def _place(self, words: bytes | Words, room: tuple[int, int] | None) -> tuple[int, int]:
        """Where a list is, after it was put there; `room`: of the one before."""
        size = len(words) // 8 if isinstance(words, bytes) else len(words)
        if room is not None and Image.fits(room[1], size):
            at = room[0]
        else:
            if room is not None:
                self._image.give_back(*room)
            at = self._image.place(size)
        self._image.write(at, words)
        return at, size

    def _view(self, key: ServiceKey, view: ServiceView | None) -> None:
        more = (view is not None) - (key in self.views)
        if more:
            count = self._count.get(key[0], 0) + more
            if count:
                self._count[key[0]] = count
            else:
                del self._count[key[0]]
            self._due.add(key[0])
        self.views.put(key, view)

    # ---- Addresses -------------------------------------------------------------------

    def _read_addresses(self, around: Surroundings) -> None:
        """The entries without port, wherever they may be others."""
        due, self._due = self._due, set()
        for address in due:
            whole = self._claims.is_cluster_ip(address)
            if not whole and not self._count.get(address):
                self.views.put((address, 0, 0), None)
                continue
            flags = SVC_PRESENT
            if address in frontends.LOOPBACK:
                flags |= SVC_HOST_ONLY | SVC_OPEN
            elif not whole:
                flags |= SVC_FRONTEND
                if around.target(address) >> TARGET_SHIFT != TO_NOWHERE:
                    flags |= SVC_OPEN
            self.views.put((address, 0, 0), ServiceView(0, 0, 0, flags))


def _claims(asks: Iterable[frontends.Ask]) -> tuple[Claim, ...]:
    """Of two for one key the first, as of two entries."""
    found: dict[ServiceKey, int] = {}
    for ask in asks:
        found.setdefault(*claim(ask))
    return tuple(found.items())


def _is_at_node(wish: _Wish) -> bool:
    if isinstance(wish.object, Pod):
        return True
    spec = wish.object.spec
    return spec.type in ("NodePort", "LoadBalancer") and any(p.node_port for p in spec.ports)


def _view(
    seed: Seed,
    draft: Draft,
    places: Mapping[ListKey, tuple[int, int]],
    where: Mapping[RangeSet, int],
) -> ServiceView:
    return ServiceView(
        seed.id,
        places[seed.backends][0] if seed.backends else 0,
        seed.count,
        seed.flags,
        seed.affinity,
        places[seed.table][0] if seed.table else 0,
        places[seed.owners][0] if seed.owners else 0,
        slot_bits(seed.owner_count, draft.slot_bits) if seed.table else 0,
        number_bits(seed.owner_count) if seed.table else 0,
        seed.owner_count,
        where[seed.ranges] if seed.ranges is not None else 0,
    )


def _add(table: dict[Any, tuple[Any, ...]], key: Any, name: Any) -> None:
    table[key] = (*table.get(key, ()), name)


def _remove(table: dict[Any, tuple[Any, ...]], key: Any, name: Any) -> None:
    left = tuple(one for one in table.get(key, ()) if one != name)
    if left:
        table[key] = left
    else:
        table.pop(key, None)

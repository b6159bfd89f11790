"""Tables into the kernel: two views, one epoch (docs/architecture.md, Two views, one epoch).

Tables that tell what differs from those in force cost that: the idle view is one publication
behind, so it gets the differences of the last two. All others, and the first two, are compared
with what the maps hold: where that says the same, laid out otherwise, nothing moves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.alike import View, alike
from lockgate.agent.datapath import Datapath
from lockgate.agent.encode import (
    EP_LIVE,
    Bytes,
    Encoder,
    EndpointRecord,
    Wanted,
    rows,
    words,
)
from lockgate.agent.two_views import TwoViews
from lockgate.bpf.grace import wait_grace
from lockgate.bpf.maps import MappedArray
from lockgate.compile.tables import Delta, Tables, Words

__all__ = ["EndpointRecord", "Publisher"]

log = logging.getLogger(__name__)

_MAX_EPOCH = 0xFFFFFFFF


class Publisher:
    """Brings tables in force. One at a time, from one thread."""

    def __init__(self, datapath: Datapath) -> None:
        self._dp = datapath
        schema = datapath.object.schema
        self._encoder = Encoder(schema, len(datapath.endpoints))
        self._endpoint = schema.dtype("endpoint")
        # Rows of words: what a pod is, then what it is in one view and in the other.
        self._endpoints = words(datapath.endpoints.view)
        self._static = _offset(self._endpoint, "view") // 8
        self._view_words = schema.dtype("endpoint_view").itemsize // 8
        self._peer_view, self._service_view = map(schema.dtype, ("peer_view", "service_view"))
        # The grace period after each move of the epoch passes beside other work; the first is
        # for a predecessor's last move.
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="grace")
        self._grace = self._waiter.submit(wait_grace)
        self._hops = _by_view(datapath.hops.view)
        self.read_back()

    @property
    def epoch(self) -> int:
        """The epoch in force; 0 = nothing was ever published."""
        return int(self._dp.state.view["epoch"][0])

    @property
    def sizes(self) -> dict[str, int]:
        """Elements and image words, for status."""
        return {
            **self._counts,
            "imageWords": sum(len(i) for i in self._inner if i is not None),
        }

    async def settled(self) -> None:
        """Until the idle view may be written: who takes what there is to publish only then has
        what came meanwhile with it, instead of one grace period later."""
        await asyncio.wait({asyncio.wrap_future(self._grace)})

    def read_back(self) -> None:
        """Learn what the maps hold."""
        self._inner: list[MappedArray | None] = [self._dp.images.inner(v) for v in (0, 1)]
        self._peers = TwoViews(self._dp.peers, self._peer_view.itemsize)
        self._services = TwoViews(self._dp.services, self._service_view.itemsize)
        self._backends = TwoViews(self._dp.backends, 1)
        self._counts = {
            "peers": len(self._peers),
            "services": len(self._services),
            "backends": len(self._backends),
        }
        # The serial of the tables in force, and what the idle view lacks of them, if it is known.
        self._serial = 0
        self._behind: Delta | None = None
        # Are those in force, byte by byte? Else they only say the same.
        self._exact = True
        # What was written last, by view: the same arrays again need no comparison.
        self._slots: NDArray[Any] | None = None
        self._views: list[NDArray[Any] | None] = [None, None]
        self._hop_tables: list[NDArray[Any] | None] = [None, None]
        self._certain = True

    def hops(self) -> NDArray[Any]:
        """A copy of the hops in force, as `struct hop_view` by number."""
        return self._dp.hops.view["view"][:, self.epoch & 1].copy()

    def publish(
        self, tables: Tables, endpoints: Mapping[int, EndpointRecord], hops: NDArray[Any]
    ) -> bool:
        """Bring `tables`, with the local pods `endpoints` by slot and the `hops` by number, in
        force together; False if they are already. On an error what was in force still is. Blocks
        for a grace period. `hops` that changed are to be another array."""
        if not self._certain:
            self.read_back()
        slots, views = self._encoder.endpoints(tables, endpoints)
        delta, behind = tables.delta, self._behind
        if delta is not None and delta.base != self._serial:
            delta = None
        wanted = self._encoder.encode(tables) if delta is None else None
        epoch = self.epoch
        # Connections remember the epoch that judged them, also those that programs of another
        # version judge beside ours: one number, one meaning.
        if (
            epoch > self._dp.beyond
            and self._has_slots(slots)
            and self._has_hops(epoch & 1, hops)
            and (
                self._in_force(epoch & 1, tables, wanted, views)
                if wanted is not None
                else not delta and self._has_views(epoch & 1, views)
            )
        ):
            if tables.serial != self._serial and delta is None:
                self._behind = None
            self._serial = tables.serial
            self._dp.state.view["host_backends"][0] |= tables.host_backends
            return False
        following = epoch + 1 if epoch < _MAX_EPOCH else 2
        if following <= self._dp.beyond < _MAX_EPOCH - 2:
            following += (self._dp.beyond - following) // 2 * 2 + 2
        idle = following & 1
        # Whoever reads the idle view began before the last move of the epoch; by now they have
        # mostly finished.
        self._grace.result()
        self._certain = False
        if delta is not None and behind is not None and self._exact:
            self._patch(idle, tables, delta, behind)
        else:
            self._write(idle, tables, wanted or self._encoder.encode(tables))
        self._write_endpoints(idle, slots, views)
        self._write_hops(idle, hops)
        # to_net has to be at work when the first answer leaves, and until the last view is left
        # that has such backends: the answers of open connections stop being translated with it.
        state = self._dp.state.view
        state["host_backends"][0] |= tables.host_backends
        state["epoch"][0] = following
        self._grace = self._waiter.submit(wait_grace)
        if slots is not self._slots:
            # Those no longer wanted: from here on their packets are refused, not unjudged.
            mine = self._dp.endpoints.view
            stale = (mine["id"] != 0) & (slots["id"] == 0)
            for slot in np.flatnonzero(stale):
                mine[slot] = np.zeros((), self._endpoint)
            self._slots = slots
        if not self._exact:
            delta, self._views[1 - idle], self._exact = None, None, True
        self._serial, self._behind = tables.serial, delta
        self._counts = {
            "peers": len(tables.peers),
            "services": len(tables.services),
            "backends": len(tables.backends),
        }
        self._certain = True
        return True

    def level(self, tables: Tables) -> None:
        """Bring the idle view to what is in force, `tables`, if it is not known what it lacks: so
        that the next change costs what it changes. Blocks for a grace period then."""
        if self._behind is not None or tables.serial != self._serial:
            return
        if not self._certain or not self._exact:
            return
        self._grace.result()
        self._certain = False
        self._write(1 - (self.epoch & 1), tables, self._encoder.encode(tables))
        self._behind = Delta(tables.serial, words=[])
        for table in (self._peers, self._services, self._backends):
            table.forget()
        self._certain = True

    # ---- Inside --------------------------------------------------------------------

    def _write(self, idle: int, tables: Tables, wanted: Wanted) -> None:
        self._write_image(idle, tables.image)
        self._peers.write(idle, *wanted.peers)
        self._services.write(idle, *wanted.services)
        self._backends.write(idle, *wanted.backends)

    def _patch(self, idle: int, tables: Tables, delta: Delta, behind: Delta) -> None:
        if behind.words is None or delta.words is None:
            self._write_image(idle, tables.image)
        else:
            self._write_image(idle, tables.image, behind.words + delta.words)
        peers, services, backends = self._encoder.patches(tables, delta, behind)
        self._peers.patch(idle, peers)
        self._services.patch(idle, services)
        self._backends.patch(idle, backends)

    def _in_force(self, view: int, tables: Tables, wanted: Wanted, views: NDArray[Any]) -> bool:
        """Do packets find in `view` what `wanted` says? Notes whether it is the same in all."""
        image = self._inner[view]
        if image is None:
            return False
        mine = self._dp.endpoints.view["view"][:, view]
        live = Wanted(*(t.table(view) for t in (self._peers, self._services, self._backends)))
        exact = (
            np.array_equal(image.view[: len(tables.image)], tables.image)
            and np.array_equal(mine, views)
            and all(np.array_equal(a, b) for a, b in zip(chain(*live), chain(*wanted), strict=True))
        )
        said, told = self._view(image.view, live, mine), self._view(tables.image, wanted, views)
        if not exact and not alike(told, said):
            return False
        self._exact = exact
        # Also where it is laid out otherwise: the same array again says the same.
        self._views[view] = views
        return True

    def _view(self, image: Words, tables: Wanted, endpoints: NDArray[Any]) -> View:
        peers, services = tables.peers, tables.services
        return View(
            image,
            (peers[0], peers[1].view(self._peer_view).reshape(-1)),
            (services[0], services[1].view(self._service_view).reshape(-1)),
            tables.backends,
            endpoints,
        )

    def _has_views(self, view: int, views: NDArray[Any]) -> bool:
        if self._views[view] is not views:
            if not np.array_equal(self._endpoint_views(view), words(views)):
                return False
            self._views[view] = views
        return True

    def _has_slots(self, slots: NDArray[Any]) -> bool:
        return slots is self._slots or np.array_equal(
            self._endpoints[:, : self._static], words(slots)[:, : self._static]
        )

    def _has_hops(self, view: int, hops: NDArray[Any]) -> bool:
        if self._hop_tables[view] is not hops:
            if not np.array_equal(self._hops[:, view], _as_rows(hops)):
                return False
            self._hop_tables[view] = hops
        return True

    def _write_hops(self, view: int, hops: NDArray[Any]) -> None:
        if self._hop_tables[view] is not hops:
            _write_rows(self._hops[:, view], _as_rows(hops))
            self._hop_tables[view] = hops

    def _write_image(
        self,
        view: int,
        image: NDArray[np.uint64],
        ranges: list[tuple[int, int]] | None = None,
    ) -> None:
        """`ranges`: the words that may differ; None if any may."""
        inner = self._inner[view]
        if inner is not None and len(inner) >= len(image):
            if ranges is not None:
                for first, behind in ranges:
                    inner.view[first:behind] = image[first:behind]
                return
            different = np.flatnonzero(inner.view[: len(image)] != image)
            if len(different):
                part = slice(different[0], different[-1] + 1)
                inner.view[part] = image[part]
            return
        # A quarter more, so that it does not grow with every rule.
        larger = self._dp.images.create_inner(len(image) + len(image) // 4)
        larger.view[: len(image)] = image
        self._dp.images.replace(view, larger)
        if inner is not None:
            inner.close()
        self._inner[view] = larger

    def _endpoint_views(self, view: int) -> Words:
        """What the pods are in one view, as rows of words that share the map's memory."""
        first = self._static + view * self._view_words
        return self._endpoints[:, first : first + self._view_words]

    def _write_endpoints(self, view: int, slots: NDArray[Any], views: NDArray[Any]) -> None:
        if slots is not self._slots:
            live = (slots["flags"] & EP_LIVE) != 0
            static = np.s_[:, : self._static]
            _write_rows(self._endpoints[static], words(slots)[static], live)
        if self._views[view] is not views:
            _write_rows(self._endpoint_views(view), words(views))
            self._views[view] = views


def _by_view(records: NDArray[Any]) -> Bytes:
    """Records of two views as bytes: [number, view, byte]."""
    return records.view(np.uint8).reshape(len(records), 2, -1)


def _offset(struct: np.dtype[Any], field: str) -> int:
    """Of a field, in bytes."""
    assert struct.fields is not None
    return int(struct.fields[field][1])


def _write_rows(mine: NDArray[Any], wanted: NDArray[Any], only: Any = True) -> None:
    """Those that differ, of those that `only` says."""
    at = np.flatnonzero((mine != wanted).any(axis=1) & only)
    mine[at] = wanted[at]


def _as_rows(records: NDArray[Any]) -> Bytes:
    return rows(records, records.dtype.itemsize)

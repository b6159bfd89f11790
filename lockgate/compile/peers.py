"""The table of peers, patched by address.

An address has a row, and addresses that nothing can tell apart are on one *spot*: so a change
of what classes there are costs a pass over arrays, and a change of a pod costs its own rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lockgate.compile.tables import PeerView

__all__ = ["NO_SPOT", "Peers"]

#: Of an address whose class is not that of a spot: a node's.
NO_SPOT = -1
_FREE = b""
_NOTHING = (0, 0, 0, 0)


class Peers(Mapping[bytes, PeerView]):
    """What each address is. `before` has, of all that was touched since `begin`, what was there
    then, or None."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}
        self._records = np.zeros((64, 4), np.uint32)
        self._spots = np.full(64, NO_SPOT, np.int32)
        self._addresses: list[bytes] = []
        self._free: list[int] = []
        self.before: dict[bytes, PeerView | None] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._rows)

    def __contains__(self, address: object) -> bool:
        return address in self._rows

    def __getitem__(self, address: bytes) -> PeerView:
        return PeerView._make(self._records[self._rows[address]].tolist())

    def endpoint(self, address: bytes) -> int:
        """The endpoint id of an address; 0 for what is no pod."""
        row = self._rows.get(address)
        return 0 if row is None else int(self._records.item(row, 1))

    def where(self, address: bytes) -> tuple[int, int] | None:
        """Kind and target of an address; None for what is not here."""
        row = self._rows.get(address)
        if row is None:
            return None
        return int(self._records.item(row, 2)), int(self._records.item(row, 3))

    def records(self) -> NDArray[np.uint32]:
        """What `PeerView` has, by position: of all addresses, in their order."""
        return self._records[np.fromiter(self._rows.values(), np.intp, len(self._rows))]

    def take(self, addresses: Collection[bytes]) -> NDArray[np.uint32]:
        """What `PeerView` has, by position, of each of `addresses`; zeroes for what is not here."""
        rows = np.array([self._rows.get(a, -1) for a in addresses], np.intp)
        found = self._records[rows]
        found[rows < 0] = 0
        return found

    # ---- Changes ---------------------------------------------------------------------

    def begin(self) -> None:
        """What is touched from here on is told apart from what is there."""
        self.before = {}

    def put(self, address: bytes, view: PeerView, spot: int) -> None:
        """Make this address so."""
        row = self._rows.get(address)
        if row is None:
            self.before.setdefault(address, None)
            row = self._rows[address] = self._take(address)
        else:
            known = PeerView._make(self._records[row].tolist())
            if known == view:
                self._spots[row] = spot
                return
            self.before.setdefault(address, known)
        self._records[row] = view
        self._spots[row] = spot

    def drop(self, address: bytes) -> None:
        """Nothing is known of this address any more."""
        row = self._rows.pop(address, None)
        if row is not None:
            self.before.setdefault(address, PeerView._make(self._records[row].tolist()))
            self._spots[row] = NO_SPOT
            self._addresses[row] = _FREE
            self._free.append(row)

    def classify(self, classes: Sequence[int]) -> None:
        """`classes` of the spots, by number."""
        if not classes:
            return
        on_spot = np.flatnonzero(self._spots != NO_SPOT)
        wanted = np.array(classes, np.uint32)[self._spots[on_spot]]
        differ = self._records[on_spot, 0] != wanted
        rows = on_spot[differ]
        for row, record in zip(rows.tolist(), self._records[rows].tolist(), strict=True):
            self.before.setdefault(self._addresses[row], PeerView._make(record))
        self._records[rows, 0] = wanted[differ]

    def spots(self, number: Mapping[bytes, int]) -> None:
        """Number the spots anew; no others than these addresses have one."""
        self._spots[:] = NO_SPOT
        for address, spot in number.items():
            self._spots[self._rows[address]] = spot

    def delta(self) -> dict[bytes, PeerView | None]:
        """What is another than at `begin`: what it was then."""
        now = self.take(self.before).tolist()
        return {
            address: was
            for (address, was), record in zip(self.before.items(), now, strict=True)
            if (was or _NOTHING) != tuple(record)
        }

    def _take(self, address: bytes) -> int:
        if self._free:
            row = self._free.pop()
            self._addresses[row] = address
            return row
        row = len(self._addresses)
        self._addresses.append(address)
        if row == len(self._spots):
            more = row + row // 4
            self._records = np.concatenate((self._records, np.zeros((more - row, 4), np.uint32)))
            self._spots = np.concatenate((self._spots, np.full(more - row, NO_SPOT, np.int32)))
        return row

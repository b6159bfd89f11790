"""Who is a backend of which service, and whose backends have an address."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lockgate.compile.claims import Holder
from lockgate.compile.tables import BackendKey
from lockgate.compile.touched import Touched

__all__ = ["Live"]


class Live:
    """`backends`, with their LIVE_ bits: what a connection is asked by later."""

    def __init__(self) -> None:
        self.backends: Touched[BackendKey, int] = Touched()
        self._users: dict[bytes, tuple[Holder, ...]] = {}

    def begin(self) -> None:
        """What is touched from here on is told apart from what is there."""
        self.backends.begin()

    def users(self, address: bytes) -> Iterable[Holder]:
        """The holders whose backends have an address."""
        return self._users.get(address, ())

    def change(
        self, holder: Holder, old: Collection[BackendKey], new: Mapping[BackendKey, int]
    ) -> None:
        """A holder's are others now. No other has the ids of its ports."""
        for one in old:
            if one not in new:
                self.backends.put(one, None)
        for one, bits in new.items():
            self.backends.put(one, bits)
        before, after = {one[0] for one in old}, {one[0] for one in new}
        for address in before - after:
            left = tuple(one for one in self._users[address] if one != holder)
            if left:
                self._users[address] = left
            else:
                del self._users[address]
        for address in after - before:
            self._users[address] = (*self._users.get(address, ()), holder)

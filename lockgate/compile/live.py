"""Who is a backend of which service, and whose backends have an address."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lockgate.compile.claims import Holder
from lockgate.compile.tables import BackendKey

__all__ = ["Live"]


class Live:
    """`backends`, and of these those that end: what a connection is asked by later."""

    def __init__(self) -> None:
        self.backends: set[BackendKey] = set()
        self.ending: set[BackendKey] = set()
        self._backends_before: dict[BackendKey, bool] = {}
        self._ending_before: dict[BackendKey, bool] = {}
        self._users: dict[bytes, tuple[Holder, ...]] = {}

    def begin(self) -> None:
        """What is touched from here on is told apart from what is there."""
        self._backends_before, self._ending_before = {}, {}

    def users(self, address: bytes) -> Iterable[Holder]:
        """The holders whose backends have an address."""
        return self._users.get(address, ())

    def change(
        self, holder: Holder, old: Collection[BackendKey], new: Mapping[BackendKey, bool]
    ) -> None:
        """A holder's are others now: `new`, and whether they end. No other has the ids of its
        ports."""
        for one in old:
            if one not in new:
                _drop(self.backends, self._backends_before, one)
            if not new.get(one):
                _drop(self.ending, self._ending_before, one)
        for one, ends in new.items():
            if one not in self.backends:
                self._backends_before.setdefault(one, False)
                self.backends.add(one)
            if ends and one not in self.ending:
                self._ending_before.setdefault(one, False)
                self.ending.add(one)
        before, after = {one[0] for one in old}, {one[0] for one in new}
        for address in before - after:
            left = tuple(one for one in self._users[address] if one != holder)
            if left:
                self._users[address] = left
            else:
                del self._users[address]
        for address in after - before:
            self._users[address] = (*self._users.get(address, ()), holder)

    def backends_delta(self) -> dict[BackendKey, bool]:
        """What is another than at `begin`: whether it was there."""
        return _delta(self._backends_before, self.backends)

    def ending_delta(self) -> dict[BackendKey, bool]:
        """The same of those that end."""
        return _delta(self._ending_before, self.ending)


def _drop(members: set[BackendKey], before: dict[BackendKey, bool], one: BackendKey) -> None:
    if one in members:
        before.setdefault(one, True)
        members.discard(one)


def _delta(before: Mapping[BackendKey, bool], now: set[BackendKey]) -> dict[BackendKey, bool]:
    return {one: was for one, was in before.items() if (one in now) != was}

"""A table that remembers what changed in it."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["Touched"]

K = TypeVar("K")
V = TypeVar("V")


class Touched(dict[K, V]):
    """A dict to be changed by `put` only. `before` has, of all that was touched since `begin`,
    what was there then, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[K, V | None] = {}

    def begin(self) -> None:
        """What is touched from here on is told apart from what is there."""
        self.before = {}

    def put(self, key: K, value: V | None) -> None:
        """Make it so; None: nothing is there."""
        known = self.get(key)
        if known == value:
            return
        self.before.setdefault(key, known)
        if value is None:
            del self[key]
        else:
            self[key] = value

    def delta(self) -> dict[K, V | None]:
        """What is another than at `begin`: what it was then."""
        return {key: was for key, was in self.before.items() if self.get(key) != was}

"""The image as it lasts: policies in front, and behind them lists that change by themselves."""

from __future__ import annotations

import numpy as np

from lockgate.compile.tables import Words

__all__ = ["Image"]

#: Room that policies get beside what they need, so that the lists need not move with each rule.
_SLACK = 1024


class Image:
    """The image's words. `changed` are the ranges (first, behind the last) written since it was
    emptied; None when all are to be taken for changed."""

    def __init__(self) -> None:
        self._words = np.zeros(0, np.uint64)
        self._start = self._end = 0
        # Rooms that were given up, by their size.
        self._free: dict[int, list[int]] = {}
        self.changed: list[tuple[int, int]] | None = None
        #: What it was before all lists had to be placed anew, until `begin`.
        self.left: Words = self._words

    @property
    def words(self) -> Words:
        """The image as it is now; what changes later changes there too."""
        return self._words[: self._end]

    def begin(self) -> None:
        """What is written from here on is told apart."""
        self.changed, self.left = [], self._words[:0]

    def set_front(self, front: Words) -> bool:
        """Put the policies' words in front. True if all lists must be placed anew."""
        if len(front) > self._start:
            self.left = self.words
            self._start = self._end = len(front) + len(front) // 8 + _SLACK
            self._words = np.zeros(self._start, np.uint64)
            self._words[: len(front)] = front
            self._free, self.changed = {}, None
            return True
        different = np.flatnonzero(self._words[: len(front)] != front)
        if len(different):
            first, last = int(different[0]), int(different[-1])
            self._words[first : last + 1] = front[first : last + 1]
            self._note(first, last + 1)
        return False

    def place(self, size: int) -> int:
        """Room for `size` words."""
        room = _room(size)
        free = self._free.get(room)
        if free:
            return free.pop()
        at = self._end
        self._end += room
        if self._end >= 1 << 32:
            raise OverflowError(f"the verdict image needs {self._end} words, the limit is 2^32")
        if self._end > len(self._words):
            more = self._end + (self._end - self._start) // 4
            self._words = np.concatenate(
                (self._words, np.zeros(more - len(self._words), np.uint64))
            )
        return at

    def give_back(self, at: int, size: int) -> None:
        """The room at `at`, of `size` words, is free."""
        self._free.setdefault(_room(size), []).append(at)

    @staticmethod
    def fits(size: int, other: int) -> bool:
        """Is room for `size` words the room for `other`?"""
        return _room(size) == _room(other)

    def write(self, at: int, words: bytes | Words) -> None:
        """Put a list into its room."""
        fresh = np.frombuffer(words, np.uint64)
        mine = self._words[at : at + len(fresh)]
        if not np.array_equal(mine, fresh):
            mine[:] = fresh
            self._note(at, at + len(fresh))

    def _note(self, first: int, behind: int) -> None:
        if self.changed is not None:
            self.changed.append((first, behind))


def _room(size: int) -> int:
    """Lists of about the same size get the same room."""
    return 1 << max(2, (size - 1).bit_length())

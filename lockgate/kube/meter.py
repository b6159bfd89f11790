"""How many bytes came, in all and lately."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

__all__ = ["WINDOW", "Meter"]

#: Seconds that `per_second` is about, in steps of `_STEP`.
WINDOW = 60
_STEP = 5


class Meter:
    """`clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        #: (number of the step, bytes in it), oldest first.
        self._steps: deque[tuple[int, int]] = deque()
        self.total = 0

    def add(self, count: int) -> None:
        """So many came just now."""
        self.total += count
        step = int(self._clock() // _STEP)
        if self._steps and self._steps[-1][0] == step:
            count += self._steps.pop()[1]
        self._steps.append((step, count))
        self._forget()

    def per_second(self) -> float:
        """On average over the last WINDOW seconds, or since the beginning if that is less."""
        self._forget()
        age = self._clock() - self._began
        return sum(count for _, count in self._steps) / max(1.0, min(age, WINDOW))

    def _forget(self) -> None:
        oldest = (self._clock() - WINDOW) // _STEP
        while self._steps and self._steps[0][0] <= oldest:
            self._steps.popleft()

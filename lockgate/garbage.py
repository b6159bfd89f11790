"""The garbage collector, kept out of changes.

Passing over the objects of a thousand pods stops a process for a tenth of a second. So the
collector does not run by itself in processes that a change of policies passes through: they
collect between changes, what is new only, and everything once an hour. What the lists of a start
took and is free is given back to the system then: a tenth of an agent of a big cluster.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
from collections.abc import Callable

__all__ = ["collect_between"]

_PERIOD = 10.0
_HOUR = 360


async def collect_between(busy: Callable[[], bool], settled: Callable[[], object]) -> None:
    """Takes the collector over, until it is cancelled. Waits while `busy`. When `settled` gives
    another answer than before, what is there now is taken to stay, and not looked at again
    within the hour."""
    gc.disable()
    known: object = None
    try:
        for turn in itertools.count(1):
            await asyncio.sleep(_PERIOD)
            while busy():
                await asyncio.sleep(0.05)
            if turn % _HOUR == 0:
                gc.unfreeze()
            # What came with the start is mostly objects that stay, and many.
            if turn > 1:
                gc.collect()
            if turn % _HOUR == 0 or settled() != known:
                known = settled()
                gc.freeze()
            if turn % _HOUR == 1:
                _give_back()
    finally:
        gc.enable()


def _give_back() -> None:
    """As malloc_trim(3), which glibc has and musl has not."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

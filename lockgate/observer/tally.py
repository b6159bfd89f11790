"""Events counted as they are decoded: whole batches, so that counting keeps up with decoding."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lockgate.observer.journal import Journal

__all__ = ["Kind", "PolicyVerdict", "Tally"]

#: Beyond so many different ones the oldest are left out: policies come and go for years.
_MOST = 4096


class Kind(NamedTuple):
    """What events are counted by; numbers as in bpf/types.h, `protocol` as in IP."""

    protocol: int
    type: int
    cause: int
    allowed: bool


class PolicyVerdict(NamedTuple):
    """A verdict with the policy that decided it; "" where no policy applied."""

    kind: str
    namespace: str
    name: str
    verdict: str
    direction: str


class Tally:
    """Since this observer began. `add` takes each batch once."""

    def __init__(self, journal: Journal, verdict_type: int) -> None:
        self._journal, self._verdict_type = journal, verdict_type
        self.events: Counter[Kind] = Counter()
        #: A dict keeps the order in which they came.
        self.verdicts: dict[PolicyVerdict, int] = {}

    def add(self, events: npt.NDArray[Any]) -> None:
        """A batch of `struct event`; the journal must have been read since they were made."""
        small = _bytes(events, "proto", "type", "cause", "verdict", "direction")
        allowed = small["verdict"] != 0
        codes = small["proto"] << 11 | (small["type"] & 3) << 9 | small["cause"] << 1 | allowed
        for code, count in _counted(codes):
            kind = Kind(code >> 11, code >> 9 & 3, code >> 1 & 0xFF, bool(code & 1))
            self.events[kind] += count
        # Reason 0 says nothing of the direction; no other id is of two.
        reasons = events["reason"].astype(np.int64) << 3 | (small["direction"] & 3) << 1 | allowed
        for code, count in _counted(reasons[small["type"] == self._verdict_type]):
            self._judged(code >> 3, code >> 1 & 3, bool(code & 1), count)

    def _judged(self, reason: int, direction: int, allowed: bool, count: int) -> None:
        known = self._journal.reasons.get(reason)
        policy = (known.policy if known is not None else None) or {}
        kind, namespace, name = (policy.get(key, "") for key in ("kind", "namespace", "name"))
        way = ("", "ingress", "egress", "")[direction]
        one = PolicyVerdict(kind, namespace, name, "allow" if allowed else "deny", way)
        if one not in self.verdicts and len(self.verdicts) >= _MOST:
            del self.verdicts[next(iter(self.verdicts))]
        self.verdicts[one] = self.verdicts.get(one, 0) + count


def _bytes(events: npt.NDArray[Any], *names: str) -> dict[str, npt.NDArray[np.int64]]:
    """Fields of one byte. Records are as long as two cache lines, so those that are within eight
    bytes of one another are read together."""
    at = {name: int(events.dtype.fields[name][1]) for name in names}  # type: ignore[index]
    first, size = min(at.values()), events.dtype.itemsize
    if max(at.values()) - first >= 8 or first + 8 > size:
        return {name: events[name].astype(np.int64) for name in names}
    window = np.dtype({"names": ["w"], "formats": ["<i8"], "offsets": [first], "itemsize": size})
    words = events.view(window)["w"].copy()
    return {name: words >> 8 * (offset - first) & 0xFF for name, offset in at.items()}


def _counted(codes: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Each code with how often it is there."""
    if not len(codes):
        return []
    if int(codes.max()) < len(codes) * 8:  # denser than sorting is worth
        counts = np.bincount(codes)
        found = np.flatnonzero(counts)
        return list(zip(found.tolist(), counts[found].tolist(), strict=True))
    values, counts = np.unique(codes, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))

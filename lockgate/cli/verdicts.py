"""What the nodes recorded of connections that were tried: who denied them, if anybody did."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lockgate.access import Access, Refused
from lockgate.cli.flows import recent
from lockgate.cli.render import policies_text

__all__ = ["Attempted", "Recorder", "Recording"]

_MARGIN = 1.0  # seconds before the first attempt


@dataclass(frozen=True, slots=True)
class Attempted:
    """One connection as its packets say it. `ends`: addresses and ports that it may have been
    for, the service's own and its backends'."""

    protocol: str
    source_ip: str
    source_port: int
    ends: frozenset[tuple[str, int]]


class Recording:
    """The verdict and drop records of all nodes of a while."""

    def __init__(self, records: Iterable[Mapping[str, Any]], complete: bool) -> None:
        """`complete`: no record of the while is missing."""
        self.complete = complete
        self._by_source: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
        for record in records:
            source = record["source"]
            key = record["protocol"], source["ip"], source.get("port", 0)
            self._by_source.setdefault(key, []).append(record)

    def denial(self, of: Attempted) -> str | None:
        """Who denied it, as `by shop/web (ingress, node-2)`, or why it was dropped."""
        for record in self._of(of, "deny"):
            direction, node = record["direction"], record["node"]
            if record["policies"]:
                return f"denied by {policies_text(record['policies'])} ({direction}, {node})"
            if record["cause"] != "policy":
                return f"dropped as {record['cause']} ({node})"
            return f"denied ({direction}, {node})"
        return None

    def allowing(self, of: Attempted) -> list[str]:
        """The nodes that let it pass."""
        return sorted({record["node"] for record in self._of(of, "allow")})

    def _of(self, of: Attempted, verdict: str) -> list[Mapping[str, Any]]:
        found = self._by_source.get((of.protocol, of.source_ip, of.source_port), [])
        return [
            record
            for record in found
            if record["verdict"] == verdict
            and (record["destination"]["ip"], record["destination"].get("port", 0)) in of.ends
        ]


class Recorder:
    """Begin it before the first attempt; ask for the recording after the last."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._began = time.monotonic() - _MARGIN
        self._before = self._counts()

    def recording(self) -> Recording:
        # So long ago, and not since when: the nodes' clocks are their own.
        ago = time.monotonic() - self._began
        records, complaints = recent(self._access, {"since": f"{ago:.3f}s"})
        after = self._counts()
        return Recording(records, not complaints and self._all_kept(after))

    def _all_kept(self, after: Mapping[str, Mapping[str, Any] | None]) -> bool:
        for node, now in after.items():
            before = self._before.get(node)
            if before is None or now is None:
                return False
            made = now["events"] - before["events"]
            missed = now["lost"] - before["lost"] + now["cut"] - before["cut"]
            if missed or made > now["kept"]:
                return False
        return True

    def _counts(self) -> dict[str, dict[str, Any] | None]:
        counts: dict[str, dict[str, Any] | None] = {}
        for node in self._access.nodes():
            try:
                counts[node] = self._access.call(node, "observer", "GET", "/v1/status", timeout=5)
            except (OSError, Refused):
                counts[node] = None
        return counts

"""The last events as columns, filters over them, and flow records at the edge."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from lockgate.objects.address import format_address
from lockgate.observer.journal import Journal

__all__ = ["Filter", "FilterError", "FlowLog", "Names", "parse_filter"]

Records = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

# bpf/types.h; macros leave no BTF.
IFINDEX_BASE = 65536
_PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPV6": 58}
_PROTOCOL_NAMES = {6: "TCP", 17: "UDP", 132: "SCTP", 1: "ICMP", 58: "ICMPv6"}
_CLOCK_SET = 10_000_000  # ns: a clock that moved so far was set; less is jitter of reading it
_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
_VERDICTS = {"deny": 0, "allow": 1}
_DIRECTIONS = {"ingress": 1, "egress": 2}


class FilterError(Exception):
    """A filter that means nothing; one sentence."""


class Names:
    """Enumerators of the schema as users see them."""

    def __init__(
        self, causes: Mapping[str, int], types: Mapping[str, int], places: Mapping[str, int]
    ) -> None:
        """`enum cause`, `enum event_type` and `enum place` as in C."""
        self.causes = {
            number: name.removeprefix("CAUSE_").lower().replace("_", "-")
            for name, number in causes.items()
            if name != "CAUSE_MAX"
        }
        self.cause_numbers = {name: number for number, name in self.causes.items()}
        self.types = {number: name.removeprefix("EVENT_").lower() for name, number in types.items()}
        # As the programs are called (docs/architecture.md, Hooks).
        self.places = {
            number: name.removeprefix("PLACE_").lower() for name, number in places.items()
        }


@dataclass(frozen=True, slots=True)
class Filter:
    """What to show; None is anything. `port` is the destination's; `pod` is one of the ends,
    `NAMESPACE/NAME` or `NAME`; `since` is ns since the epoch."""

    verdict: str | None = None
    namespace: str | None = None
    pod: str | None = None
    policy: str | None = None
    cause: str | None = None
    direction: str | None = None
    port: int | None = None
    protocol: str | None = None
    since: int | None = None
    limit: int | None = None


def parse_filter(query: Mapping[str, str], names: Names) -> Filter:
    """From the parameters of a request. Empty values are as good as none. FilterError."""

    def one_of(key: str, known: Iterable[str]) -> str | None:
        value = query.get(key, "").lower() or None
        if value is not None and value not in known:
            raise FilterError(f"{key}: expected one of {', '.join(known)}, got {value}")
        return value

    def number(key: str, most: int) -> int | None:
        value = query.get(key, "")
        if not value:
            return None
        if not (value.isascii() and value.isdigit()) or int(value) > most:
            raise FilterError(f"{key}: expected a number up to {most}, got {value}")
        return int(value)

    protocol = one_of("protocol", [name.lower() for name in _PROTOCOLS])
    return Filter(
        verdict=one_of("verdict", _VERDICTS),
        namespace=query.get("namespace") or None,
        pod=query.get("pod") or None,
        policy=query.get("policy") or None,
        cause=one_of("cause", names.cause_numbers),
        direction=one_of("direction", _DIRECTIONS),
        port=number("port", 65535),
        protocol=protocol.upper() if protocol else None,
        since=_since(query.get("since", "")),
        limit=number("limit", 1 << 31),
    )


def _since(text: str) -> int | None:
    """`30s`, `5m`, `2h`, `1d` ago, or a time of RFC 3339; ns since the epoch."""
    if not text:
        return None
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1])
    try:
        if unit is not None:
            return time.time_ns() - round(float(text[:-1]) * unit * 1e9)
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise FilterError(f"since: expected 30s, 5m, 2h or an RFC 3339 time, got {text}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp() * 1e9)


class FlowLog:
    """The last `capacity` events in arrival order. Numbers of events count from 0 and never
    start again, so a follower knows what it missed."""

    def __init__(
        self,
        event: np.dtype[Any],
        head_size: int,
        names: Names,
        journal: Journal,
        node: str,
        *,
        capacity: int = 65536,
    ) -> None:
        self.names, self.journal, self.node = names, journal, node
        self.nodes: dict[str, str] = {}  # address → node, where known
        self.capacity = capacity
        self.next = 0
        self._events: Records = np.zeros(capacity, event)
        self._heads: Records | None = None
        self._head_size = head_size
        self._interfaces: dict[int, str] = {}
        self._clock = 0
        journal.in_use = self.ids

    def ids(self) -> dict[str, set[int]]:
        """The ids that events kept speak of, by kind as in the journal."""
        events = self._events[: min(self.next, self.capacity)]
        return {
            "endpoint": set(np.union1d(events["src_endpoint"], events["dst_endpoint"]).tolist()),
            "reason": set(np.unique(events["reason"]).tolist()),
            "service": set(np.unique(events["service"]).tolist()),
        }

    @property
    def first(self) -> int:
        """Number of the oldest event that is still here."""
        return max(0, self.next - self.capacity)

    def add(self, events: Records, heads: Records | None = None) -> None:
        """Takes a batch; `heads` are the packets' first bytes, one row for each."""
        if len(events) > self.capacity:
            self.next += len(events) - self.capacity
            events = events[-self.capacity :]
            heads = None if heads is None else heads[-self.capacity :]
        at = self.next % self.capacity
        split = min(len(events), self.capacity - at)
        self._events[at : at + split] = events[:split]
        self._events[: len(events) - split] = events[split:]
        if heads is not None:
            if self._heads is None:
                self._heads = np.zeros((self.capacity, self._head_size), np.uint8)
            self._heads[at : at + split] = heads[:split]
            self._heads[: len(heads) - split] = heads[split:]
        self.next += len(events)

    def select(self, wanted: Filter, start: int = 0) -> list[dict[str, Any]]:
        """Flow records from event number `start` on that pass the filter, oldest first; the
        newest `limit` of them."""
        return self.records(self.numbers(wanted, start))

    def numbers(self, wanted: Filter, start: int = 0) -> npt.NDArray[np.int64]:
        """The numbers of those events."""
        numbers = np.arange(max(start, self.first), self.next)
        chosen = numbers[self._passes(self._events[numbers % self.capacity], wanted)]
        return chosen if wanted.limit is None else chosen[max(0, len(chosen) - wanted.limit) :]

    def records(self, numbers: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Flow records of the events that are still here: some 30 µs each."""
        offset = self._offset()
        positions = (numbers[numbers >= self.first] % self.capacity).tolist()
        return [self._record(self._events[at], at, offset) for at in positions]

    # ---- Inside -------------------------------------------------------------------

    def _passes(self, events: Records, wanted: Filter) -> Mask:
        mask: Mask = np.ones(len(events), np.bool_)
        source, destination = events["src_endpoint"], events["dst_endpoint"]
        if wanted.verdict is not None:
            mask &= events["verdict"] == _VERDICTS[wanted.verdict]
        if wanted.direction is not None:
            mask &= events["direction"] == _DIRECTIONS[wanted.direction]
        if wanted.cause is not None:
            mask &= events["cause"] == self.names.cause_numbers[wanted.cause]
        if wanted.protocol is not None:
            mask &= events["proto"] == _PROTOCOLS[wanted.protocol]
        if wanted.port is not None:
            ported = (events["proto"] != 1) & (events["proto"] != 58)
            mask &= ported & (events["dport"] == wanted.port)
        if wanted.since is not None:
            offset = self._offset()
            mask &= events["time"] >= np.uint64(min(max(0, wanted.since - offset), 2**63 - 1))
        either: tuple[tuple[str | None, Callable[[Records, str], Mask]], ...] = (
            (wanted.namespace, self.journal.in_namespace),
            (wanted.pod, self.journal.is_pod),
        )
        for text, test in either:
            if text is not None:
                mask &= test(source, text) | test(destination, text)
        if wanted.policy is not None:
            mask &= np.isin(events["reason"], self.journal.reasons_of(wanted.policy))
        return mask

    def _offset(self) -> int:
        """From the kernel's clock to the time of day. Kept while the clock is not set, so that a
        record has the same time whenever it is asked for."""
        offset = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        if abs(offset - self._clock) > _CLOCK_SET:
            self._clock = offset
        return self._clock

    def _record(self, event: Any, position: int, offset: int) -> dict[str, Any]:
        proto = int(event["proto"])
        cause = self.names.causes.get(int(event["cause"]), str(int(event["cause"])))
        record: dict[str, Any] = {
            "time": _rfc3339(int(event["time"]) + offset),
            "node": self.node,
            "type": self.names.types.get(int(event["type"]), "unknown"),
            "verdict": "allow" if event["verdict"] else "deny",
            "direction": (None, "ingress", "egress")[min(2, int(event["direction"]))],
            "cause": None if cause == "none" else cause,
            "place": self.names.places.get(int(event["place"])),
        }
        record |= self._decided(int(event["reason"]), record)
        icmp = proto in (1, 58)
        ends = (
            ("source", "saddr", "sport", "src_endpoint"),
            ("destination", "daddr", "dport", "dst_endpoint"),
        )
        for key, address, port, endpoint in ends:
            record[key] = self._end(
                event[address].tobytes(),
                None if icmp else int(event[port]),
                int(event[endpoint]),
                int(event["time"]),
            )
        record["protocol"] = _PROTOCOL_NAMES.get(proto, str(proto))
        record["tcpFlags"] = None
        if proto == 6:
            flags = int(event["tcp_flags"])
            record["tcpFlags"] = [name for i, name in enumerate(_FLAGS) if flags >> i & 1]
        if icmp:
            record["icmpType"], record["icmpCode"] = int(event["sport"]), int(event["dport"])
        service = self.journal.services.get(int(event["service"]))
        record["service"] = None
        if service is not None:
            record["service"] = {
                "namespace": service.namespace,
                "name": service.name,
                "port": service.port,
            }
        record["interface"] = self._interface(int(event["ifindex"]))
        record["length"] = int(event["length"])
        captured = int(event["captured"])
        if captured and self._heads is not None:
            record["packet"] = self._heads[position, :captured].tobytes().hex()
        return record

    def _decided(self, reason: int, record: Mapping[str, Any]) -> dict[str, Any]:
        """Policy, rule and policies; a reason that speaks of another verdict is not shown."""
        known = self.journal.reasons.get(reason)
        mine = record["verdict"], record["direction"]
        if known is None or (known.verdict, known.direction) != mine:
            return {"policy": None, "rule": None, "policies": []}
        return {"policy": known.policy, "rule": known.rule, "policies": known.policies}

    def _end(self, address: bytes, port: int | None, endpoint: int, when: int) -> dict[str, Any]:
        ip = format_address(address)
        end: dict[str, Any] = {}
        pod = self.journal.endpoint(endpoint, when)
        if pod is not None:
            end |= {"namespace": pod.namespace, "pod": pod.name, "labels": pod.labels}
        elif ip in self.nodes:
            end["node"] = self.nodes[ip]
        end["ip"] = ip
        if port is not None:
            end["port"] = port
        return end

    def _interface(self, index: int) -> str:
        if index >= IFINDEX_BASE:
            return f"lg{index - IFINDEX_BASE}"
        if index not in self._interfaces:
            try:
                self._interfaces[index] = socket.if_indextoname(index)
            except OSError:
                return str(index)
        return self._interfaces[index]


def _rfc3339(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06d}Z"

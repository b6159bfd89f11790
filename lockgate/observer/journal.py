"""The agent's journal, followed: what ids of endpoints, reasons and services mean.

Ids are small numbers that are never reused, so names are columns indexed by id: a whole array
of events is matched with one look-up, and strings are made only for records that are shown.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lockgate.boot import this_boot

__all__ = ["EndpointName", "Journal", "Reason", "ServiceName"]

#: Of a policy whose rules can't be read (`lockgate.compile.tables`).
_UNREADABLE = -2

#: Changes of pods that are remembered, of all pods together; less than 1 KB each.
EARLIER = 16384

Codes = npt.NDArray[np.int32]
_MAX_ID = 1 << 26  # beyond that a line is damaged, and a column would not fit in memory


@dataclass(frozen=True, slots=True)
class EndpointName:
    """A pod as it was from `since` on, nanoseconds of the clock of events."""

    namespace: str
    name: str
    node: str
    labels: dict[str, str]
    since: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Reason:
    """`policies` as flow records and answers have them."""

    verdict: str
    direction: str | None  # None: of a firewall
    policies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def policy(self) -> dict[str, str] | None:
        if not self.policies:
            return None
        return {key: self.policies[0][key] for key in ("kind", "namespace", "name")}

    @property
    def rule(self) -> str | None:
        """The first rule that allowed. Rules allow; for a deny there is none."""
        return next((rule for policy in self.policies for rule in policy["rules"]), None)


@dataclass(frozen=True, slots=True)
class ServiceName:
    namespace: str
    name: str
    port: int | str | None
    ip: str | None


class _Column:
    """Strings as codes, by id; code 0 is "unknown"."""

    def __init__(self) -> None:
        self.codes: Codes = np.zeros(256, np.int32)
        self._numbers: dict[str, int] = {}
        self._last = 0

    def forget(self, ids: list[int]) -> None:
        self.codes[ids] = 0
        used = set(np.unique(self.codes).tolist())
        self._numbers = {text: code for text, code in self._numbers.items() if code in used}

    def set(self, id_: int, text: str) -> None:
        if id_ >= len(self.codes):
            grown = np.zeros(max(id_ + 1, 2 * len(self.codes)), np.int32)
            grown[: len(self.codes)] = self.codes
            self.codes = grown
        code = self._numbers.get(text)
        if code is None:
            self._last += 1
            code = self._numbers[text] = self._last
        self.codes[id_] = code

    def equal(self, ids: npt.NDArray[Any], text: str) -> npt.NDArray[np.bool_]:
        """Which of the ids have this text."""
        code = self._numbers.get(text)
        if code is None:
            return np.zeros(len(ids), np.bool_)
        known = ids < len(self.codes)
        matches: npt.NDArray[np.bool_] = known & (self.codes[np.where(known, ids, 0)] == code)
        return matches


class Journal:
    """Follows one journal file; it may not exist yet, and may be replaced by another.

    What neither that file nor the one before it says, and no event kept (`in_use`) speaks of, is
    forgotten. Of the one before: events about its ids may be in the ring still. What a pod was
    before its labels changed is kept for the last EARLIER changes, of all pods together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.endpoints: dict[int, EndpointName] = {}  # as of now
        self._earlier: dict[int, list[EndpointName]] = {}  # oldest first
        self._changes: deque[int] = deque()  # the id of each in `_earlier`, oldest first
        self._boot = this_boot()
        self.reasons: dict[int, Reason] = {}
        self.services: dict[int, ServiceName] = {}
        self.namespace = _Column()
        self.name = _Column()
        self.damaged = 0
        #: Ids that must stay, by kind as in the file
        self.in_use: Callable[[], dict[str, set[int]]] = _none
        self._said: dict[str, set[int]] = _none()
        self._file: Any = None
        self._inode = 0
        self._rest = b""

    def refresh(self) -> None:
        """Reads what was appended since. A line that is no record is counted and passed over."""
        try:
            info = os.stat(self.path)
        except OSError:
            return
        before: dict[str, set[int]] | None = None
        if self._file is None or info.st_ino != self._inode or info.st_size < self._file.tell():
            if self._file is not None:
                self._file.close()
                before, self._said = self._said, _none()
            self._file = open(self.path, "rb")  # noqa: SIM115, kept open while we follow
            self._inode, self._rest = os.fstat(self._file.fileno()).st_ino, b""
        text = self._rest + self._file.read()
        *lines, self._rest = text.split(b"\n")
        for line in lines:
            if line.strip():
                self._take(line)
        if before is not None:
            self._forget(before)

    def _forget(self, before: dict[str, set[int]]) -> None:
        used = self.in_use()

        def gone(kind: str, known: Mapping[int, object]) -> list[int]:
            stay = self._said[kind] | before[kind] | used[kind]
            return [id_ for id_ in known if id_ not in stay]

        endpoints = gone("endpoint", self.endpoints)
        for id_ in endpoints:
            del self.endpoints[id_]
            self._earlier.pop(id_, None)
        if endpoints:
            self.namespace.forget(endpoints)
            self.name.forget(endpoints)
        for id_ in gone("reason", self.reasons):
            del self.reasons[id_]
        for id_ in gone("service", self.services):
            del self.services[id_]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def endpoint(self, id_: int, time: int) -> EndpointName | None:
        """The pod as it was at a time of an event; where that is not known any more, as it was
        first after it."""
        latest = self.endpoints.get(id_)
        if latest is None or latest.since <= time or id_ not in self._earlier:
            return latest
        earlier = self._earlier[id_]
        return next((one for one in reversed(earlier) if one.since <= time), earlier[0])

    def in_namespace(self, ids: npt.NDArray[Any], namespace: str) -> npt.NDArray[np.bool_]:
        """Which endpoint ids are of pods of the namespace."""
        return self.namespace.equal(ids, namespace)

    def is_pod(self, ids: npt.NDArray[Any], pod: str) -> npt.NDArray[np.bool_]:
        """Which endpoint ids are of the pod, `NAMESPACE/NAME` or `NAME` of any namespace."""
        namespace, slash, name = pod.rpartition("/")
        found = self.name.equal(ids, name)
        return found & self.namespace.equal(ids, namespace) if slash else found

    def reasons_of(self, policy: str) -> npt.NDArray[np.uint32]:
        """Ids of the reasons that have the policy, `NAMESPACE/NAME` or `NAME`."""
        namespace, slash, name = policy.rpartition("/")
        return np.array(
            [
                id_
                for id_, reason in self.reasons.items()
                for one in reason.policies
                if one["name"] == name and (not slash or one["namespace"] == namespace)
            ],
            np.uint32,
        )

    def _take(self, line: bytes) -> None:
        try:
            record = msgspec.json.decode(line)
            if record["k"] == "last":
                return  # for the writer
            id_ = int(record["id"])
            if not 0 < id_ < _MAX_ID:
                raise ValueError(id_)
            if record["k"] in self._said:
                self._said[record["k"]].add(id_)
            match record["k"]:
                case "endpoint":
                    boot, since = record.get("since", ("", 0))
                    endpoint = EndpointName(
                        record["namespace"],
                        record["name"],
                        record.get("node", ""),
                        record.get("labels") or {},
                        int(since) if boot == self._boot else 0,  # all events are of this boot
                    )
                    self._set(id_, endpoint)
                case "reason":
                    self.reasons[id_] = _reason(record)
                case "service":
                    self.services[id_] = ServiceName(
                        record["namespace"], record["name"], record.get("port"), record.get("ip")
                    )
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
            self.damaged += 1

    def _set(self, id_: int, endpoint: EndpointName) -> None:
        before = self.endpoints.get(id_)
        if before is not None and 0 < endpoint.since < before.since:
            return  # a line that is read again
        if before is not None and endpoint.since and endpoint != before:
            self._earlier.setdefault(id_, []).append(before)
            self._changes.append(id_)
            if (
                len(self._changes) > EARLIER
                and (oldest := self._changes.popleft()) in self._earlier
            ):
                del self._earlier[oldest][0]
                if not self._earlier[oldest]:
                    del self._earlier[oldest]
        self.endpoints[id_] = endpoint
        self.namespace.set(id_, endpoint.namespace)
        self.name.set(id_, endpoint.name)


def _none() -> dict[str, set[int]]:
    return {"endpoint": set(), "reason": set(), "service": set()}


def _reason(record: dict[str, Any]) -> Reason:
    direction = record["direction"]
    if direction is None:
        return _firewall(record)
    matched: dict[tuple[str, str], list[str]] = {}
    for namespace, name, index in record["rules"]:
        rules = matched.setdefault((namespace, name), [])
        if index >= 0 and record["verdict"] == "allow":
            rules.append(f"{direction}[{index}]")
        elif index == _UNREADABLE:
            rules.append("unreadable")
    policies = [
        {"kind": "NetworkPolicy", "namespace": namespace, "name": name, "rules": rules}
        for (namespace, name), rules in matched.items()
    ]
    return Reason(record["verdict"], direction, policies)


def _firewall(record: dict[str, Any]) -> Reason:
    """A rule of a Firewall object, its default (-1), or what commands added (no name)."""
    _, name, index = record["rules"][0]
    rule = f"rules[{index}]" if index >= 0 else "default" if name else "command"
    policy = {"kind": "Firewall", "namespace": "", "name": name, "rules": [rule]}
    return Reason(record["verdict"], None, [policy])

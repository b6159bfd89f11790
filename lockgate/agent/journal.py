"""The journal: what ids mean, kept for late readers (docs/architecture.md, The journal).

One JSON object a line. The agent writes a line before the id in it can reach a packet; so whoever
sees an id finds its line. It is not synced to disk: maps, programs and records that bear the id do
not outlive the machine's power either, and every ADD would wait. Ids are never reused; a later
line with the same id says what holds from its time on (a pod's labels or addresses changed). That
time is in `since`: the boot, and nanoseconds of its clock, which is the one of events and is never
set. The observer reads it (`lockgate.observer.journal`).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

from lockgate.boot import Moment, now, this_boot
from lockgate.compile.tables import Direction, Rule, Verdict
from lockgate.objects.changes import Name
from lockgate.objects.model import Cluster, Pod

__all__ = ["Journal", "LastIds"]

#: Seconds and lines that must have come since the last time before the file is made shorter.
REST = 600.0
SLACK = 4096

Kind = Literal["endpoint", "reason", "service"]
_KINDS: tuple[Kind, ...] = get_args(Kind)


class LastIds(Protocol):
    """A second place for the last id of each kind: a record of the map `ids`, or a dict."""

    def __getitem__(self, kind: Kind, /) -> Any: ...

    def __setitem__(self, kind: Kind, number: int, /) -> None: ...


class Journal:
    """The writer, and the interner of endpoints, reasons and services for the compiler.

    `endpoint`, `reason` and `service` hand out ids at once; `commit` writes them and must return
    before they go live.
    """

    def __init__(self, path: Path, last: LastIds | None = None) -> None:
        """Opens or makes the file. A last line that was cut short by a crash is cut off; its id
        never went live. What a damaged or lost file no longer says is asked of `last`: ids go on
        from there."""
        self.path = path
        # With the object that was asked for last, which is there anyway; what the file says of a
        # pod that was not asked for yet.
        self._endpoints: dict[str, tuple[int, Pod | dict[str, Any], Moment]] = {}
        self._reasons: dict[tuple[str, str | None, tuple[Rule, ...]], int] = {}
        self._services: dict[tuple[str, str, str, str, int], tuple[int, str]] = {}
        self._last: dict[Kind, int] = dict.fromkeys(_KINDS, 0)
        self._second = last
        self._pending: list[bytes] = []
        # Ids that are asked for while everything is, and those of the time before.
        self._asked: set[tuple[Kind, int]] | None = None
        self._before: set[tuple[Kind, int]] | None = None
        self._lines = self._kept = 0
        self._boot = this_boot()
        self._rested = time.monotonic()
        self.cluster = Cluster()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._load()
        if last is not None:
            for kind in _KINDS:
                last[kind] = self._last[kind] = max(self._last[kind], int(last[kind]))

    def close(self) -> None:
        """Close the file; what was not committed is lost. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- Ids ---------------------------------------------------------------------

    def endpoint(self, pod: Pod) -> int:
        """Id of the pod with this uid."""
        uid = pod.metadata.uid
        known = self._endpoints.get(uid)
        if known is not None and known[1] is pod:
            number = known[0]
        else:
            facts = _endpoint_facts(pod)
            if known is None or _endpoint_facts(known[1]) != facts:
                number = self._next("endpoint") if known is None else known[0]
                since = self._boot, now()
                self._write("endpoint", number, facts | {"since": since})
            else:
                number, _, since = known
            self._endpoints[uid] = number, pod, since
        if self._asked is not None:
            self._asked.add(("endpoint", number))
        return number

    def name(self, uid: str) -> Name | None:
        """Namespace and name of the pod that had this uid last."""
        known = self._endpoints.get(uid)
        if known is None:
            return None
        facts = _endpoint_facts(known[1])
        return facts["namespace"], facts["name"]

    def reason(self, verdict: Verdict, direction: Direction, rules: tuple[Rule, ...]) -> int:
        """Id of an ordered list of rules or policies."""
        return self._reason(verdict, direction, rules)

    def _reason(
        self, verdict: Verdict, direction: Direction | None, rules: tuple[Rule, ...]
    ) -> int:
        key = (verdict, direction, rules)
        number = self._reasons.get(key)
        if number is None:
            number = self._reasons[key] = self._next("reason")
            self._write("reason", number, _reason_facts(*key))
        if self._asked is not None:
            self._asked.add(("reason", number))
        return number

    def firewall(self, name: str, index: int) -> int:
        """Id of the reason that is a rule of a Firewall object; index -1: its default. Name "":
        what commands added."""
        return self._reason("deny", None, (("", name, index),))

    def service(self, namespace: str, name: str, port_name: str, protocol: str, port: int) -> int:
        """Id of one port of a service."""
        key = (namespace, name, port_name, protocol, port)
        service = self.cluster.services.get((namespace, name))
        ip = next(iter(service.cluster_ips), "") if service is not None else ""
        known = self._services.get(key)
        if known is not None and known[1] == ip:
            number = known[0]
        else:
            number = known[0] if known is not None else self._next("service")
            self._services[key] = number, ip
            self._write("service", number, _service_facts(key, ip))
        if self._asked is not None:
            self._asked.add(("service", number))
        return number

    def served(self) -> dict[int, tuple[str, str, str, str, int]]:
        """By id: namespace, name, name of the port, protocol and port."""
        return {number: key for key, (number, _) in self._services.items()}

    def commit(self) -> int:
        """Write what is new; returns the number of lines. On OSError nothing is lost:
        the lines stay for the next commit."""
        if not self._pending:
            return 0
        if self._second is not None:
            for kind, number in self._last.items():
                self._second[kind] = number
        data = b"".join(self._pending)
        start = os.fstat(self._fd).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            os.ftruncate(self._fd, start)
            raise
        count = len(self._pending)
        self._pending.clear()
        self._lines += count
        return count

    # ---- Growing no further ------------------------------------------------------

    @property
    def overgrown(self) -> bool:
        """Whether it is time for `asking` and `shorten`."""
        return self._lines > 2 * self._kept + SLACK and time.monotonic() - self._rested >= REST

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """In this block every id that is wanted must be asked for, also what was known."""
        self._asked = set()
        try:
            yield
        except BaseException:
            self._asked = None
            raise

    def shorten(self) -> None:
        """Write the file anew after `asking`, without the ids that were wanted neither then nor
        the time before: records of those times are still about. Readers see another file.
        On OSError the old one stays."""
        assert self._asked is not None
        self.commit()
        asked, self._asked = self._asked, None
        before, self._before = self._before, asked
        self._rested = time.monotonic()
        if before is None:
            return  # nothing is known of the time before
        wanted = asked | before
        endpoints = {u: v for u, v in self._endpoints.items() if ("endpoint", v[0]) in wanted}
        reasons = {k: n for k, n in self._reasons.items() if ("reason", n) in wanted}
        services = {k: v for k, v in self._services.items() if ("service", v[0]) in wanted}
        lasts = {str(kind): number for kind, number in self._last.items()}
        lines = [_line({"k": "last", **lasts})]
        lines += [
            _record("endpoint", n, _endpoint_facts(of) | {"since": since})
            for n, of, since in endpoints.values()
        ]
        lines += [_record("reason", n, _reason_facts(*key)) for key, n in reasons.items()]
        lines += [_record("service", n, _service_facts(k, ip)) for k, (n, ip) in services.items()]
        fd = _replace(self.path, lines)
        os.close(self._fd)
        self._fd = fd
        self._endpoints, self._reasons, self._services = endpoints, reasons, services
        self._lines = self._kept = len(lines)

    # ---- Inside ------------------------------------------------------------------

    def _next(self, kind: Kind) -> int:
        self._last[kind] += 1
        return self._last[kind]

    def _write(self, kind: Kind, number: int, facts: dict[str, Any]) -> None:
        self._pending.append(_record(kind, number, facts))

    def _load(self) -> None:
        end = 0
        with open(self.path, "rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                end += len(raw)
                self._lines += 1
                line = _decode(raw)
                if line is not None:
                    with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
                        self._learn(line)
        os.ftruncate(self._fd, end)

    def _learn(self, line: dict[str, Any]) -> None:
        kind, number = line.get("k"), line.get("id")
        if kind == "last":
            for name in _KINDS:
                self._last[name] = max(self._last[name], int(line[name]))
        if kind not in _KINDS or not isinstance(number, int):
            return
        self._last[kind] = max(self._last[kind], number)
        if kind == "endpoint":
            facts = {k: line.get(k) for k in ("uid", "namespace", "name", "node", "ips", "labels")}
            boot, since = line.get("since", ("", 0))
            self._endpoints[str(line.get("uid"))] = number, facts, (str(boot), int(since))
        elif kind == "reason":
            rules = tuple((r[0], r[1], r[2]) for r in line["rules"])
            self._reasons[line["verdict"], line["direction"], rules] = number
        else:
            key = (
                line["namespace"],
                line["name"],
                line.get("portName", ""),
                line.get("protocol", "TCP"),
                line["port"],
            )
            self._services[key] = number, line.get("ip", "")


def _endpoint_facts(of: Pod | dict[str, Any]) -> dict[str, Any]:
    if isinstance(of, dict):
        return of
    meta = of.metadata
    return {
        "uid": meta.uid,
        "namespace": meta.namespace,
        "name": meta.name,
        "node": of.spec.node_name,
        "ips": of.ips,
        "labels": meta.labels,
    }


def _reason_facts(verdict: str, direction: str | None, rules: tuple[Rule, ...]) -> dict[str, Any]:
    """Without a direction: of a Firewall."""
    return {"verdict": verdict, "direction": direction, "rules": [list(rule) for rule in rules]}


def _service_facts(key: tuple[str, str, str, str, int], ip: str) -> dict[str, Any]:
    return dict(zip(("namespace", "name", "portName", "protocol", "port"), key, strict=True)) | {
        "ip": ip
    }


def _record(kind: Kind, number: int, facts: dict[str, Any]) -> bytes:
    return _line({"k": kind, "id": number, **facts, "t": round(time.time(), 3)})


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _replace(path: Path, lines: Iterable[bytes]) -> int:
    """Another file under the name, on disk before it has it; open for appending."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    try:
        view = memoryview(b"".join(lines))
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
        os.rename(fresh, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _decode(raw: bytes) -> dict[str, Any] | None:
    """None for a line that a crash or a full disk damaged: one line is not worth all others."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None

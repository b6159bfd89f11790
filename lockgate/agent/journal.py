"""The journal: what ids mean, kept for late readers (docs/architecture.md, The journal).

Append only, one JSON object a line. The agent writes a line, and syncs it to disk, before the
id in it can reach a packet; so whoever sees an id finds its line. Ids are never reused; a later
line with the same id replaces what is known of it (a pod's labels or addresses changed).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from lockgate.compile.tables import Direction, Rule, Verdict
from lockgate.objects.model import Cluster, Pod

__all__ = ["Journal", "Reader"]


class Journal:
    """The writer, and the interner of endpoints, reasons and services for the compiler.

    `endpoint`, `reason` and `service` hand out ids at once; `commit` makes them durable and
    must return before they go live.
    """

    def __init__(self, path: Path) -> None:
        """Opens or makes the file. A last line that was cut short by a crash is cut off; its id
        never went live."""
        self.path = path
        self._endpoints: dict[str, tuple[int, dict[str, Any]]] = {}
        # The objects that were asked for last: pods don't change, so they cost nothing again.
        self._seen: dict[str, tuple[Pod, int]] = {}
        self._reasons: dict[tuple[str, str, tuple[Rule, ...]], int] = {}
        self._services: dict[tuple[str, str, str, str, int], tuple[int, str]] = {}
        self._last = {"endpoint": 0, "reason": 0, "service": 0}
        self._pending: list[bytes] = []
        self.cluster = Cluster()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._load()

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
        meta = pod.metadata
        seen = self._seen.get(meta.uid)
        if seen is not None and seen[0] is pod:
            return seen[1]
        number = self._endpoint(pod)
        self._seen[meta.uid] = pod, number
        return number

    def _endpoint(self, pod: Pod) -> int:
        meta = pod.metadata
        facts: dict[str, Any] = {
            "uid": meta.uid,
            "namespace": meta.namespace,
            "name": meta.name,
            "node": pod.spec.node_name,
            "ips": pod.ips,
            "labels": dict(meta.labels),
        }
        known = self._endpoints.get(meta.uid)
        if known is not None and known[1] == facts:
            return known[0]
        number = known[0] if known is not None else self._next("endpoint")
        self._endpoints[meta.uid] = number, facts
        self._write({"k": "endpoint", "id": number, **facts})
        return number

    def reason(self, verdict: Verdict, direction: Direction, rules: tuple[Rule, ...]) -> int:
        """Id of an ordered list of rules or policies."""
        key = (verdict, direction, rules)
        number = self._reasons.get(key)
        if number is None:
            number = self._reasons[key] = self._next("reason")
            self._write(
                {
                    "k": "reason",
                    "id": number,
                    "verdict": verdict,
                    "direction": direction,
                    "rules": [list(rule) for rule in rules],
                }
            )
        return number

    def service(self, namespace: str, name: str, port_name: str, protocol: str, port: int) -> int:
        """Id of one port of a service."""
        key = (namespace, name, port_name, protocol, port)
        service = self.cluster.services.get((namespace, name))
        ip = next(iter(service.cluster_ips), "") if service is not None else ""
        known = self._services.get(key)
        if known is not None and known[1] == ip:
            return known[0]
        number = known[0] if known is not None else self._next("service")
        self._services[key] = number, ip
        self._write(
            {
                "k": "service",
                "id": number,
                "namespace": namespace,
                "name": name,
                "port": port,
                "portName": port_name,
                "protocol": protocol,
                "ip": ip,
            }
        )
        return number

    def commit(self) -> int:
        """Write and sync what is new; returns the number of lines. On OSError nothing is lost:
        the lines stay for the next commit."""
        if not self._pending:
            return 0
        data = b"".join(self._pending)
        start = os.fstat(self._fd).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, start)
            raise
        count = len(self._pending)
        self._pending.clear()
        return count

    # ---- Inside ------------------------------------------------------------------

    def _next(self, kind: str) -> int:
        self._last[kind] += 1
        return self._last[kind]

    def _write(self, line: dict[str, Any]) -> None:
        line["t"] = round(time.time(), 3)
        self._pending.append(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def _load(self) -> None:
        end = 0
        with open(self.path, "rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                end += len(raw)
                line = _decode(raw)
                if line is not None:
                    with contextlib.suppress(KeyError, IndexError, TypeError):
                        self._learn(line)
        os.ftruncate(self._fd, end)

    def _learn(self, line: dict[str, Any]) -> None:
        kind, number = line.get("k"), line.get("id")
        if not isinstance(kind, str) or not isinstance(number, int) or kind not in self._last:
            return
        self._last[kind] = max(self._last[kind], number)
        if kind == "endpoint":
            facts = {k: line.get(k) for k in ("uid", "namespace", "name", "node", "ips", "labels")}
            self._endpoints[str(line.get("uid"))] = number, facts
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


class Reader:
    """Follows a journal that another process writes.

    reader = Reader(path)
    reader.update()                # whenever an id is not known yet
    reader.endpoints[7]["name"]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.endpoints: dict[int, dict[str, Any]] = {}
        self.reasons: dict[int, dict[str, Any]] = {}
        self.services: dict[int, dict[str, Any]] = {}
        self._offset = 0

    def update(self) -> int:
        """Read what was added; returns the number of lines. A line in the making is left for the
        next time, a file that is not there yet is empty."""
        count = 0
        for line in self._lines():
            kind, number = line.get("k"), line.get("id")
            table = {
                "endpoint": self.endpoints,
                "reason": self.reasons,
                "service": self.services,
            }.get(str(kind))
            if table is not None and isinstance(number, int):
                table[number] = line
                count += 1
        return count

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size == self._offset:
                    return
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for raw in whole.splitlines():
            line = _decode(raw)
            if line is not None:
                yield line


def _decode(raw: bytes) -> dict[str, Any] | None:
    """None for a line that a crash or a full disk damaged: one line is not worth all others."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None

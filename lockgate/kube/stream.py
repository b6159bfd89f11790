"""Objects from a watch stream on a unix socket (docs/architecture.md, The watch stream)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, Literal, Protocol

import aiohttp
import msgspec

from lockgate.objects import model
from lockgate.objects.changes import Changed
from lockgate.objects.model import Cluster

__all__ = ["Change", "Reporter", "Source", "StreamSource", "Transaction", "apply", "watch"]

log = logging.getLogger(__name__)

Verb = Literal["ADDED", "MODIFIED", "DELETED"]
_STRUCTS: dict[str, Any] = {
    "Namespace": model.Namespace,
    "Node": model.Node,
    "Pod": model.Pod,
    "Service": model.Service,
    "EndpointSlice": model.EndpointSlice,
    "NetworkPolicy": model.NetworkPolicy,
    "ServiceCIDR": model.ServiceCIDR,
    "Firewall": model.Firewall,
}
#: Kind → field of Cluster, and whether its keys have a namespace.
_FIELDS = {
    "Namespace": ("namespaces", False),
    "Node": ("nodes", False),
    "Pod": ("pods", True),
    "Service": ("services", True),
    "EndpointSlice": ("slices", True),
    "NetworkPolicy": ("policies", True),
    "ServiceCIDR": ("service_cidrs", False),
    "Firewall": ("firewalls", False),
}
_LINE_MAX = 16 << 20


class _Line(msgspec.Struct):
    type: str
    object: msgspec.Raw = msgspec.Raw(b"")
    revision: int = 0


class _Kind(msgspec.Struct):
    kind: str


class Change(msgspec.Struct):
    """One event: what happened to an object."""

    verb: Verb
    object: Any


class Transaction(msgspec.Struct):
    """The events up to a bookmark, to be applied together. `complete`: they are all that there
    is, so what is not among them is gone."""

    changes: list[Change]
    revision: int
    complete: bool
    errors: list[str]


async def watch(socket: Path) -> AsyncIterator[Transaction]:
    """Transactions of one connection, the first of them complete. Ends when the server does;
    OSError or aiohttp.ClientError if it can't be reached. Objects that can't be read are left
    out and named in `errors`."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    async with aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(str(socket)), timeout=timeout, read_bufsize=1 << 20
    ) as session:
        async with session.get("http://lockgate/v1/watch") as response:
            response.raise_for_status()
            changes: list[Change] = []
            errors: list[str] = []
            complete = True
            tail = b""
            async for chunk in response.content.iter_any():
                *lines, tail = (tail + chunk).split(b"\n")
                if len(tail) > _LINE_MAX:
                    raise OSError(f"{socket}: a line of the watch stream has no end")
                for raw in lines:
                    if not raw.strip():
                        continue
                    line = msgspec.json.decode(raw, type=_Line)
                    if line.type == "BOOKMARK":
                        yield Transaction(changes, line.revision, complete, errors)
                        changes, errors, complete = [], [], False
                    else:
                        _read(line, changes, errors)


def _read(line: _Line, changes: list[Change], errors: list[str]) -> None:
    try:
        kind = msgspec.json.decode(line.object, type=_Kind).kind
        struct = _STRUCTS.get(kind)
        if struct is not None and line.type in ("ADDED", "MODIFIED", "DELETED"):
            item = msgspec.json.decode(line.object, type=struct)
            changes.append(Change(line.type, item))  # type: ignore[arg-type]
    except msgspec.MsgspecError as error:
        errors.append(f"an object of the watch stream can't be read: {error}: {_excerpt(line)}")


def _excerpt(line: _Line) -> str:
    return bytes(line.object)[:200].decode(errors="replace")


def apply(cluster: Cluster, *transactions: Transaction) -> tuple[Cluster, Changed | None]:
    """The cluster after transactions, in their order, and what changed; None if that may be
    anything. `cluster` itself is changed, but for a complete transaction."""
    changed: Changed | None = Changed()
    for transaction in transactions:
        if transaction.complete:
            cluster, changed = Cluster(), None
        for change in transaction.changes:
            meta = change.object.metadata
            field, namespaced = _FIELDS[change.object.kind]
            table = getattr(cluster, field)
            key = (meta.namespace, meta.name) if namespaced else meta.name
            if change.verb == "DELETED":
                table.pop(key, None)
            else:
                table[key] = change.object
            if changed is not None:
                getattr(changed, field).add(key)
    return cluster, changed


class Source(Protocol):
    """Where an agent's objects come from."""

    @property
    def connected(self) -> bool:
        """Is everything that changes heard of?"""

    def transactions(self) -> AsyncGenerator[Transaction, None]:
        """What changes, the first transaction complete; never ends. `errors` are all objects
        that can't be read at present."""

    async def applied(self, revision: int, error: str) -> None:
        """A revision is in force, or why it is not. One that can't be told is told again."""

    async def close(self) -> None:
        """May be called again."""

    def problem(self) -> str:
        """One sentence for who asks how it is; "" if all is well."""

    def status(self) -> dict[str, Any]:
        """Figures for who asks, JSON."""


class StreamSource:
    """The supervisor's stream, again and again: without it, what is in force stays in force."""

    def __init__(self, control: Path, node: str) -> None:
        self._control = control
        self._reporter = Reporter(control, node)
        self.connected = False

    async def transactions(self) -> AsyncGenerator[Transaction, None]:
        wait = 0.1
        while True:
            try:
                async for transaction in watch(self._control):
                    wait, self.connected = 0.1, True
                    yield transaction
            except (OSError, aiohttp.ClientError, ValueError) as error:
                if self.connected:
                    log.warning("the watch stream ended: %s", error)
            self.connected = False
            await asyncio.sleep(wait)
            wait = min(wait * 2, 2.0)

    async def applied(self, revision: int, error: str) -> None:
        await self._reporter.report(revision, error)

    async def close(self) -> None:
        await self._reporter.close()

    def problem(self) -> str:
        return ""  # `connected` says it, and the supervisor's end is the cluster's

    def status(self) -> dict[str, Any]:
        return {}


class Reporter:
    """Tells the supervisor what is in force on a node, over one connection."""

    def __init__(self, socket: Path, node: str) -> None:
        self._socket, self._node = socket, node
        self._session: aiohttp.ClientSession | None = None

    async def report(self, revision: int, error: str = "") -> None:
        """A revision is in force, or why it is not."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(self._socket)),
                timeout=aiohttp.ClientTimeout(total=10),
            )
        body: dict[str, Any] = {"node": self._node, "revision": revision}
        if error:
            body["error"] = error
        async with self._session.post("http://lockgate/v1/applied", json=body) as response:
            response.raise_for_status()

    async def close(self) -> None:
        """May be called again."""
        if self._session is not None:
            await self._session.close()
            self._session = None

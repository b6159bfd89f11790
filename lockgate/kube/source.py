"""All kinds from the API server as one stream of transactions, the first of them complete.

Nothing is told before every kind was listed whole: half a view would take away what is only not
known yet. Later changes come together with all that came since the last transaction was taken.
Without an API server the stream begins with the snapshot on disk; what the first lists find
different then comes as changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any

from lockgate.kube import snapshot
from lockgate.kube.client import Client
from lockgate.kube.kinds import KINDS, Kind, Parts
from lockgate.kube.reflector import Reflector
from lockgate.kube.stream import Change, Transaction

__all__ = ["ApiSource"]

log = logging.getLogger(__name__)

#: How long a server that refuses or can't be reached is waited for before a snapshot serves.
_SNAPSHOT_AFTER = 5.0
#: A list of a large cluster keeps an API server busy for a second: 1,000 agents, 200 of them each.
_SPREAD = 5.0
_SAVE_EVERY = 30.0
#: A large snapshot is written less often: bytes per second on average, at most.
_SAVE_RATE = 100_000


class ApiSource:
    """The objects of a cluster (see `lockgate.kube.stream.Source`)."""

    def __init__(
        self,
        client: Client,
        saved: Path | None = None,
        *,
        snapshot_after: float = _SNAPSHOT_AFTER,
        in_force: Callable[[], bool] = lambda: False,
        spread: float = _SPREAD,
    ) -> None:
        """`saved` is the snapshot's file. `in_force` tells whether the kernel has a state by
        which it judges: a snapshot that changes came after must not take its place. `spread`:
        seconds over which agents that all have to list again do so."""
        self.client = client
        self._saved, self._snapshot_after = saved, snapshot_after
        self._in_force = in_force
        #: There while the snapshot is behind what was told, however this process ends.
        self._behind = saved.with_suffix(".behind") if saved is not None else None
        self._parts = Parts()
        self._reflectors = [
            Reflector(client, kind, self._parts, self._take, self._look, self._earlier, spread)
            for kind in KINDS
        ]
        self._fresh = not self._stale
        self._loaded: tuple[float, Mapping[str, Mapping[Any, Any]]] | None = None
        #: What changed and was not told yet, by (kind, key).
        self._pending: dict[tuple[str, Any], Change] = {}
        self._woken = asyncio.Event()
        self._synced = False
        self._revision = 0
        self._errors: list[str] = []
        self._away_since: float | None = time.time()
        self._snapshot_of: float | None = None
        self._dirty = False

    # ---- What the agent asks -------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Is everything that changes heard of?"""
        return self._away_since is None

    async def transactions(self) -> AsyncGenerator[Transaction, None]:
        """Never ends."""
        tasks = [asyncio.create_task(one.run()) for one in self._reflectors]
        tasks.append(asyncio.create_task(self._keep_snapshot()))
        try:
            first = True
            if await self._first():
                yield self._all()
                first = False
            while True:
                await self._wait(tasks)
                if not self._synced and all(one.synced for one in self._reflectors):
                    self._synced, self._snapshot_of, self._loaded = True, None, None
                if self._synced and first:
                    first = False
                    yield self._all()
                elif self._synced and (self._pending or self._errors != self._problems()):
                    yield self._transaction(list(self._pending.values()), False)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._dirty:
                await self._save()

    async def applied(self, revision: int, error: str) -> None:
        """Nobody but `status` asks."""

    async def close(self) -> None:
        await self.client.close()

    def problem(self) -> str:
        """One sentence for who asks how it is; "" if all is well."""
        if self._away_since is None:
            return ""
        since = _clock(self._away_since)
        reason = next((one.problem for one in self._reflectors if one.problem), "it was not asked")
        text = f"API server away since {since} ({reason})"
        if self._snapshot_of is not None:
            text += f", working with a snapshot of {_clock(self._snapshot_of)}"
        return text

    def status(self) -> dict[str, Any]:
        """Times are Unix times; bytes are those received since the start, and a second on average
        over the last minute."""
        return {
            "server": self.client.server,
            "awaySince": self._away_since,
            "snapshotOf": self._snapshot_of,
            "kinds": {
                one.kind.resource: {
                    "objects": len(one.objects),
                    "bytes": one.counts.bytes.total,
                    "bytesPerSecond": round(one.counts.bytes.per_second(), 1),
                    "lists": one.counts.lists,
                    "watches": one.counts.watches,
                    "events": one.counts.events,
                    "same": one.counts.same,
                    "skipped": len(one.errors),
                }
                for one in self._reflectors
            },
        }

    def skipped(self) -> dict[tuple[str, Any], str]:
        """The objects that can't be read, by (kind, key)."""
        return {
            (one.kind.name, key): text
            for one in self._reflectors
            for key, text in one.errors.items()
        }

    def uid(self, kind: str, namespace: str, name: str) -> str:
        """Of an object as its kind is named ("Pod"); "" if it is not known."""
        for one in self._reflectors:
            if one.kind.name == kind:
                return one.uid(one.kind.key(namespace, name))
        return ""

    # ---- Inside --------------------------------------------------------------------------

    def _take(self, kind: Kind, key: Any, change: Change) -> None:
        """A difference, from a reflector."""
        self._pending[kind.name, key] = change
        if not self._dirty and self._behind is not None:
            with contextlib.suppress(OSError):
                self._behind.touch()
        self._dirty = True

    def _look(self) -> None:
        """The end of a batch, or another state, of a reflector."""
        if any(one.problem or not one.synced for one in self._reflectors):
            if self._away_since is None:
                self._away_since = time.time()
        elif self._away_since is not None:
            self._away_since = None
        self._woken.set()

    async def _first(self) -> bool:
        """Wait for the first lists; True when a snapshot has to serve instead of them."""
        if self._saved is None or not self._saved.exists():
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._snapshot_after):
                while not all(one.synced for one in self._reflectors):
                    self._woken.clear()
                    await self._woken.wait()
                return False
        while not any(one.problem for one in self._reflectors):
            # It answers, only slowly.
            if all(one.synced for one in self._reflectors):
                return False
            self._woken.clear()
            await self._woken.wait()
        if any(one.synced for one in self._reflectors):
            return False
        if self._stale and self._in_force():
            log.warning("%s; the kernel has a later state than the snapshot", self.problem())
            return False
        found = await asyncio.to_thread(snapshot.load, self._saved)
        if found is None or any(one.synced for one in self._reflectors):
            return False
        self._snapshot_of, tables = found
        for one in self._reflectors:
            one.objects.update(tables[one.kind.name])
        log.warning("%s", self.problem())
        return True

    def _earlier(self, kind: Kind, key: Any) -> Any:
        """What an agent before knew of an object, if its snapshot has all that it knew."""
        if self._synced or not self._fresh or self._saved is None:
            return None
        self._loaded = self._loaded or snapshot.load(self._saved) or (0.0, {})
        return self._loaded[1].get(kind.name, {}).get(key)

    @property
    def _stale(self) -> bool:
        return self._behind is not None and self._behind.exists()

    async def _wait(self, tasks: list[asyncio.Task[None]]) -> None:
        await self._woken.wait()
        self._woken.clear()
        for task in tasks:
            if task.done():
                task.result()  # a fault of ours: it must not go unnoticed

    def _all(self) -> Transaction:
        items = [item for one in self._reflectors for item in one.objects.values()]
        return self._transaction([Change("ADDED", item) for item in items], True)

    def _transaction(self, changes: list[Change], complete: bool) -> Transaction:
        self._pending.clear()
        self._revision += 1
        self._errors = self._problems()
        return Transaction(changes, self._revision, complete, self._errors)

    def _problems(self) -> list[str]:
        return list(self.skipped().values())

    async def _keep_snapshot(self) -> None:
        if self._saved is None:
            return
        size = 0
        while True:
            await asyncio.sleep(max(_SAVE_EVERY, size / _SAVE_RATE))
            if self._dirty and self._synced:
                size = await self._save() or size

    async def _save(self) -> int:
        if self._saved is None or not self._synced:
            return 0
        tables = {one.kind.name: list(one.objects.values()) for one in self._reflectors}
        self._dirty = False
        try:
            size = await asyncio.to_thread(snapshot.save, self._saved, tables)
            if not self._dirty and self._behind is not None:
                self._behind.unlink(missing_ok=True)
            return size
        except OSError as error:
            self._dirty = True
            log.warning("the snapshot can't be written: %s", error)
            return 0


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))

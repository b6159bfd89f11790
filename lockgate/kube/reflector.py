"""One kind of objects, as the API server has it: list, then watch, for as long as it lasts.

The protocol is that of "Efficient detection of changes" in the Kubernetes API concepts: a list
at resourceVersion=0 (whatever the server has in memory), a watch from the list's version with
bookmarks, again from the last version seen when it ends, a new list when that version is too
old (410 Gone). What is kept is a table of objects by key; who is told, is told differences.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from lockgate.kube.client import AWAY, ApiError, Client
from lockgate.kube.kinds import Kind, Parts, Version
from lockgate.kube.lists import ListMeta, Splitter, chunks
from lockgate.kube.meter import Meter
from lockgate.kube.stream import Change
from lockgate.kube.wire import plain, read

__all__ = ["Reflector"]

log = logging.getLogger(__name__)

_LINE_MAX = 16 << 20  # etcd takes objects of 1.5 MB
_WATCH_SECONDS = (300, 600)
#: Bookmarks come about once a minute; who says nothing for longer is not there.
_SILENCE = 150.0
_WAIT_FIRST, _WAIT_MOST = 0.2, 30.0
_PAGE = 1000
_ABSENT_AGAIN = 600.0


class _Event(msgspec.Struct):
    """meta/v1 WatchEvent."""

    type: str
    object: msgspec.Raw


class _ErrorStatus(msgspec.Struct):
    code: int = 0
    reason: str = ""
    message: str = ""


class _Absent(Exception):
    """The server does not know the kind."""


class _Gone(Exception):
    """The server no longer knows the version to go on from."""


@dataclass(slots=True)
class Counts:
    """What this kind cost the API server so far."""

    bytes: Meter = field(default_factory=Meter)
    lists: int = 0
    watches: int = 0
    events: int = 0
    #: Events that changed nothing that is kept.
    same: int = 0


class Reflector:
    """Follows one kind. `objects` is what is known, by key; `emit(kind, key, change)` is called
    for each difference, and `look()` after a batch of them and when the state is another.

    `synced`: a list was read whole. `problem`: why nothing comes at present, "" if it does.
    `errors`: by key the objects that can't be read. What one was before stays, also if that was
    known to an agent before (`earlier`, of a key); else its kind may know what to make of it.
    """

    def __init__(
        self,
        client: Client,
        kind: Kind,
        parts: Parts,
        emit: Callable[[Kind, Any, Change], None],
        look: Callable[[], None],
        earlier: Callable[[Kind, Any], Any] = lambda _kind, _key: None,
        spread: float = 0.0,
    ) -> None:
        """`spread`: seconds over which agents that all have to list again do so."""
        self._client, self.kind, self._parts = client, kind, parts
        self._earlier, self._spread = earlier, spread
        self._emit, self._look = emit, look
        self.objects: dict[Any, Any] = {}
        self.errors: dict[Any, str] = {}
        self._odd: dict[Any, str] = {}
        self.counts = Counts()
        self.synced = False
        self.problem = ""
        self._selectors = list(kind.selectors)
        self._wait = _WAIT_FIRST
        self._version = ""
        self._decoder = msgspec.json.Decoder(kind.struct)

    def uid(self, key: Any) -> str:
        """Of an object, also of one that can't be read; "" if there is none."""
        item = self.objects.get(key)
        if item is not None:
            return str(item.metadata.uid)
        return self._odd.get(key, "") if key in self.errors else ""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if not self._version:
                    self._version = await self._list()
                await self._watch()
            except _Gone as gone:
                log.info("%s: %s: listing again", self.kind.resource, gone)
                self._version = ""
                # All agents hear it at once, and a list is dear.
                await asyncio.sleep(random.uniform(0, self._spread))
                await self._pause()
            except msgspec.DecodeError as error:
                self._version = ""
                self._fail(f"what the API server answers can't be read: {error}")
                await self._pause()
            except _Absent:
                await asyncio.sleep(_ABSENT_AGAIN)
            except (*AWAY, ApiError) as error:
                self._fail(str(error) or type(error).__name__)
                await self._pause()

    def _well(self) -> None:
        if self.problem:
            log.info("%s: the API server answers again", self.kind.resource)
        self.problem, self._wait = "", _WAIT_FIRST

    def _fail(self, text: str) -> None:
        if not self.problem:
            log.warning("%s: %s", self.kind.resource, text)
        self.problem = text
        self._look()

    async def _pause(self) -> None:
        await asyncio.sleep(self._wait * random.uniform(0.5, 1.0))
        self._wait = min(self._wait * 2, _WAIT_MOST)

    # ---- List ------------------------------------------------------------------------

    async def _list(self) -> str:
        """Read all there is and tell the difference; the version to watch from."""
        found: dict[Any, Any] = {}
        errors: dict[Any, str] = {}
        params = {"resourceVersion": "0", "limit": str(_PAGE)}
        while True:
            try:
                meta = await self._page(params, found, errors)
            except ApiError as error:
                if error.status == 410:
                    raise _Gone(str(error)) from error
                if error.status == 404 and self.kind.optional:
                    self._found({}, {})
                    raise _Absent from error
                if error.status == 400 and len(self._selectors) > 1:
                    log.info("%s: %s: asking for more", self.kind.resource, error)
                    del self._selectors[0]
                    continue
                raise
            if not meta.continue_:
                break
            params = {"limit": str(_PAGE), "continue": meta.continue_}
        self.counts.lists += 1
        self._found(found, errors)
        return meta.resource_version

    def _found(self, found: dict[Any, Any], errors: dict[Any, str]) -> None:
        """Take what a whole list has, and tell the difference."""
        self.errors = errors
        self._odd = {key: uid for key, uid in self._odd.items() if key in errors}
        known = self.objects
        for key in [key for key in known if key not in found]:
            self._emit(self.kind, key, Change("DELETED", known.pop(key)))
        for key, item in found.items():
            before = known.get(key)
            if before is None or before != item:
                known[key] = item
                self._emit(self.kind, key, Change("MODIFIED", item))
        self.synced = True
        self._well()
        self._look()

    async def _page(
        self, params: dict[str, str], found: dict[Any, Any], errors: dict[Any, str]
    ) -> ListMeta:
        splitter = Splitter()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
        async with self._request(params, timeout, "gzip") as response:
            async for chunk in chunks(response, self.counts.bytes):
                for number, piece in enumerate(splitter.feed(chunk), 1):
                    self._read_listed(piece, found, errors)
                    if number % 200 == 0:
                        await asyncio.sleep(0)
        last, meta = splitter.finish()
        for piece in last:
            self._read_listed(piece, found, errors)
        return meta

    def _read_listed(self, raw: bytes, found: dict[Any, Any], errors: dict[Any, str]) -> None:
        try:
            item = self._keep(raw)
            found[self._key(item.metadata)] = item
        except msgspec.MsgspecError as error:
            key, item, errors[key] = self._instead(raw, error)
            if item is not None:
                found[key] = item

    # ---- Watch -----------------------------------------------------------------------

    async def _watch(self) -> None:
        """Tell each change, until the server ends the watch."""
        params = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(random.randint(*_WATCH_SECONDS)),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=_SILENCE)
        began = time.monotonic()
        try:
            async with self._request(params, timeout) as response:
                self.counts.watches += 1
                self._well()
                self._look()
                tail = b""
                async for chunk in chunks(response, self.counts.bytes):
                    *lines, tail = (tail + chunk).split(b"\n")
                    if len(tail) > _LINE_MAX:
                        raise OSError("a watch event of the API server has no end")
                    for line in lines:
                        if line.strip():
                            self._event(line)
                    if lines:
                        self._look()
        except ApiError as error:
            if error.status == 410:
                raise _Gone(str(error)) from error
            raise
        if time.monotonic() - began < 1:
            # A watch that ends as soon as it begins is not asked for in a hurry.
            await self._pause()

    def _event(self, line: bytes) -> None:
        event = msgspec.json.decode(line, type=_Event)
        raw = bytes(event.object)
        if event.type == "ERROR":
            status = msgspec.json.decode(raw, type=_ErrorStatus)
            if status.code == 410:
                raise _Gone(status.message)
            raise ApiError(status.code, status.reason, status.message)
        meta = msgspec.json.decode(raw, type=Version).metadata
        self._version = meta.resource_version or self._version
        if event.type == "BOOKMARK":
            return
        self.counts.events += 1
        key = self._key(meta)
        self.errors.pop(key, None)
        self._odd.pop(key, None)
        if event.type == "DELETED":
            gone = self.objects.pop(key, None)
            if gone is not None:
                self._emit(self.kind, key, Change("DELETED", gone))
            return
        try:
            item = self._keep(raw)
        except msgspec.MsgspecError as error:
            key, item, self.errors[key] = self._instead(raw, error)
            if item is None:
                return
        before = self.objects.get(key)
        if before is not None and before == item:
            self.counts.same += 1
        else:
            self.objects[key] = item
            self._emit(self.kind, key, Change("MODIFIED", item))

    # ---- Inside ----------------------------------------------------------------------

    def _request(
        self, params: dict[str, str], timeout: aiohttp.ClientTimeout, encoding: str = "identity"
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._selectors[0]:
            params = {**params, "fieldSelector": self._selectors[0]}
        if self.kind.labels:
            params = {**params, "labelSelector": self.kind.labels}
        return self._client.request(
            "GET",
            self.kind.path,
            params=params,
            timeout=timeout,
            headers={"Accept-Encoding": encoding},
        )

    def _keep(self, raw: bytes) -> Any:
        return self.kind.keep(read(raw, self._decoder), self._parts)

    def _key(self, meta: Any) -> Any:
        return self.kind.key(meta.namespace, meta.name)

    def _instead(self, raw: bytes, error: Exception) -> tuple[Any, Any, str]:
        """Of an object that can't be read its key, what is in force in its place, if anything,
        and what to say of it."""
        try:
            meta = msgspec.json.decode(raw, type=Version).metadata
            key, uid = self._key(meta), meta.uid
        except msgspec.MsgspecError:
            key, uid = self.kind.key("?", "?"), ""
        if self.kind.uid is not None:
            with contextlib.suppress(msgspec.MsgspecError):
                uid = self.kind.uid(plain(raw))
        self._odd[key] = uid
        item = self.objects.get(key) or self._earlier(self.kind, key)
        if item is not None and item.metadata.uid != uid:
            item = None
        kept = "skipped" if item is None else "as it was before"
        if self.kind.rest is not None and (item is None or item.unreadable):
            with contextlib.suppress(msgspec.MsgspecError):
                item = self.kind.keep(self.kind.rest(plain(raw)), self._parts)
                kept = "it isolates its pods and allows nothing"
        return key, item, f"{self.kind.title(key)} can't be read ({kept}): {error}"

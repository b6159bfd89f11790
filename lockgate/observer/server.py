"""The observer's process: reads rings, answers on observer.sock (docs/architecture.md)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from aiohttp import ClientError, ClientSession, ClientTimeout, UnixConnector, web
from prometheus_client import CONTENT_TYPE_LATEST

from lockgate import __version__
from lockgate.bpf.btf import Schema
from lockgate.objects.address import listen
from lockgate.observer.config import Config
from lockgate.observer.flows import Filter, FilterError, FlowLog, Names, parse_filter
from lockgate.observer.journal import Journal
from lockgate.observer.metrics import Metrics
from lockgate.observer.source import Source
from lockgate.observer.tally import Tally

__all__ = ["Observer", "run"]

_log = logging.getLogger("lockgate.observer")
_CHECK = 0.5  # seconds between looks for pins that were replaced
_FIRST = 0.05  # seconds between looks for pins, while there are none
_GATHER = 0.01  # seconds that events gather before they are read
_CHUNK = 100  # records a write: some 3 ms


class Observer:
    """One node's observer."""

    def __init__(self, config: Config, schema: Schema, *, capacity: int = 65536) -> None:
        self.config = config
        self.journal = Journal(Path(config.journal))
        head = schema.dtype("event_raw")["head"]
        names = Names(schema.enum("cause"), schema.enum("event_type"), schema.enum("place"))
        self.log = FlowLog(
            schema.dtype("event"),
            head.itemsize,
            names,
            self.journal,
            config.node,
            capacity=capacity,
        )
        self.tally = Tally(self.journal, schema.enum("event_type")["EVENT_VERDICT"])
        self.source = Source(config.pins, schema, self.log, self.tally)
        self.metrics = Metrics(self)
        self._arrived = asyncio.Event()
        self._watched: list[int] = []
        self._scheduled = False

    # ---- Reading ------------------------------------------------------------------

    async def keep_reading(self) -> None:
        """Opens the rings when they are there, again when they were replaced; never ends."""
        try:
            while True:
                waiting = self._check() and not self.source.ready
                await asyncio.sleep(_FIRST if waiting else _CHECK)
        finally:
            self._unwatch()
            self.source.close()
            self.journal.close()

    def _check(self) -> bool:
        """Opens and reads what is pinned; False when that failed."""
        try:
            self.journal.refresh()
            if self.source.open():
                self._unwatch()
                self._watched = self.source.filenos()
                for fd in self._watched:
                    asyncio.get_running_loop().add_reader(fd, self._readable)
                if self.source.ready:
                    _log.info("reading the rings in %s", self.config.pins)
            self._drain()
        except (OSError, ValueError) as error:
            self.source.error = str(error)
            _log.error("%s", error)
            self.source.close()
            self._unwatch()
            return False
        return True

    def _readable(self) -> None:
        # Readiness is a level: stop listening while events gather, or we would spin.
        if not self._scheduled:
            self._scheduled = True
            loop = asyncio.get_running_loop()
            for fd in self._watched:
                loop.remove_reader(fd)
            loop.call_later(_GATHER, self._gathered)

    def _gathered(self) -> None:
        self._scheduled = False
        try:
            self._drain()
        except (OSError, ValueError) as error:
            self.source.error = str(error)
            _log.error("%s", error)
            return
        loop = asyncio.get_running_loop()
        for fd in self._watched:
            loop.add_reader(fd, self._readable)

    def _drain(self) -> None:
        before = self.log.next
        if self.source.read() and not self._scheduled:
            self._readable()
        if self.log.next != before:
            self._arrived.set()
            self._arrived = asyncio.Event()

    def _unwatch(self) -> None:
        for fd in self._watched:
            asyncio.get_running_loop().remove_reader(fd)
        self._watched = []

    # ---- Names of nodes -----------------------------------------------------------

    async def keep_nodes(self) -> None:
        """Learns which addresses are nodes', from the source of objects, where it can."""
        while self.config.control:
            try:
                self.log.nodes = await self._nodes()
            except (OSError, ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
                _log.debug("cannot list nodes: %s", error)
            await asyncio.sleep(10 if self.log.nodes else 1)

    async def _nodes(self) -> dict[str, str]:
        connector = UnixConnector(self.config.control)
        async with ClientSession(connector=connector, timeout=ClientTimeout(5)) as session:
            async with session.get("http://control/v1/objects/nodes") as response:
                found = await response.json()
        items = found["items"] if isinstance(found, dict) else found
        return {
            address["address"]: item["metadata"]["name"]
            for item in items
            for address in item.get("status", {}).get("addresses", [])
            if address.get("type") == "InternalIP"
        }

    # ---- HTTP ---------------------------------------------------------------------

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/flows", self._flows)
        app.router.add_get("/v1/reasons", self._reasons)
        app.router.add_get("/v1/status", self._status)
        app.cleanup_ctx.append(self._background)
        return app

    def probes(self) -> web.Application:
        """What the kubelet asks: alive, as long as it answers; ready, once it reads the rings. And
        what Prometheus asks. Nothing here names a pod."""
        app = web.Application(client_max_size=1024)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _request: web.Request) -> web.Response:
        if self.source.ready:
            return web.Response(text="ok\n")
        return web.Response(text=f"{self.source.error}\n", status=503)

    async def _metrics(self, _request: web.Request) -> web.Response:
        with contextlib.suppress(OSError, ValueError):
            self._drain()
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        return web.Response(body=self.metrics.text(), headers=headers)

    async def _background(self, _app: web.Application) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(self.keep_reading()),
            asyncio.create_task(self.keep_nodes()),
        ]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _status(self, _request: web.Request) -> web.Response:
        status: dict[str, Any] = {
            "version": __version__,
            "cluster": self.config.cluster,
            "node": self.config.node,
            "ready": self.source.ready,
            **self.source.counts(),
            "decoded": self.source.decoded,
            "kept": self.log.next - self.log.first,
            "journalDamaged": self.journal.damaged,
            "memory": _resident(),
        }
        if self.source.error:
            status["error"] = self.source.error
        return web.json_response(status)

    async def _reasons(self, request: web.Request) -> web.Response:
        """The policies of `?id=`s, by id; null for one that the journal does not have."""
        wanted = request.query.getall("id", [])
        if not all(text.isdecimal() for text in wanted):
            return web.json_response({"error": "id: expected a number"}, status=400)
        self.journal.refresh()
        found = {text: self.journal.reasons.get(int(text)) for text in wanted}
        return web.json_response({k: v.policies if v else None for k, v in found.items()})

    async def _flows(self, request: web.Request) -> web.StreamResponse:
        """ndjson, newest last. A follower that is too slow is told how many it missed:
        {"type": "missed", "count": n}."""
        try:
            wanted = parse_filter(request.query, self.log.names)
        except FilterError as error:
            return web.json_response({"error": str(error)}, status=400)
        follow = request.query.get("follow", "0") not in ("", "0", "false")
        with contextlib.suppress(OSError, ValueError):
            self._drain()
        self.journal.refresh()
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):  # who asked has seen enough
            await self._tell(response, wanted, follow)
        return response

    async def _tell(self, response: web.StreamResponse, wanted: Filter, follow: bool) -> None:
        at = self.log.next
        await self._send(response, self.log.numbers(wanted), tell_missed=follow)
        wanted = replace(wanted, limit=None)
        while follow:
            arrived = self._arrived
            if at == self.log.next:
                await arrived.wait()
            if at < self.log.first:
                await _write(response, [_missed(self.log.first - at)])
                at = self.log.first
            numbers = self.log.numbers(wanted, at)
            at = self.log.next
            await self._send(response, numbers, tell_missed=True)
        await response.write_eof()

    async def _send(
        self, response: web.StreamResponse, numbers: npt.NDArray[np.int64], *, tell_missed: bool
    ) -> None:
        """A piece at a time: the rings are read between, or they would be full."""
        for start in range(0, len(numbers), _CHUNK):
            piece = numbers[start : start + _CHUNK]
            records = self.log.records(piece)
            if tell_missed and len(records) < len(piece):
                records.insert(0, _missed(len(piece) - len(records)))
            await _write(response, records)
            await asyncio.sleep(0)


def _resident() -> int:
    """Bytes of memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _missed(count: int) -> dict[str, Any]:
    return {"type": "missed", "count": count}


async def _write(response: web.StreamResponse, records: list[dict[str, Any]]) -> None:
    await response.write(msgspec.json.Encoder().encode_lines(records))


async def run(config: Config, schema: Schema) -> None:
    """Serves until SIGTERM or SIGINT."""
    observer = Observer(config, schema)
    async with contextlib.AsyncExitStack() as stack:
        await serve(stack, observer.application(), config.socket)
        if config.web:
            await serve(stack, observer.probes(), listen(config.web))
        done = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, done.set)
        await done.wait()


async def serve(
    stack: contextlib.AsyncExitStack, app: web.Application, place: str | tuple[str, int]
) -> None:
    """On a unix socket, for root only, or on a port, until `stack` ends."""
    # Without cancellation, a follower that went and whose filter nothing fits is served for ever.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, handler_cancellation=True)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    if isinstance(place, str):
        path = Path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        stack.callback(path.unlink, missing_ok=True)
        await web.UnixSite(runner, place).start()
        path.chmod(0o600)
    else:
        await web.TCPSite(runner, *place).start()

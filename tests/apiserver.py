"""A server that speaks the API server's list and watch, for edge cases of the protocol and for
measurements of an agent against more objects than real machines could be had for.

The real API server is tested against in tests/cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from pathlib import Path
from typing import Any

from aiohttp import web

from lockgate.kube.kinds import KINDS
from lockgate.net import namespaces

__all__ = ["ApiServer"]

PATHS = {kind.name: kind.path for kind in KINDS}
GROUPS = {kind.name: kind.group for kind in KINDS}


class ApiServer:
    """Objects by kind and key, and what happened to them; each change is a version.

    `paged`: lists are given in pages of `limit`. `unknown_selectors`: field selectors that are
    answered with 400. `accept`: the only token that is not answered with 401. `refuse`: HTTP
    status with which everything is answered. `busy`: so many requests are answered with 429 and
    Retry-After. `absent`: kinds that the server does not know.
    `extensions`: lists of other kinds by "group/version/plural"; a string is the refusal (403).
    `hold`: kinds whose lists are not answered before the event is set. `requests`: (kind, query,
    headers). `clients`: names in clients' certificates. `patches` of nodes' status and `created`
    events.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[tuple[str, str], dict[str, Any]]] = {k: {} for k in PATHS}
        self.version = 1
        self.oldest = 0
        self.history: dict[str, list[tuple[int, bytes]]] = {k: [] for k in PATHS}
        self.paged = False
        self.refuse = 0
        self.busy = 0
        self.accept = ""
        self.clients: list[str] = []
        self.absent: set[str] = set()
        self.refused = 0
        self.extensions: dict[str, list[Any] | str] = {}
        self.unknown_selectors: set[str] = set()
        self.hold: dict[str, asyncio.Event] = {}
        self.requests: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self.patches: list[tuple[str, Any]] = []
        self.created: list[Any] = []
        #: With the label selector of each.
        self._watchers: dict[str, dict[asyncio.Queue[bytes | None], str]] = {k: {} for k in PATHS}
        self._runner: web.AppRunner | None = None
        self.port = 0

    # ---- Life --------------------------------------------------------------------------

    async def start(self, ssl: Any = None, netns: Path | None = None) -> str:
        """Listens on loopback, of the network namespace `netns` if there is one; the URL."""
        app = web.Application(middlewares=[self._gate])
        for kind, path in PATHS.items():
            app.router.add_get(path, self._handler(kind))
        app.router.add_patch("/api/v1/nodes/{name}/status", self._patch)
        app.router.add_post("/apis/events.k8s.io/v1/namespaces/{namespace}/events", self._create)
        app.router.add_get("/api/v1/namespaces/{namespace}/pods/{name}/exec", self._echo)
        app.router.add_get("/apis", self._groups)
        app.router.add_get("/apis/{group}/{version}", self._resources)
        app.router.add_get("/apis/{group}/{version}/{plural}", self._extension)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        with namespaces.inside(netns) if netns else contextlib.nullcontext():
            listener = socket.create_server(("127.0.0.1", self.port))
        await web.SockSite(self._runner, listener, ssl_context=ssl).start()
        self.port = self._runner.addresses[0][1]
        return f"{'https' if ssl else 'http'}://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """The port is kept for the next start."""
        self.end_watches()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # ---- Objects -----------------------------------------------------------------------

    def put(self, *items: dict[str, Any], tell: bool = True) -> None:
        for item in items:
            meta = item["metadata"]
            key = meta.get("namespace", ""), meta["name"]
            table = self.objects[item["kind"]]
            verb = "MODIFIED" if key in table else "ADDED"
            self.version += 1
            meta["resourceVersion"] = str(self.version)
            table[key] = item
            self._record(item["kind"], {"type": verb, "object": item}, tell)

    def delete(self, kind: str, namespace: str, name: str, tell: bool = True) -> None:
        item = self.objects[kind].pop((namespace, name))
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self._record(kind, {"type": "DELETED", "object": item}, tell)

    def bookmark(self, kind: str) -> None:
        meta = {"resourceVersion": str(self.version)}
        self.send(kind, _line({"type": "BOOKMARK", "object": {"kind": kind, "metadata": meta}}))

    def compact(self) -> None:
        """Forget history: who watches from before now is told 410 Gone."""
        self.oldest = self.version
        for events in self.history.values():
            events.clear()

    def send(self, kind: str, data: bytes) -> None:
        """Bytes to all who watch a kind now."""
        for queue in self._watchers[kind]:
            queue.put_nowait(data)

    def end_watches(self) -> None:
        for queues in self._watchers.values():
            for queue in queues:
                queue.put_nowait(None)

    def watching(self) -> int:
        return sum(map(len, self._watchers.values()))

    def _record(self, kind: str, event: dict[str, Any], tell: bool) -> None:
        line = _line(event)
        self.history[kind].append((self.version, line))
        for queue, selector in self._watchers[kind].items() if tell else ():
            queue.put_nowait(_selected(line, selector))

    # ---- Requests ----------------------------------------------------------------------

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.refuse:
            self.refused += 1
            return _status(self.refuse, "Refused")
        if self.busy:
            self.busy -= 1
            answer = _status(429, "TooManyRequests", "storage is (re)initializing")
            answer.headers["Retry-After"] = "0"
            return answer
        if self.accept and request.headers.get("Authorization") != f"Bearer {self.accept}":
            self.refused += 1
            return _status(401, "Unauthorized", "Unauthorized")
        certificate = request.get_extra_info("peercert")
        if certificate:
            self.clients += [value for ((key, value),) in certificate["subject"]]
        handled: web.StreamResponse = await handler(request)
        return handled

    def _handler(self, kind: str) -> Any:
        async def answer(request: web.Request) -> web.StreamResponse:
            query = dict(request.query)
            self.requests.append((kind, query, dict(request.headers)))
            if kind in self.absent:
                return _status(404, "NotFound", "the server could not find the requested resource")
            if query.get("fieldSelector", "") in self.unknown_selectors:
                return _status(400, "BadRequest", "field label not supported")
            if query.get("watch"):
                return await self._watch(kind, request)
            if kind in self.hold:
                await self.hold[kind].wait()
            return self._list(kind, query, request)

        return answer

    def _list(self, kind: str, query: dict[str, str], request: web.Request) -> web.Response:
        selector = query.get("labelSelector", "")
        items = [item for item in self.objects[kind].values() if _matches(item, selector)]
        meta = {"resourceVersion": str(self.version)}
        if self.paged:
            version, _, start = query.get("continue", f"{self.version}:0").partition(":")
            if int(version) < self.oldest:
                return _status(410, "Expired")
            end = int(start) + int(query["limit"])
            if end < len(items):
                meta["continue"] = f"{version}:{end}"
            items = items[int(start) : end]
            meta["resourceVersion"] = version
        # As Go writes it: no spaces, metadata first, no kind in items.
        text = ",".join(
            json.dumps({k: v for k, v in item.items() if k != "kind"}, separators=(",", ":"))
            for item in items
        )
        head = json.dumps(
            {"kind": f"{kind}List", "apiVersion": GROUPS[kind], "metadata": meta}
        ).removesuffix("}")
        body = f'{head},"items":[{text}]}}'.encode()
        response = web.Response(body=body, content_type="application/json")
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            response.enable_compression()
        return response

    async def _watch(self, kind: str, request: web.Request) -> web.StreamResponse:
        """With sendInitialEvents the objects come first, and a bookmark that says so."""
        since = int(request.query.get("resourceVersion") or 0)
        selector = request.query.get("labelSelector", "")
        initial = request.query.get("sendInitialEvents") == "true"
        if not initial and since < self.oldest:
            return _status(410, "Expired", f"too old resource version: {since}")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        if initial:
            for item in self.objects[kind].values():
                if _matches(item, selector):
                    queue.put_nowait(_line({"type": "ADDED", "object": item}))
            meta = {
                "resourceVersion": str(self.version),
                "annotations": {"k8s.io/initial-events-end": "true"},
            }
            end = {"kind": kind, "apiVersion": GROUPS[kind], "metadata": meta}
            queue.put_nowait(_line({"type": "BOOKMARK", "object": end}))
        for version, line in () if initial else self.history[kind]:
            if version > since:
                queue.put_nowait(_selected(line, selector))
        self._watchers[kind][queue] = selector
        try:
            while (data := await queue.get()) is not None:
                await response.write(data)
        except ConnectionResetError:
            pass
        finally:
            self._watchers[kind].pop(queue, None)
        return response

    async def _echo(self, request: web.Request) -> web.WebSocketResponse:
        """A command in a container, as far as a WebSocket shows: it says what it was told."""
        wire = web.WebSocketResponse(protocols=request.headers["Sec-WebSocket-Protocol"].split(","))
        await wire.prepare(request)
        async for message in wire:
            await wire.send_bytes(message.data)
        return wire

    # ---- Kinds of others -------------------------------------------------------------------

    async def _groups(self, _: web.Request) -> web.Response:
        """APIGroupList: the kinds above and `extensions`; the last version is preferred."""
        groups: dict[str, list[dict[str, str]]] = {}
        for path in [*(kind.path.removeprefix("/apis/") for kind in KINDS), *self.extensions]:
            if not path.startswith("/api/"):
                group, version, _ = path.split("/")
                versions = groups.setdefault(group, [])
                versions.append({"groupVersion": f"{group}/{version}", "version": version})
        return web.json_response(
            {
                "groups": [
                    {"name": name, "versions": versions, "preferredVersion": versions[-1]}
                    for name, versions in groups.items()
                ]
            }
        )

    async def _resources(self, request: web.Request) -> web.Response:
        where = "{group}/{version}/".format(**request.match_info)
        names = [path.removeprefix(where) for path in self.extensions if path.startswith(where)]
        resources = [
            resource
            for name in names
            for resource in (
                {"name": name, "verbs": ["get", "list"]},
                {"name": f"{name}/status", "verbs": ["get"]},
            )
        ]
        return web.json_response({"resources": resources})

    async def _extension(self, request: web.Request) -> web.Response:
        items = self.extensions.get("{group}/{version}/{plural}".format(**request.match_info))
        if items is None:
            return _status(404, "NotFound", "the server could not find the requested resource")
        if isinstance(items, str):
            return _status(403, "Forbidden", items)
        return web.json_response({"items": items})

    async def _patch(self, request: web.Request) -> web.Response:
        """A strategic merge patch: conditions are told apart by type."""
        name, patch = request.match_info["name"], await request.json()
        self.patches.append((name, patch))
        node = self.objects["Node"].get(("", name))
        if node is None:
            return _status(404, "NotFound", f'nodes "{name}" not found')
        status = node.setdefault("status", {})
        conditions = {one["type"]: one for one in status.get("conditions", ())}
        conditions |= {one["type"]: one for one in patch["status"]["conditions"]}
        self.put({**node, "status": {**status, "conditions": list(conditions.values())}})
        return web.json_response({})

    async def _create(self, request: web.Request) -> web.Response:
        self.created.append(await request.json())
        return web.json_response({}, status=201)


def _matches(item: dict[str, Any], selector: str) -> bool:
    """Label selectors as far as they are used: "!key,!key"."""
    labels = item["metadata"].get("labels", {})
    return all(term.removeprefix("!") not in labels for term in selector.split(",") if term)


def _selected(line: bytes, selector: str) -> bytes:
    """An event as a watcher with this selector hears it: what does not match any more is gone."""
    if selector and not _matches((event := json.loads(line))["object"], selector):
        return _line({**event, "type": "DELETED"})
    return line


def _line(event: Any) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def _status(code: int, reason: str, message: str = "") -> web.Response:
    body = {"kind": "Status", "code": code, "reason": reason, "message": message}
    return web.json_response(body, status=code)

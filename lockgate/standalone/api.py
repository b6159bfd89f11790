"""The supervisor's HTTP API on control.sock, for agents and for the command line.

GET  /v1/watch                       the stream of objects (docs/architecture.md)
POST /v1/applied {node, revision, error?}
POST /v1/wait?timeout=S              {ok, revision, reasons, warnings}: everything saved in force?
GET  /v1/objects/{pods,services,endpoints,policies,nodes,namespaces,firewalls}  one JSON array
GET  /v1/status                      phase, nodes, pods, errors, warnings
GET  /v1/exec?pod=NS/NAME            {pid, cgroup, node, netns, environment}
POST /v1/shutdown                    ends the cluster and removes it
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from lockgate.objects.model import Pod
from lockgate.standalone.runtime import pod_spec
from lockgate.standalone.store import object_json
from lockgate.standalone.supervisor import Supervisor

__all__ = ["serve"]

_COLLECTIONS = {
    "pods": "Pod",
    "services": "Service",
    "endpoints": "EndpointSlice",
    "policies": "NetworkPolicy",
    "nodes": "Node",
    "namespaces": "Namespace",
    "firewalls": "Firewall",
}


async def serve(supervisor: Supervisor) -> Callable[[], Awaitable[None]]:
    """Listens; what is returned ends it."""
    api = _Api(supervisor)
    app = web.Application(middlewares=[_errors])
    app.add_routes(
        [
            web.get("/v1/watch", api.watch),
            web.post("/v1/applied", api.applied),
            web.post("/v1/wait", api.wait),
            web.get("/v1/objects/{collection}", api.objects),
            web.get("/v1/status", api.status),
            web.get("/v1/exec", api.exec),
            web.post("/v1/shutdown", api.shutdown),
        ]
    )
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    path = supervisor.state.control
    path.unlink(missing_ok=True)
    old = os.umask(0o177)
    try:
        await web.UnixSite(runner, str(path)).start()
    finally:
        os.umask(old)
    return runner.cleanup


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        answer: web.StreamResponse = await handler(request)
        return answer
    except web.HTTPException as error:
        return _json({"error": error.text or error.reason}, error.status)
    except (ValueError, KeyError) as error:
        return _json({"error": f"not understood: {error}"}, 400)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value) + b"\n", status=status, content_type="application/json"
    )


class _Api:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        store = self._supervisor.store
        watcher = store.watch()
        try:
            while (batch := await watcher.queue.get()) is not None:
                await response.write(batch)
        except ConnectionResetError:
            pass
        finally:
            store.unwatch(watcher)
        return response

    async def applied(self, request: web.Request) -> web.Response:
        body = await request.json()
        await self._supervisor.applied(str(body["node"]), int(body["revision"]), body.get("error"))
        return _json({})

    async def wait(self, request: web.Request) -> web.Response:
        timeout = float(request.query.get("timeout", "30"))
        reasons = await self._supervisor.wait(timeout)
        return _json(
            {
                "ok": not reasons,
                "revision": self._supervisor.store.revision,
                "reasons": reasons,
                "warnings": self._supervisor.warnings,
            }
        )

    async def objects(self, request: web.Request) -> web.Response:
        kind = _COLLECTIONS.get(request.match_info["collection"])
        if kind is None:
            raise web.HTTPNotFound(text=f"expected one of {', '.join(_COLLECTIONS)}")
        items = self._supervisor.store.objects[kind]
        body = b",\n".join(object_json(items[key]) for key in sorted(items))
        return web.Response(body=b"[" + body + b"]\n", content_type="application/json")

    async def status(self, _request: web.Request) -> web.Response:
        supervisor = self._supervisor
        store = supervisor.store
        pods = [pod for pod in store.objects["Pod"].values() if isinstance(pod, Pod)]
        nodes = []
        for name in supervisor.machines.published:
            children = {c.role: c.status for c in supervisor.machines.children if c.node == name}
            nodes.append(
                {
                    "name": name,
                    "applied": store.applied.get(name, 0),
                    "error": store.errors.get(name, ""),
                    **children,
                }
            )
        phase = supervisor.phase
        if phase == "starting" and store.revision and not supervisor.reasons(store.revision):
            phase = supervisor.phase = "running"
        return _json(
            {
                "cluster": supervisor.state.cluster,
                "folder": str(supervisor.folder.path),
                "pid": os.getpid(),
                "phase": phase,
                "revision": store.revision,
                "nodes": nodes,
                "pods": {
                    "total": len(pods),
                    "ready": sum(pod.ready or pod.status.phase == "Succeeded" for pod in pods),
                    "running": sum(pod.status.phase == "Running" for pod in pods),
                    "failed": sum(pod.status.phase == "Failed" for pod in pods),
                },
                "notReady": supervisor.not_ready(),
                "waitingFor": supervisor.waiting_for(),
                "reasons": supervisor.reasons(store.revision),
                "errors": supervisor.update.errors,
                "warnings": supervisor.warnings,
            }
        )

    async def exec(self, request: web.Request) -> web.Response:
        name = request.query["pod"]
        namespace, _, pod_name = name.rpartition("/")
        runner = self._supervisor.runners.get((namespace or "default", pod_name))
        if runner is None:
            raise web.HTTPNotFound(text=f"there is no pod {name}")
        if runner.process is None:
            raise web.HTTPConflict(text=f"pod {name} is not running ({runner.pod.status.phase})")
        return _json(
            {
                "pid": runner.process.pid,
                "cgroup": str(runner.cgroup),
                "node": runner.node,
                "netns": str(runner.process.netns_path),
                "environment": dict(pod_spec(runner.pod).containers[0].environment),
            }
        )

    async def shutdown(self, _request: web.Request) -> web.Response:
        self._supervisor.stop.set()
        return _json({})

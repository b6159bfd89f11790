"""/healthz, /readyz and /metrics: for the kubelet and Prometheus, on a port of the node.

Nothing here changes anything or names a pod.
"""

from __future__ import annotations

import asyncio

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from lockgate.agent.agent import Agent

__all__ = ["application"]

_STUCK = 20.0
_AGENT = web.AppKey("agent", Agent)


def application(agent: Agent) -> web.Application:
    """The routes."""
    app = web.Application(client_max_size=1024)
    app[_AGENT] = agent
    app.add_routes(
        [
            web.get("/healthz", _health),
            web.get("/readyz", _ready),
            web.get("/metrics", _metrics),
        ]
    )
    return app


async def _health(request: web.Request) -> web.Response:
    """200 while the thread that works on the kernel takes work; a restart helps where not."""
    try:
        async with asyncio.timeout(_STUCK):
            await request.app[_AGENT].work(lambda: None)
    except TimeoutError:
        return web.Response(text=f"no work was done for {_STUCK:g} s\n", status=503)
    return web.Response(text="ok\n")


async def _ready(request: web.Request) -> web.Response:
    """200 once a complete view of the objects is in force. An API server that is away later
    does not make a node unready: what is in force stays."""
    agent = request.app[_AGENT]
    if not agent.applied:
        text = agent.source.problem() or "; ".join(agent.errors.get("publish", ()))
        text = text or "the objects are not known yet"
        return web.Response(text=f"nothing is in force yet: {text}\n", status=503)
    return web.Response(text=f"ok {agent.source.problem()}".strip() + "\n")


async def _metrics(request: web.Request) -> web.Response:
    agent = request.app[_AGENT]
    body = await agent.metrics.text(agent)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

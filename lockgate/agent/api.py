"""The agent's HTTP API on a unix socket (docs/architecture.md, Agent HTTP API)."""

from __future__ import annotations

import base64
import logging
from typing import Any

import msgspec
from aiohttp import web

from lockgate.agent import firewall_api, firewall_asked, frontends, probe
from lockgate.agent.agent import Agent
from lockgate.agent.endpoints import Attachment
from lockgate.agent.ipam import PoolExhausted
from lockgate.agent.requests import EndpointError

__all__ = ["application"]

log = logging.getLogger(__name__)
_PLACES = ("from_pod", "to_pod", "from_net")
_AGENT = web.AppKey("agent", Agent)


def application(agent: Agent) -> web.Application:
    """The routes. Errors are {"error": "one sentence"}."""
    app = web.Application(middlewares=[_errors], client_max_size=64 << 20)
    app[_AGENT] = agent
    app.add_routes(
        [
            web.post("/v1/endpoints", _add),
            web.delete("/v1/endpoints/{uid}", _delete),
            web.get("/v1/status", _status),
            web.get("/v1/dryrun", _dry_run_facts),
            web.get("/v1/objects/nodes", _nodes),
            web.post("/v1/dryrun", _dry_run),
            web.post("/v1/frontends", _frontends),
            web.post("/v1/probe", _probe),
            web.get("/v1/doctor", _doctor),
            web.get("/v1/report", _report),
            web.get("/v1/firewall", _firewall),
            web.post("/v1/firewall", _firewall_add),
            web.post("/v1/firewall/delete", _firewall_delete),
            web.post("/v1/firewall/ask", _firewall_ask),
            web.get("/healthz", _health),
        ]
    )
    return app


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        answer: web.StreamResponse = await handler(request)
        return answer
    except EndpointError as error:
        return _error(error.status, str(error))
    except PoolExhausted as error:
        return _error(507, str(error))
    except (ValueError, KeyError, TypeError) as error:
        log.info("%s %s: %s", request.method, request.path, error)
        return _error(400, f"the request can't be read: {error}")
    except OSError as error:
        log.exception("%s %s", request.method, request.path)
        return _error(500, error.strerror or str(error))


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


async def _add(request: web.Request) -> web.Response:
    body = await request.json()
    uid, netns = body["uid"], body["netns"]
    if not isinstance(uid, str) or not isinstance(netns, str) or not uid:
        raise ValueError("uid and netns must be strings")
    return web.json_response(await request.app[_AGENT].requests.add(Attachment(uid, netns)))


async def _delete(request: web.Request) -> web.Response:
    done = await request.app[_AGENT].requests.delete(request.match_info["uid"])
    return web.json_response({"deleted": done})


async def _status(request: web.Request) -> web.Response:
    return web.json_response(await request.app[_AGENT].status())


async def _nodes(request: web.Request) -> web.Response:
    """As the supervisor's: the observer asks whose an address is."""
    cluster = request.app[_AGENT].cluster
    nodes = list(cluster.nodes.values()) if cluster is not None else []
    return web.Response(body=msgspec.json.encode(nodes), content_type="application/json")


async def _health(request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


async def _dry_run_facts(request: web.Request) -> web.Response:
    return web.json_response(await request.app[_AGENT].dry_run_facts())


async def _frontends(request: web.Request) -> web.Response:
    asked = msgspec.convert((await request.json())["frontends"], list[frontends.Asked])
    answers = await request.app[_AGENT].work(frontends.frontends, request.app[_AGENT], asked)
    return web.json_response({"answers": answers})


async def _probe(request: web.Request) -> web.Response:
    body = msgspec.json.decode(await request.read(), type=probe.Request)
    results = await probe.probe(request.app[_AGENT], body)
    return web.json_response({"results": msgspec.to_builtins(results)})


async def _doctor(request: web.Request) -> web.Response:
    facts, findings = await request.app[_AGENT].doctor()
    answer = {"facts": facts, "findings": findings}
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


async def _report(request: web.Request) -> web.Response:
    body = msgspec.json.encode(await request.app[_AGENT].report())
    return web.Response(body=body, content_type="application/json")


async def _firewall(request: web.Request) -> web.Response:
    top = int(request.query.get("top", "100"))
    return await firewall_api.respond(firewall_api.show, request.app[_AGENT], top)


async def _firewall_add(request: web.Request) -> web.Response:
    body = await request.read()
    return await firewall_api.respond(firewall_api.add, request.app[_AGENT], body)


async def _firewall_delete(request: web.Request) -> web.Response:
    body = await request.read()
    return await firewall_api.respond(firewall_api.delete, request.app[_AGENT], body)


async def _firewall_ask(request: web.Request) -> web.Response:
    asked = msgspec.json.decode(await request.read(), type=firewall_asked.Asked)
    answer = await request.app[_AGENT].work(firewall_asked.ask, request.app[_AGENT], asked)
    return web.json_response({"answer": answer})


async def _dry_run(request: web.Request) -> web.Response:
    packets = []
    for item in (await request.json())["packets"]:
        if item["at"] not in _PLACES:
            raise ValueError(f"at: expected one of {', '.join(_PLACES)}, got {item['at']!r}")
        packet = base64.b64decode(item["packet"], validate=True)
        packets.append(
            {
                "at": item["at"],
                "packet": packet,
                "ifindex": item.get("ifindex"),
                "ownSocket": bool(item.get("ownSocket")),
            }
        )
    return web.json_response({"answers": await request.app[_AGENT].dry_run(packets)})

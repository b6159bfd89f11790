"""The ports at which load balancers ask a node whether to send it packets, as with kube-proxy.

Each service with `spec.healthCheckNodePort` has one (externalTrafficPolicy Local): 200 while ready
endpoints of it are on this node. Balancers of the others (Cluster) ask at the setting
`proxyHealthPort`, `/healthz`: 200 while the node serves services and stays (KEP-3836); `/livez` is
the same for a node on its way out. All addresses of the node are listened on, also of a family that
the service does not have: the answer is of the one that it has.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from aiohttp import web

from lockgate.agent.brief import BriefServer
from lockgate.agent.health_counts import HealthCounts
from lockgate.agent.service_health import KeepingUp, eligible
from lockgate.objects.changes import Changed, Name
from lockgate.objects.model import Cluster

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["HealthPorts"]

log = logging.getLogger(__name__)
#: Seconds until a port that somebody else has is tried again.
_AGAIN = 5.0
_FAMILIES = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
_ANY = {"IPv4": "0.0.0.0", "IPv6": "::"}


@dataclass(slots=True, frozen=True)
class _Port:
    """What is asked at a port: about a service, or (None) about the node."""

    service: Name | None
    field: str  # object and field that want it


class HealthPorts:
    """`follow` tells it what changed, `keeping_up` how the tables do; `run` listens until it is
    cancelled."""

    def __init__(self, agent: Agent) -> None:
        self.keeping_up = KeepingUp()
        self._agent = agent
        self._loop: asyncio.AbstractEventLoop | None = None
        self._counts = HealthCounts(agent.config.node)
        self._wanted: dict[int, _Port] = {}
        self._disputed: list[str] = []
        self._open: dict[tuple[int, str], web.SockSite] = {}
        self._moved = asyncio.Event()
        self._want()

    def follow(self, cluster: Cluster, changed: Changed | None) -> None:
        """Counts are others at once, listeners soon. From the worker, when `cluster` is compiled;
        `changed` as for the compiler."""
        if self._counts.follow(cluster, changed):
            self._want()
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._moved.set)

    @property
    def healthy(self) -> bool:
        """Something is in force, and changes come into force."""
        return self._agent.publisher.epoch > 0 and self.keeping_up.healthy

    def _want(self) -> None:
        wanted: dict[int, _Port] = {}
        disputed = []
        if self._agent.config.proxy_health_port:
            wanted[self._agent.config.proxy_health_port] = _Port(
                None, f"Node {self._agent.config.node}: proxyHealthPort"
            )
        for name, asked in self._counts.asked.items():  # in the order of names
            field = f"Service {'/'.join(name)}: spec.healthCheckNodePort"
            other = wanted.setdefault(asked.port, _Port(name, field))
            if other.service != name:
                disputed.append(f"{field}: {asked.port} is of {other.field} already")
        self._wanted, self._disputed = wanted, disputed

    # ---- Listening -----------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        self._loop = asyncio.get_running_loop()
        runner = web.ServerRunner(BriefServer(self._answer))
        await runner.setup()
        try:
            while True:
                self._moved.clear()
                errors = await self._settle(runner)
                for text in set(errors) - set(self._agent.errors.get("health", ())):
                    log.warning("%s", text)
                self._agent.errors["health"] = errors
                try:
                    async with asyncio.timeout(_AGAIN if errors else None):
                        await self._moved.wait()
                except TimeoutError:
                    pass
        finally:
            await runner.cleanup()
            self._open.clear()

    async def _settle(self, runner: web.ServerRunner) -> list[str]:
        """Listen where it is wanted; what can't be."""
        wanted, errors = self._wanted, list(self._disputed)
        listened = {(port, family) for port in wanted for family in _FAMILIES}
        for key in self._open.keys() - listened:
            await self._open.pop(key).stop()
        for port, family in sorted(listened - self._open.keys()):
            try:
                site = web.SockSite(runner, _listen(port, family))
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT:  # the kernel is without the family
                    continue
                errors.append(
                    f"{wanted[port].field}: {port} can't be listened on over {family}"
                    f" ({error.strerror}); tried again every {_AGAIN:g} s"
                )
                continue
            await site.start()
            self._open[port, family] = site
        return errors

    # ---- Answering -----------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        transport = request.transport
        if transport is None:
            return web.Response(status=503)
        address, number = transport.get_extra_info("sockname")[:2]
        port = self._wanted.get(number)
        if port is None:
            return _json(503, {})
        if port.service is None:
            return self._of_node(request.path)
        return self._of_service(port.service, "IPv6" if ":" in address else "IPv4")

    def _of_service(self, name: Name, family: str) -> web.Response:
        asked = self._counts.asked.get(name)
        counts = asked.counts if asked is not None else {}
        count = counts.get(family, max(counts.values(), default=0))
        body = {
            "service": {"namespace": name[0], "name": name[1]},
            "localEndpoints": count,
            "serviceProxyHealthy": self.healthy,
        }
        response = _json(200 if count and self.healthy else 503, body)
        response.headers["X-Load-Balancing-Endpoint-Weight"] = str(count)
        return response

    def _of_node(self, path: str) -> web.Response:
        if path not in ("/healthz", "/livez"):
            return _json(404, {})
        agent, now = self._agent, datetime.now(UTC)
        healthy = self.healthy
        # kube-proxy's is "recent" while it is healthy, whether or not anything changed.
        updated = now if healthy else datetime.fromtimestamp(self.keeping_up.last, UTC)
        body: dict[str, Any] = {"lastUpdated": _time(updated), "currentTime": _time(now)}
        if path == "/healthz":
            cluster = agent.cluster
            node = cluster.nodes.get(agent.config.node) if cluster is not None else None
            body["nodeEligible"] = eligible(node)
            healthy = healthy and eligible(node)
        return _json(200 if healthy else 503, {**body, "healthy": healthy})


def _json(status: int, body: dict[str, Any]) -> web.Response:
    response = web.json_response(body, status=status)
    response.content_type, response.charset = "application/json", None
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Server"] = "lockgate"  # everybody is told: without versions
    response.force_close()
    return response


def _time(when: datetime) -> str:
    return when.isoformat().replace("+00:00", "Z")


def _listen(port: int, family: str) -> socket.socket:
    """On all addresses of one family. OSError."""
    sock = socket.socket(_FAMILIES[family], socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == "IPv6":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((_ANY[family], port))
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    return sock

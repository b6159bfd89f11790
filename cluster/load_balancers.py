"""What a cloud has in front of a cluster: addresses for Services of type LoadBalancer, and routers.

For development and tests only, and no part of Lockgate, which serves the addresses that such a one
writes into the status. As in a cloud:

- A service without `loadBalancerClass` gets an address per family and keeps it while it is of the
  type. A finalizer holds the service until its load balancer is gone.
- The machine outside leads each address to the nodes that are Ready, by connection (ECMP); with
  `externalTrafficPolicy: Local` to those alone whose `healthCheckNodePort` says 200, or to all
  where none does. With `sessionAffinity: ClientIP` it is one node: outside there is one client.
- An address that is nobody's leads to all nodes: it is for them to refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_network
from types import TracebackType
from typing import Any
from zlib import crc32

import aiohttp
import msgspec

from cluster.commands import Failed, run
from cluster.state import State
from lockgate.kube.client import AWAY, ApiError, Client, Settings
from lockgate.net import namespaces
from lockgate.standalone import underlay
from lockgate.standalone.service_addresses import BALANCER_NET4, BALANCER_NET6

__all__ = ["FINALIZER", "LoadBalancers", "Service", "addresses_of", "next_hops"]

#: k8s.io/cloud-provider/service/helpers, LoadBalancerCleanupFinalizer.
FINALIZER = "service.kubernetes.io/load-balancer-cleanup"
_EVERY = 0.3  # seconds between two looks at all services: nothing to be missed, as with a watch
_HEALTH = aiohttp.ClientTimeout(total=1)
_NETS = {"IPv4": BALANCER_NET4, "IPv6": BALANCER_NET6}
_MERGE = "application/merge-patch+json"

log = logging.getLogger(__name__)


class _Camel(msgspec.Struct, rename="camel"):
    pass


class Metadata(_Camel):
    name: str
    namespace: str = ""
    resource_version: str = ""
    deletion_timestamp: str = ""
    finalizers: list[str] = []


class Ingress(_Camel):
    ip: str = ""


class Balancer(_Camel):
    ingress: list[Ingress] = []


class ServiceSpec(_Camel):
    type: str = ""
    load_balancer_class: str = ""
    ip_families: list[str] = []
    health_check_node_port: int = 0
    session_affinity: str = ""


class ServiceStatus(_Camel):
    load_balancer: Balancer = msgspec.field(default_factory=Balancer)


class Service(_Camel):
    """Of a Service (core/v1) what concerns its load balancer."""

    metadata: Metadata
    spec: ServiceSpec = msgspec.field(default_factory=ServiceSpec)
    status: ServiceStatus = msgspec.field(default_factory=ServiceStatus)

    @property
    def addresses(self) -> list[str]:
        return [one.ip for one in self.status.load_balancer.ingress]

    @property
    def wants(self) -> bool:
        """Whether it is to have a load balancer of ours."""
        spec = self.spec
        ours = spec.type == "LoadBalancer" and not spec.load_balancer_class
        return ours and not self.metadata.deletion_timestamp


class _Services(msgspec.Struct):
    items: list[Service]


class _Condition(msgspec.Struct):
    type: str
    status: str


class _NodeStatus(msgspec.Struct):
    conditions: list[_Condition] = []


class _Node(msgspec.Struct):
    metadata: Metadata
    status: _NodeStatus = msgspec.field(default_factory=_NodeStatus)


class _Nodes(msgspec.Struct):
    items: list[_Node]


def addresses_of(service: Service, free: Mapping[str, Iterator[str]]) -> list[str]:
    """Its address in each of its families: that which it has, else the next that is free."""
    has = {"IPv6" if ":" in ip else "IPv4": ip for ip in service.addresses}
    return [has.get(family) or next(free[family]) for family in service.spec.ip_families]


def next_hops(service: Service, ready: Sequence[int], healthy: Sequence[int]) -> list[int]:
    """Numbers of the nodes that its addresses lead to."""
    hops = list(ready)
    if service.spec.health_check_node_port:
        hops = [number for number in ready if number in healthy] or hops
    if service.spec.session_affinity == "ClientIP" and hops:
        name = f"{service.metadata.namespace}/{service.metadata.name}"
        hops = [min(hops, key=lambda number: crc32(f"{name} {number}".encode()))]
    return hops


class LoadBalancers:
    """As a context: within it they work. Raises Failed at its end if they broke."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._client = Client(Settings(kubeconfig=str(state.outside_kubeconfig)))
        self._thread = threading.Thread(target=self._main, name="load balancers", daemon=True)
        self._end = threading.Event()
        self._broken: BaseException | None = None
        self._spread: list[int] = []
        self._routes: dict[str, list[int]] = {}
        # Round and round: an address that was given back is not at once another's.
        self._cursors = {
            family: itertools.cycle(map(str, itertools.islice(ip_network(net).hosts(), 200)))
            for family, net in _NETS.items()
        }

    def __enter__(self) -> LoadBalancers:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._broken is not None and error is None:
            raise Failed(f"the load balancers broke: {self._broken!r}") from self._broken

    # ---- The thread, which is outside -------------------------------------------------

    def _main(self) -> None:
        try:
            namespaces.enter(namespaces.path_of(self._state.outside_netns))
            asyncio.run(self._run())
        except BaseException as error:
            log.exception("the load balancers broke")
            self._broken = error

    async def _run(self) -> None:
        async with aiohttp.ClientSession() as session, contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._client.close)
            while not self._end.is_set():
                # Specs may restart the API server.
                with contextlib.suppress(*AWAY, ApiError):
                    await self._turn(session)
                await asyncio.sleep(_EVERY)

    async def _turn(self, session: aiohttp.ClientSession) -> None:
        services = (await self._list("services", _Services)).items
        ready = [
            int(node.metadata.name.removeprefix("node-"))
            for node in (await self._list("nodes", _Nodes)).items
            if any((each.type, each.status) == ("Ready", "True") for each in node.status.conditions)
        ]
        if ready != self._spread:
            underlay.spread(self._state, ready)
            self._spread = ready
        mine = [service for service in services if service.wants]
        healthy = await asyncio.gather(*(_healthy(session, one, ready) for one in mine))
        taken = {address for service in services for address in service.addresses}
        free = {
            family: (one for one in cursor if one not in taken)
            for family, cursor in self._cursors.items()
        }
        given = [addresses_of(service, free) for service in mine]
        self._lead(
            {
                address: next_hops(service, ready, well)
                for service, well, addresses in zip(mine, healthy, given, strict=True)
                for address in addresses
            }
        )
        for service, addresses in zip(mine, given, strict=True):
            await self._give(service, addresses)
        for service in services:
            if not service.wants and FINALIZER in service.metadata.finalizers:
                await self._take(service)

    def _lead(self, routes: dict[str, list[int]]) -> None:
        for address in self._routes.keys() - routes.keys():
            # One that a run before left behind may be gone by now.
            with contextlib.suppress(Failed):
                _ip("route", "del", _host(address))
        for address, numbers in routes.items():
            if numbers and self._routes.get(address) != numbers:
                hops = (
                    ("nexthop", "via", underlay.outside_address(number, ":" in address))
                    for number in numbers
                )
                _ip("route", "replace", _host(address), *itertools.chain(*hops))
        self._routes = {address: numbers for address, numbers in routes.items() if numbers}

    # ---- The API -------------------------------------------------------------------------

    async def _give(self, service: Service, addresses: list[str]) -> None:
        finalizers = service.metadata.finalizers
        if FINALIZER not in finalizers:
            # What the service is to be by then is seen in the next turn.
            await self._patch(service, "", {"metadata": {"finalizers": [*finalizers, FINALIZER]}})
        elif addresses != service.addresses:
            ingress = [{"ip": address, "ipMode": "VIP"} for address in addresses]
            await self._patch(
                service, "/status", {"status": {"loadBalancer": {"ingress": ingress}}}
            )

    async def _take(self, service: Service) -> None:
        if service.addresses:
            await self._patch(service, "/status", {"status": {"loadBalancer": None}})
        else:
            left = [one for one in service.metadata.finalizers if one != FINALIZER]
            await self._patch(service, "", {"metadata": {"finalizers": left}})

    async def _patch(self, service: Service, part: str, body: dict[str, Any]) -> None:
        """One that has changed since is left for the next turn."""
        meta = service.metadata
        body.setdefault("metadata", {})["resourceVersion"] = meta.resource_version
        path = f"/api/v1/namespaces/{meta.namespace}/services/{meta.name}{part}"
        try:
            await self._client.call("PATCH", path, body=body, content_type=_MERGE)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def _list(self, resource: str, kind: type[Any]) -> Any:
        return msgspec.json.decode(await self._client.call("GET", f"/api/v1/{resource}"), type=kind)


async def _healthy(
    session: aiohttp.ClientSession, service: Service, numbers: Sequence[int]
) -> list[int]:
    """Of the nodes with these numbers those that say they have endpoints."""
    port = service.spec.health_check_node_port
    if not port:
        return []

    async def well(number: int) -> bool:
        url = f"http://{underlay.outside_address(number, False)}:{port}/"
        try:
            async with session.get(url, timeout=_HEALTH) as answer:
                return answer.status == 200
        except AWAY:
            return False

    answers = await asyncio.gather(*map(well, numbers))
    return [number for number, good in zip(numbers, answers, strict=True) if good]


def _host(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"


def _ip(*words: str) -> None:
    run("ip", *words)

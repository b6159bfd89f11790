"""The answers to load balancers, over real sockets; the agent behind them is the test's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from lockgate.agent import brief, health_ports
from lockgate.agent.health_ports import HealthPorts
from lockgate.agent.service_health import LATE, KeepingUp
from lockgate.objects.changes import Changed
from lockgate.objects.model import Cluster, Node, NodeSpec, ObjectMeta, Taint
from tests.unit.test_agent_health_counts import cluster, endpoint, of, service

LOOPBACK = {"IPv4": "127.0.0.1", "IPv6": "[::1]"}


def free_port() -> int:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as sock:
        return int(sock.getsockname()[1])


class Agent(SimpleNamespace):
    """What HealthPorts asks of one."""

    def __init__(self, proxy_port: int = 0) -> None:
        config = SimpleNamespace(node="one", proxy_health_port=proxy_port)
        in_force = SimpleNamespace(epoch=1)
        super().__init__(config=config, errors={}, cluster=Cluster(), publisher=in_force)


@contextlib.asynccontextmanager
async def ports_of(agent: Agent) -> AsyncIterator[HealthPorts]:
    ports = HealthPorts(agent)  # type: ignore[arg-type]
    task = asyncio.create_task(ports.run())
    try:
        yield ports
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def settled(agent: Agent) -> None:
    """All listeners are as they are wanted."""
    async with asyncio.timeout(10):
        agent.errors.pop("health", None)
        while "health" not in agent.errors:
            await asyncio.sleep(0.005)


async def ask(port: int, family: str = "IPv4", path: str = "/") -> tuple[int, Any, Any]:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{LOOPBACK[family]}:{port}{path}") as response:
            return response.status, response.headers, json.loads(await response.text())


async def test_a_service_is_answered_for_as_kube_proxy_does() -> None:
    agent, port = Agent(), free_port()
    now = cluster(service(health_check_node_port=port), a=of("web", endpoint("10.0.0.1")))
    async with ports_of(agent) as ports:
        ports.follow(now, None)
        await settled(agent)
        status, headers, body = await ask(port)
        assert status == 200
        assert headers["Content-Type"] == "application/json"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Server"] == "lockgate"
        assert headers["X-Load-Balancing-Endpoint-Weight"] == "1"
        assert body == {
            "service": {"namespace": "shop", "name": "web"},
            "localEndpoints": 1,
            "serviceProxyHealthy": True,
        }
        status, headers, body = await ask(port, "IPv6")
        assert (status, headers["X-Load-Balancing-Endpoint-Weight"]) == (503, "0")
        assert body["localEndpoints"] == 0, "its endpoint has no address of that family"

        now.slices["shop", "a"] = of("web", endpoint("10.0.0.1", ready=False, terminating=True))
        ports.follow(now, Changed(slices={("shop", "a")}))
        status, headers, body = await ask(port)
        assert (status, headers["X-Load-Balancing-Endpoint-Weight"]) == (503, "0")
        assert body["serviceProxyHealthy"] is True


async def test_a_node_whose_tables_do_not_keep_up_sends_clients_away() -> None:
    port, of_node = free_port(), free_port()
    agent = Agent(of_node)
    agent.cluster = Cluster(nodes={"one": Node(metadata=ObjectMeta(name="one"))})
    now = cluster(service(health_check_node_port=port), a=of("web", endpoint("10.0.0.1")))
    async with ports_of(agent) as ports:
        ports.follow(now, None)
        await settled(agent)
        now_s = [0.0]
        ports.keeping_up = KeepingUp(lambda: now_s[0])
        ports.keeping_up.noted()
        assert (await ask(port))[0] == 200, "it may wait for a while"
        now_s[0] = LATE
        status, headers, body = await ask(port)
        assert (status, headers["X-Load-Balancing-Endpoint-Weight"]) == (503, "1")
        assert (body["localEndpoints"], body["serviceProxyHealthy"]) == (1, False)
        for path in ("/healthz", "/livez"):
            assert (await ask(of_node, path=path))[0] == 503
        ports.keeping_up.done(all_of_it=True)
        assert (await ask(port))[0] == (await ask(of_node, path="/healthz"))[0] == 200
        agent.publisher.epoch = 0
        assert (await ask(port))[0] == (await ask(of_node, path="/healthz"))[0] == 503


async def test_a_balancer_may_ask_over_a_family_that_the_service_does_not_have() -> None:
    agent, port = Agent(), free_port()
    now = cluster(
        service(health_check_node_port=port, cluster_ips=["10.96.0.1"]),
        a=of("web", endpoint("10.0.0.1")),
    )
    async with ports_of(agent) as ports:
        ports.follow(now, None)
        await settled(agent)
        assert (await ask(port))[0] == (await ask(port, "IPv6"))[0] == 200
        now.slices["shop", "a"] = of("web", endpoint("10.0.0.1", ready=False))
        ports.follow(now, Changed(slices={("shop", "a")}))
        assert (await ask(port))[0] == (await ask(port, "IPv6"))[0] == 503


async def test_a_node_on_its_way_out_is_told_at_healthz_only() -> None:
    port = free_port()
    agent = Agent(port)
    async with ports_of(agent):
        await settled(agent)
        assert (await ask(port, path="/healthz"))[0] == 503, "the node is not known yet"
        node = Node(metadata=ObjectMeta(name="one"))
        agent.cluster = Cluster(nodes={"one": node})
        for family in LOOPBACK:
            status, headers, body = await ask(port, family, "/healthz")
            assert (status, headers["Content-Type"]) == (200, "application/json")
            assert body["healthy"] is body["nodeEligible"] is True
            assert body["lastUpdated"] == body["currentTime"]
        marked = NodeSpec(taints=[Taint(key="ToBeDeletedByClusterAutoscaler")])
        agent.cluster = Cluster(nodes={"one": Node(metadata=node.metadata, spec=marked)})
        status, _, body = await ask(port, path="/healthz")
        assert (status, body["healthy"], body["nodeEligible"]) == (503, False, False)
        status, _, body = await ask(port, path="/livez")
        assert (status, body["healthy"]) == (200, True)
        assert (await ask(port, path="/else"))[0] == 404


async def test_ports_come_and_go() -> None:
    agent, first, second = Agent(), free_port(), free_port()
    async with ports_of(agent) as ports:
        ports.follow(cluster(service(health_check_node_port=first)), None)
        await settled(agent)
        ports.follow(cluster(service(health_check_node_port=second)), None)
        await settled(agent)
        assert (await ask(second))[0] == 503
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(first)
        ports.follow(Cluster(), None)
        await settled(agent)
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(second)


async def test_a_port_that_is_taken_is_named_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health_ports, "_AGAIN", 0.05)
    agent, port = Agent(), free_port()
    async with ports_of(agent) as ports:
        with socket.create_server(("0.0.0.0", port)):
            ports.follow(cluster(service(health_check_node_port=port)), None)
            await settled(agent)
            assert agent.errors["health"] == [
                f"Service shop/web: spec.healthCheckNodePort: {port} can't be listened on over IPv4"
                " (Address already in use); tried again every 0.05 s"
            ]
            assert (await ask(port, "IPv6"))[0] == 503, "that family is free"
        async with asyncio.timeout(10):
            while agent.errors["health"]:
                await asyncio.sleep(0.01)
        assert (await ask(port))[0] == 503


async def test_of_two_that_want_a_port_the_first_by_name_has_it() -> None:
    agent, port = Agent(), free_port()
    now = cluster(
        service("b", health_check_node_port=port),
        service("a", health_check_node_port=port),
        x=of("b", endpoint("10.0.0.1")),
    )
    async with ports_of(agent) as ports:
        ports.follow(now, None)
        await settled(agent)
        assert agent.errors["health"] == [
            f"Service shop/b: spec.healthCheckNodePort: {port} is of"
            " Service shop/a: spec.healthCheckNodePort already"
        ]
        assert (await ask(port))[2]["service"]["name"] == "a"
        del now.services["shop", "a"]
        ports.follow(now, Changed(services={("shop", "a")}))
        await settled(agent)
        status, _, body = await ask(port)
        assert (status, body["service"]["name"], agent.errors["health"]) == (200, "b", [])


async def test_who_only_holds_connections_does_not_keep_others_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(brief, "MOST", 3)
    port = free_port()
    agent = Agent(port)
    async with ports_of(agent):
        await settled(agent)
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
        assert (await ask(port, path="/livez"))[0] == 200
        for reader, _ in held[:3]:
            assert await asyncio.wait_for(reader.read(), 5) == b""
        for _, writer in held:
            writer.close()


async def test_a_connection_without_a_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brief, "LONGEST", 0.1)
    port = free_port()
    agent = Agent(port)
    async with ports_of(agent):
        await settled(agent)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /livez HTTP/1.1\r\n")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()

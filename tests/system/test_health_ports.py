"""healthCheckNodePort and proxyHealthPort of a real node, asked from outside the cluster."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lockgate.net import namespaces
from tests.system.agents import Bed, make_bed, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PORT, OF_NODE = 30777, 10256
#: Node one, as the world reaches it.
ADDRESSES = ["198.18.1.2", "fd18:1::2"]


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    async with make_bed(tmp_path, "one", proxyHealthPort=OF_NODE) as bed:
        yield bed


def service(port: int = PORT, policy: str = "Local") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "type": "LoadBalancer",
            "externalTrafficPolicy": policy,
            "healthCheckNodePort": port,
            "clusterIPs": ["10.96.0.1", "fd96::1"],
            "ports": [{"port": 80, "targetPort": 8080}],
        },
    }


def slices(*nodes: str, **conditions: bool) -> list[dict[str, Any]]:
    return [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"web-{family.lower()}",
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "web"},
            },
            "addressType": family,
            "endpoints": [
                {
                    "addresses": [f"{net}{number}"],
                    "nodeName": node,
                    "conditions": conditions or {"ready": True},
                }
                for number, node in enumerate(nodes, 1)
            ],
            "ports": [{"port": 8080}],
        }
        for family, net in (("IPv4", "10.77.1."), ("IPv6", "fd77:1::"))
    ]


async def ask(bed: Bed, address: str, port: int, path: str = "/") -> tuple[int, Any, Any] | str:
    """Status, weight and body; or how the connection failed."""

    host = f"[{address}]" if ":" in address else address
    outside = namespaces.path_of(f"lg-{bed.cluster}-outside")

    def make(info: Any) -> socket.socket:
        with namespaces.inside(outside):
            return socket.socket(info[0], info[1], info[2])

    connector = aiohttp.TCPConnector(socket_factory=make)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=5)
    ) as session:
        try:
            async with session.get(f"http://{host}:{port}{path}") as response:
                weight = response.headers.get("X-Load-Balancing-Endpoint-Weight")
                return response.status, weight, await response.json()
        except aiohttp.ClientConnectorError as error:
            return os.strerror(error.os_error.errno or 0)


async def put(bed: Bed, *objects: dict[str, Any]) -> None:
    await bed.supervisor.wait(bed.supervisor.put(*objects), "one")


@pytest.mark.parametrize("address", ADDRESSES)
async def test_the_node_says_whether_it_serves_the_service(bed: Bed, address: str) -> None:
    await put(bed, service(), *slices("one", "one", "two"))

    async def answers() -> Any:
        return await ask(bed, address, PORT)

    async def become(status: int, weight: str) -> Any:
        async with asyncio.timeout(15):
            while not isinstance(got := await answers(), tuple) or got[:2] != (status, weight):
                await asyncio.sleep(0.02)
        return got[2]

    body = await become(200, "2")
    assert body == {
        "service": {"namespace": "shop", "name": "web"},
        "localEndpoints": 2,
        "serviceProxyHealthy": True,
    }
    await put(bed, *slices("one", "two", ready=False, serving=True, terminating=True))
    assert (await answers())[:2] == (503, "0"), "those that end serve, but no new client is wanted"
    await put(bed, *slices("one", "two"))
    assert (await answers())[:2] == (200, "1")
    await put(bed, *slices("two"))
    assert (await answers())[:2] == (503, "0")


async def test_ports_follow_the_service(bed: Bed) -> None:
    async def says(port: int, expected: int | str) -> None:
        async def settled() -> bool:
            got = await ask(bed, ADDRESSES[0], port)
            return (got if isinstance(got, str) else got[0]) == expected

        await until(settled)

    await put(bed, service(), *slices("one"))
    await says(PORT, 200)
    await put(bed, service(PORT + 1))
    await says(PORT + 1, 200)
    await says(PORT, "Connection refused")
    await put(bed, service(PORT + 1, policy="Cluster"))
    await says(PORT + 1, "Connection refused")


async def test_a_port_that_a_process_has_is_named_until_it_is_free(bed: Bed) -> None:
    with namespaces.inside(namespaces.path_of(bed.nodes["one"].netns)):
        taken = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)

    async def errors() -> list[str]:
        status, answer = await bed.nodes["one"].call("GET", "/v1/status")
        assert status == 200
        return [text for text in answer["errors"] if "healthCheckNodePort" in text]

    with taken:
        await put(bed, service(), *slices("one"))
        await until(errors)
        assert await errors() == [
            f"Service shop/web: spec.healthCheckNodePort: {PORT} can't be listened on over {family}"
            " (Address already in use); tried again every 5 s"
            for family in ("IPv4", "IPv6")
        ]

    async def free() -> bool:
        return not await errors()

    await until(free)
    for address in ADDRESSES:
        assert (await ask(bed, address, PORT))[0] == 200


@pytest.mark.parametrize("address", ADDRESSES)
async def test_balancers_are_told_that_the_node_is_on_its_way_out(bed: Bed, address: str) -> None:
    async def up() -> bool:
        return not isinstance(await ask(bed, address, OF_NODE, "/healthz"), str)

    await until(up)
    status, _, body = await ask(bed, address, OF_NODE, "/healthz")
    assert (status, body["healthy"], body["nodeEligible"]) == (200, True, True)
    node = next(one for key, one in bed.supervisor.objects.items() if key[::2] == ("Node", "one"))
    taint = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
    await put(bed, {**node, "spec": {**node["spec"], "taints": [taint]}})
    status, _, body = await ask(bed, address, OF_NODE, "/healthz")
    assert (status, body["healthy"], body["nodeEligible"]) == (503, False, False)
    assert (await ask(bed, address, OF_NODE, "/livez"))[0] == 200

"""Kubernetes Events: once, not too many, and not lost while the API server is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from lockgate.agent.writeback import named_in
from lockgate.kube.client import Client, Settings
from lockgate.kube.events import Events, Regarding
from tests.apiserver import ApiServer

POD = Regarding("Pod", "shop", "web", "uid-1")


@asynccontextmanager
async def telling(server: ApiServer, **times: float) -> AsyncIterator[Events]:
    client = Client(Settings(api_server=await server.start()))
    events = Events(client, "lockgate.dev/agent", "one", **{"spread": 0.0, **times})
    task = asyncio.create_task(events.run())
    try:
        yield events
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()
        await server.stop()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_the_same_is_told_once_and_has_one_name_on_all_nodes() -> None:
    server, other = ApiServer(), ApiServer()
    async with telling(server) as one, telling(other) as two:
        for _ in range(3):
            one.tell(POD, "NoAddress", "the pool is exhausted", "Adding")
        two.tell(POD, "NoAddress", "the pool is exhausted", "Adding")
        one.tell(POD, "NoAddress", "another reason", "Adding")
        await until(lambda: len(server.created) == 2 and other.created)
        first = server.created[0]
        assert first["metadata"]["name"] == other.created[0]["metadata"]["name"]
        assert first["metadata"]["namespace"] == "shop"
        assert first["regarding"] == {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": "shop",
            "name": "web",
            "uid": "uid-1",
        }
        assert (first["type"], first["action"]) == ("Warning", "Adding")


async def test_too_many_are_counted_and_dropped() -> None:
    server = ApiServer()
    async with telling(server) as events:
        for number in range(40):
            events.tell(POD, "NoAddress", f"reason {number}", "Adding")
        await until(lambda: len(server.created) == 25)
        assert events.dropped == 15


async def test_what_was_too_much_has_its_turn_as_long_as_it_is_told() -> None:
    server = ApiServer()
    async with telling(server, every=0.05) as events:
        notes = {f"reason {number}" for number in range(40)}

        def all_told() -> bool:
            for note in notes:
                events.tell(POD, "NoAddress", note, "Adding")
            return {event["note"] for event in server.created} == notes

        await until(all_told)
        assert events.dropped > 0 and len(server.created) == len(notes)


async def test_events_wait_side_by_side_not_one_after_the_other() -> None:
    server = ApiServer()
    async with telling(server, spread=2) as events:
        for number in range(25):
            events.tell(POD, "NoAddress", f"reason {number}", "Adding")
        await until(lambda: len(server.created) == 25)  # one by one: 25 s


async def test_what_lasts_is_told_again_under_another_name_when_the_first_is_over() -> None:
    server = ApiServer()
    async with telling(server, again=0.1) as events:

        def told_twice() -> bool:
            events.tell(POD, "NoAddress", "the pool is exhausted", "Adding")
            return len(server.created) == 2

        await until(told_twice)
        first, second = (event["metadata"]["name"] for event in server.created)
        assert first != second


@pytest.mark.parametrize("status, again", [(503, True), (429, True), (403, False), (409, False)])
async def test_a_refused_event(status: int, again: bool) -> None:
    server = ApiServer()
    async with telling(server) as events:
        server.refuse = status
        events.tell(POD, "NoAddress", "first", "Adding")
        await until(lambda: server.refused)
        server.refuse = 0
        events.tell(Regarding("Node", "", "one"), "X", "second", "Adding")
        notes = ["first", "second"] if again else ["second"]
        await until(lambda: len(server.created) == len(notes))
        assert [event["note"] for event in server.created] == notes
        assert server.created[-1]["metadata"]["namespace"] == "default"


TITLES = {
    "Pod shop/web: status.podIPs: not an IP address: 'x'": ("Pod", "shop", "web"),
    "Pod shop/web, link lg7: put program from_pod back": ("Pod", "shop", "web"),
    "Pod shop/web-0.a can't be read (skipped): …": ("Pod", "shop", "web-0.a"),
    "Node one: no interface that is up": ("Node", "", "one"),
    "ServiceCIDR kubernetes: spec.cidrs: not a CIDR block": ("ServiceCIDR", "", "kubernetes"),
    "NetworkPolicy a/b: spec.ingress[0]: c/d": ("NetworkPolicy", "a", "b"),
    "EndpointSlice a/b: endpoints.addresses: …": ("EndpointSlice", "a", "b"),
    "OSError: it broke": None,
    "pod 7f-1: no such device": None,
    "interface eth9 does not exist": None,
}


@pytest.mark.parametrize(("text", "expected"), TITLES.items(), ids=TITLES.keys())
def test_the_object_that_an_error_names(text: str, expected: tuple[str, str, str] | None) -> None:
    assert named_in(text) == expected

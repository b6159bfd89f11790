"""Who reads flows from an observer keeps it from nothing, and may stop at any moment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from aiohttp import ClientSession, UnixConnector

from lockgate.bpf.btf import Schema
from lockgate.observer.config import Config
from lockgate.observer.server import Observer, serve
from lockgate.paths import bpf_object


@pytest.fixture
async def observer(tmp_path: Path) -> AsyncIterator[Observer]:
    config = Config(
        node="one",
        bpffs=str(tmp_path),
        journal=str(tmp_path / "journal"),
        socket=str(tmp_path / "observer.sock"),
    )
    schema = Schema.from_object(bpf_object())
    one = Observer(config, schema)
    one.log.add(np.ones(60_000, schema.dtype("event")))
    async with AsyncExitStack() as stack:
        await serve(stack, one.application(), config.socket)
        yield one


async def left_after_the_first_bytes(observer: Observer, query: str) -> None:
    """Asks, and goes; returns when nothing of the request is left."""
    before = asyncio.all_tasks()
    reader, writer = await asyncio.open_unix_connection(observer.config.socket)
    writer.write(f"GET /v1/flows?{query} HTTP/1.1\r\nHost: node\r\n\r\n".encode())
    assert await reader.readexactly(12) == b"HTTP/1.1 200"
    assert asyncio.all_tasks() > before
    writer.transport.abort()
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("limit=60000", id="in the middle of an answer"),
        pytest.param("follow=1&limit=0", id="while there is nothing to tell"),
        pytest.param("follow=1&limit=0&pod=none", id="when nothing will ever fit"),
    ],
)
async def test_who_goes_leaves_nothing_behind_and_is_no_error(
    observer: Observer, query: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        await left_after_the_first_bytes(observer, query)
    assert [record.getMessage() for record in caplog.records] == []


async def test_a_long_answer_does_not_keep_the_rings_from_being_read(observer: Observer) -> None:
    """The loop that reads them turns meanwhile. In one piece this answer takes two seconds."""
    loop = asyncio.get_running_loop()

    async def ask() -> bytes:
        async with ClientSession(connector=UnixConnector(observer.config.socket)) as session:
            async with session.get("http://node/v1/flows?limit=60000") as response:
                return await response.read()

    asking = asyncio.create_task(ask())
    longest, turn = 0.0, loop.time()
    while not asking.done():
        await asyncio.sleep(0)
        longest, turn = max(longest, loop.time() - turn), loop.time()
    assert asking.result().count(b"\n") == 60_000
    assert longest < 0.5

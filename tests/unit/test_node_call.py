"""lockgate-node-call: one request to a node's socket, as `pods/exec` starts it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

OVER = web.AppKey("over", asyncio.Event)
COMMAND = [sys.executable, "-m", "lockgate.node_call"]


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """An HTTP server of the agent's kind; the environment that leads to it."""

    async def echo(request: web.Request) -> web.Response:
        return web.json_response({"path": request.path_qs, "got": len(await request.read())})

    async def refuse(_request: web.Request) -> web.Response:
        return web.json_response({"error": "not today"}, status=409)

    async def follow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"n": 1}\n')
        await request.app[OVER].wait()
        return response

    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b'{"n": 1}\n' * 1000)
        return response

    app = web.Application(client_max_size=1 << 24)
    app[OVER] = asyncio.Event()
    app.router.add_route("*", "/v1/echo", echo)
    app.router.add_get("/v1/refuse", refuse)
    app.router.add_get("/v1/follow", follow)
    app.router.add_get("/v1/flood", flood)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "agent.sock")).start()
    yield {**os.environ, "LOCKGATE_RUN": str(tmp_path)}
    app[OVER].set()
    await runner.cleanup()


async def run(
    environment: dict[str, str], *words: str, body: bytes = b""
) -> tuple[int, bytes, bytes]:
    done = await asyncio.create_subprocess_exec(
        *COMMAND, *words, stdin=-1, stdout=-1, stderr=-1, env=environment
    )
    assert done.stdin and done.stdout and done.stderr
    done.stdin.write(body)
    await done.stdin.drain()
    out, err = await asyncio.gather(done.stdout.read(), done.stderr.read())
    return await done.wait(), out, err


async def test_the_answer_is_on_standard_output(agent: dict[str, str]) -> None:
    code, out, err = await run(agent, "agent", "GET", "/v1/echo?a=1")
    assert (code, json.loads(out), err) == (0, {"path": "/v1/echo?a=1", "got": 0}, b"")


@pytest.mark.parametrize("size", [1, 70_000, 5_000_000])
async def test_a_body_of_the_length_that_was_told(agent: dict[str, str], size: int) -> None:
    body = b"x" * size
    code, out, _ = await run(agent, "agent", "POST", "/v1/echo", str(size), body=body)
    assert (code, json.loads(out)["got"]) == (0, size)


async def test_a_refusal_is_on_standard_error(agent: dict[str, str]) -> None:
    code, out, err = await run(agent, "agent", "GET", "/v1/refuse", "0")
    assert (code, out, json.loads(err)) == (1, b"", {"error": "not today"})


async def test_nobody_listens(agent: dict[str, str]) -> None:
    code, out, err = await run(agent, "observer", "GET", "/v1/status")
    assert (code, out) == (2, b"")
    assert err == b"the observer does not answer: No such file or directory\n"


async def test_who_follows_ends_when_nobody_reads_any_more(agent: dict[str, str]) -> None:
    follower = await asyncio.create_subprocess_exec(
        *COMMAND, "agent", "GET", "/v1/follow", "0", stdin=-1, stdout=-1, env=agent
    )
    assert follower.stdin and follower.stdout
    assert await follower.stdout.readline() == b'{"n": 1}\n'
    follower.stdin.close()
    assert await asyncio.wait_for(follower.wait(), 10) == 2


async def test_who_follows_ends_though_nobody_empties_its_pipe(agent: dict[str, str]) -> None:
    out, into = os.pipe()
    with subprocess.Popen(
        [*COMMAND, "agent", "GET", "/v1/flood", "0"], stdin=-1, stdout=into, env=agent
    ) as follower:
        assert follower.stdin
        os.close(into)
        held, before = b"", None
        while not any(held) or held != before:
            await asyncio.sleep(0.2)
            held, before = fcntl.ioctl(out, termios.FIONREAD, b"\0" * 4), held
        follower.stdin.close()
        try:
            assert await asyncio.to_thread(follower.wait, 10) == 2
        finally:
            follower.kill()
    os.close(out)


def test_it_imports_only_what_starts_at_once() -> None:
    code = "import sys, lockgate.node_call; print(*sys.modules)"
    isolated = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append('.'); {code}"]
    loaded = subprocess.run(isolated, capture_output=True, text=True, check=True).stdout.split()
    assert not {"socket", "json", "asyncio", "re", "typing"} & set(loaded)

"""Readiness probes over real connections: what is asked, and what counts as ready."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lockgate.objects.model import Container, ObjectMeta, Pod, PodIP, PodStatus, Probe
from lockgate.standalone.readiness import check
from tests.certificates import Certificates

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

HERE = Path("/proc/self/ns/net")


class Server:
    """Answers each request with `status`; keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.answer = b"HTTP/1.1 204 No Content\r\n\r\n"
        self.port = 0

    async def answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            text = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(text.strip().split("\r\n"))
            writer.write(self.answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()


@pytest.fixture(params=["127.0.0.1", "::1"], ids=["IPv4", "IPv6"])
def address(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def serving(address: str, context: ssl.SSLContext | None) -> AsyncIterator[Server]:
    made = Server()
    server = await asyncio.start_server(made.answers, address, 0, ssl=context)
    made.port = server.sockets[0].getsockname()[1]
    async with server:
        yield made


@pytest.fixture
async def plain(address: str) -> AsyncIterator[Server]:
    async for server in serving(address, None):
        yield server


@pytest.fixture
async def secret(address: str, tmp_path: Path) -> AsyncIterator[Server]:
    """With the certificate of a CA that nobody knows, for a name that nobody asks for."""
    context = Certificates(tmp_path, "unknown").server("another.example")
    async for server in serving(address, context):
        yield server


async def probed(address: str, port: int, **action: Any) -> str:
    """What `check` says of a pod with that address."""
    kind = "tcpSocket" if action.pop("tcp", False) else "httpGet"
    probe = msgspec.convert({kind: {"port": port, **action}}, Probe)
    pod = Pod(
        metadata=ObjectMeta(name="p", namespace="default"),
        status=PodStatus(pod_ips=[PodIP(ip=address)]),
    )
    return await check(pod, Container(name="c"), probe, HERE)


def host(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def header(name: str, value: str) -> dict[str, str]:
    return {"name": name, "value": value}


OURS = ["User-Agent: lockgate-probe", "Accept: */*"]
REQUESTS = [
    ("as it is", {}, "/", "", OURS),
    ("a path", {"path": "/ready?full=1&a=%20b"}, "/ready?full=1&a=%20b", "", OURS),
    ("a path without a slash", {"path": "ready"}, "/ready", "", OURS),
    ("a path with blanks", {"path": "/a b\r\nX: y"}, "/a%20b%0D%0AX:%20y", "", OURS),
    (
        "headers, also two of a name",
        {"httpHeaders": [header("X-A", "1"), header("x-a", "2"), header("Empty", "")]},
        "/",
        "",
        [*OURS, "X-A: 1", "x-a: 2", "Empty: "],
    ),
    (
        "a Host header",
        {"httpHeaders": [header("host", "web.example")]},
        "/",
        "web.example",
        OURS,
    ),
    (
        "headers in the place of ours",
        {"httpHeaders": [header("User-Agent", "mine"), header("accept", "text/plain")]},
        "/",
        "",
        ["User-Agent: mine", "Accept: text/plain"],
    ),
    (
        "headers left out",
        {"httpHeaders": [header("User-Agent", ""), header("Accept", ""), header("Host", "")]},
        "/",
        "",
        [],
    ),
]


@pytest.mark.parametrize(
    ("action", "path", "named", "headers"), [r[1:] for r in REQUESTS], ids=[r[0] for r in REQUESTS]
)
async def test_what_is_asked(address, plain, action, path, named, headers):
    assert await probed(address, plain.port, **action) == ""
    [request] = plain.requests
    wanted = [f"GET {path} HTTP/1.1", f"Host: {named or host(address, plain.port)}"]
    assert request == [*wanted, *headers, "Connection: close"]


async def test_another_host_than_the_pod(address, plain):
    """192.0.2.1 is nowhere: what answers is `host`."""
    assert await probed("192.0.2.1", plain.port, host=address) == ""
    assert plain.requests[0][1] == f"Host: {host(address, plain.port)}"
    assert await probed("192.0.2.1", plain.port, host=address, tcp=True) == ""
    plain.answer = b"HTTP/1.1 500 Oh\r\n\r\n"
    told = await probed("192.0.2.1", plain.port, host=address)
    assert told == f"port {plain.port} of {address}: HTTP 500"


async def test_a_host_by_its_name(address):
    """`localhost` has both addresses on most machines, and somebody listens on one."""
    names = {info[4][0] for info in socket.getaddrinfo("localhost", None)}
    async for server in serving(address if address in names else names.pop(), None):
        assert await probed("192.0.2.1", server.port, host="localhost") == ""
        assert server.requests[0][1] == f"Host: localhost:{server.port}"
        told = await probed("192.0.2.1", server.port, host="no-such-host.invalid")
        assert told.startswith(f"port {server.port} of no-such-host.invalid: ")


async def test_https_looks_at_no_certificate(address, secret):
    headers = [header("X-A", "1")]
    assert await probed(address, secret.port, scheme="HTTPS", httpHeaders=headers) == ""
    assert "X-A: 1" in secret.requests[0]
    secret.answer = b"HTTP/1.1 503 Later\r\n\r\n"
    assert await probed(address, secret.port, scheme="HTTPS") == f"port {secret.port}: HTTP 503"


async def test_the_wrong_scheme_is_a_failure(address, plain, secret):
    assert await probed(address, secret.port) == f"port {secret.port}: the answer is not HTTP"
    told = await probed(address, plain.port, scheme="HTTPS")
    assert told.startswith(f"port {plain.port}: ") and len(told) > len(f"port {plain.port}: ")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.0 399 So so\r\n\r\n", ""),
        (b"HTTP/1.1 400 No\r\n\r\n", "HTTP 400"),
        (b"SSH-2.0-x\r\n", "the answer is not HTTP"),
        (b"", "the answer is not HTTP"),
    ],
)
async def test_what_counts_as_ready(address, plain, answer, complaint):
    plain.answer = answer
    told = await probed(address, plain.port)
    assert told == (f"port {plain.port}: {complaint}" if complaint else "")


@pytest.mark.parametrize("name", ["a..b", "a" * 64 + ".example"])
async def test_a_host_that_is_no_name_is_a_failure(address, plain, name):
    assert (await probed(address, plain.port, host=name)).startswith(f"port {plain.port} of {name}")


async def test_a_line_without_an_end_is_a_failure(address, plain):
    plain.answer = b"HTTP/1.1 200 " + b"x" * (1 << 17)
    assert (await probed(address, plain.port)).startswith(f"port {plain.port}: ")

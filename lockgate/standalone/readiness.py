"""Readiness probes as the kubelet makes them: from the node, never from the supervisor's own place.

A socket belongs to the network namespace of the thread that makes it, so it is made during a short
visit to the node's, and used from the event loop afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote

from lockgate.net.namespaces import inside
from lockgate.objects.model import Container, HTTPGetAction, Pod, Probe

__all__ = ["check", "target_port"]

#: What a path may have without being written as %XX (RFC 3986), and what was.
_PLAIN = "/?&=%+,;:@!$'()*~"


def target_port(container: Container, port: int | str) -> int | None:
    """The number of a probe's port, which may be the name of one of the container's."""
    if isinstance(port, int):
        return port
    for candidate in container.ports:
        if candidate.name == port:
            return candidate.container_port
    return None


async def check(pod: Pod, container: Container, probe: Probe, netns: Path) -> str:
    """Tries once. "" when it succeeded, else why not."""
    action = probe.http_get or probe.tcp_socket
    if action is None:
        return ""  # exec and gRPC probes are not run here
    port = target_port(container, action.port)
    if port is None:
        return f"the container has no port named {action.port!r}"
    if not pod.ips:
        return "the pod has no address"
    host = action.host or pod.ips[0]
    # As complaints have it: whose port, where it is not the pod's.
    where = f"port {port} of {host}" if action.host else f"port {port}"
    try:
        async with asyncio.timeout(max(1, probe.timeout_seconds)):
            tls = probe.http_get is not None and probe.http_get.scheme == "HTTPS"
            reader, writer = await _connect(netns, host, port, tls)
            try:
                if probe.http_get is None:
                    return ""
                complaint = await _get(reader, writer, host, port, probe.http_get)
                return f"{where}: {complaint}" if complaint else ""
            finally:
                writer.transport.abort()  # not a word more, also of TLS
    except TimeoutError:
        return f"{where}: no answer within {max(1, probe.timeout_seconds)} s"
    except OSError as error:
        return f"{where}: {error.strerror or error}"
    except ValueError as error:  # a name that is none, or a line without an end
        return f"{where}: {error}"


async def _connect(
    netns: Path, host: str, port: int, tls: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock = await _socket(netns, host, port)
    try:
        if not tls:
            return await asyncio.open_connection(sock=sock)
        return await asyncio.open_connection(sock=sock, ssl=_tls(), server_hostname=host)
    except BaseException:
        sock.close()
        raise


async def _socket(netns: Path, host: str, port: int) -> socket.socket:
    """Connected to the first address of the host that answers."""
    loop = asyncio.get_running_loop()
    problem = OSError(f"{host} has no address")
    for family, address in await _resolve(host, port):
        with inside(netns):
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await loop.sock_connect(sock, address)
            return sock
        except OSError as error:
            sock.close()
            problem = error
        except BaseException:
            sock.close()
            raise
    raise problem


async def _resolve(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    """(family, address) of a host. Names that nobody knows hold up only other names, in threads of
    their own: a name server's silence outlasts a probe."""
    with contextlib.suppress(ValueError):
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
        return [(family, (host, port))]
    ask = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_resolver(), ask)
    return [(family, (str(address[0]), port)) for family, _, _, _, address in found]


@functools.cache
def _resolver() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="resolver")


@functools.cache
def _tls() -> ssl.SSLContext:
    """Nobody's certificate is looked at: the kubelet's probes don't, either."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _get(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    host: str,
    port: int,
    action: HTTPGetAction,
) -> str:
    writer.write(_request(host, port, action))
    await writer.drain()
    words = (await reader.readline()).split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        return "the answer is not HTTP"
    status = int(words[1])
    return "" if 200 <= status < 400 else f"HTTP {status}"


def _request(host: str, port: int, action: HTTPGetAction) -> bytes:
    """As the kubelet's (pkg/probe/http): of `httpHeaders` Host, User-Agent and Accept take the
    place of ours, and an empty User-Agent or Accept is left out."""
    host = f"[{host}]" if ":" in host else host
    own = {"host": f"{host}:{port}", "user-agent": "lockgate-probe", "accept": "*/*"}
    first = {header.name.lower(): header.value for header in reversed(action.http_headers)}
    headers = [(name.title(), first.get(name, value)) for name, value in own.items()]
    headers = [("Host", headers[0][1] or own["host"]), *(h for h in headers[1:] if h[1])]
    headers += [(h.name, h.value) for h in action.http_headers if h.name.lower() not in own]
    path = quote(action.path if action.path.startswith("/") else f"/{action.path}", safe=_PLAIN)
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    return "".join(f"{line}\r\n" for line in (*lines, "Connection: close", "")).encode()

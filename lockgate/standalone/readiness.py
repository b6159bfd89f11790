"""Readiness probes as the kubelet makes them: from the node, never from the supervisor's own place.

A socket belongs to the network namespace of the thread that makes it, so it is made during a short
visit to the node's, and used from the event loop afterwards.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from lockgate.net.namespaces import inside
from lockgate.objects.model import Container, Pod, Probe

__all__ = ["check", "target_port"]


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
    try:
        async with asyncio.timeout(max(1, probe.timeout_seconds)):
            reader, writer = await _connect(netns, pod.ips[0], port)
            try:
                if probe.http_get is None:
                    return ""
                return await _get(reader, writer, pod.ips[0], port, probe.http_get.path)
            finally:
                writer.close()
    except TimeoutError:
        return f"port {port}: no answer within {max(1, probe.timeout_seconds)} s"
    except OSError as error:
        return f"port {port}: {error.strerror or error}"


async def _connect(
    netns: Path, address: str, port: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(netns):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
        return await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise


async def _get(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, path: str
) -> str:
    host = f"[{host}]" if ":" in host else host
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUser-Agent: lockgate-probe\r\n"
        "Accept: */*\r\nConnection: close\r\n\r\n".encode()
    )
    await writer.drain()
    words = (await reader.readline()).split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        return f"port {port}: the answer is not HTTP"
    status = int(words[1])
    return "" if 200 <= status < 400 else f"port {port}: HTTP {status}"

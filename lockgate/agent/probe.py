"""Connections made from a pod's network, or the node's own, to see which ways are open.

No program of the pod takes part, and nothing is said on a connection: a TCP handshake tells
enough. The sockets are opened in the pod's network namespace, which is found by the other end
of its link among the namespaces that container runtimes keep in /run/netns.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lockgate.agent.requests import EndpointError
from lockgate.net.namespaces import inside
from lockgate.net.pods import peer_of

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["Origin", "ProbeTarget", "Probed", "Request", "probe"]

#: Where container runtimes keep pods' namespaces, in our container and without one.
_FOLDERS = (Path("/host/run/netns"), Path("/run/netns"))
_MOST = 4096
_AT_ONCE = 256


class ProbeTarget(msgspec.Struct, rename="camel"):
    """As `lockgate.access.Target`."""

    protocol: str
    address: str
    port: int
    timeout: float = 1.0
    payload: str = ""


class Origin(msgspec.Struct):
    """A pod of this node by its UID, a namespace by its path, or, with neither, the node."""

    uid: str = ""
    netns: str = ""


class Request(msgspec.Struct):
    """The body of POST /v1/probe."""

    targets: list[ProbeTarget]
    origin: Origin = msgspec.field(name="from", default_factory=Origin)


class Probed(msgspec.Struct, omit_defaults=True):
    """ok: a handshake, or an answer over UDP · refused · timeout · unreachable · error. `port`: of
    the source of what timed out."""

    result: str
    detail: str = ""
    port: int = 0


async def probe(agent: Agent, asked: Request) -> list[Probed]:
    """All results in the order of the targets. EndpointError when there is no such pod."""
    if len(asked.targets) > _MOST:
        raise ValueError(f"targets: expected at most {_MOST}, got {len(asked.targets)}")
    netns = asked.origin.netns
    if asked.origin.uid:
        netns = await asyncio.to_thread(_namespace_of, agent, asked.origin.uid)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(target: ProbeTarget) -> Probed:
        async with gate:
            return await _try(netns, target)

    return await asyncio.gather(*(one(target) for target in asked.targets))


def _namespace_of(agent: Agent, uid: str) -> str:
    lease = agent.ipam.leases.get(uid)
    if lease is None:
        raise EndpointError(404, f"pod {uid} has no endpoint on node {agent.config.node}")
    index = agent.endpoints.link(lease).ifindex
    for path in _namespaces():
        try:
            if peer_of(str(path), lease.ifname) == index:
                return str(path)
        except OSError:
            continue
    raise EndpointError(
        404,
        f"pod {uid}: its network namespace is not among those in"
        f" {' and '.join(map(str, _FOLDERS))}",
    )


def _namespaces() -> Iterator[Path]:
    for folder in _FOLDERS:
        if folder.is_dir():
            yield from folder.iterdir()


def _open(netns: str, family: int, kind: int) -> socket.socket:
    with inside(netns) if netns else nullcontext():
        made = socket.socket(family, kind)
    made.setblocking(False)
    return made


async def _try(netns: str, target: ProbeTarget) -> Probed:
    if target.protocol not in ("tcp", "udp"):
        raise ValueError(f"protocol: expected tcp or udp, got {target.protocol!r}")
    family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
    kind = socket.SOCK_STREAM if target.protocol == "tcp" else socket.SOCK_DGRAM
    loop = asyncio.get_running_loop()
    try:
        with await asyncio.to_thread(_open, netns, family, kind) as wire:
            try:
                async with asyncio.timeout(target.timeout):
                    await loop.sock_connect(wire, (target.address, target.port))
                    if target.protocol == "tcp":
                        return Probed("ok")
                    await loop.sock_sendall(wire, base64.b64decode(target.payload))
                    await loop.sock_recv(wire, 2048)
                    return Probed("ok")
            except TimeoutError as error:  # ETIMEDOUT is one too
                detail = "" if error.errno is None else "ETIMEDOUT"
                return Probed("timeout", detail, wire.getsockname()[1])
    except ConnectionRefusedError:
        return Probed("refused")
    except OSError as error:
        if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
            return Probed("unreachable")
        return Probed("error", errno.errorcode.get(error.errno or 0, os.strerror(error.errno or 0)))

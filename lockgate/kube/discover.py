"""Finding the API server from a node (docs/cluster.md, Finding the API server).

The kubelet keeps a connection to it, so it is one of the remote ends of the node's established
TCP connections: the one that shows a certificate of the cluster's CA for kubernetes.default.svc.
Nothing is sent to an end that has not shown it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path

__all__ = ["SERVER_NAME", "find", "is_server", "remote_ends", "url"]

#: Every API server's certificate has this name (kubeadm, managed clusters, k3s).
SERVER_NAME = "kubernetes.default.svc"
_ESTABLISHED = "01"
_USUAL_PORTS = (6443, 443)
_MAX_ENDS = 512
_AT_ONCE = 16
_PATIENCE = 3.0

End = tuple[str, int]


def url(end: End) -> str:
    """https://HOST:PORT of an address."""
    host, port = end
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def remote_ends(proc: Path = Path("/proc/self/net")) -> list[End]:
    """Remote ends of the established TCP connections of the network namespace, those at an API
    server's usual ports first. At most 512."""
    found: dict[End, None] = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in (proc / name).read_text().splitlines()[1:]:
                fields = line.split()
                if len(fields) > 3 and fields[3] == _ESTABLISHED:
                    end = _end(fields[2])
                    if end is not None:
                        found[end] = None
    last = len(_USUAL_PORTS)
    order = {port: place for place, port in enumerate(_USUAL_PORTS)}
    return sorted(found, key=lambda end: order.get(end[1], last))[:_MAX_ENDS]


def _end(text: str) -> End | None:
    """An address as /proc/net/tcp writes it: 32-bit words in the machine's byte order. None
    where a connection could not be made without knowing the link."""
    words, _, port = text.partition(":")
    raw = b"".join(
        int(words[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(words), 8)
    )
    address = ip_address(raw)
    if address.version == 6 and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped), int(port, 16)
    return None if address.is_link_local else (str(address), int(port, 16))


async def is_server(end: End, context: ssl.SSLContext) -> bool:
    """Does it prove to be the API server of the CA in `context`?"""
    try:
        async with asyncio.timeout(_PATIENCE):
            _, writer = await asyncio.open_connection(
                *end, ssl=context, server_hostname=SERVER_NAME
            )
    except (OSError, TimeoutError):  # ssl.SSLError is an OSError
        return False
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1):
            await writer.wait_closed()
    return True


async def find(ends: Iterable[End], context: ssl.SSLContext) -> End | None:
    """The first of `ends` that is the API server; None if none is."""
    waiting = list(ends)
    for at in range(0, len(waiting), _AT_ONCE):
        some = waiting[at : at + _AT_ONCE]
        answers = await asyncio.gather(*(is_server(end, context) for end in some))
        for end, answer in zip(some, answers, strict=True):
            if answer:
                return end
    return None

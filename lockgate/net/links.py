"""Links, addresses, routes and neighbours of a node (a pod's: `lockgate.net.pods`).

`Net` wraps one netlink socket of the namespace that its thread is in. pyroute2's sockets have
an event loop of their own, so use them from worker threads, never from a coroutine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from ipaddress import ip_interface
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import Any, Self

from pyroute2 import IPRoute, NetlinkError

from lockgate.net.dumps import ROUTE_PROTOCOL

__all__ = ["GATEWAY4", "GATEWAY6", "IFINDEX_BASE", "Net", "sysctl"]

IFINDEX_BASE = 65536
GATEWAY4 = "169.254.1.1"
GATEWAY6 = "fe80::1"
_NODAD = 2
_PERMANENT = 0x80
_SCOPE_LINK = 253


# Where settings may be written: in a container that is not privileged /proc/sys is read only, and
# the DaemonSet mounts the node's beside it. Either shows the calling thread's namespace.
_SYSCTLS = "/host/proc/sys/net" if Path("/host/proc/sys/net").exists() else "/proc/sys/net"


def sysctl(key: str, value: int | str) -> bool:
    """Write net.<key> (with slashes) of the calling thread's namespace; False if there is none."""
    try:
        file = os.open(f"{_SYSCTLS}/{key}", os.O_WRONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return False
    try:
        os.write(file, str(value).encode())
    finally:
        os.close(file)
    return True


def mac_text(mac: bytes) -> str:
    return mac.hex(":")


class Net:
    """One netlink socket. Errors are OSErrors that name the object."""

    def __init__(self) -> None:
        self._ip: Any = IPRoute()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._ip.close()

    # ---- Links ---------------------------------------------------------------------

    def remove_link(self, ifindex: int) -> bool:
        """False if there was none."""
        with _named(f"remove interface {ifindex}"):
            return self._gone_is_false("link", "del", index=ifindex)

    # ---- Addresses, neighbours, routes -----------------------------------------------

    def _add_address(self, ifindex: int, address: str) -> None:
        value = ip_interface(address)
        more: dict[str, Any] = {"flags": _NODAD} if value.version == 6 else {}
        try:
            self._ip.addr(
                "add",
                index=ifindex,
                address=str(value.ip),
                prefixlen=value.network.prefixlen,
                family=_family(address),
                **more,
            )
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise

    def neighbour(self, ifindex: int, address: str, mac: bytes) -> None:
        """A permanent entry."""
        self._ip.neigh(
            "replace",
            ifindex=ifindex,
            dst=address,
            lladdr=mac_text(mac),
            state=_PERMANENT,
            family=_family(address),
        )

    def route(
        self,
        destination: str,
        ifindex: int = 0,
        gateway: str | None = None,
        source: str | None = None,
        kind: str = "unicast",
    ) -> None:
        """Set the route to a block; `kind` may be "unreachable" (senders get EHOSTUNREACH)."""
        request: dict[str, Any] = {
            "dst": destination,
            "family": _family(destination),
            "proto": ROUTE_PROTOCOL,
        }
        if kind != "unicast":
            request["type"] = kind
        else:
            request["oif"] = ifindex
            if gateway is not None:
                request["gateway"] = gateway
                if ":" not in gateway:
                    request["flags"] = ["onlink"]
            elif ":" not in destination:
                request["scope"] = _SCOPE_LINK
            if source is not None:
                request["prefsrc"] = source
        with _named(f"set route {destination}"):
            self._ip.route("replace", **request)

    def remove_route(self, destination: str) -> bool:
        """False if there was none."""
        with _named(f"remove route {destination}"):
            return self._gone_is_false("route", "del", dst=destination, family=_family(destination))

    # ---- Neighbours ------------------------------------------------------------------

    def ask(self, ifindex: int, address: str) -> None:
        """Have the kernel resolve a neighbour, as if a packet were to be sent (NTF_USE)."""
        with contextlib.suppress(NetlinkError):
            self._ip.neigh(
                "add", ifindex=ifindex, dst=address, flags=1, state=0, family=_family(address)
            )

    def _gone_is_false(self, what: str, *arguments: str, **request: Any) -> bool:
        try:
            getattr(self._ip, what)(*arguments, **request)
        except NetlinkError as error:
            if error.code in (errno.ENODEV, errno.ESRCH, errno.ENOENT):
                return False
            raise
        return True


def _index(name: str) -> int | None:
    """Index of an interface in the calling thread's namespace."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _family(text: str) -> int:
    return int(AF_INET6 if ":" in text else AF_INET)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, f"cannot {what}: {os.strerror(error.code)}") from error

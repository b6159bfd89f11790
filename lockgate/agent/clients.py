"""Connected UDP sockets of the node's own processes whose backend went.

What a pod's connected socket sends is translated again by from_pod. No program sees what one
of the node itself sends, so the socket is ended: its owner hears ECONNABORTED at once and
connects again, instead of talking to nobody. Others do the same (Cilium, with the same call).
"""

from __future__ import annotations

import logging
import socket

import numpy as np

from lockgate.agent.datapath import Datapath
from lockgate.compile import Tables
from lockgate.net.udp_sockets import ConnectedUdp, abort, connected_udp

__all__ = ["Clients"]

log = logging.getLogger(__name__)
_UDP = int(socket.IPPROTO_UDP)


class Clients:
    """For one agent; all from its worker, in the node's network namespace."""

    def __init__(self, dp: Datapath) -> None:
        self._dp = dp
        self._tables: Tables | None = None  # to be looked at
        self._possible = True

    def note(self, tables: Tables) -> None:
        """These are in force now. Remembers whether a UDP backend may have gone."""
        delta = tables.delta
        if (
            delta is None
            or self._tables is not None
            or any(
                had and key[3] == _UDP and key not in tables.backends
                for key, had in delta.backends.items()
            )
        ):
            self._tables = tables

    def follow(self) -> None:
        """End the sockets whose backend went with what was noted. Costs nothing if none did."""
        tables, self._tables = self._tables, None
        if tables is None or not self._possible:
            return
        try:
            ended = sum(self._is_bereaved(tables, one) and abort(one) for one in connected_udp())
            if ended:
                log.info("ended %d UDP sockets of the node's own, whose backend went", ended)
        except OSError as error:
            self._possible = False
            log.warning(
                "connected UDP sockets of the node's own processes stay with backends that go: %s",
                error,
            )

    def _is_bereaved(self, tables: Tables, one: ConnectedUdp) -> bool:
        key = np.zeros((), self._dp.sockets.key_dtype)
        key["cookie"], key["port"], key["proto"] = one.cookie, one.port, _UDP
        key["addr"] = np.frombuffer(one.address, np.uint8)
        asked = self._dp.sockets.get(key)
        if asked is None:
            return False  # it never asked for a service, or for others
        service = tables.services.get((asked["addr"].tobytes(), int(asked["port"]), _UDP))
        return service is None or (one.address, service.id, one.port, _UDP) not in tables.backends

"""Connected UDP sockets of the node's own processes whose backend went.

What a pod's connected socket sends is translated again by from_pod. No program sees what one
of the node itself sends, so the socket is ended: its owner hears ECONNABORTED at once and
connects again, instead of talking to nobody. Others do the same (Cilium, with the same call).
"""

from __future__ import annotations

import errno
import logging
import socket

import numpy as np

from lockgate.agent.datapath import Datapath
from lockgate.compile import Tables
from lockgate.net.udp_sockets import ConnectedUdp, abort, connected_udp

__all__ = ["Clients"]

log = logging.getLogger(__name__)
_UDP = int(socket.IPPROTO_UDP)
#: No udp_diag, no INET_DIAG_DESTROY, no right to: it will not be otherwise the next time.
_CANNOT = {errno.ENOENT, errno.EOPNOTSUPP, errno.EPERM}


class Clients:
    """For one agent; all from its worker, in the node's network namespace."""

    def __init__(self, dp: Datapath) -> None:
        self._dp = dp
        self._tables: Tables | None = None  # to be looked at
        self._possible = True

    @property
    def waiting(self) -> bool:
        """Is there anything for `follow` to do?"""
        return self._possible and self._tables is not None

    def note(self, tables: Tables) -> None:
        """These will be in force next. Remembers whether a UDP backend may have gone."""
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
        """What was noted is in force: end the sockets whose backend went with it. Those that can't
        be ended now are tried again with the next change."""
        tables, self._tables = self._tables, None
        if tables is None:
            return
        ended, problem = 0, None
        try:
            for one in connected_udp():
                try:
                    ended += self._is_bereaved(tables, one) and abort(one)
                except OSError as error:
                    problem = error
        except OSError as error:
            problem = error
        if ended:
            log.info("ended %d UDP sockets of the node's own, whose backend went", ended)
        if problem is None:
            return
        if problem.errno in _CANNOT:
            self._possible = False
        else:
            self._tables = tables
        log.warning(
            "connected UDP sockets of the node's own processes stay with backends that go: %s",
            problem,
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

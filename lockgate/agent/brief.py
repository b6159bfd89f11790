"""A server whose connections are brief: for ports that everybody reaches.

aiohttp waits for a request for as long as the client likes. Clients that only hold connections
would use up the agent's descriptors, which pods that start need.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

__all__ = ["BriefServer"]

#: Seconds that a connection lasts at most.
LONGEST = 10.0
#: Connections at once; beyond, the oldest go, which would have been answered long ago.
MOST = 256


class BriefServer(web.Server):
    """Answers one request on a connection, and ends it."""

    def __init__(self, handler: Any) -> None:
        super().__init__(handler, access_log=None, keepalive_timeout=0)
        self._open: dict[asyncio.Transport, asyncio.TimerHandle] = {}

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        loop = asyncio.get_running_loop()
        self._open[transport] = loop.call_later(LONGEST, self._end, transport)
        if len(self._open) > MOST:
            self._end(next(iter(self._open)))

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        # The handler has forgotten its transport by now.
        for transport in [one for one in self._open if one.is_closing()]:
            self._open.pop(transport).cancel()
        super().connection_lost(handler, exc)

    def _end(self, transport: asyncio.Transport) -> None:
        timer = self._open.pop(transport, None)
        if timer is not None:
            timer.cancel()
            transport.abort()

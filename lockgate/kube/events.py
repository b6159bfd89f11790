"""Kubernetes Events (events.k8s.io/v1): what a user must know, where `kubectl describe` shows it.

An event's name is made of what it says and of the hour, so that of all nodes that find the same
fault the first one makes the event and the others find it made, and that it can be told again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from datetime import UTC, datetime
from typing import NamedTuple

from lockgate.kube.client import AWAY, ApiError, Client

__all__ = ["Events", "Regarding"]

log = logging.getLogger(__name__)

#: The API server keeps events for an hour; what still holds then is told again, not by all nodes at
#: once.
_AGAIN, _LATER = 3600.0, 1.05
#: Tokens: so many at once, then one in so many seconds.
_BURST, _EVERY = 25, 10.0
_REMEMBERED = 4096
_SPREAD = 5.0
_NOTE_MAX = 1024


class Regarding(NamedTuple):
    """The object that an event is about."""

    kind: str
    namespace: str
    name: str
    uid: str = ""
    api_version: str = ""


_VERSIONS = {
    "EndpointSlice": "discovery.k8s.io/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "ServiceCIDR": "networking.k8s.io/v1",
    "Firewall": "lockgate.dev/v1alpha1",
}


class _Event(NamedTuple):
    regarding: Regarding
    reason: str
    note: str
    action: str
    type: str
    hour: int
    due: float


class Events:
    """Tells events, each once an hour at most, 25 at once and 6 a minute in the long run. Who has
    one to tell that lasts, tells it again and again: one that was too many has its turn later."""

    def __init__(
        self,
        client: Client,
        component: str,
        instance: str,
        spread: float = _SPREAD,
        again: float = _AGAIN,
        every: float = _EVERY,
    ) -> None:
        """`component` and `instance` say who tells. In seconds: `spread`, over which nodes that
        find the same at once are spread; `again`, after which the same is told once more; `every`,
        in which one more may be told."""
        self._client, self._component, self._instance = client, component, instance
        self._spread, self._again, self._every = spread, again, every
        #: When each is told again.
        self._due: dict[tuple[object, ...], float] = {}
        self._waiting: asyncio.Queue[_Event] = asyncio.Queue(100)
        self._tokens, self._filled = float(_BURST), time.monotonic()
        self.sent = 0
        #: How often one was not told because too many were.
        self.dropped = 0

    def tell(
        self, regarding: Regarding, reason: str, note: str, action: str, kind: str = "Warning"
    ) -> None:
        """Returns at once. `reason` and `action` are in CamelCase, `note` is a sentence."""
        key = (*regarding, reason, note)
        now = time.monotonic()
        if now < self._due.get(key, now):
            return
        self._tokens = min(_BURST, self._tokens + (now - self._filled) / self._every)
        self._filled = now
        if self._tokens < 1 or self._waiting.full():
            self.dropped += 1
            return
        if len(self._due) >= _REMEMBERED:
            self._due = {k: due for k, due in self._due.items() if now < due}
        self._tokens -= 1
        self._due[key] = now + self._again * random.uniform(1.0, _LATER)
        hour = int(time.time() / self._again)
        due = now + random.uniform(0, self._spread)
        self._waiting.put_nowait(_Event(regarding, reason, note, action, kind, hour, due))

    async def run(self) -> None:
        """Until cancelled. An event that the server refuses is let go, one for which it is away
        is told later."""
        while True:
            event = await self._waiting.get()
            await asyncio.sleep(max(0.0, event.due - time.monotonic()))
            wait = 1.0
            while not await self._send(event):
                await asyncio.sleep(wait)
                wait = min(wait * 2, 60.0)

    async def _send(self, event: _Event) -> bool:
        """False if it is to be told again."""
        regarding, reason, note, action, kind, hour, _ = event
        namespace = regarding.namespace or "default"
        text = "\0".join((*regarding, reason, note, str(hour)))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        reference = {
            "apiVersion": regarding.api_version or _VERSIONS.get(regarding.kind, "v1"),
            "kind": regarding.kind,
            "name": regarding.name,
        }
        if regarding.namespace:
            reference["namespace"] = regarding.namespace
        if regarding.uid:
            reference["uid"] = regarding.uid
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{regarding.name[:200]}.{digest}", "namespace": namespace},
            "eventTime": now,
            "reportingController": self._component,
            "reportingInstance": self._instance[:128],
            "action": action,
            "reason": reason,
            "regarding": reference,
            "note": note if len(note) <= _NOTE_MAX else f"{note[: _NOTE_MAX - 1]}…",
            "type": kind,
        }
        try:
            await self._client.call(
                "POST", f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", body=body
            )
        except ApiError as error:
            if error.status == 429 or error.status >= 500:
                return False
            if error.status != 409:  # 409: another node was first
                log.warning("an event can't be told: %s", error)
        except AWAY:
            return False
        else:
            self.sent += 1
        return True

"""The cluster's objects as the agents see them: a revision, a stream of changes, and their answers.

Changes are compared, encoded once, and handed to all watchers as one batch that ends in a
bookmark. An agent that comes late gets everything, then the same stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from lockgate.objects.model import (
    EndpointSlice,
    Firewall,
    Namespace,
    NetworkPolicy,
    Node,
    Pod,
    Service,
)

__all__ = ["KINDS", "Store", "Watcher", "object_json"]

Key = tuple[str, str]
Item = Namespace | Node | Pod | Service | EndpointSlice | NetworkPolicy | Firewall

#: In the order in which they are sent: what others refer to comes first.
KINDS: dict[str, str] = {
    "Namespace": "v1",
    "Node": "v1",
    "Service": "v1",
    "Pod": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "Firewall": "lockgate.dev/v1alpha1",
}

_encode = msgspec.json.Encoder().encode


def object_json(item: Item) -> bytes:
    """One object; with kind and apiVersion, which the model leaves out as defaults."""
    body = _encode(item)
    head = f'{{"kind":"{item.kind}","apiVersion":"{KINDS[item.kind]}",'.encode()
    return head + body[1:]


def _event(type_: str, item: Item) -> bytes:
    return b'{"type":"' + type_.encode() + b'","object":' + object_json(item) + b"}\n"


class Watcher:
    """One agent's side of the stream. `queue` takes batches; None ends it."""

    def __init__(self, first: bytes) -> None:
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.queue.put_nowait(first)


class Store:
    """All objects by kind and (namespace, name), and which revision each node has in force."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[Key, Item]] = {kind: {} for kind in KINDS}
        self.revision = 0
        self.applied: dict[str, int] = {}
        self.errors: dict[str, str] = {}
        self._watchers: set[Watcher] = set()
        self._moved = asyncio.Condition()

    def replace(self, wanted: Mapping[str, Mapping[Key, Item]]) -> int:
        """Makes the kinds in `wanted` what is given; the revision, which moves if anything did."""
        gone: list[bytes] = []
        there: list[bytes] = []
        for kind in KINDS:
            if kind not in wanted:
                continue
            before, after = self.objects[kind], wanted[kind]
            if before is after:
                continue
            for key, item in before.items():
                if key not in after:
                    gone.append(_event("DELETED", item))
            for key, item in after.items():
                known = before.get(key)
                if known is item:
                    continue
                if known is None:
                    there.append(_event("ADDED", item))
                elif known.metadata.uid != item.metadata.uid:
                    gone.append(_event("DELETED", known))
                    there.append(_event("ADDED", item))
                elif known != item:
                    there.append(_event("MODIFIED", item))
            self.objects[kind] = dict(after)
        if gone or there:
            self.revision += 1
            batch = b"".join((*gone, *there, self._bookmark()))
            for watcher in self._watchers:
                watcher.queue.put_nowait(batch)
        return self.revision

    def watch(self) -> Watcher:
        """A new stream that begins with everything."""
        lines = [_event("ADDED", item) for kind in KINDS for item in self.objects[kind].values()]
        watcher = Watcher(b"".join((*lines, self._bookmark())))
        self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)

    def close(self) -> None:
        """Ends all streams."""
        for watcher in self._watchers:
            watcher.queue.put_nowait(None)

    async def take_applied(self, node: str, revision: int, error: str | None) -> None:
        """An agent's answer to a bookmark."""
        async with self._moved:
            self.applied[node] = max(revision, self.applied.get(node, 0))
            if error:
                self.errors[node] = error
            else:
                self.errors.pop(node, None)
            self._moved.notify_all()

    def forget(self, node: str) -> None:
        """The node's agent ended: what it had in force is known again when it answers."""
        self.applied.pop(node, None)

    def remove(self, node: str) -> None:
        """The node's agent is no more."""
        self.applied.pop(node, None)
        self.errors.pop(node, None)

    async def wait_applied(self, revision: int, timeout: float) -> bool:
        """Whether every node had `revision` in force, or answered with an error, in time."""
        try:
            async with asyncio.timeout(timeout):
                async with self._moved:
                    await self._moved.wait_for(lambda: not self.behind(revision))
        except TimeoutError:
            return False
        return not self.errors

    def behind(self, revision: int) -> list[str]:
        """Nodes that have not answered for `revision` yet."""
        return [name for _, name in self.objects["Node"] if self.applied.get(name, -1) < revision]

    def _bookmark(self) -> bytes:
        return b'{"type":"BOOKMARK","revision":%d}\n' % self.revision

"""What an agent writes to the API server: the node's condition, and events for users."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from lockgate.kube.client import AWAY, ApiError, Client
from lockgate.kube.events import Events, Regarding
from lockgate.kube.kinds import KINDS

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["RBAC", "WriteBack"]

log = logging.getLogger(__name__)

#: What the agent's ClusterRole must allow, and nothing else: (API group, resource) → verbs.
#: A test compares deploy/ with it.
RBAC: dict[tuple[str, str], frozenset[str]] = {
    **{(kind.api_group, kind.resource): frozenset({"list", "watch"}) for kind in KINDS},
    ("", "nodes/status"): frozenset({"patch"}),
    ("events.k8s.io", "events"): frozenset({"create"}),
}

_LOOK_EVERY = 2.0
#: "Pod shop/web: …", "Node one: …": how errors name their object.
_TITLE = re.compile(r"([A-Z]\w+) (?:([^/\s:]+)/)?([^/\s:]+)(?=[:,\s])")


class WriteBack:
    """Follows an agent's state and writes what others must know."""

    def __init__(self, agent: Agent, client: Client) -> None:
        self._agent, self._client = agent, client
        self.events = Events(client, "lockgate.dev/agent", agent.config.node)
        self._told: str | None = None
        self._retry = 0.0
        self._seen: set[str] = set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.events.run())
            group.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            if self._agent.applied:
                await self._tell_node()
                self._tell_errors()
            await asyncio.sleep(_LOOK_EVERY)

    # ---- The node ----------------------------------------------------------------------

    async def _tell_node(self) -> None:
        """NetworkUnavailable=False, once for each Node object of our name: without it, clouds'
        taints keep pods off the node."""
        cluster = self._agent.cluster
        node = None if cluster is None else cluster.nodes.get(self._agent.config.node)
        if node is None or self._told == node.metadata.uid or time.monotonic() < self._retry:
            return
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {
            "type": "NetworkUnavailable",
            "status": "False",
            "reason": "LockgateIsUp",
            "message": "Lockgate carries this node's pods",
            "lastTransitionTime": now,
            "lastHeartbeatTime": now,
        }
        try:
            await self._client.call(
                "PATCH",
                f"/api/v1/nodes/{self._agent.config.node}/status",
                body={"status": {"conditions": [condition]}},
                content_type="application/strategic-merge-patch+json",
            )
            self._told = node.metadata.uid
        except (*AWAY, ApiError) as error:
            log.warning("the node's condition can't be written: %s", error)
            self._retry = time.monotonic() + 10

    # ---- Events ------------------------------------------------------------------------

    def _tell_errors(self) -> None:
        agent = self._agent
        current: dict[str, str] = dict.fromkeys(agent.object_errors, "ObjectUnreadable")
        current |= dict.fromkeys(agent.errors.get("objects", ()), "ObjectNotInForce")
        current |= dict.fromkeys(agent.errors.get("publish", ()), "ChangesNotInForce")
        current |= dict.fromkeys(agent.refused, "NoAddress")
        agent.refused.clear()
        current |= dict.fromkeys(agent.patrol.others.values(), "ForeignProgram")
        told, agent.patrol.told = agent.patrol.told, []
        current |= dict.fromkeys(told, "ProgramPutBack")
        for text in current.keys() - self._seen:
            self.events.tell(self._regarding(text), current[text], text, "Enforcing")
        self._seen = set(current)

    def _regarding(self, text: str) -> Regarding:
        """The object that an error names; the node if it names none."""
        match = _TITLE.match(text)
        if match is None or match[1] not in {kind.name for kind in KINDS}:
            name = self._agent.config.node
            # The kubelet's own events of a node have its name for a uid: kubectl looks for it.
            return Regarding("Node", "", name, name)
        return Regarding(match[1], match[2] or "", match[3])

"""What an agent writes to the API server: the node's condition, and events for users."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from lockgate.kube.client import AWAY, ApiError
from lockgate.kube.events import Events, Regarding
from lockgate.kube.kinds import KINDS, NETWORK_UNAVAILABLE
from lockgate.kube.source import ApiSource

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["RBAC", "REASONS", "WriteBack"]

log = logging.getLogger(__name__)

#: What the agent's ClusterRole must allow, and nothing else: (API group, resource) → verbs.
#: A test compares deploy/ with it.
RBAC: dict[tuple[str, str], frozenset[str]] = {
    **{(kind.api_group, kind.resource): frozenset({"list", "watch"}) for kind in KINDS},
    ("", "nodes/status"): frozenset({"patch"}),
    ("events.k8s.io", "events"): frozenset({"create"}),
}

#: The reason that an event has, by where the fault was noted: `Agent.errors` and a few besides.
#: docs/operate.md tells what each means; a test compares.
REASONS = {
    "unreadable": "ObjectUnreadable",
    "objects": "ObjectNotInForce",
    "claims": "ObjectNotInForce",
    "publish": "ChangesNotInForce",
    "hops": "NoWay",
    "cni": "PluginNotInUse",
    "refused": "NoAddress",
    "attach": "ProgramNotAttached",
    "programs": "ProgramNotAttached",
    "xdp": "ProgramNotAttached",
    "others": "ForeignProgram",
    "repaired": "ProgramPutBack",
    "endpoints": "StateRebuilt",
    "health": "HealthPortTaken",
    "firewall": "FirewallNotInForce",
}

_KINDS = {kind.name for kind in KINDS}
_LOOK_EVERY = 2.0
#: Seconds until the node's condition is written again: who else writes it is not to be outrun.
_WRITTEN_AGAIN = 10.0
#: "Pod shop/web: …", "Node one: …": how errors name their object.
_TITLE = re.compile(r"([A-Z]\w+) (?:([^/\s:,]+)/)?([^/\s:,]+)(?=[:,\s])")


class WriteBack:
    """Follows an agent's state and writes what others must know."""

    def __init__(self, agent: Agent, source: ApiSource) -> None:
        self._agent, self._source, self._client = agent, source, source.client
        self.events = Events(source.client, "lockgate.dev/agent", agent.config.node)
        self._told: str | None = None
        self._retry = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.events.run())
            group.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            if self._agent.applied:
                await self._tell_node()
                self._tell_faults()
            await asyncio.sleep(_LOOK_EVERY)

    # ---- The node ----------------------------------------------------------------------

    async def _tell_node(self) -> None:
        """NetworkUnavailable=False, once for each Node object of our name, and when somebody has
        written otherwise since: with it clouds' taints keep pods off the node."""
        cluster = self._agent.cluster
        node = None if cluster is None else cluster.nodes.get(self._agent.config.node)
        if node is None or time.monotonic() < self._retry:
            return
        says = [one.status for one in node.status.conditions if one.type == NETWORK_UNAVAILABLE]
        if self._told == node.metadata.uid and says == ["False"]:
            return
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {
            "type": NETWORK_UNAVAILABLE,
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
            # What is written comes back by the watch.
            self._told, self._retry = node.metadata.uid, time.monotonic() + _WRITTEN_AGAIN
        except (*AWAY, ApiError) as error:
            log.warning("the node's condition can't be written: %s", error)
            self._retry = time.monotonic() + _WRITTEN_AGAIN

    # ---- Events ------------------------------------------------------------------------

    def _tell_faults(self) -> None:
        """All that are there now: each is told once an hour, and when there is room for it."""
        agent = self._agent
        refused, agent.refused = agent.refused, []
        repaired, agent.patrol.told = agent.patrol.told, []
        faults = {
            **agent.errors,
            "unreadable": agent.object_errors,
            "refused": refused,
            "others": list(agent.patrol.others.values()),
            "repaired": repaired,
        }
        for source, reason in REASONS.items():
            for text in faults.get(source, ()):
                self.events.tell(self._regarding(text), reason, text, "Enforcing")

    def _regarding(self, text: str) -> Regarding:
        """The object that an error names; the node if it names none. kubectl describe shows the
        events that have the object's uid; those of a node have its name for one, as the kubelet's
        own do."""
        kind, namespace, name = named_in(text) or ("Node", "", self._agent.config.node)
        if kind == "Node":
            return Regarding(kind, "", name, name)
        return Regarding(kind, namespace, name, self._source.uid(kind, namespace, name))


def named_in(text: str) -> tuple[str, str, str] | None:
    """Kind, namespace and name of the object that an error begins with; None if with none."""
    match = _TITLE.match(text)
    if match is None or match[1] not in _KINDS:
        return None
    return match[1], match[2] or "", match[3]

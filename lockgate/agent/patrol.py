"""Looking after the programs on pods' links: others with the right to may have removed them, or
have come before them. Both are put right within `guard_seconds`, and said."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING

from lockgate.agent.ipam import Lease

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["Patrol"]

log = logging.getLogger(__name__)
#: Of `told`: nobody may be there to tell events to.
_KEPT = 100


class Patrol:
    """For one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        #: How often programs had to be put right.
        self.repaired = 0
        #: What was done, to be told as events: "Pod shop/web, link lg7: …".
        self.told: list[str] = []
        #: By pods' uid programs of others that ours was put in front of, likewise.
        self.others: dict[str, str] = {}

    async def run(self) -> None:
        """Until cancelled."""
        agent = self._agent
        while True:
            await asyncio.sleep(agent.config.guard_seconds)
            # Not in the turn: mostly all is as it was, and no pod has to wait for that.
            if not agent.dp.pending and await asyncio.to_thread(self._disturbed):
                async with agent.turn:
                    await agent.work(self._settle)
            else:
                # What there was to complain of is well, or its pod went.
                agent.errors.pop("programs", None)
                leases = agent.ipam.leases
                self.others = {uid: text for uid, text in self.others.items() if uid in leases}

    def _disturbed(self) -> bool:
        """Pods that are just being wired may look so."""
        return any(self._is_disturbed(lease) for lease in list(self._agent.ipam.leases.values()))

    def _is_disturbed(self, lease: Lease) -> bool:
        try:
            return self._agent.dp.guard.disturbed(self._agent.endpoints.link(lease).ifindex)
        except OSError as error:
            return error.errno != errno.ENODEV  # its namespace went; DEL is to come

    def _settle(self) -> None:
        agent, errors = self._agent, []
        others: dict[str, str] = {}
        for lease in agent.ipam.leases.values():
            link = agent.endpoints.link(lease)
            title = f"{agent.endpoints.title(lease.uid)}, link {link.name}"
            try:
                done = agent.dp.guard.settle(link.slot, link.ifindex)
                found = agent.dp.guard.others(link.ifindex)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    errors.append(f"{title}: {error}")
                continue
            if found:
                others[lease.uid] = f"{title}: {', '.join(found)} of somebody else; ours run first"
            if done:
                self.repaired += 1
                self.told.append(f"{title}: {', '.join(done)}")
                log.warning("%s", self.told[-1])
        for uid in others.keys() - self.others.keys():
            log.warning("%s", others[uid])
        self.others = others
        del self.told[:-_KEPT]
        agent.errors["programs"] = errors

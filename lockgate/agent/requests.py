"""Requests for endpoints: what CNI ADD and DEL come down to.

A request waits for its Pod object and for its turn; those that wait together cost one change
of the tables.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lockgate.agent.endpoints import namespace_exists
from lockgate.agent.hops import internal_ips, pod_cidrs
from lockgate.agent.ipam import Lease, PoolExhausted
from lockgate.net.links import Net
from lockgate.objects.model import Pod

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["EndpointError", "Requests"]

log = logging.getLogger(__name__)


class EndpointError(Exception):
    """An endpoint could not be made; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class _Add:
    """A CNI ADD that waits for its turn."""

    uid: str
    netns: str
    answer: asyncio.Future[dict[str, Any]]


class Requests:
    """The endpoints that are asked for and given back, for one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._waiting: set[str] = set()
        self._gone: set[str] = set()
        self._adds: list[_Add] = []
        self._adder: asyncio.Task[None] | None = None

    async def add(self, uid: str, netns: str, timeout: float = 30.0) -> dict[str, Any]:
        """CNI ADD. The same answer again for a pod that is wired."""
        if not namespace_exists(netns):
            raise EndpointError(400, f"pod {uid}: there is no network namespace {netns}")
        self._waiting.add(uid)
        try:
            async with asyncio.timeout(timeout), self._agent.seen:
                await self._agent.seen.wait_for(
                    lambda: uid in self._agent.uids or uid in self._gone
                )
        except TimeoutError:
            raise EndpointError(
                504, f"pod {uid}: no Pod object with this uid came within {timeout:g} s"
            ) from None
        finally:
            gone = uid in self._gone
            self._waiting.discard(uid)
            self._gone.discard(uid)
        if gone:
            raise EndpointError(409, f"pod {uid} was deleted meanwhile")
        one = _Add(uid, netns, asyncio.get_running_loop().create_future())
        self._adds.append(one)
        if self._adder is None:
            self._adder = asyncio.create_task(self._add_waiting())
        return await one.answer

    async def _add_waiting(self) -> None:
        """All that wait when their turn comes, with one change of the tables."""
        try:
            while self._adds:
                async with self._agent.turn:
                    batch, self._adds = self._adds, []
                    try:
                        answers = await self._agent.work(
                            self._add, [(one.uid, one.netns) for one in batch]
                        )
                    except Exception as error:
                        answers = [error for _ in batch]
                for one, answer in zip(batch, answers, strict=True):
                    if one.answer.done():
                        continue  # who asked has gone
                    if isinstance(answer, Exception):
                        one.answer.set_exception(answer)
                    else:
                        one.answer.set_result(answer)
        finally:
            self._adder = None

    def _add(self, batch: list[tuple[str, str]]) -> list[dict[str, Any] | Exception]:
        """The answer, or what kept it from being made, for each of `batch` (uid, namespace)."""
        assert self._agent.cluster is not None
        pods = {pod.metadata.uid: pod for pod in self._agent.cluster.pods.values()}
        before = dict(self._agent.ipam.leases)
        answers: list[dict[str, Any] | Exception] = []
        try:
            with self._agent.ipam.together():
                leases = [self._lease(uid, netns, pods.get(uid)) for uid, netns in batch]
            if any(isinstance(lease, Lease) for lease in leases):
                self._agent.publish()
        except Exception as error:
            self._give_back(set(self._agent.ipam.leases) - set(before))
            return [error for _ in batch]
        with Net() as net:
            for (uid, _), lease in zip(batch, leases, strict=True):
                if isinstance(lease, Lease):
                    try:
                        answers.append(self._wire(lease, before.get(uid) != lease, net))
                        before[uid] = lease
                    except Exception as error:
                        if uid not in before:
                            self._give_back({uid})
                        answers.append(error)
                else:
                    answers.append(lease)
        return answers

    def _lease(self, uid: str, netns: str, pod: Pod | None) -> Lease | Exception:
        assert self._agent.cluster is not None
        node = self._agent.config.node
        me = self._agent.cluster.nodes.get(node)
        if pod is None:
            return EndpointError(409, f"pod {uid} was deleted meanwhile")
        title = f"Pod {'/'.join(pod.key)}"
        if pod.spec.node_name != node:
            return EndpointError(
                409,
                f"{title}: spec.nodeName is {pod.spec.node_name!r}, not {node}",
            )
        if me is None:
            return EndpointError(503, f"{title}: there is no Node {node} yet")
        self._agent.ipam.set_pools(pod_cidrs(me))
        try:
            return self._agent.ipam.acquire(uid, netns)
        except PoolExhausted as error:
            return error

    def _wire(self, lease: Lease, new: bool, net: Net) -> dict[str, Any]:
        assert self._agent.cluster is not None
        if new or not self._agent.endpoints.wired(lease, net):
            me = self._agent.cluster.nodes[self._agent.config.node]
            self._agent.endpoints.wire(lease, net, tuple(internal_ips(me)))
        pod = self._agent.endpoints.pod(lease.uid)
        return {
            "ips": list(lease.ips),
            "slot": lease.slot,
            "endpoint": self._agent.journal.endpoint(pod),
        }

    def _give_back(self, uids: set[str]) -> None:
        """Leases of pods that could not be wired."""
        for uid in uids:
            self._agent.ipam.release(uid)
        self._agent.changed_soon()

    async def delete(self, uid: str) -> bool:
        """CNI DEL; False if there was nothing to be done."""
        async with self._agent.seen:
            if uid in self._waiting:
                self._gone.add(uid)
                self._agent.seen.notify_all()
        for one in [one for one in self._adds if one.uid == uid]:
            self._adds.remove(one)
            if not one.answer.done():
                one.answer.set_exception(EndpointError(409, f"pod {uid} was deleted meanwhile"))
        async with self._agent.turn:
            return await self._agent.work(self._delete, uid)

    def _delete(self, uid: str) -> bool:
        lease = self._agent.ipam.leases.get(uid)
        if lease is None:
            return False
        with Net() as net:
            self._agent.endpoints.unwire(lease.slot, net)
        self._agent.ipam.release(uid)
        try:
            self._agent.publish()
        except Exception:
            # The pod is gone in any case; its entries go with the next state.
            log.exception("the state without pod %s can't be put in force yet", uid)
            self._agent.changed_soon()
        return True

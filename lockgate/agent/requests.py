"""Requests for endpoints: what CNI ADD and DEL come down to.

A request waits for its Pod object and for its turn; those that wait together cost one change
of the tables.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lockgate.agent.endpoints import Attachment, namespace_exists
from lockgate.agent.ipam import Lease, PoolExhausted
from lockgate.agent.ways import internal_ips, pod_cidrs
from lockgate.objects.model import Pod

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["EndpointError", "Requests"]

log = logging.getLogger(__name__)
_FEW = 16
_Answer = dict[str, Any] | Exception


class EndpointError(Exception):
    """An endpoint could not be made; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class _Add:
    """A CNI ADD that waits for its turn."""

    who: Attachment
    answer: asyncio.Future[dict[str, Any]]

    def settle(self, answer: _Answer) -> None:
        """Unless who asked has gone."""
        if self.answer.done():
            return
        if isinstance(answer, Exception):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


class Requests:
    """The endpoints that are asked for and given back, for one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._waiting: set[str] = set()
        self._gone: set[str] = set()
        self._adds: list[_Add] = []
        self._deletes: dict[str, asyncio.Future[bool]] = {}
        self._adder: asyncio.Task[None] | None = None
        self._cleaner: asyncio.Task[None] | None = None

    async def add(self, who: Attachment, timeout: float = 30.0) -> dict[str, Any]:
        """CNI ADD. The same answer again for a pod that is wired."""
        with self._agent.metrics.request("add"):
            return await self._asked(who, timeout)

    async def _asked(self, who: Attachment, timeout: float) -> dict[str, Any]:
        if not namespace_exists(who.netns):
            raise EndpointError(400, f"{who}: there is no network namespace {who.netns}")
        self._waiting.add(who.key)
        try:
            async with asyncio.timeout(timeout), self._agent.seen:
                await self._agent.seen.wait_for(
                    lambda: self._uid(who) is not None or who.key in self._gone
                )
        except TimeoutError:
            raise EndpointError(
                504, f"{who}: no Pod object with this uid came within {timeout:g} s"
            ) from None
        finally:
            gone = who.key in self._gone
            self._waiting.discard(who.key)
            self._gone.discard(who.key)
        uid = self._uid(who)
        if gone or uid is None:
            raise EndpointError(409, f"{who} was deleted meanwhile")
        if all(who.name):
            self._agent.believe(uid, who.name)
        who = replace(who, uid=uid)
        one = _Add(who, asyncio.get_running_loop().create_future())
        self._adds.append(one)
        if self._adder is None:
            self._adder = asyncio.create_task(self._add_waiting())
        try:
            return await asyncio.shield(one.answer)
        except asyncio.CancelledError:
            # Who asked keeps the path of the namespace good until then, and it may be in use.
            if one in self._adds:
                self._adds.remove(one)
            else:
                await asyncio.wait([one.answer])
            raise

    def _uid(self, who: Attachment) -> str | None:
        """Uid of the Pod object that is meant, if it is known."""
        claims, cluster = self._agent.claims, self._agent.cluster
        if who.uid:
            known = claims.uid(who.name) == who.uid if all(who.name) else who.uid in claims.names
            return who.uid if known else None
        if cluster is None:
            return None
        pod = cluster.pods.get(who.name)  # some runtimes tell no uid
        return None if pod is None else pod.metadata.uid

    async def _add_waiting(self) -> None:
        """All that wait when their turn comes, with one change of the tables."""
        loop = asyncio.get_running_loop()

        def tell(one: _Add, answer: _Answer) -> None:
            loop.call_soon_threadsafe(one.settle, answer)

        try:
            while self._adds:
                async with self._agent.turn:
                    batch, self._adds = self._adds, []
                    try:
                        await self._agent.work(self._add, batch, tell)
                    except Exception as error:
                        for one in batch:
                            one.settle(error)
        finally:
            self._adder = None

    def _add(self, batch: list[_Add], tell: Callable[[_Add, _Answer], None]) -> None:
        """Tells the answer for each of `batch`, or what kept it from being made, as soon as its
        link is there: the first are not to wait for the last."""
        self._agent.catch_up()
        assert self._agent.cluster is not None
        if not self._agent.published:
            # It finds the pods of other plugins, whose addresses nobody is to get.
            self._agent.publish()
        before = dict(self._agent.ipam.leases)
        try:
            with self._agent.ipam.together():
                leases = [self._lease(one.who, self._pod(one.who)) for one in batch]
            if any(isinstance(lease, Lease) for lease in leases):
                self._agent.publish()
        except Exception:
            self._give_back(set(self._agent.ipam.leases) - set(before))
            raise
        for one, lease in zip(batch, leases, strict=True):
            if isinstance(lease, Exception):
                tell(one, lease)
                continue
            uid = one.who.uid
            try:
                answer = self._wire(one.who, lease, before.get(uid) != lease)
                before[uid] = lease
            except Exception as error:
                if uid not in before:
                    self._give_back({uid})
                tell(one, error)
            else:
                tell(one, answer)

    def _pod(self, who: Attachment) -> Pod | None:
        """The pod that asks, as the tables will have it."""
        assert self._agent.cluster is not None
        name = self._agent.claims.names.get(who.uid, ("", ""))
        if all(who.name) and name != who.name:
            return None
        pod = self._agent.cluster.pods.get(name)
        return pod if pod is not None and pod.metadata.uid == who.uid else None

    def _lease(self, who: Attachment, pod: Pod | None) -> Lease | Exception:
        assert self._agent.cluster is not None
        uid = who.uid
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
            return self._agent.ipam.acquire(uid, who.sandbox)
        except PoolExhausted as error:
            self._agent.refused.append(f"{title}: {error}")
            return error

    def _wire(self, who: Attachment, lease: Lease, new: bool) -> dict[str, Any]:
        assert self._agent.cluster is not None
        if new or not self._agent.endpoints.wired(lease, who.netns):
            me = self._agent.cluster.nodes[self._agent.config.node]
            self._agent.endpoints.wire(lease, who.netns, tuple(internal_ips(me)))
        pod = self._agent.endpoints.pod(lease.uid)
        return {
            "uid": lease.uid,
            "ips": list(lease.ips),
            "slot": lease.slot,
            "endpoint": self._agent.journal.endpoint(pod),
        }

    def _give_back(self, uids: set[str]) -> None:
        """Leases of pods that could not be wired."""
        for uid in uids:
            self._agent.ipam.release(uid)
        self._agent.changed_soon()

    async def delete(self, key: str) -> bool:
        """CNI DEL of an attachment by its key; False if there was nothing to be done: a newer
        sandbox of the pod is left alone."""
        async with self._agent.seen:
            if key in self._waiting:
                self._gone.add(key)
                self._agent.seen.notify_all()
        for one in [one for one in self._adds if one.who.key == key]:
            self._adds.remove(one)
            if not one.answer.done():
                one.answer.set_exception(EndpointError(409, f"{one.who} was deleted meanwhile"))
        answer = self._deletes.get(key)
        if answer is None:
            answer = self._deletes[key] = asyncio.get_running_loop().create_future()
        with self._agent.metrics.request("delete"):
            async with self._agent.turn:
                await self._delete_waiting()
            return await answer

    async def _delete_waiting(self) -> None:
        """All that wait when the turn of the first comes, with one change of the tables."""
        batch, self._deletes = self._deletes, {}
        if not batch:
            return
        try:
            done = await self._agent.work(self._delete, set(batch))
            self._clean_up()
            for key, answer in batch.items():
                answer.set_result(key in done)
        except BaseException as error:
            problem = error if isinstance(error, Exception) else OSError("the agent is ending")
            for answer in batch.values():
                answer.set_exception(problem)
                answer.exception()  # seen, should nobody wait any more
            if not isinstance(error, Exception):
                raise

    async def collect(self, keep: set[str]) -> int:
        """CNI GC: delete what belongs to other sandboxes than `keep`; returns how many."""
        async with self._agent.turn:
            known = {one.sandbox for one in self._agent.ipam.leases.values()} - {""}
            done = await self._agent.work(self._delete, known - keep)
            self._clean_up()
            return len(done)

    def _clean_up(self) -> None:
        """Take retired links away, a few at a time: others want to change links too."""
        if self._cleaner is None or self._cleaner.done():
            self._cleaner = asyncio.create_task(self._clean())

    async def _clean(self) -> None:
        while slots := sorted(self._agent.ipam.retired)[:_FEW]:
            try:
                await asyncio.to_thread(self._agent.endpoints.unwire, slots)
            except OSError as error:
                log.warning("links of pods that went: %s", error)
                await asyncio.sleep(1)

    async def close(self) -> None:
        """What is left to be cleaned up, the next agent finds."""
        if self._cleaner is not None:
            self._cleaner.cancel()
            await asyncio.gather(self._cleaner, return_exceptions=True)

    def _delete(self, keys: set[str]) -> set[str]:
        """Which of the attachments had a lease. They are cut off now; links and tables go soon,
        and until they have, nobody else gets the slots and addresses."""
        agent = self._agent
        over = [one for one in agent.ipam.leases.values() if one.key in keys]
        if over:
            agent.endpoints.retire([one.slot for one in over])
            with agent.ipam.together():
                for one in over:
                    agent.ipam.release(one.uid)
            agent.changed_soon()
        return {one.key for one in over}

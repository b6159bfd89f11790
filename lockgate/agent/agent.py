"""The agent of one node: objects in, kernel tables out, endpoints on request.

One event loop, and one worker thread for all that blocks (compiling, bpf, netlink, disk): so
everything that changes the kernel happens one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import aiohttp

from lockgate.agent.config import Config
from lockgate.agent.datapath import Datapath
from lockgate.agent.endpoints import Endpoints, namespace_exists
from lockgate.agent.hops import Hops, internal_ips, pod_cidrs
from lockgate.agent.ipam import Ipam, Lease, PoolExhausted
from lockgate.agent.journal import Journal
from lockgate.agent.publish import Publisher
from lockgate.agent.sweep import sweep
from lockgate.bpf.features import probe
from lockgate.compile import Tables, compile_node
from lockgate.compile.tables import Direction, Rule, Verdict
from lockgate.kube import stream
from lockgate.net import neighbours
from lockgate.net.links import Net
from lockgate.objects.model import Cluster, Node, Pod

__all__ = ["Agent", "EndpointError"]

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
_COUNT_CAUSE = 8


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


class _Ids:
    """The compiler's ids: the journal's, slots and hops (`lockgate.compile.Ids`)."""

    def __init__(self, journal: Journal, endpoints: Endpoints, hops: Hops) -> None:
        self._journal, self._endpoints, self._hops = journal, endpoints, hops

    def endpoint(self, pod: Pod) -> int:
        return self._journal.endpoint(pod)

    def reason(self, verdict: Verdict, direction: Direction, rules: tuple[Rule, ...]) -> int:
        return self._journal.reason(verdict, direction, rules)

    def service(self, namespace: str, name: str, port_name: str, protocol: str, port: int) -> int:
        return self._journal.service(namespace, name, port_name, protocol, port)

    def slot(self, uid: str) -> int | None:
        return self._endpoints.slot(uid)

    def hop(self, node: str) -> int | None:
        return self._hops.number(node)


class Agent:
    """`await start()` takes over what is in the kernel; `run()` follows the objects until it is
    cancelled; `close()` leaves the kernel as it is. The process must be in the node's network
    namespace before the agent is made."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._state = Path(config.state_dir)
        self._reporter = stream.Reporter(Path(config.control), config.node)
        self._worker = ThreadPoolExecutor(1, "kernel")
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._hops_changed = asyncio.Event()
        self._seen = asyncio.Condition()
        self._cluster: Cluster | None = None
        self._settled: object = None
        self._uids: set[str] = set()
        self._waiting: set[str] = set()
        self._gone: set[str] = set()
        self._adds: list[_Add] = []
        self._adder: asyncio.Task[None] | None = None
        self._cards: dict[str, int] = {}
        self._hop_nodes: dict[str, Node] | None = None
        self._tables: Tables | None = None
        self._revision = 0
        self._applied = 0
        self._reported = -1
        self._stream_errors: list[str] = []
        self._errors: dict[str, list[str]] = {}
        self._connected = False
        self._started = time.time()
        self._swept = 0
        self._features = [f._asdict() for f in probe()]

    # ---- Life ----------------------------------------------------------------------

    async def start(self) -> None:
        """Load, take over, reconcile. Raises what keeps the node from working at all."""
        await self._work(self._start)

    def _start(self) -> None:
        config = self.config
        self._state.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self._state / "journal.jsonl")
        self.dp = Datapath(config.object_path, config.pins)
        self.ipam = Ipam(self._state / "ipam.json", len(self.dp.endpoints))
        self.publisher = Publisher(self.dp)
        self.endpoints = Endpoints(self.dp, self.ipam, config.node)
        self.hops = Hops(
            self.dp, config.node, config.underlay, config.outside, config.service_cidrs
        )
        self._ids = _Ids(self.journal, self.endpoints, self.hops)
        if config.cgroup:
            self.dp.attach_cgroup(Path(config.cgroup))
        with Net() as net:
            self._set_mtu(net)
            net.add_gateway()
            self._errors["endpoints"] = self.endpoints.reconcile(net)
            self._attach_cards(net)

    async def run(self) -> None:
        """Follow the objects and the kernel's neighbours."""
        stop = neighbours.watch(self._hops_changed.set)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow())
                group.create_task(self._apply())
                group.create_task(self._watch_hops())
                group.create_task(self._sweep())
        finally:
            stop()

    async def close(self) -> None:
        """Let go; what is in the kernel goes on working."""
        await self._reporter.close()
        await self._work(self._close)
        self._worker.shutdown()

    def _close(self) -> None:
        self.dp.close()
        self.journal.close()

    # ---- Objects into the kernel -----------------------------------------------------

    async def _follow(self) -> None:
        """The watch stream, again and again: without it, what is in force stays in force."""
        control, wait = Path(self.config.control), 0.1
        while True:
            try:
                async for transaction in stream.watch(control):
                    wait, self._connected = 0.1, True
                    await self._take(transaction)
            except (OSError, aiohttp.ClientError, ValueError) as error:
                if self._connected:
                    log.warning("the watch stream ended: %s", error)
            self._connected = False
            await asyncio.sleep(wait)
            wait = min(wait * 2, 2.0)

    async def _take(self, transaction: stream.Transaction) -> None:
        cluster = stream.apply(self._cluster or Cluster(), transaction)
        for error in transaction.errors:
            log.warning("%s", error)
        if transaction.complete:
            self._reported = -1
        self._stream_errors = transaction.errors
        async with self._seen:
            if self._cluster is None or cluster.pods is not self._cluster.pods:
                self._uids = {pod.metadata.uid for pod in cluster.pods.values()}
            self._cluster, self._revision = cluster, transaction.revision
            self._seen.notify_all()
        self._changed.set()

    async def _apply(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            async with self._turn:
                revision = self._revision
                error = await self._publish_safely()
            if not error:
                self._applied = revision
            if self._reported != revision or error:
                await self._report(revision, error)
            self._settle()
            if error:
                await asyncio.sleep(1)
                self._changed.set()

    def _settle(self) -> None:
        """Have the garbage collector pass over the objects that stay: with a thousand pods it
        would stop a change of policies for a tenth of a second."""
        pods = None if self._cluster is None else self._cluster.pods
        if pods is not self._settled:
            self._settled = pods
            gc.collect(1)
            gc.freeze()

    async def _report(self, revision: int, error: str) -> None:
        try:
            text = error or "; ".join(self._stream_errors)
            await self._reporter.report(revision, text)
            self._reported = revision
        except (OSError, aiohttp.ClientError, TimeoutError) as problem:
            log.warning("the supervisor could not be told of revision %d: %s", revision, problem)

    async def _publish_safely(self) -> str:
        """Publish; returns the error that kept it from happening."""
        try:
            await self._work(self._publish)
        except Exception as error:
            # Whatever is wrong with the new state, the one in force stays, and so do we.
            log.exception("the new state can't be put in force")
            self._errors["publish"] = [f"{type(error).__name__}: {error}"]
            return self._errors["publish"][0]
        self._errors.pop("publish", None)
        return ""

    def _publish(self) -> bool:
        """Compile and bring in force, from the worker, in turn. Nothing before the first
        complete view of the objects: an empty store must not wipe a working node."""
        if self._cluster is None:
            return False
        cluster = self.endpoints.overlay(self._cluster)
        me = cluster.nodes.get(self.config.node)
        if me is not None:
            self.ipam.set_pools(pod_cidrs(me))
        self.hops.assign(cluster.nodes)
        if cluster.nodes != self._hop_nodes:
            self._refresh_hops(cluster)
            self._hop_nodes = cluster.nodes
        self.journal.cluster = cluster
        tables = compile_node(cluster, self.config.node, self._ids, self._tables)
        records = self.endpoints.records(tables.endpoints, self.journal.endpoint)
        self.journal.commit()
        moved = self.publisher.publish(tables, records)
        for text in set(tables.errors) - set(self._errors.get("objects", ())):
            log.warning("%s", text)
        self._errors["objects"] = tables.errors
        self._tables = tables
        return moved

    # ---- Hops and cards --------------------------------------------------------------

    async def _watch_hops(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hops_changed.wait(), 10)
            # Netlink messages come in bursts, our own changes among them.
            await asyncio.sleep(0.05)
            self._hops_changed.clear()
            async with self._turn:
                with contextlib.suppress(OSError):
                    await self._work(self._refresh_hops, None)

    def _refresh_hops(self, cluster: Cluster | None) -> None:
        cluster = cluster or self._cluster
        if cluster is None:
            return
        try:
            with Net() as net:
                self._set_mtu(net)
                self._attach_cards(net)
                self.hops.refresh(net, cluster)
            self._errors["hops"] = self.hops.errors
        except OSError as error:
            log.warning("hops: %s", error)
            self._errors["hops"] = [str(error)]

    def _attach_cards(self, net: Net) -> None:
        links = net.links()
        for name in {self.config.underlay, self.config.outside} - {""}:
            if name in links and self._cards.get(name) != links[name]:
                self.dp.attach_net(name, links[name])
                self._cards[name] = links[name]

    def _set_mtu(self, net: Net) -> None:
        link = net.link(self.config.underlay) if self.config.underlay else None
        self.endpoints.mtu = self.config.mtu or (link["mtu"] if link else 1500)

    # ---- Endpoints -------------------------------------------------------------------

    async def add(self, uid: str, netns: str, timeout: float = 30.0) -> dict[str, Any]:
        """CNI ADD. The same answer again for a pod that is wired."""
        if not namespace_exists(netns):
            raise EndpointError(400, f"pod {uid}: there is no network namespace {netns}")
        self._waiting.add(uid)
        try:
            async with asyncio.timeout(timeout), self._seen:
                await self._seen.wait_for(lambda: uid in self._uids or uid in self._gone)
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
                async with self._turn:
                    batch, self._adds = self._adds, []
                    try:
                        answers = await self._work(
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
        assert self._cluster is not None
        pods = {pod.metadata.uid: pod for pod in self._cluster.pods.values()}
        before = dict(self.ipam.leases)
        answers: list[dict[str, Any] | Exception] = []
        try:
            with self.ipam.together():
                leases = [self._lease(uid, netns, pods.get(uid)) for uid, netns in batch]
            if any(isinstance(lease, Lease) for lease in leases):
                self._publish()
        except Exception as error:
            self._give_back(set(self.ipam.leases) - set(before))
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
        assert self._cluster is not None
        me = self._cluster.nodes.get(self.config.node)
        if pod is None:
            return EndpointError(409, f"pod {uid} was deleted meanwhile")
        title = f"Pod {'/'.join(pod.key)}"
        if pod.spec.node_name != self.config.node:
            return EndpointError(
                409, f"{title}: spec.nodeName is {pod.spec.node_name!r}, not {self.config.node}"
            )
        if me is None:
            return EndpointError(503, f"{title}: there is no Node {self.config.node} yet")
        self.ipam.set_pools(pod_cidrs(me))
        try:
            return self.ipam.acquire(uid, netns)
        except PoolExhausted as error:
            return error

    def _wire(self, lease: Lease, new: bool, net: Net) -> dict[str, Any]:
        assert self._cluster is not None
        if new or not self.endpoints.wired(lease, net):
            me = self._cluster.nodes[self.config.node]
            self.endpoints.wire(lease, net, tuple(internal_ips(me)))
        pod = self.endpoints.pod(lease.uid)
        return {
            "ips": list(lease.ips),
            "slot": lease.slot,
            "endpoint": self.journal.endpoint(pod),
        }

    def _give_back(self, uids: set[str]) -> None:
        """Leases of pods that could not be wired."""
        for uid in uids:
            self.ipam.release(uid)
        self._changed_soon()

    async def delete(self, uid: str) -> bool:
        """CNI DEL; False if there was nothing to be done."""
        async with self._seen:
            if uid in self._waiting:
                self._gone.add(uid)
                self._seen.notify_all()
        for one in [one for one in self._adds if one.uid == uid]:
            self._adds.remove(one)
            if not one.answer.done():
                one.answer.set_exception(EndpointError(409, f"pod {uid} was deleted meanwhile"))
        async with self._turn:
            return await self._work(self._delete, uid)

    def _delete(self, uid: str) -> bool:
        lease = self.ipam.leases.get(uid)
        if lease is None:
            return False
        with Net() as net:
            self.endpoints.unwire(lease.slot, net)
        self.ipam.release(uid)
        try:
            self._publish()
        except Exception:
            # The pod is gone in any case; its entries go with the next state.
            log.exception("the state without pod %s can't be put in force yet", uid)
            self._changed_soon()
        return True

    def _changed_soon(self) -> None:
        self._loop.call_soon_threadsafe(self._changed.set)

    # ---- Questions -------------------------------------------------------------------

    async def dry_run(self, packets: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run live programs; `packet` is bytes here."""
        return await self._work(self._dry_run, packets)

    def _dry_run(self, packets: list[dict[str, Any]]) -> list[dict[str, Any]]:
        mark = 0x6C6B6761
        answers: list[dict[str, Any]] = []
        for item in packets:
            try:
                ifindex = int(item.get("ifindex") or self._cards.get(self.config.underlay, 1))
                run = self.dp.dry_run(item["at"], item["packet"], ifindex, mark)
            except (OSError, ValueError) as error:
                answers.append({"error": str(error)})
                continue
            result, egress, ingress, target, service = run.cb
            answers.append(
                {
                    "retval": run.retval,
                    "verdict": result & 0xFF,
                    "cause": result >> 8 & 0xFF,
                    "judged": result >> 16,
                    "egress": egress,
                    "ingress": ingress,
                    "targetKind": target >> 28,
                    "target": target & 0xFFFFFFF,
                    "service": service,
                }
            )
        return answers

    async def status(self) -> dict[str, Any]:
        """What GET /v1/status answers."""
        return await self._work(self._status)

    def _status(self) -> dict[str, Any]:
        totals = self.dp.counters.values().sum(axis=1)
        causes = self.dp.object.schema.enum("cause")
        drops = {
            name.removeprefix("CAUSE_").lower().replace("_", "-"): int(totals[_COUNT_CAUSE + n])
            for name, n in causes.items()
            if name != "CAUSE_MAX" and totals[_COUNT_CAUSE + n]
        }
        return {
            "cluster": self.config.cluster,
            "node": self.config.node,
            "epoch": self.publisher.epoch,
            "revision": self._revision,
            "applied": self._applied,
            "connected": self._connected,
            "started": self._started,
            "counts": {
                **self.publisher.sizes,
                "endpoints": len(self.ipam.leases),
                "hops": len(self.hops.numbers),
                "swept": self._swept,
            },
            "endpoints": [
                {"uid": one.uid, "ips": list(one.ips), "slot": one.slot}
                for one in self.ipam.leases.values()
            ],
            "errors": [text for texts in self._errors.values() for text in texts],
            "features": self._features,
            "memory": _resident(),
            "losses": {"events": int(totals[1])},
            "events": int(totals[0]),
            "forwarded": int(totals[2]),
            "drops": drops,
        }

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.config.sweep_seconds)
            steps = sweep(self.dp)
            try:
                while (count := await self._work(next, steps, None)) is not None:
                    self._swept += count
            except OSError as error:
                log.warning("sweep: %s", error)

    async def _work(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self._loop = asyncio.get_running_loop()
        # Shielded: a client that hangs up must not leave a job running outside its turn.
        future = self._loop.run_in_executor(self._worker, lambda: job(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await future
            raise


def _resident() -> int:
    """Bytes of memory this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

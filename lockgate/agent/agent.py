"""The agent of one node: objects in, kernel tables out, endpoints on request.

One event loop, and one worker thread for all that blocks (compiling, bpf, netlink, disk): so
everything that changes the kernel happens one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lockgate.agent import doctor, questions, report
from lockgate.agent.cards import Cards
from lockgate.agent.carry import Carry
from lockgate.agent.claims import Claims
from lockgate.agent.clients import Clients
from lockgate.agent.config import Config
from lockgate.agent.datapath import Datapath
from lockgate.agent.edge import Edge
from lockgate.agent.endpoints import Endpoints
from lockgate.agent.firewall import Firewall
from lockgate.agent.foreign import Foreign
from lockgate.agent.health_ports import HealthPorts
from lockgate.agent.hops import Hops
from lockgate.agent.ids import NodeIds
from lockgate.agent.ipam import Ipam
from lockgate.agent.journal import Journal
from lockgate.agent.metrics import Metrics
from lockgate.agent.patrol import Patrol
from lockgate.agent.publish import Publisher
from lockgate.agent.requests import Requests
from lockgate.agent.sweep import sweep
from lockgate.agent.tunnel import TunnelDevice
from lockgate.agent.uplinks import Uplinks
from lockgate.agent.ways import pod_cidrs
from lockgate.agent.writeback import WriteBack
from lockgate.bpf.features import Feature
from lockgate.bpf.grace import wait_grace
from lockgate.compile import Host, Tables, compile_node
from lockgate.garbage import collect_between
from lockgate.kube import stream
from lockgate.kube.client import AWAY, Client
from lockgate.kube.source import ApiSource
from lockgate.net import neighbours
from lockgate.net.links import GATEWAY4, IFINDEX_BASE
from lockgate.net.netlink import Batch
from lockgate.objects.changes import Changed, Name
from lockgate.objects.model import Cluster

__all__ = ["Agent"]

log = logging.getLogger(__name__)
_LO = 1
_TICK = 1.0  # seconds
P = ParamSpec("P")
T = TypeVar("T")


class Agent:
    """`await start()` takes over what is in the kernel; `run()` follows the objects until it is
    cancelled; `close()` leaves the kernel as it is. The process must be in the node's network
    namespace before the agent is made."""

    def __init__(self, config: Config, features: list[Feature]) -> None:
        self.config = config
        self._state = Path(config.state_dir)
        self.source = _source(config, lambda: self.publisher.epoch > 0)
        self._worker = ThreadPoolExecutor(1, "kernel")
        self.turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self.seen = asyncio.Condition()
        self.cluster: Cluster | None = None
        self._noted: deque[stream.Transaction] = deque()
        #: Of the pods that are known, those noted included.
        self.claims = Claims(
            lambda uid: uid in self.ipam.leases, lambda uid: self.journal.name(uid)
        )
        self.requests = Requests(self)
        self.uplinks = Uplinks(self)
        self.patrol = Patrol(self)
        self.foreign = Foreign()
        self.health_ports = HealthPorts(self)
        self._tables: Tables | None = None
        #: What changed in `cluster` since the tables were made; None: anything.
        self._unpublished: Changed | None = None
        self.revision = 0
        self.applied = 0
        self._reported = -1
        self.object_errors: list[str] = []
        self.errors: dict[str, list[str]] = {"claims": []}
        #: Pods that got no address, to be told as events.
        self.refused: list[str] = []
        self.metrics = Metrics()
        self.started = time.time()
        self.swept = 0
        self.features = [feature._asdict() for feature in features]

    # ---- Life ----------------------------------------------------------------------

    async def start(self) -> None:
        """Load, take over, reconcile. Raises what keeps the node from working at all."""
        await self.work(self._start)

    def _start(self) -> None:
        config = self.config
        self._state.mkdir(parents=True, exist_ok=True)
        self.dp = Datapath(
            config.object_path,
            config.pins,
            share=config.memory_share,
            limits=config.limits,
            tunnels=config.routing != "direct",
            flows=config.flows,
        )
        self.edge = Edge(self.dp, config.xdp_object_path, config.xdp)
        # From here on also where programs of the agent before run: they read it with each event.
        self.dp.state.view["capture"][0] = config.capture
        self.journal = Journal(self._state / "journal.jsonl", self.dp.ids.view[0])
        self.firewall = Firewall(self.edge, self.journal, self._state, config.node)
        self.ipam = Ipam(self._state / "ipam.json", len(self.dp.endpoints))
        self.publisher = Publisher(self.dp)
        self._clients = Clients(self.dp)
        self.endpoints = Endpoints(self.dp, self.ipam, config.node)
        self._tunnel = TunnelDevice(self.dp, config.vxlan_port)
        self.hops = Hops(
            self.dp,
            self.publisher.hops(),
            config.node,
            config.underlay,
            config.outside,
            config.service_cidrs,
            config.routing,
            self._tunnel,
        )
        self._ids = NodeIds(self.journal, self.endpoints, self.foreign, self.hops)
        cards = self.uplinks.read()
        self.uplinks.set_mtu(cards)
        with Batch() as batch:
            # It answers ARP of pods that lost their neighbour entry.
            batch.host_address(_LO, f"{GATEWAY4}/32")
            batch.send()
        self.errors["endpoints"] = self.endpoints.reconcile()
        if self.dp.pending:
            log.info("maps of another version are in force until ours are complete")
        else:
            self._attach(cards)
            self.dp.tidy()

    def _attach(self, cards: Cards) -> None:
        """Our programs everywhere, in place of those of the agent before."""
        if self.config.cgroup_path is not None:
            self.dp.attach_cgroup(self.config.cgroup_path)
        self.errors["attach"] = self.endpoints.attach()
        self.uplinks.attach(cards)
        self._tunnel.attach_waiting()
        self.settle_edge(cards)

    def _take_over(self) -> None:
        """From programs of another version, once our maps hold all that ours need
        (docs/cluster.md, Versioned pins). Whenever this ends, the next agent does it again."""
        with Carry(self.dp) as carry:
            carried = carry.before() + carry.before()
            self._attach(self.uplinks.read())
            wait_grace()
            carried += carry.after()
        self.dp.settle()
        log.info("taken over from another version; %d records carried over", carried)

    async def run(self) -> None:
        """Follow the objects and the kernel's neighbours."""
        stop = neighbours.watch(self.uplinks.changed.set, IFINDEX_BASE)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow())
                group.create_task(self._apply())
                group.create_task(self.uplinks.watch())
                group.create_task(self._sweep())
                group.create_task(self.patrol.run())
                group.create_task(self.health_ports.run())
                group.create_task(self._tick())
                group.create_task(collect_between(self.turn.locked, lambda: self.revision))
                if isinstance(self.source, ApiSource):
                    group.create_task(WriteBack(self, self.source).run())
        finally:
            stop()

    async def close(self) -> None:
        """Let go; what is in the kernel goes on working."""
        await self.requests.close()
        await self.source.close()
        await self.work(self._close)
        self._worker.shutdown()

    def _close(self) -> None:
        self.edge.close()
        self.firewall.close()
        self.dp.close()
        self.journal.close()

    # ---- Objects into the kernel -----------------------------------------------------

    async def _follow(self) -> None:
        async with contextlib.aclosing(self.source.transactions()) as transactions:
            async for transaction in transactions:
                await self._take(transaction)

    async def _take(self, transaction: stream.Transaction) -> None:
        """Note what changed; the next turn applies all that was noted."""
        for error in transaction.errors:
            if error not in self.object_errors:
                log.warning("%s", error)
        if transaction.complete:
            self._reported = -1
        self.object_errors = transaction.errors
        async with self.seen:
            self._noted.append(self.claims.take(transaction))
            self._tell_claims()
            self.revision = transaction.revision
            self.seen.notify_all()
        self.health_ports.keeping_up.noted()
        self._changed.set()

    def believe(self, uid: str, name: Name) -> None:
        """As `Claims.believe`; the next turn applies what is another."""
        changes = self.claims.believe(uid, name)
        if changes:
            self._noted.append(stream.Transaction(changes, self.revision, False, []))
            self._tell_claims()
            self._changed.set()

    def _tell_claims(self) -> None:
        before, errors = self.errors["claims"], self.claims.errors()
        if errors is not before:
            for text in set(errors) - set(before):
                log.warning("%s", text)
            self.errors["claims"] = errors

    def catch_up(self) -> None:
        """Apply what was noted, from the worker, in turn."""
        noted = [self._noted.popleft() for _ in range(len(self._noted))]
        if noted:
            self.cluster, changed = stream.apply(self.cluster or Cluster(), *noted)
            if changed is None or self._unpublished is None:
                self._unpublished = None
            else:
                self._unpublished.update(changed)

    async def _apply(self) -> None:
        while True:
            await self._changed.wait()
            await self.publisher.settled()
            self._changed.clear()
            async with self.turn:
                revision = self.revision
                error = await self._publish_safely()
                if not error and self._clients.waiting:
                    await self.work(self._clients.follow)
            async with self.seen:
                # Who asks for a pod by its name looks into the tables, which hold it only now.
                self.seen.notify_all()
            if not error:
                self.applied = revision
                self.health_ports.keeping_up.done(all_of_it=self.revision == revision)
            if self._reported != revision or error:
                await self._report(revision, error)
            if error:
                await asyncio.sleep(1)
                self._changed.set()

    async def _report(self, revision: int, error: str) -> None:
        try:
            text = error or "; ".join(self.object_errors)
            await self.source.applied(revision, text)
            self._reported = revision
        except AWAY as problem:
            log.warning("the supervisor could not be told of revision %d: %s", revision, problem)

    async def _publish_safely(self) -> str:
        """Publish; returns the error that kept it from happening."""
        try:
            with self.metrics.publish.time():
                await self.work(self.publish)
        except Exception as error:
            # Whatever is wrong with the new state, the one in force stays, and so do we.
            text = f"{type(error).__name__}: {error}"
            # It is tried again each second, and mostly ends the same.
            if self.errors.get("publish") != [text]:
                log.exception("the new state can't be put in force")
            self.errors["publish"] = [text]
            return text
        self.errors.pop("publish", None)
        return ""

    @property
    def published(self) -> bool:
        """Whether what is in force is of this agent."""
        return self._tables is not None

    def publish(self) -> bool:
        """Compile and bring in force, from the worker, in turn. Nothing before the first
        complete view of the objects: an empty store must not wipe a working node."""
        self.catch_up()
        if self.cluster is None:
            return False
        # Should anything fail on the way, all may have changed the next time.
        changed, self._unpublished = self._unpublished, None
        tables, self._tables = self._tables, None
        cluster, changed = self.endpoints.overlay(self.cluster, changed)
        moved = self.foreign.look(self.endpoints.unleased())
        self.ipam.foreign = self.foreign.addresses
        if changed is not None:
            changed.pods |= moved
        me = cluster.nodes.get(self.config.node)
        if me is not None:
            self.ipam.set_pools(pod_cidrs(me))
        if changed is None or changed.nodes or changed.service_cidrs:
            self.uplinks.follow(cluster)
        self.journal.cluster = cluster
        overgrown = self.journal.overgrown
        with self.journal.asking() if overgrown else contextlib.nullcontext():
            reusable = None if overgrown else tables
            host = Host(self.uplinks.addresses, self.config.forwarding == "snat")
            tables = compile_node(cluster, self.config.node, self._ids, reusable, changed, host)
            self._tables, self._unpublished = tables, Changed()
            self.health_ports.follow(cluster, changed)
            self._clients.note(tables)
            records = self.endpoints.records(tables.endpoints, self.journal.endpoint)
            if overgrown:
                self.firewall.ask()
        self.journal.commit()
        if overgrown:
            with contextlib.suppress(OSError):
                self.journal.shorten()
        epoch_moved = self.publisher.publish(tables, records, self.hops.table)
        self.hops.write_routes()
        self.publisher.level(tables)
        self.edge.follow(tables, alone=not self.hops.direct)
        for text in set(tables.errors) - set(self.errors.get("objects", ())):
            log.warning("%s", text)
        self.errors["objects"] = tables.errors
        self.firewall.follow(cluster, changed)
        self.errors["firewall"] = self.firewall.errors
        if self.dp.pending:
            self._take_over()
        elif self.edge.due:
            self.settle_edge(self.uplinks.read())
        return epoch_moved

    def settle_edge(self, cards: Cards) -> None:
        """XDP where it is needed, once it is known what is; from the worker."""
        if self.published:
            self.firewall.see_cards(ip for card in cards.all for ip in card.addresses)
            self.edge.settle(cards)
            self.errors["xdp"] = self.edge.errors
            # What a driver can depends on what is attached.
            self._loop.call_soon_threadsafe(self.uplinks.changed.set)

    # ---- Questions ---------------------------------------------------------------------

    async def dry_run(self, packets: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run live programs; `packet` is bytes here."""
        return await self.work(questions.dry_run, self, packets)

    async def dry_run_facts(self) -> dict[str, Any]:
        """What GET /v1/dryrun answers."""
        return await self.work(questions.dry_run_facts, self)

    async def doctor(self) -> tuple[doctor.Facts, list[doctor.Finding]]:
        """What GET /v1/doctor answers."""
        facts = await self.work(doctor.collect, self)
        return facts, doctor.check(facts)

    async def report(self) -> dict[str, Any]:
        """What GET /v1/report answers."""
        return await self.work(report.report, self)

    async def status(self) -> dict[str, Any]:
        """What GET /v1/status answers."""
        return await self.work(questions.status, self)

    def problems(self) -> list[list[str]]:
        """What is wrong at present: of the source, of objects, of what could not be done."""
        source = self.source.problem()
        return [[source] if source else [], self.object_errors, *self.errors.values()]

    # ---- Turns -----------------------------------------------------------------------

    def changed_soon(self) -> None:
        """Something is to be put in force; from any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.config.sweep_seconds)
            steps = sweep(self.dp)
            try:
                while (count := await self.work(next, steps, None)) is not None:
                    self.swept += count
                await self.work(self.dp.tidy)
            except OSError as error:
                log.warning("sweep: %s", error)

    async def _tick(self) -> None:
        """Entries of the firewall expire, whatever else happens."""
        while True:
            await asyncio.sleep(_TICK)
            if self.firewall.idle:
                continue
            async with self.turn:
                try:
                    await self.work(self.firewall.tick)
                    await self.work(self.settle_firewall)
                except OSError as error:
                    log.warning("firewall: %s", error)

    def settle_firewall(self) -> None:
        """XDP as the firewall needs it now; from the worker, in turn."""
        self.errors["firewall"] = self.firewall.errors
        if self.edge.due and not self.dp.pending:
            self.settle_edge(self.uplinks.read())

    async def work(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self._loop = asyncio.get_running_loop()
        # Shielded: a client that hangs up must not leave a job running outside its turn.
        future = self._loop.run_in_executor(self._worker, lambda: job(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await future
            raise


def _source(config: Config, in_force: Callable[[], bool]) -> stream.Source:
    """Where the objects come from: the API server, or the supervisor of a standalone cluster."""
    if config.kubernetes is None:
        return stream.StreamSource(Path(config.control), config.node)
    state = Path(config.state_dir)
    return ApiSource(Client(config.kubernetes, state), state / "snapshot", in_force=in_force)

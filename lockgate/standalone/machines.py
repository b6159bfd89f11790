"""The nodes of a running cluster as they come and go with the manifests.

A node that comes is built beside the others (namespace, links, agent, observer), then published;
pods may be there from then on. One that goes gets no more pods, stays published until its last
pod has ended, and is unknown to the others before anything of it is taken down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable, Mapping
from typing import Protocol

from lockgate.objects.model import Node, Object
from lockgate.standalone import teardown, underlay
from lockgate.standalone.children import Child, Settings, write_config
from lockgate.standalone.nodes import make_nodes, node_number, overlap, refused
from lockgate.standalone.state import State

__all__ = ["Machines"]

log = logging.getLogger("lockgate.supervisor")


class Cluster(Protocol):
    """What the nodes need of the supervisor."""

    def nodes_moved(self) -> None:
        """A node is built, or wholly gone: `follow` is due, and what it says to be published."""

    def child_died(self, child: Child) -> None: ...

    async def known_everywhere(self) -> None:
        """Publishes, and returns when all nodes know, or should be waited for no longer."""

    async def forget_node(self, node: str) -> None:
        """Its agent is no more."""


class Machines:
    """Nodes, their namespaces, agents and observers. `published` are the nodes that all know."""

    def __init__(self, state: State, count: int, settings: Settings, cluster: Cluster) -> None:
        self.published: dict[str, Node] = {}
        self.children: list[Child] = []
        self._state = state
        self._count = count
        self._settings = settings
        self._cluster = cluster
        self._coming: dict[str, Node] = {}
        self._late: list[str] = []
        self._going: dict[str, Node] = {}
        self._failed: dict[str, str] = {}
        self._last = 0
        self._tasks: set[asyncio.Task[None]] = set()
        #: Nodes whose agent has brought something in force, and those that the world is sent to.
        self._serving: set[str] = set()
        self._spread: set[int] = set()
        # `ip -batch` runs of two nodes would find half of each other's bridge.
        self._wiring = asyncio.Lock()

    # ---- The start and the end --------------------------------------------------

    async def build(self, objects: Iterable[Object]) -> None:
        """The first nodes; without agents yet. Raises UnderlayError, OSError."""
        self.published = make_nodes(objects, self._count)
        self._last = len(self.published)
        await self._wire(self.published)

    def start_children(self, nodes: Iterable[str]) -> None:
        """Agents and observers of nodes that are built."""
        nodes = list(nodes)
        for role in ("agent", "observer"):
            for node in nodes:
                config = write_config(self._state, node, role, self._settings, len(self._known()))
                (self._state.cgroup(node) / "pods").mkdir(parents=True, exist_ok=True)
                child = Child(self._state, node, role, config)
                child.start(self._cluster.child_died)
                self.children.append(child)

    async def close(self) -> None:
        """Ends all agents and observers; what is left of nodes goes with the cluster."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(child.stop() for child in self.children), return_exceptions=True)

    # ---- What the manifests want ------------------------------------------------

    def refused(self, objects: list[Object]) -> list[str]:
        """Why these manifests' nodes cannot be made beside those that run; nothing if they can."""
        known = self._known()
        wanted = make_nodes(objects, self._count, known, self._last)
        told = [
            f"Node {name}, field metadata.name: {problem}"
            for name in wanted
            if name not in known and (problem := self._state.node_problem(name))
        ]
        return told + refused(objects, wanted, known)

    def try_again(self) -> None:
        """Nodes that could not be built are, with the next `follow`."""
        self._failed.clear()

    def follow(self, objects: Iterable[Object]) -> dict[str, Node]:
        """Begins to build what is missing, gives up what is not wanted; the nodes where pods may
        be as of now."""
        known = self._known()
        wanted = make_nodes(objects, self._count, known, self._last)
        for name, node in self.published.items():
            if name not in wanted:
                self._going.setdefault(name, node)
        for name, node in wanted.items():
            if name not in known and name not in self._failed and not self._must_wait(name, node):
                self._coming[name] = node
                self._last = node_number(node)
                self._do(self._come(name, node))
        usable = {n: node for n, node in wanted.items() if n in self.published and n in known}
        self._late = [n for n in wanted if n not in usable and n not in self._failed]
        self.published = usable | {
            n: node for n, node in self.published.items() if n in self._going
        }
        return usable

    def let_go(self, in_use: set[str]) -> None:
        """Takes down nodes that are not wanted and have no pods any more."""
        for name in self._going:
            if name in self.published and name not in in_use:
                self._do(self._go(name, self.published.pop(name)))

    def serves(self, node: str) -> None:
        """Its agent has in force what it was told."""
        if node not in self._serving:
            self._serving.add(node)
            self._do(self._lead_the_world())

    def is_going(self, node: str) -> bool:
        return node in self._going

    def reasons(self) -> list[str]:
        """What the manifests say of nodes and is not so yet, or cannot be."""
        # Saved away while it is being built: it goes as soon as it is.
        unwanted = {name: node for name, node in self._coming.items() if name not in self._late}
        return [
            *self._failed.values(),
            *(f"node {name}: it is being ended" for name in {**self._going, **unwanted}),
            *(f"node {name}: it is being started" for name in self._late),
        ]

    @property
    def failed(self) -> bool:
        return bool(self._failed)

    @property
    def under_way(self) -> bool:
        return bool(self._coming or self._going)

    # ---- One node -----------------------------------------------------------------

    def _known(self) -> dict[str, Node]:
        """Those that run or are being built, and are not going."""
        stay = {n: node for n, node in self.published.items() if n not in self._going}
        return stay | self._coming

    def _must_wait(self, name: str, node: Node) -> bool:
        """For one that goes: the same name again, or its pods' addresses."""
        return name in self._going or any(overlap(node, other) for other in self._going.values())

    async def _come(self, name: str, node: Node) -> None:
        try:
            await self._wire({name: node})
            self.start_children([name])
            self.published[name] = node
        except (underlay.UnderlayError, OSError) as error:
            self._fail(name, f"it cannot be started: {error}")
            with contextlib.suppress(underlay.UnderlayError, OSError):
                await self._unmake(name, node)
        del self._coming[name]
        self._cluster.nodes_moved()

    async def _go(self, name: str, node: Node) -> None:
        self._serving.discard(name)
        await self._lead_the_world()
        await self._cluster.known_everywhere()
        children = [child for child in self.children if child.node == name]
        await asyncio.gather(*(child.stop() for child in children))
        self.children = [child for child in self.children if child not in children]
        try:
            await self._unmake(name, node)
        except (underlay.UnderlayError, OSError) as error:
            self._fail(name, f"something of it is left: {error}")
        await self._cluster.forget_node(name)
        del self._going[name]
        self._cluster.nodes_moved()

    async def _lead_the_world(self) -> None:
        """Routes to load balancers' addresses over all nodes that serve."""
        async with self._wiring:
            known = self._known()
            numbers = {node_number(known[name]) for name in self._serving if name in known}
            if numbers == self._spread:
                return
            self._spread = numbers
            try:
                await asyncio.to_thread(underlay.spread, self._state, numbers)
            except (underlay.UnderlayError, OSError) as error:
                log.error("load balancers' addresses: %s", error)

    async def _wire(self, nodes: Mapping[str, Node]) -> None:
        numbers = [(name, node_number(node)) for name, node in nodes.items()]
        async with self._wiring:
            await asyncio.to_thread(underlay.build, self._state, numbers)

    async def _unmake(self, name: str, node: Node) -> None:
        async with self._wiring:
            await asyncio.to_thread(teardown.remove_node, self._state, name, node_number(node))

    def _fail(self, name: str, what: str) -> None:
        self._failed[name] = f"node {name}: {what}"
        log.error("%s", self._failed[name])

    def _do(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

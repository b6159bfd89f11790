"""The embedded cluster: a folder of manifests in, nodes, agents and pods out.

One asyncio loop: the folder's updates become a plan (controllers), the plan's pods become
PodRunners, and everything together becomes the stream that the agents follow (store). A change of
policies goes from the folder to the stream in one step, without waiting for anything. Its API is
in api.py; main.py runs both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from lockgate.garbage import collect_between
from lockgate.kube.folder import Folder, Update
from lockgate.objects.model import EndpointSlice, NetworkPolicy, Object, Pod
from lockgate.standalone.children import Child, Settings
from lockgate.standalone.controllers import (
    Memory,
    Plan,
    endpoint_slices,
    hosts_text,
    plan,
)
from lockgate.standalone.machines import Machines
from lockgate.standalone.pods import AgentRefused, PodRunner
from lockgate.standalone.state import State
from lockgate.standalone.store import Store

__all__ = ["Serve", "Supervisor"]

log = logging.getLogger("lockgate.supervisor")

Key = tuple[str, str]
#: Begins to answer for the cluster; what it returns ends that.
Serve = Callable[["Supervisor"], Awaitable[Callable[[], Awaitable[None]]]]

#: Pods that change their status close together make one revision.
SETTLE = 0.005
#: A pod's first process does not wait longer for other nodes to know its address.
KNOWN_TIMEOUT = 1.0
PARALLEL_STARTS = 8


class Supervisor:
    """Everything of one cluster. `run` returns when it was told to stop, and has cleaned up."""

    def __init__(self, state: State, folder: Path, nodes: int, settings: Settings) -> None:
        self.state = state
        self.machines = Machines(state, nodes, settings, self)
        self.store = Store()
        self.folder = Folder(folder)
        self.update = Update(objects=[])
        self.plan = Plan()
        self.runners: dict[Key, PodRunner] = {}
        self.phase = "starting"
        self.problem = ""
        self.stop = asyncio.Event()
        self.moved = asyncio.Event()
        self._memory = Memory(seed=str(uuid.uuid4()))
        self._others: list[Object] = []
        self._objects: list[Object] = []
        self._slices: dict[Key, EndpointSlice] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._ending: set[PodRunner] = set()
        self._slots = asyncio.Semaphore(PARALLEL_STARTS)
        self._pods_changed = False
        self._hosts_written: dict[str, str] = {}
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def run(self, serve: Serve) -> None:
        """`serve` makes the cluster answer on control.sock."""
        first = self.folder.refresh(first=True)
        if errors := first.errors or self.machines.refused(first.objects):
            raise SystemExit("\n".join(errors))
        for folder in (self.state.hosts, self.state.logs):
            folder.mkdir(parents=True, exist_ok=True)
        stop_serving = await serve(self)
        try:
            await self.machines.build(first.objects)
            self.take(first)
            self.machines.start_children(self.machines.published)
            await self._follow_until_stopped()
        finally:
            self.phase = "stopping"
            await self._shut_down()
            await stop_serving()

    async def _follow_until_stopped(self) -> None:
        follower = asyncio.create_task(self._follow())
        collector = asyncio.create_task(
            collect_between(lambda: False, lambda: self.store.objects["Pod"])
        )
        stop = asyncio.create_task(self.stop.wait())
        done, _ = await asyncio.wait({follower, stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in (follower, stop, collector):
            task.cancel()
        if follower in done:
            follower.result()

    async def _follow(self) -> None:
        async for update in self.folder:
            self.take(update)

    async def _shut_down(self) -> None:
        self.store.close()
        for runner in self.runners.values():
            runner.abandon()
        await self.machines.close()
        for session in self._sessions.values():
            await session.close()
        self.folder.close()

    # ---- Manifests ------------------------------------------------------------

    def take(self, update: Update) -> None:
        """Puts a state of the folder into force; one that is known already changes nothing."""
        if update.number <= self.update.number:
            return
        if not update.errors and (refused := self.machines.refused(update.objects)):
            update = msgspec.structs.replace(update, errors=refused)
        for error in update.errors:
            if error not in self.update.errors:
                log.error("%s", error)
        known = set(self.update.warnings + self.plan.warnings)
        self.update = update
        if update.errors:
            self.tell()
            return
        self._objects = update.objects
        policies = {
            (item.metadata.namespace, item.metadata.name): item
            for item in update.objects
            if isinstance(item, NetworkPolicy)
        }
        others: list[Object] = [
            item for item in update.objects if not isinstance(item, NetworkPolicy)
        ]
        if self._only_policies_changed(others, policies):
            self.plan = msgspec.structs.replace(self.plan, policies=policies)
            self.store.replace({"NetworkPolicy": policies})
            self.tell()
            return
        self._others = others
        self.machines.try_again()
        self._plan(known)

    def _plan(self, known: set[str]) -> None:
        """What should be there, from the manifests in force, on the nodes as they are now."""
        nodes = self.machines.follow(self._objects)
        self.plan = plan(self._objects, nodes, self._memory)
        for warning in self.update.warnings + self.plan.warnings:
            if warning not in known:
                log.warning("%s", warning)
        self._reconcile()
        self._let_nodes_go()
        self._pods_changed = True
        self.publish()

    def _only_policies_changed(
        self, others: Sequence[Object], policies: dict[Key, NetworkPolicy]
    ) -> bool:
        return (
            len(others) == len(self._others)
            and all(a is b for a, b in zip(others, self._others, strict=True))
            and all(namespace in self.plan.namespaces for namespace, _ in policies)
        )

    def _reconcile(self) -> None:
        """Starts, relabels and ends pods so that they are those of the plan."""
        for key, runner in list(self.runners.items()):
            wanted = self.plan.pods.get(key)
            unwanted = wanted is None or key in self.plan.unscheduled
            if unwanted or (wanted and wanted.metadata.uid != runner.pod.metadata.uid):
                self._end(key, runner)
            elif wanted and not runner.stopping:
                runner.relabel(wanted)
        for key, pod in self.plan.pods.items():
            if key not in self.runners and key not in self.plan.unscheduled:
                self.runners[key] = PodRunner(pod, self, self._slots)

    def _end(self, key: Key, runner: PodRunner) -> None:
        if runner in self._ending:
            return
        self._ending.add(runner)

        async def end() -> None:
            await runner.stop()
            self._ending.discard(runner)
            if self.runners.get(key) is runner:
                del self.runners[key]
            self._pods_changed = True
            self._reconcile()
            self._let_nodes_go()
            self.publish()

        task = asyncio.create_task(end())
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    # ---- The stream -----------------------------------------------------------

    def changed(self, runner: PodRunner) -> None:
        """A pod has another status: seen by the agents a few milliseconds later."""
        if not self._pods_changed:
            self._pods_changed = True
            asyncio.get_running_loop().call_later(SETTLE, self.publish)

    def publish(self) -> None:
        """Makes what is known now a revision, if it differs from the last one."""
        wanted: dict[str, Any] = {
            "Namespace": {("", name): item for name, item in self.plan.namespaces.items()},
            "Node": {("", name): item for name, item in self.machines.published.items()},
            "Service": self.plan.services,
            "NetworkPolicy": self.plan.policies,
        }
        if self._pods_changed:
            self._pods_changed = False
            pods: dict[Key, Pod] = {
                key: self.plan.pods[key] for key in self.plan.unscheduled if key in self.plan.pods
            }
            pods |= {key: runner.pod for key, runner in self.runners.items()}
            self._slices = (
                endpoint_slices(self.plan.services, pods, self.machines.published)
                | self.plan.slices
            )
            wanted |= {"Pod": pods, "EndpointSlice": self._slices}
        before = self.store.revision
        if self.store.replace(wanted) != before:
            self._write_hosts()
        self.tell()

    def _write_hosts(self) -> None:
        for namespace in self.plan.namespaces:
            text = hosts_text(namespace, self.plan.services, self._slices.values())
            if self._hosts_written.get(namespace) == text:
                continue
            self._hosts_written[namespace] = text
            # In place: the file is bound into pods, which would not see another one.
            fd = os.open(
                self.state.hosts_file(namespace), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
            with os.fdopen(fd, "wb") as file:
                file.write(text.encode())
                file.truncate()

    def tell(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()

    async def known_everywhere(self) -> None:
        self.publish()
        await self.store.wait_applied(self.store.revision, KNOWN_TIMEOUT)

    # ---- Nodes ----------------------------------------------------------------

    def node_addresses(self, node: str) -> list[str]:
        found = self.machines.published.get(node)
        addresses = found.status.addresses if found else []
        return [item.address for item in addresses if item.type == "InternalIP"]

    def nodes_moved(self) -> None:
        """A node is built, or wholly gone."""
        self._plan(set(self.update.warnings + self.plan.warnings))

    def _let_nodes_go(self) -> None:
        self.machines.let_go({runner.node for runner in self.runners.values()})

    def child_died(self, child: Child) -> None:
        """An agent or observer ended without having been told to."""
        log.error("%s of %s ended: %s", child.role, child.node, child.status.error)
        if child.role == "agent":
            self.store.forget(child.node)
        self.tell()

    async def forget_node(self, node: str) -> None:
        """Its agent is no more."""
        self.store.remove(node)
        if session := self._sessions.pop(node, None):
            await session.close()

    async def applied(self, node: str, revision: int, error: str | None) -> None:
        """An agent's answer to a bookmark."""
        for child in self.machines.children:
            if (child.node, child.role) == (node, "agent"):
                child.answered()
        self.machines.serves(node)
        await self.store.take_applied(node, revision, error)
        self.tell()

    async def agent(self, node: str, method: str, path: str, body: Any = None) -> Any:
        session = self._sessions.get(node)
        if session is None:
            session = self._sessions[node] = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(self.state.agent(node))),
                timeout=aiohttp.ClientTimeout(total=60),
            )
        while True:
            try:
                async with session.request(method, f"http://agent{path}", json=body) as response:
                    text = await response.text()
                    if response.status < 400:
                        return json.loads(text) if text else None
                    raise AgentRefused(f"agent of {node}: {_sentence(text)}")
            except (aiohttp.ClientConnectionError, FileNotFoundError):
                if self.phase == "stopping":
                    raise AgentRefused(f"agent of {node}: it is being stopped") from None
                if self.machines.is_going(node):
                    # What its agent does not undo any more goes with the node.
                    raise AgentRefused(f"agent of {node}: the node is being ended") from None
                await asyncio.sleep(0.02)

    # ---- Being in force -------------------------------------------------------

    def reasons(self, revision: int) -> list[str]:
        """Why what was saved is not in force on all nodes; nothing when it is."""
        reasons = [*self.update.errors, *self.machines.reasons()]
        for node in self.store.behind(revision):
            agents = [c for c in self.machines.children if c.node == node and c.role == "agent"]
            error = agents[0].last_error if agents else ""
            what = f"ended: {error}" if error else "has not answered yet"
            reasons.append(f"node {node}: its agent {what}")
        reasons += [f"node {node}: {error}" for node, error in self.store.errors.items()]
        for (namespace, name), why in self.plan.unscheduled.items():
            reasons.append(f"pod {namespace}/{name}: {why}")
        for (namespace, name), runner in self.runners.items():
            if runner.problem:
                reasons.append(f"pod {namespace}/{name}: {runner.problem}")
            elif runner.stopping or runner in self._ending:
                reasons.append(f"pod {namespace}/{name}: it is being ended")
            elif not runner.settled:
                reasons.append(f"pod {namespace}/{name}: it is being started")
        return reasons

    def not_ready(self) -> list[str]:
        """Pods that should be ready and are not; a finished Job's are not expected to be."""
        return [
            "/".join(key)
            for key, pod in self.store.objects["Pod"].items()
            if isinstance(pod, Pod) and not pod.ready and pod.status.phase != "Succeeded"
        ]

    def waiting_for(self) -> dict[str, str]:
        """Why pods are not ready, where it is known."""
        found = {"/".join(key): runner.waiting_for for key, runner in self.runners.items()}
        return {name: found[name] for name in self.not_ready() if found.get(name)}

    async def wait(self, timeout: float) -> list[str]:
        """Waits until everything that is saved now is in force; else the reasons why not."""
        self.take(self.folder.refresh())
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while True:
            if self._pods_changed:
                self.publish()
            reasons = self.reasons(self.store.revision)
            final = (
                self.update.errors
                or self.machines.failed
                or self.store.errors
                or self.plan.unscheduled
            )
            left = end - loop.time()
            if not reasons or left <= 0 or (final and not self._under_way()):
                return reasons
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, 0.5)):
                    await self.moved.wait()

    def _under_way(self) -> bool:
        return (
            self.machines.under_way
            or bool(self.store.behind(self.store.revision))
            or any(
                runner.stopping or runner in self._ending or not runner.settled
                for runner in self.runners.values()
            )
        )


def _sentence(text: str) -> str:
    try:
        answer = json.loads(text)
    except ValueError:
        return text.strip() or "no reason given"
    return str(answer.get("error", text)) if isinstance(answer, dict) else text

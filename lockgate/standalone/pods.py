"""One pod's life: namespaces, network and policy, containers, readiness, the end.

The order is the promise: the pod's object goes to the agents, its network is wired and its policy
in force, other nodes know its address, and only then its first process runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec

from lockgate.objects.model import Condition, Container, Pod, PodIP, PodStatus, Probe
from lockgate.standalone import readiness
from lockgate.standalone.controllers import probed_container
from lockgate.standalone.runtime import PodProcess, RuntimeFailure, Status, pod_spec
from lockgate.standalone.state import State

__all__ = ["AgentRefused", "Cluster", "PodRunner"]

#: Seconds from SIGTERM to SIGKILL, where spec.terminationGracePeriodSeconds does not say it.
GRACE = 2.0
_RETRY_LONGEST = 10.0


class AgentRefused(Exception):
    """The agent answered with an error."""


class Cluster(Protocol):
    """What a pod needs of the supervisor."""

    state: State

    async def agent(self, node: str, method: str, path: str, body: Any = None) -> Any:
        """One request; waits for an agent that is being restarted. Raises AgentRefused."""

    def changed(self, runner: PodRunner) -> None:
        """The pod's object is another one now."""

    async def known_everywhere(self) -> None:
        """Returns when all nodes have in force what is known now, or should be waited for no
        longer."""

    def node_addresses(self, node: str) -> list[str]: ...


class PodRunner:
    """Runs one incarnation of a pod. `pod` is its object with the status as of now."""

    def __init__(self, pod: Pod, cluster: Cluster, slots: asyncio.Semaphore) -> None:
        self.pod = pod
        self.process: PodProcess | None = None
        self.problem = ""
        self.stopping = False
        self._cluster = cluster
        self._slots = slots
        self._up: set[str] = set()
        self._running = False
        self._exits: dict[str, int] = {}
        self._complaints: dict[str, str] = {}
        self._probed: dict[str, bool] = {c.name: False for c in probed_container(pod)}
        self._life = asyncio.create_task(self._live(), name=f"pod {pod.metadata.name}")
        self._probes: list[asyncio.Task[None]] = []

    @property
    def node(self) -> str:
        return self.pod.spec.node_name

    @property
    def cgroup(self) -> Path:
        return self._cluster.state.cgroup(self.node) / "pods" / self.pod.metadata.uid

    @property
    def settled(self) -> bool:
        """Whether it has come as far as it can without waiting for anything but itself."""
        return self._running or self.pod.finished or bool(self.problem)

    @property
    def waiting_for(self) -> str:
        """Why a running pod is not ready, as far as is known."""
        for container in self.pod.spec.containers:
            if container.name in self._up:
                continue
            if (code := self._exits.get(container.name)) is not None:
                return f"container {container.name}: {_ending(container, code)}"
        for name, complaint in self._complaints.items():
            if not self._probed[name]:
                return f"container {name}: readiness probe: {complaint}"
        return ""

    def relabel(self, wanted: Pod) -> None:
        """Takes over what may change in a living pod: labels, annotations, owners."""
        meta = msgspec.structs.replace(
            wanted.metadata, deletion_timestamp=self.pod.metadata.deletion_timestamp
        )
        if meta != self.pod.metadata:
            self._set(msgspec.structs.replace(self.pod, metadata=meta))

    async def stop(self) -> None:
        """Ends the pod and leaves nothing of it."""
        if self.stopping:
            await asyncio.wait({self._life})
            return
        self.stopping = True
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        meta = msgspec.structs.replace(self.pod.metadata, deletion_timestamp=now)
        self._set(msgspec.structs.replace(self.pod, metadata=meta))
        self._life.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._life
        await self._end()

    def abandon(self) -> None:
        """Stops following the pod, which is about to be killed with its cgroup."""
        self.stopping = True
        self._life.cancel()
        self._stop_probes()

    # ---- Life -----------------------------------------------------------------

    async def _live(self) -> None:
        pause = 0.5
        while True:
            try:
                await self._start()
                phase = await self._run()
            except (RuntimeFailure, AgentRefused, OSError) as error:
                self._running = False
                self.problem = str(error)
                self._status(phase="Pending", ready=False, reason="Error", message=self.problem)
                await self._clear()
                await asyncio.sleep(pause)
                pause = min(2 * pause, _RETRY_LONGEST)
                continue
            self._running = False
            self._status(phase=phase, ready=False)
            await self._clear()
            return

    async def _run(self) -> str:
        """From "go" to the phase in which all containers are over for good."""
        assert self.process
        phase = await self.process.wait_for("running", "succeeded", "failed")
        if phase == "running":
            self._running = True
            self.problem = ""
            self._refresh()
            for container in probed_container(self.pod):
                assert container.readiness_probe
                self._probes.append(
                    asyncio.create_task(self._probe(container, container.readiness_probe))
                )
            phase = await self.process.wait_for("succeeded", "failed")
        self._stop_probes()
        if phase == "ended":
            raise RuntimeFailure("the pod's first process died")
        return "Succeeded" if phase == "succeeded" else "Failed"

    async def _start(self) -> None:
        pod, state = self.pod, self._cluster.state
        async with self._slots:
            self.cgroup.mkdir(parents=True, exist_ok=True)
            spec = pod_spec(pod)
            if pod.spec.host_network:
                spec = dataclasses.replace(spec, netns=state.netns_path(self.node))
            self.process = await PodProcess.start(
                spec,
                cgroup=self.cgroup,
                hosts=state.hosts_file(pod.metadata.namespace),
                log=state.pod_log(*pod.key),
                on_status=self._on_status,
            )
        if pod.spec.host_network:
            ips = self._cluster.node_addresses(self.node)
        else:
            answer = await self._cluster.agent(
                self.node,
                "POST",
                "/v1/endpoints",
                {"uid": pod.metadata.uid, "netns": str(self.process.netns_path)},
            )
            ips = answer["ips"]
        self._status(ips=[ip.partition("/")[0] for ip in ips])
        await self._cluster.known_everywhere()
        await self.process.go()

    def _stop_probes(self) -> None:
        for task in self._probes:
            task.cancel()
        self._probes.clear()
        for name in self._probed:
            self._probed[name] = False

    async def _end(self) -> None:
        self._stop_probes()
        if self.process:
            grace = self.pod.spec.termination_grace_period_seconds
            await self.process.terminate(GRACE if grace is None else grace)
        await self._clear()

    async def _clear(self) -> None:
        """Removes the process, the network and the cgroup."""
        if self.process:
            await self.process.kill()
            self.process = None
        if not self.pod.spec.host_network:
            with contextlib.suppress(AgentRefused, OSError):
                await self._cluster.agent(
                    self.node, "DELETE", f"/v1/endpoints/{self.pod.metadata.uid}"
                )
        with contextlib.suppress(OSError):
            (self.cgroup / "cgroup.kill").write_text("1")
        for _ in range(50):
            try:
                self.cgroup.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:
                await asyncio.sleep(0.01)

    # ---- Status ---------------------------------------------------------------

    def _on_status(self, status: Status) -> None:
        if status.event == "started":
            self._up.add(status.container)
        elif status.event == "exited":
            self._up.discard(status.container)
            self._exits[status.container] = status.value
        else:
            return
        if self._running:
            self._refresh()

    def _refresh(self) -> None:
        names = {container.name for container in self.pod.spec.containers}
        ready = names <= self._up and all(self._probed.values())
        self._status(phase="Running", ready=ready)

    async def _probe(self, container: Container, probe: Probe) -> None:
        """Readiness of one container, by its thresholds."""
        await asyncio.sleep(probe.initial_delay_seconds)
        good = bad = 0
        netns = self._cluster.state.netns_path(self.node)
        while True:
            complaint = await readiness.check(self.pod, container, probe, netns)
            good, bad = (0, bad + 1) if complaint else (good + 1, 0)
            self._complaints[container.name] = complaint
            before = self._probed[container.name]
            if not before and good >= probe.success_threshold:
                self._probed[container.name] = True
            elif before and bad >= probe.failure_threshold:
                self._probed[container.name] = False
            if self._probed[container.name] != before:
                self._refresh()
            # Until it is ready for the first time a pod is asked more often: as the kubelet does
            # when a container has just started.
            period = max(1, probe.period_seconds)
            await asyncio.sleep(period if self._probed[container.name] else min(period, 0.5))

    def _status(
        self,
        *,
        phase: str | None = None,
        ready: bool | None = None,
        ips: list[str] | None = None,
        reason: str = "",
        message: str = "",
    ) -> None:
        before = self.pod.status
        addresses = self.pod.ips if ips is None else ips
        is_ready = self.pod.ready if ready is None else ready
        hosts = self._cluster.node_addresses(self.node)
        status = PodStatus(
            phase=phase or before.phase or "Pending",
            pod_ip=addresses[0] if addresses else "",
            pod_ips=[PodIP(ip=ip) for ip in addresses],
            host_ip=hosts[0] if hosts else "",
            conditions=[Condition(type="Ready", status="True" if is_ready else "False")],
            reason=reason,
            message=message,
        )
        if status != before:
            self._set(msgspec.structs.replace(self.pod, status=status))

    def _set(self, pod: Pod) -> None:
        self.pod = pod
        self._cluster.changed(self)


def _ending(container: Container, code: int) -> str:
    command = container.command[0] if container.command else ""
    if code == 127 and command:
        return f"command {command} was not found"
    if code == 126 and command:
        return f"command {command} cannot be run"
    return f"it ended by signal {code - 128}" if code > 128 else f"it ended with exit code {code}"

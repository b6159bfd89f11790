"""Pods as processes: start, wire, release, probe, enter, end them.

The work is done by `lockgate-pod` (runtime/pod.c describes its protocol). A pod
starts in two steps, so that its network and its policy are in force before
anything of it runs::

    pod = await PodProcess.start(spec, cgroup=…, hosts=…, log=…)
    ...                                  # wire pod.netns_path
    await pod.go()
    ...
    await pod.terminate(grace=5)
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from lockgate.objects import model
from lockgate.paths import pod_binary

__all__ = [
    "Container",
    "PodProcess",
    "PodSpec",
    "ProbeResult",
    "RuntimeFailure",
    "Status",
    "Target",
    "binary",
    "exec_command",
    "pod_spec",
    "probe",
    "probe_each",
]

RestartPolicy = Literal["Always", "OnFailure", "Never"]
Result = Literal["ok", "refused", "timeout", "unreachable", "error"]

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class RuntimeFailure(Exception):
    """A pod, or a prober, could not be started; the message says why."""


def binary() -> Path:
    """Where `lockgate-pod` is: $LOCKGATE_POD, or what was built with this package."""
    chosen = os.environ.get("LOCKGATE_POD")
    return Path(chosen) if chosen else pod_binary()


@dataclass(frozen=True)
class Container:
    """Without a command, the container answers on its ports with the pod's name.

    `command` runs on the host's file system; `environment` is the whole of it.
    `ports` are ("tcp" | "udp", number) pairs.
    """

    name: str
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str = ""
    ports: Sequence[tuple[str, int]] = ()
    log: Path | None = None

    def _records(self, kind: str) -> list[str]:
        records = [f"{kind} {self.name}"]
        records += [f"arg {word}" for word in self.command]
        records += [f"env {key}={value}" for key, value in self.environment.items()]
        records += [f"{protocol} {number}" for protocol, number in self.ports]
        if self.directory:
            records.append(f"cwd {self.directory}")
        if self.log:
            records.append(f"log {self.log}")
        return records


@dataclass(frozen=True)
class PodSpec:
    """What `lockgate-pod run` is told. Times are in seconds."""

    name: str
    containers: Sequence[Container]
    init_containers: Sequence[Container] = ()
    hostname: str = ""
    restart_policy: RestartPolicy = "Always"
    grace: float = 30.0
    #: Wait before the first restart of a container; doubles up to five minutes.
    backoff: float = 1.0
    #: Path of a network namespace to use, instead of a new one (hostNetwork).
    netns: Path | None = None

    def encode(self, cgroup: Path | None, hosts: Path | None, log: Path | None) -> bytes:
        """The description as runtime/pod.c reads it."""
        records = [
            f"name {self.name}",
            f"hostname {self.hostname or self.name}",
            f"restart {self.restart_policy}",
            f"grace {round(self.grace * 1000)}",
            f"backoff {round(self.backoff * 1000)}",
        ]
        for key, path in (
            ("cgroup", cgroup),
            ("hosts", hosts),
            ("log", log),
            ("netns", self.netns),
        ):
            if path is not None:
                records.append(f"{key} {path}")
        for container in self.init_containers:
            records += container._records("init")
        for container in self.containers:
            records += container._records("container")
        for record in records:
            if "\0" in record:
                raise RuntimeFailure(f"pod {self.name}: a zero byte in {record!r}")
        return "\0".join(records).encode() + b"\0\0"


def pod_spec(pod: model.Pod, *, environment: Mapping[str, str] | None = None) -> PodSpec:
    """The process form of a Pod object.

    `environment` is added below each container's own `env`, after PATH, HOME and
    HOSTNAME. SCTP ports have no server here. As in Kubernetes, `args` follow
    `command`; without a command there is no image whose entry point they could
    be for, so they are ignored.
    """
    name = pod.metadata.name
    hostname = pod.spec.hostname or _hostname(name)
    base = {"PATH": DEFAULT_PATH, "HOME": "/", "HOSTNAME": hostname, **(environment or {})}

    def container(given: model.Container) -> Container:
        return Container(
            name=given.name,
            command=[*given.command, *given.args] if given.command else [],
            environment={**base, **{one.name: one.value for one in given.env}},
            directory=given.working_dir,
            ports=[
                (port.protocol.lower(), port.container_port)
                for port in given.ports
                if port.protocol in ("TCP", "UDP")
            ],
        )

    policy: RestartPolicy = "Always"
    if pod.spec.restart_policy == "OnFailure":
        policy = "OnFailure"
    elif pod.spec.restart_policy == "Never":
        policy = "Never"
    return PodSpec(
        name=name,
        hostname=hostname,
        containers=[container(given) for given in pod.spec.containers],
        init_containers=[container(given) for given in pod.spec.init_containers],
        restart_policy=policy,
    )


def _hostname(name: str) -> str:
    """A pod's name as far as a host may be called so (as the kubelet's truncatePodHostname)."""
    return name[:63].rstrip("-.")


@dataclass(frozen=True)
class Status:
    """One line that the pod reported.

    event      container  value
    started    name       0
    exited     name       exit code (128 + signal)
    backoff    name       milliseconds until the restart
    running, succeeded, failed: "", 0: the pod as a whole
    ended      ""         exit code of the runtime: the pod is no more
    """

    event: str
    container: str = ""
    value: int = 0


class PodProcess:
    """A running pod. Made by `start`; `pid` is its first process, seen from here."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        pid: int,
        on_status: Callable[[Status], None] | None,
    ) -> None:
        self._process = process
        self._on_status = on_status
        self.pid = pid
        #: "pending", then "running", "succeeded" or "failed" as the pod reported.
        self.phase = "pending"
        self.restarts: dict[str, int] = {}
        self._changed = asyncio.Condition()
        self._ended = asyncio.create_task(self._follow())

    @classmethod
    async def start(
        cls,
        spec: PodSpec,
        *,
        cgroup: Path | None = None,
        hosts: Path | None = None,
        log: Path | None = None,
        on_status: Callable[[Status], None] | None = None,
    ) -> PodProcess:
        """Makes the pod's namespaces and returns when they are there.

        `cgroup` is an existing cgroup v2 directory. `hosts` is bound over
        /etc/hosts: change it in place, a file renamed over it is not seen.
        `log` takes what the containers write. `on_status` is called in this
        event loop. Raises RuntimeFailure; nothing is left behind then.
        """
        description = spec.encode(cgroup, hosts, log)
        try:
            process = await asyncio.create_subprocess_exec(
                binary(),
                "run",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise RuntimeFailure(f"pod {spec.name}: cannot run lockgate-pod: {error}") from error
        assert process.stdin and process.stdout
        try:
            process.stdin.write(description)
            line = (await process.stdout.readline()).decode(errors="replace").strip()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        word, _, rest = line.partition(" ")
        if word != "ready":
            await process.wait()
            raise RuntimeFailure(f"pod {spec.name}: {rest or line or 'the runtime died'}")
        return cls(process, int(rest), on_status)

    @property
    def netns_path(self) -> Path:
        return Path(f"/proc/{self.pid}/ns/net")

    async def go(self) -> None:
        """Lets the init containers, then the containers, run."""
        await self._command("go")

    async def wait_for(self, *phases: str) -> str:
        """Waits until the phase is one of `phases`, or "ended"; says which."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.phase in (*phases, "ended"))
            return self.phase

    async def wait(self) -> int:
        """Waits until the pod is no more; the exit code of its runtime."""
        return await asyncio.shield(self._ended)

    async def terminate(self, grace: float | None = None) -> int:
        """SIGTERM to the containers, SIGKILL after `grace` seconds; waits for the end.

        None means the grace of the PodSpec. Right again after the pod has ended.
        """
        if grace is None:
            if self._process.returncode is None:
                self._process.terminate()
        else:
            await self._command(f"stop {round(grace * 1000)}")
        return await self.wait()

    async def kill(self) -> int:
        """Ends the pod at once."""
        if self._process.returncode is None:
            self._process.kill()
        return await self.wait()

    async def _command(self, line: str) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{line}\n".encode())
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended; wait() tells how

    async def _follow(self) -> int:
        assert self._process.stdout and self._process.stdin
        while line := await self._process.stdout.readline():
            event, *words = line.decode(errors="replace").split()
            if event == "error":
                continue  # the pod ends with it, and tells so by its exit code
            container = words[0] if words else ""
            value = int(words[1]) if len(words) > 1 else 0
            await self._report(Status(event, container, value))
        code = await self._process.wait()
        self._process.stdin.close()
        await self._report(Status("ended", value=code))
        return code

    async def _report(self, status: Status) -> None:
        if status.event == "backoff":
            self.restarts[status.container] = self.restarts.get(status.container, 0) + 1
        if not status.container:
            async with self._changed:
                self.phase = status.event
                self._changed.notify_all()
        if self._on_status:
            self._on_status(status)


@dataclass(frozen=True)
class Target:
    """What to try: protocol "tcp" or "udp", a numeric address, a port."""

    protocol: str
    address: str
    port: int
    timeout: float = 1.0


@dataclass(frozen=True)
class ProbeResult:
    """`detail`: the first line of the answer when ok (a pod's own server answers
    with its name), the errno's name on "error", "connected" on the "timeout" of a TCP
    server that accepted and then said nothing. `port`: the source port, 0 if it took none."""

    result: Result
    detail: str = ""
    port: int = field(default=0, compare=False)


_RESULTS: dict[str, Result] = {
    "ok": "ok",
    "refused": "refused",
    "timeout": "timeout",
    "unreachable": "unreachable",
    "error": "error",
}


async def probe_each(
    targets: Iterable[Target],
    *,
    netns: Path | None = None,
    cgroup: Path | None = None,
    concurrency: int = 512,
) -> AsyncIterator[tuple[int, ProbeResult]]:
    """Tries all targets at once; yields (index of the target, result) as they come."""
    command = [str(binary()), "probe", "--concurrency", str(concurrency)]
    if netns:
        command += ["--netns", str(netns)]
    if cgroup:
        command += ["--cgroup", str(cgroup)]
    questions = "".join(
        f"{index} {one.protocol} {one.address} {one.port} {round(one.timeout * 1000)}\n"
        for index, one in enumerate(targets)
    )
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    try:
        try:
            process.stdin.write(questions.encode())
            await process.stdin.drain()
            process.stdin.close()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it says why on stderr
        while line := await process.stdout.readline():
            index, port, result, *detail = line.decode(errors="replace").rstrip("\n").split(" ", 3)
            found = ProbeResult(_RESULTS[result], detail[0] if detail else "", int(port))
            yield int(index), found
        complaint = (await process.stderr.read()).decode(errors="replace").strip()
        if await process.wait():
            raise RuntimeFailure(f"probe: {complaint.removeprefix('error ')}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def probe(
    targets: Sequence[Target],
    *,
    netns: Path | None = None,
    cgroup: Path | None = None,
    concurrency: int = 512,
) -> list[ProbeResult]:
    """As `probe_each`, all results in the order of the targets."""
    results: list[ProbeResult] = [ProbeResult("error", "NOANSWER")] * len(targets)
    async for index, result in probe_each(
        targets, netns=netns, cgroup=cgroup, concurrency=concurrency
    ):
        results[index] = result
    return results


async def exec_command(
    pid: int,
    cgroup: Path | None,
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> asyncio.subprocess.Process:
    """Runs a command in a pod's namespaces and cgroup; the process, to be waited for.

    The standard streams are the caller's unless given. Exit codes are the
    command's; 127 when it was not found, 126 when it could not be run.
    """
    command = [str(binary()), "exec", "--pid", str(pid)]
    if cgroup:
        command += ["--cgroup", str(cgroup)]
    return await asyncio.create_subprocess_exec(
        *command, "--", *argv, stdin=stdin, stdout=stdout, stderr=stderr, env=environment
    )

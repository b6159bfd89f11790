"""Who may talk to whom on a real cluster: tried from every pod, and by the specification over the
API server's own objects. Nothing of an agent takes part in either."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster import Cluster, processes
from lockgate.explain.names import Names
from lockgate.explain.question import Question
from lockgate.explain.spec import SpecEngine
from lockgate.kube.kinds import KINDS
from lockgate.objects import model
from lockgate.standalone.runtime import ProbeResult, Target, probe

__all__ = ["Check", "differences", "objects", "place_of", "plan", "try_all"]

_SERVED = ("TCP", "UDP")
_AT_ONCE = 4
_STRUCTS = {kind.name: getattr(model, kind.name) for kind in KINDS}


def objects(cluster: Cluster) -> model.Cluster:
    """All objects, decoded as a folder's are."""
    found = model.Cluster()
    for kind in KINDS:
        listed = json.loads(cluster.kubectl("get", "--raw", kind.path))["items"]
        table = getattr(found, kind.table)
        for item in listed:
            one = msgspec.convert(item, _STRUCTS[kind.name])
            table[kind.key(one.metadata.namespace, one.metadata.name)] = one
    return found


@dataclass(slots=True)
class Check:
    """One connection. `allowed`: pods that may answer; empty if every one is denied. `denied`:
    whether one of the backends is. `named`: what answers there says its pod's name."""

    source: model.Pod
    title: str
    address: str
    port: int
    protocol: str
    allowed: set[str]
    denied: bool
    named: bool
    result: ProbeResult | None = None

    @property
    def difference(self) -> str:
        """What is not as the specification says, or ""."""
        assert self.result is not None
        kind, detail = self.result.result, self.result.detail
        if kind == "timeout" and detail != "connected":
            good = self.denied
        elif kind == "ok" and self.named:
            good = detail in self.allowed
        else:
            # Refused by the pod, or not understood: the packets went there and back.
            good = bool(self.allowed)
        if good:
            return ""
        wanted = f"an answer of {' or '.join(sorted(self.allowed))}" if self.allowed else "nothing"
        return (
            f"{'/'.join(self.source.key)} → {self.title} ({self.address}): expected {wanted},"
            f" measured {kind} {detail}"
        )


def plan(cluster: model.Cluster) -> list[Check]:
    """Every pod to every port of every pod and service, over each family that both have."""
    spec = SpecEngine(cluster)
    pods = [
        pod
        for _, pod in sorted(cluster.pods.items())
        if pod.ips and not pod.finished and not pod.spec.host_network
    ]
    targets = [
        (
            f"{'/'.join(pod.key)}:{port.container_port}/{port.protocol}",
            ip,
            port.container_port,
            port,
        )
        for pod in pods
        for container in pod.spec.containers
        for port in container.ports
        if port.protocol in _SERVED
        for ip in pod.ips
    ]
    targets += [
        (f"svc/{'/'.join(key)}:{port.port}/{port.protocol}", ip, port.port, port)
        for key, service in sorted(cluster.services.items())
        for port in service.spec.ports
        if port.protocol in _SERVED
        for ip in service.cluster_ips
    ]
    return [
        _check(spec, spec.names, source, title, Question(own, address, number, port.protocol))
        for source in pods
        for title, address, number, port in targets
        for own in source.ips
        if (":" in own) == (":" in address)
    ]


def _check(
    spec: SpecEngine, names: Names, source: model.Pod, title: str, question: Question
) -> Check:
    attempts = names.attempts(question)
    verdicts = [answer.verdict for answer in spec.judge([(question, one) for one in attempts])]
    ends = [one.destination.pod if one.destination is not None else None for one in attempts]
    return Check(
        source,
        title,
        question.target,
        question.port or 0,
        question.protocol,
        {
            pod.metadata.name if pod is not None else "?"
            for pod, verdict in zip(ends, verdicts, strict=True)
            if verdict == "allow"
        },
        "deny" in verdicts,
        all(pod is not None and pod.spec.containers[0].args[:1] == ["answer"] for pod in ends),
    )


def place_of(cluster: Cluster, pod: model.Pod) -> tuple[Path, Path]:
    """The network namespace of a running pod, and the cgroup of one of its containers."""
    below = cluster.state.cgroup(pod.spec.node_name) / "kubepods"
    for folder in below.rglob(f"pod{pod.metadata.uid}/*"):
        for pid in processes.pids(folder):
            return Path(f"/proc/{pid}/ns/net"), folder
    raise AssertionError(f"{'/'.join(pod.key)} has no process on {pod.spec.node_name}")


def try_all(cluster: Cluster, checks: list[Check], timeout: float = 1.0) -> None:
    """Fill in the results, by real connections out of the pods' namespaces and cgroups."""

    async def everyone() -> None:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(mine: list[Check]) -> None:
            async with gate:
                netns, cgroup = await asyncio.to_thread(place_of, cluster, mine[0].source)
                targets = [Target(c.protocol.lower(), c.address, c.port, timeout) for c in mine]
                results = await probe(targets, netns=netns, cgroup=cgroup, concurrency=128)
                for check, result in zip(mine, results, strict=True):
                    check.result = result

        by_source: dict[tuple[str, str], list[Check]] = {}
        for check in checks:
            by_source.setdefault(check.source.key, []).append(check)
        await asyncio.gather(*(one(mine) for mine in by_source.values()))

    asyncio.run(everyone())


def differences(cluster: Cluster, checks: list[Check]) -> list[str]:
    """What is not as the specification says. What differed is tried once more, with patience: on
    a busy machine a connection may take its time."""
    try_all(cluster, checks)
    again = [check for check in checks if check.difference]
    if again:
        try_all(cluster, again, 5.0)
    return [check.difference for check in again if check.difference]

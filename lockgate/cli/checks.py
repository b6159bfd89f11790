"""What `lockgate probe` tries: connections, what the policies say of each, and what happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lockgate.access import Result
from lockgate.cli.verdicts import Attempted, Recording
from lockgate.explain.names import Names
from lockgate.explain.question import Answer, Family, Question
from lockgate.explain.spec import SpecEngine
from lockgate.objects.address import format_address, parse_address
from lockgate.objects.model import Cluster, Pod

__all__ = ["Check", "Summary", "check_of", "plan", "workload"]


@dataclass(slots=True)
class Check:
    """One connection: what the policies say, and what happened."""

    source: Pod
    target: str  # ns/pod or svc/ns/name
    column: str  # what the matrix calls it
    address: str
    port: int
    protocol: str
    expected: str  # allow, deny; either: backends differ
    answers: list[Answer]  # of the specification, one per backend
    backends: dict[str, str]  # answer of a backend → its verdict
    certain: bool  # something answers there, so silence means denied
    named: bool  # and answers with its pod's name
    source_ip: str
    ends: frozenset[tuple[str, int]]  # the address and port, and those of the backends
    result: Result | None = None
    recording: Recording | None = None  # of the time when it was tried, for a timeout

    @property
    def measured(self) -> str:
        """allow, deny, or unknown where nobody would have answered anyway."""
        if self.result is None:
            return "unknown"
        if self.result.result == "ok" or (self._shows_a_way and not self.refusal):
            return "allow"
        if (
            self.result.result == "timeout"
            and not self.certain
            and self.expected != "deny"
            and self.denial is None
        ):
            return "unknown"
        return "deny"

    @property
    def _attempted(self) -> Attempted:
        assert self.result
        return Attempted(self.protocol, self.source_ip, self.result.port, self.ends)

    @property
    def denial(self) -> str | None:
        """Who denied it, by the nodes' records."""
        return self.recording.denial(self._attempted) if self.recording else None

    @property
    def _by_the_records(self) -> str:
        """What the nodes' records say of a silence that should have been an answer."""
        if self.recording is None:
            return ""
        if self.denial is not None:
            return f": {self.denial}"
        nodes = self.recording.allowing(self._attempted)
        if nodes:
            return f": allowed on {' and '.join(nodes)}, but the server did not answer"
        return ": no node denied it" if self.recording.complete else ""

    @property
    def _shows_a_way(self) -> bool:
        """Whether it did not work, but the packets went there and back."""
        assert self.result
        return self.result.result in ("refused", "error") or self.result.detail == "connected"

    @property
    def unanswered(self) -> str | None:
        """What is odd although the policies are in force: a server that does not serve."""
        if self.result is None or self.measured != "allow" or self.result.result == "ok":
            return None
        return f"allowed, but nothing answered ({self._what})" if self.certain else None

    @property
    def _what(self) -> str:
        assert self.result
        return f"{self.result.result} {self.result.detail}".rstrip()

    @property
    def refusal(self) -> bool:
        """The service itself refuses: no backend, or no such port."""
        return any(answer.cause for answer in self.answers)

    @property
    def difference(self) -> str | None:
        """What is not as the specification says, or None."""
        result, measured = self.result, self.measured
        if result is None:
            return "was not tried"
        if measured == "unknown":
            return None
        if self.expected != "either" and measured != self.expected:
            told = f"expected {self.expected}, measured {measured} ({self._what})"
            return told + self._by_the_records
        if (
            self.expected == "deny"
            and self.recording is not None
            and self.recording.complete
            and self.denial is None
        ):
            nodes = self.recording.allowing(self._attempted)
            passed = f"; allowed on {' and '.join(nodes)}" if nodes else ""
            return f"expected deny: no answer, but nobody denied it{passed}"
        if result.result == "ok" and self.named and self.backends.get(result.detail) != "allow":
            return f"answered by {result.detail!r}, expected {_any(self.backends)}"
        return None

    def json(self) -> dict[str, Any]:
        answer = next((a for a in self.answers if a.verdict == "deny"), self.answers[0]).json()
        return {
            "from": "/".join(self.source.key),
            "to": self.target,
            "address": self.address,
            "port": self.port,
            "protocol": self.protocol,
            "family": "IPv6" if ":" in self.address else "IPv4",
            "expected": self.expected,
            "measured": self.measured,
            "result": self.result.result if self.result else None,
            "answer": self.result.detail if self.result else None,
            "denial": self.denial,
            "direction": answer["direction"],
            "policy": answer["policy"],
            "rule": answer["rule"],
            "difference": self.difference,
            "unanswered": self.unanswered,
        }


@dataclass(slots=True)
class Summary:
    """All checks of one run."""

    checks: list[Check] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def differences(self) -> list[Check]:
        return [check for check in self.checks if check.difference is not None]

    @property
    def good(self) -> bool:
        return not self.differences and not self.complaints


def workload(pod: Pod) -> str:
    """NAMESPACE/NAME of what made the pod, or its own."""
    owner = next((o for o in pod.metadata.owner_references if o.controller), None)
    owner = owner or next(iter(pod.metadata.owner_references), None)
    return f"{pod.metadata.namespace}/{owner.name if owner else pod.metadata.name}"


# ---- What to try -----------------------------------------------------------------


def plan(
    cluster: Cluster, namespace: str | None, family: Family | None, standalone: bool
) -> list[Check]:
    """Every pair that has to do with the namespace."""
    pods = [
        pod
        for _, pod in sorted(cluster.pods.items())
        if not pod.finished
        and not pod.spec.host_network
        and pod.ips
        and pod.status.phase == "Running"
    ]
    spec = SpecEngine(cluster)
    names = spec.names
    targets: list[tuple[str, str, str, str, int, str]] = []
    for pod in pods:
        name = "/".join(pod.key)
        for container in pod.spec.containers:
            for port in container.ports:
                if port.protocol in ("TCP", "UDP"):
                    column = f"{workload(pod)}:{port.container_port}/{port.protocol}"
                    targets += [
                        (
                            name,
                            pod.metadata.namespace,
                            column,
                            ip,
                            port.container_port,
                            port.protocol,
                        )
                        for ip in pod.ips
                    ]
    for (space, name), service in sorted(cluster.services.items()):
        for one in service.spec.ports:
            if one.protocol in ("TCP", "UDP"):
                label = f"svc/{space}/{name}"
                targets += [
                    (label, space, f"{label}:{one.port}/{one.protocol}", ip, one.port, one.protocol)
                    for ip in service.cluster_ips
                ]
    checks = []
    for source in pods:
        sources = {":" in ip: ip for ip in reversed(source.ips)}
        for target, space, column, address, number, protocol in targets:
            six = ":" in address
            if six not in sources or (family is not None and six != (family == 6)):
                continue
            if namespace and namespace not in (source.metadata.namespace, space):
                continue
            question = Question(sources[six], address, number, protocol)
            checks.append(check_of(spec, names, source, target, column, question, standalone))
    return checks


def check_of(
    spec: SpecEngine,
    names: Names,
    source: Pod,
    target: str,
    column: str,
    question: Question,
    standalone: bool,
) -> Check:
    attempts = names.attempts(question)
    answers = spec.judge([(question, attempt) for attempt in attempts])
    verdicts = {answer.verdict for answer in answers}
    ends = [attempt.destination for attempt in attempts]
    pods = [end.pod if end is not None else None for end in ends]
    named = standalone and all(
        pod is not None and _answers(pod, attempt.port, attempt.protocol)
        for pod, attempt in zip(pods, attempts, strict=True)
    )
    return Check(
        source,
        target,
        column,
        question.target,
        question.port or 0,
        question.protocol,
        verdicts.pop() if len(verdicts) == 1 else "either",
        answers,
        {
            pod.metadata.name: answer.verdict
            for pod, answer in zip(pods, answers, strict=True)
            if pod is not None
        },
        # A real pod's kernel accepts or refuses every TCP connection; nothing is known of UDP.
        named or (not standalone and question.protocol == "TCP" and all(pods)),
        named,
        format_address(parse_address(question.source)),
        frozenset(
            {
                (end.ip, attempt.port or 0)
                for end, attempt in zip(ends, attempts, strict=True)
                if end
            }
            | {(format_address(parse_address(question.target)), question.port or 0)}
        ),
    )


def _answers(pod: Pod, port: int | None, protocol: str) -> bool:
    """Whether a container without a command answers there, with the pod's name."""
    return any(
        (one.container_port, one.protocol) == (port, protocol)
        for container in pod.spec.containers
        if not container.command
        for one in container.ports
    )


def _any(backends: dict[str, str]) -> str:
    names = [name for name, verdict in backends.items() if verdict == "allow"]
    return " or ".join(names) or "nobody"

"""`lockgate probe`: every pod tries every port, with real connections; compared with the spec."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import click

from lockgate.access import Access, Place, Result, Target
from lockgate.cli.common import (
    Refused,
    access_options,
    fail,
    json_option,
    load_objects,
    print_json,
)
from lockgate.cli.render import WIDTH, columns, heading, paint
from lockgate.cli.verdicts import Attempted, Recorder, Recording
from lockgate.explain.names import Names
from lockgate.explain.question import Answer, Family, Question, QuestionError
from lockgate.explain.spec import SpecEngine
from lockgate.objects.address import format_address, parse_address
from lockgate.objects.model import Cluster, Pod

__all__ = ["Check", "Summary", "differences_text", "matrix", "measure", "probe", "workload"]

_AT_ONCE = 6  # pods that probe at the same time
_SHOWN = 10  # unanswered connections that are listed
_RETRY = 3  # times the timeout, for what differed


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


def _plan(
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
            checks.append(_check(spec, names, source, target, column, question, standalone))
    return checks


def _check(
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


# ---- Trying it -------------------------------------------------------------------


def _try(
    access: Access,
    checks: Sequence[Check],
    timeout: float,
    advance: Callable[[int], None],
) -> list[str]:
    """Fills in the results, and for silences the nodes' records of that time; sentences about
    pods that could not try."""
    recorder = Recorder(access)
    complaints = _connect(access, checks, timeout, advance)
    silent = [c for c in checks if c.result and c.result.result == "timeout" and c.result.port]
    if silent:
        recording = recorder.recording()
        for check in silent:
            check.recording = recording
    return complaints


def _connect(
    access: Access,
    checks: Sequence[Check],
    timeout: float,
    advance: Callable[[int], None],
) -> list[str]:
    by_source: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        by_source.setdefault(check.source.key, []).append(check)

    def one(mine: list[Check]) -> str | None:
        source = mine[0].source
        place = Place(source.spec.node_name, source)
        targets = [Target(c.protocol.lower(), c.address, c.port, timeout) for c in mine]
        try:
            for index, result in access.probe(place, targets):
                mine[index].result = result
                advance(1)
        except (OSError, Refused) as error:
            return f"pod {'/'.join(source.key)} could not try: {error}"
        return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [text for text in pool.map(one, by_source.values()) if text]


def measure(
    access: Access,
    cluster: Cluster,
    *,
    namespace: str | None = None,
    timeout: float = 1.0,
    family: Family | None = None,
    progress: bool = True,
) -> Summary:
    """Tries everything. What differed is tried once more, with patience: on a busy machine a
    connection may take its time, and the cluster may have changed meanwhile."""
    checks = _plan(cluster, namespace, family, access.standalone)
    summary = Summary(checks)
    bar: Any = nullcontext(None)
    if progress and sys.stderr.isatty():
        bar = click.progressbar(length=len(checks), label="Probing", file=sys.stderr)
    with bar as shown:

        def advance(count: int) -> None:
            if shown is not None:
                shown.update(count)

        summary.complaints = _try(access, checks, timeout, advance)
    again = [check for check in checks if check.difference or check.unanswered]
    if again:
        fresh = load_objects(access)
        spec = SpecEngine(fresh)
        kept = {id(check) for check in again}
        once_more = []
        for check in again:
            source = fresh.pods.get(check.source.key)
            owner = spec.names.pods.get(parse_address(check.address))
            gone = not check.target.startswith("svc/") and (
                owner is None or "/".join(owner.key) != check.target
            )
            if source is None or source.finished or gone:
                continue  # it went while we looked
            six = ":" in check.address
            ip = next((ip for ip in source.ips if (":" in ip) == six), "")
            question = Question(ip, check.address, check.port, check.protocol)
            try:
                once_more.append(
                    _check(
                        spec,
                        spec.names,
                        source,
                        check.target,
                        check.column,
                        question,
                        access.standalone,
                    )
                )
            except QuestionError:
                continue
        summary.complaints += _try(access, once_more, timeout * _RETRY, lambda _: None)
        summary.checks = [c for c in checks if id(c) not in kept] + once_more
    return summary


# ---- Showing it ------------------------------------------------------------------


def matrix(summary: Summary) -> str:
    """Rows are workloads that ask, columns are workloads (or services) and their ports. Fits
    WIDTH columns: what does not fit beside comes below."""
    rows: dict[str, dict[str, list[Check]]] = {}
    heads: dict[str, int] = {}
    for check in summary.checks:
        name = workload(check.source)
        rows.setdefault(name, {}).setdefault(check.column, []).append(check)
        heads.setdefault(check.column, len(heads) + 1)
    if not rows:
        return "no pair of pods to try"
    legend = [f"{number:>2} {column}" for column, number in heads.items()]
    side = min(34, max(map(len, rows)))
    across = (WIDTH - side - 2) // 3
    ordered = list(heads)
    lines = [columns(legend, indent=0), ""]
    for start in range(0, len(ordered), across):
        block = ordered[start : start + across]
        lines.append(" " * side + "  " + "".join(f"{heads[c]:>3}" for c in block))
        for name, cells in sorted(rows.items()):
            label = name if len(name) <= side else name[: side - 1] + "…"
            marks = "".join("  " + _mark(cells.get(column, [])) for column in block)
            lines.append(f"{label:<{side}}  {marks}")
        lines.append("")
    lines.append(
        "● allowed   · denied   ◐ some of each   ? nobody to answer   ○ no answer   ✗ differs"
    )
    return "\n".join(lines)


def _mark(checks: list[Check]) -> str:
    if not checks:
        return " "
    if any(check.difference for check in checks):
        return paint("✗", "red", bold=True)
    if any(check.unanswered for check in checks):
        return paint("○", "yellow")
    # A pod always reaches itself; that hides what is asked when there are others.
    others = [check for check in checks if "/".join(check.source.key) != check.target]
    measured = {check.measured for check in others or checks} - {"unknown"}
    if measured == {"allow"}:
        return paint("●", "green")
    if measured == {"deny"}:
        return paint("·", "red")
    return paint("◐", "yellow") if measured else "?"


def _told(check: Check, what: str | None) -> str:
    return (
        f"  {'/'.join(check.source.key)} → {check.target} ({check.address}) "
        f"port {check.port}/{check.protocol}:\n"
        + textwrap.fill(what or "", WIDTH, initial_indent="    ", subsequent_indent="    ")
    )


def differences_text(summary: Summary) -> str:
    """A line for the whole, and one for each difference."""
    checks = summary.checks
    allowed = sum(check.measured == "allow" for check in checks)
    unknown = sum(check.measured == "unknown" for check in checks)
    lines = [
        f"{len(checks)} connections tried: {allowed} allowed, "
        f"{len(checks) - allowed - unknown} denied"
        + (f", {unknown} that nobody would answer" if unknown else "")
    ]
    found = summary.differences
    if found:
        lines.append(heading(f"{len(found)} differ from the specification:"))
        lines += [_told(check, check.difference) for check in found]
    elif not summary.complaints:
        lines.append("Every one is as the specification says.")
    silent = [check for check in checks if check.unanswered]
    if silent:
        lines.append(heading(f"{len(silent)} were allowed, but the server did not answer:"))
        lines += [_told(check, check.unanswered) for check in silent[:_SHOWN]]
        if len(silent) > _SHOWN:
            lines.append(f"  … and {len(silent) - _SHOWN} more (--json has all)")
    lines += [f"  {complaint}" for complaint in summary.complaints]
    return "\n".join(lines)


@click.command()
@click.option("-n", "--namespace", help="Only pairs with an end in this namespace.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.05, 60),
    default=1.0,
    show_default=True,
    help="Seconds until silence means denied.",
)
@click.option("--family", type=click.Choice(["4", "6"]), help="Only this address family.")
@json_option
@access_options
def probe(
    namespace: str | None, timeout: float, family: str | None, as_json: bool, access: Access
) -> None:
    """Try every pair of pods and every port with real connections.

    Each pod connects to each declared port (TCP and UDP) of each pod and service, from inside
    its own network. What happens is compared with what the policies mean. On a real cluster the
    agents open the sockets, and nothing is said on the connections.

    A server that is allowed to be reached, accepts and does not answer is shown, but is no
    difference. Of a silence the nodes' records say who denied it: where nobody did, a connection
    that should have been denied differs, too.

    Exit codes: 0 all as specified, 1 something differs, 2 no such cluster.
    """
    known = load_objects(access)
    if namespace and not any(key[0] == namespace for key in known.pods):
        fail(f"no pods in namespace {namespace}")
    wanted: Family | None = None if family is None else 4 if family == "4" else 6
    summary = measure(
        access, known, namespace=namespace, timeout=timeout, family=wanted, progress=not as_json
    )
    if as_json:
        print_json([check.json() for check in summary.checks])
        for complaint in summary.complaints:
            click.echo(f"lockgate: {complaint}", err=True)
    else:
        click.echo(matrix(summary))
        click.echo("")
        click.echo(differences_text(summary))
    raise SystemExit(0 if summary.good else 1)

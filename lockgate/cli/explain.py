"""`lockgate explain`: what would happen, by the kernel's programs or by the specification."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click
import msgspec
import yaml

from lockgate.access import Access
from lockgate.cli.common import (
    access_options,
    fail,
    forwarding_of,
    json_option,
    load_objects,
    print_json,
)
from lockgate.cli.render import heading, paint, policies_text
from lockgate.explain.engine import Engine
from lockgate.explain.engine import explain as answer_all
from lockgate.explain.frontends import with_forwarding
from lockgate.explain.question import (
    Answer,
    Direction,
    Family,
    Question,
    QuestionError,
    Side,
    parse_port,
    parse_question,
)
from lockgate.explain.spec import SpecEngine
from lockgate.objects.model import Cluster, Pod

if TYPE_CHECKING:
    from lockgate.bpf.btf import Schema
    from lockgate.explain.kernel import NodeKernel

__all__ = ["REFUSALS", "explain", "kernel_of", "open_engine"]

_CHUNK = 10_000
#: What causes of drops mean to who asks.
REFUSALS = {
    "no-backend": "the service has no ready backend: the connection is refused",
    "no-local-backend": "no backend of the service is on that node, and its policy is Local",
    "source-range": "the client is not in the service's loadBalancerSourceRanges",
    "unknown-service-port": "the service has no such port: the connection is refused",
    "sctp-port-rewrite": "the service changes the port, which SCTP does not survive",
    "spoofed-source": "nobody can have that source there",
    "no-route": "there is no way to the destination",
}


def open_engine(access: Access, cluster: Cluster, kind: str) -> Engine:
    """The engine `kernel` or `spec`."""
    cluster = with_forwarding(cluster, forwarding_of(access, cluster) or "")
    if kind == "spec":
        return SpecEngine(cluster)
    from lockgate.bpf.btf import Schema
    from lockgate.explain.kernel import KernelEngine
    from lockgate.paths import bpf_object

    schema = Schema.from_object(bpf_object())
    return KernelEngine(cluster, lambda node: kernel_of(access, node, schema), schema)


def kernel_of(access: Access, node: str, schema: Schema) -> NodeKernel:
    """The kernel of one node: by its pins where it is on this machine, else by its agent."""
    from lockgate.access.standalone import StandaloneAccess

    if isinstance(access, StandaloneAccess):
        from lockgate.bpf.pins import node_folder
        from lockgate.explain.pinned import NodePlace, PinnedNode
        from lockgate.standalone.state import bpffs

        state = access.state
        place = NodePlace(
            pins=node_folder(bpffs(), state.cluster, node),
            netns=state.netns_path(node),
            journal=state.node(node) / "journal.jsonl",
        )
        return PinnedNode(node, place, schema)
    from lockgate.explain.asked import AskedNode

    return AskedNode(access, node)


@click.command()
@click.argument("source", metavar="FROM", required=False)
@click.argument("target", metavar="TO", required=False)
@click.argument("port", metavar="PORT[/PROTO]", required=False)
@click.option(
    "--engine",
    type=click.Choice(["kernel", "spec"]),
    default="kernel",
    show_default=True,
    help="Test runs of the live programs, or the specification.",
)
@click.option(
    "--batch",
    metavar="FILE.jsonl|-",
    help='Questions, one {"from","to","port","protocol"} a line; an answer a line.',
)
@click.option("--family", type=click.Choice(["4", "6"]), help="Where both ends have both.")
@json_option
@access_options
def explain(
    source: str | None,
    target: str | None,
    port: str | None,
    engine: str,
    batch: str | None,
    family: str | None,
    as_json: bool,
    access: Access,
) -> None:
    """Say whether FROM may open a connection to TO, and who decides.

    FROM and TO are NAMESPACE/POD, svc/NAMESPACE/NAME or an address; PROTO is tcp, udp or sctp,
    and `icmp` instead of a port asks about a ping. Nothing is sent and nothing is recorded.

    \b
    lockgate explain shop/frontend-0 svc/shop/cart 80
    lockgate explain shop/frontend-0 203.0.113.7 443/tcp
    lockgate explain --batch questions.jsonl --engine spec

    Exit codes: 0 allowed (--batch: all answered), 1 denied, 2 a question that cannot be asked.
    """
    asked = [argument for argument in (source, target, port) if argument is not None]
    if (batch is not None and asked) or (batch is None and len(asked) != 3):
        raise click.UsageError("give FROM, TO and PORT[/PROTO], or --batch FILE")
    wanted: Family | None = None if family is None else 4 if family == "4" else 6
    try:
        if batch is not None:
            raise SystemExit(_batch(access, engine, batch, wanted))
        number, protocol = parse_port(asked[2])
        known = load_objects(access)
        question = Question(asked[0], asked[1], number, protocol, wanted)
        answer = answer_all(open_engine(access, known, engine), [question])[0]
    except (QuestionError, OSError) as error:
        fail(str(error))
    if answer.error is not None:
        fail(answer.error)
    if as_json:
        print_json([answer.json()])
    else:
        _print(answer, known)
    raise SystemExit(0 if answer.verdict == "allow" else 1)


def _batch(access: Access, engine: str, path: str, family: Family | None) -> int:
    asker = open_engine(access, load_objects(access), engine)
    source: IO[bytes] = sys.stdin.buffer if path == "-" else Path(path).open("rb")  # noqa: SIM115
    encode = msgspec.json.Encoder().encode_lines
    failed = False
    with source:
        questions = _questions(source, family)
        while chunk := list(islice(questions, _CHUNK)):
            answers = answer_all(asker, chunk)
            failed = failed or any(answer.error is not None for answer in answers)
            sys.stdout.buffer.write(encode([answer.json() for answer in answers]))
            sys.stdout.buffer.flush()
    return 2 if failed else 0


def _questions(source: IO[bytes], family: Family | None) -> Iterator[Question | QuestionError]:
    decode = msgspec.json.Decoder().decode
    for number, line in enumerate(source, 1):
        if not line.strip():
            continue
        try:
            question = parse_question(decode(line))
        except (msgspec.DecodeError, QuestionError) as error:
            yield QuestionError(f"line {number}: {error}")
            continue
        if family is not None and question.family is None:
            question = Question(
                question.source, question.target, question.port, question.protocol, family
            )
        yield question


# ---- For people ------------------------------------------------------------------


def _print(answer: Answer, cluster: Cluster) -> None:
    asked = answer.question
    port = asked.protocol if asked.port is None else f"port {asked.port}/{asked.protocol}"
    to = asked.target
    if answer.backend:
        to += f" (backend {answer.backend})"
    elif answer.destination_ip not in ("", to):
        to += f" ({answer.destination_ip})"
    origin = asked.source
    if answer.source_ip != origin:
        origin += f" ({answer.source_ip})"
    click.echo(f"{origin} → {to}, {port}\n")
    sides = SpecSides(answer, cluster)
    if answer.verdict == "allow":
        why = _why_allowed(answer, sides.exempt)
        click.echo(paint("allow", "green", bold=True) + f"  {why}")
    else:
        click.echo(paint("deny", "red", bold=True) + f"  {_why_denied(answer)}")
    if answer.cause is not None:
        return
    click.echo("")
    for direction in ("egress", "ingress"):
        click.echo(f"  {direction:<8} {sides.text(direction)}")
    hints = sides.hints()
    if hints and answer.verdict == "deny":
        click.echo("\n" + heading("To allow it:"))
        click.echo("\n".join(hints))


def _why_allowed(answer: Answer, exempt: str | None) -> str:
    if answer.direction is None:
        return f"not judged: {exempt}" if exempt else "no policy applies"
    return f"by {answer.direction}: {policies_text(answer.policies)}"


def _why_denied(answer: Answer) -> str:
    if answer.cause is not None:
        return REFUSALS.get(answer.cause, answer.cause)
    return (
        f"{answer.direction}: isolated by {policies_text(answer.policies)}:\n"
        "      no rule of theirs matches"
    )


class SpecSides:
    """Each direction in a line, and what would allow it. A kernel that denied a packet on its
    way out was never asked about the way in: there the specification tells."""

    def __init__(self, answer: Answer, cluster: Cluster) -> None:
        self._answer, self._cluster = answer, cluster
        spec = SpecEngine(cluster)
        self._names = spec.names
        self.sides = dict(answer.sides)
        for attempt in spec.names.attempts(answer.question):
            if attempt.backend != answer.backend or attempt.unserved:
                continue
            self._attempt = attempt
            judged = spec.judge([(answer.question, attempt)])[0]
            self.sides = {**judged.sides, **self.sides}
            break
        else:
            self._attempt = spec.names.attempts(answer.question)[0]

    @property
    def exempt(self) -> str | None:
        """Why the policies are not asked."""
        return self._attempt.exempt

    def text(self, direction: Direction) -> str:
        end = self._attempt.source if direction == "egress" else self._attempt.destination
        side = self.sides.get(direction)
        if end is None or end.pod is None:
            return "not a pod of this cluster: no policy applies"
        name = "/".join(end.pod.key)
        if self.exempt is not None:
            return f"of {name}: not judged: {self.exempt}"
        if side is None:
            return f"of {name}: not asked"
        if not side.policies:
            return f"of {name}: no policy applies" if side.allowed else f"of {name}: denied"
        by = policies_text(side.policies)
        return f"of {name}: " + (f"allowed by {by}" if side.allowed else f"isolated by {by}")

    def hints(self) -> list[str]:
        lines: list[str] = []
        for direction in ("egress", "ingress"):
            side = self.sides.get(direction)
            if side is None or side.allowed or not side.policies:
                continue
            lines.append(
                f"  in NetworkPolicy {self._closest(side)} (or one more that selects the pod), "
                f"under spec.{direction}:"
            )
            text = yaml.safe_dump([self._rule(direction)], sort_keys=False)
            lines += [f"    {line}" for line in text.splitlines()]
        return lines

    def _closest(self, side: Side) -> str:
        """The policy whose selector says most: it is about this pod rather than about many."""

        def terms(key: tuple[str, str]) -> int:
            policy = self._cluster.policies.get(key)
            if policy is None:
                return 0
            selector = policy.spec.pod_selector
            return len(selector.match_labels) + len(selector.match_expressions)

        closest = max(((one["namespace"], one["name"]) for one in side.policies), key=terms)
        return "/".join(closest)

    def _rule(self, direction: Direction) -> dict[str, object]:
        attempt = self._attempt
        peer = attempt.destination if direction == "egress" else attempt.source
        assert peer is not None
        if peer.pod is not None:
            item: dict[str, object] = _selectors(peer.pod)
        else:
            item = {"ipBlock": {"cidr": f"{peer.ip}/{128 if ':' in peer.ip else 32}"}}
        rule: dict[str, object] = {"to" if direction == "egress" else "from": [item]}
        if attempt.port is not None:
            rule["ports"] = [{"protocol": attempt.protocol, "port": attempt.port}]
        return rule


def _selectors(pod: Pod) -> dict[str, object]:
    passing = ("pod-template-hash", "statefulset.kubernetes.io/", "apps.kubernetes.io/")
    labels = {
        key: value
        for key, value in pod.metadata.labels.items()
        if not key.startswith(passing) and key != "controller-revision-hash"
    }
    return {
        "namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": pod.metadata.namespace}
        },
        "podSelector": {"matchLabels": labels} if labels else {},
    }

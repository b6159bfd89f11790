"""`lockgate service`: what services have in force, and where a packet to one would go."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import click

from lockgate.access import Access, Refused
from lockgate.cli.common import (
    access_options,
    fail,
    forwarding_of,
    json_option,
    load_objects,
    print_json,
)
from lockgate.cli.explain import kernel_of
from lockgate.cli.service_rows import Row, overview, places
from lockgate.cli.service_text import list_text, show_text, trace_text
from lockgate.explain.names import Names
from lockgate.explain.question import QuestionError
from lockgate.explain.trace import Asked, Trace, Tracer, asked
from lockgate.explain.trace_spec import SpecTrace, by_the_specification
from lockgate.objects.model import Cluster, Service

__all__ = ["service"]

_AT_ONCE = 16


@click.group()
def service() -> None:
    """Services for clients inside and outside: what is in force, and where packets go."""


@service.command("list")
@click.option("-n", "--namespace", help="Only services of this namespace.")
@json_option
@access_options
def list_(namespace: str | None, as_json: bool, access: Access) -> None:
    """List services: where they are asked, how clients outside reach them, who serves.

    Exit codes: 0 listed (perhaps none), 2 no such cluster.
    """
    cluster = load_objects(access)
    rows = [row for row in overview(cluster) if namespace in (None, row["namespace"])]
    default = forwarding_of(access, cluster)
    for row in rows:
        if row["externalTrafficPolicy"] is not None:
            row["forwarding"] = row["forwarding"] or default
    if as_json:
        print_json(rows)
    elif rows:
        click.echo(list_text(rows))
    else:
        click.echo("no services" + (f" in namespace {namespace}" if namespace else ""), err=True)


@service.command()
@click.argument("name", metavar="NAMESPACE/NAME")
@click.option("--node", "only", multiple=True, metavar="NODE", help="Ask only these nodes.")
@json_option
@access_options
def show(name: str, only: tuple[str, ...], as_json: bool, access: Access) -> None:
    """Show one service: its frontends, and who serves at each, as nodes have it in force.

    Of clients outside: the slots of the table that each backend owns, which is its share of new
    connections. What nodes have alike is shown once.

    Exit codes: 0 shown, 1 some node did not answer, 2 no such service or cluster.
    """
    cluster = load_objects(access)
    try:
        found = _named(cluster, name)
        known = sorted(cluster.nodes)
        if unknown := sorted(set(only) - set(known)):
            raise QuestionError(f"no node {unknown[0]}")
    except QuestionError as error:
        fail(str(error))
    row = next(iter(overview(cluster, found)))
    asked = places(cluster, found)
    nodes = list(only) or known

    def ask(node: str) -> list[Row | None] | str:
        try:
            return views_of(access, node, [place.question(node) for place in asked])
        except QuestionError as error:
            return str(error)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip(nodes, pool.map(ask, nodes), strict=True))
    silent = {node: told for node, told in answers.items() if isinstance(told, str)}
    row["unanswered"] = silent
    row["inForce"] = [
        place.json() | {"nodes": {n: told[i] for n, told in answers.items() if n not in silent}}
        for i, place in enumerate(asked)
    ]
    if as_json:
        print_json(row)
    else:
        click.echo(show_text(row, Names(cluster)))
    raise SystemExit(1 if silent else 0)


@service.command()
@click.argument("client", metavar="CLIENT[:PORT]")
@click.argument("frontend", metavar="FRONTEND[:PORT][/PROTO]")
@click.option("--via", default="", metavar="NODE", help="Where the packet comes in.")
@click.option("--ack", is_flag=True, help="Not a connection's first packet, but a later one (TCP).")
@click.option(
    "--engine",
    type=click.Choice(["kernel", "spec"]),
    default="kernel",
    show_default=True,
    help="Test runs of the live programs, or the specification.",
)
@json_option
@access_options
def trace(
    client: str, frontend: str, via: str, ack: bool, engine: str, as_json: bool, access: Access
) -> None:
    """Say where a packet of CLIENT to FRONTEND would go, and why.

    CLIENT is an address outside the cluster, NAMESPACE/POD, or a node's address; FRONTEND an
    address of a service, a node's address with a node port, or NAMESPACE/NAME. Node by node: the
    flow's slot and its owners, how the packet goes on, and what the firewall at the card and the
    policies at the backend say. Nothing is sent and nothing is recorded.

    \b
    lockgate service trace 198.51.100.7 192.0.2.10:80
    lockgate service trace 198.51.100.7:40001 shop/web:80 --via node-2
    lockgate service trace '[2001:db8::7]' '[2001:db8:1::10]:443/udp'

    Exit codes: 0 it reaches a backend, 1 it does not, 2 a question that cannot be asked.
    """
    cluster = load_objects(access)
    try:
        one = asked(Names(cluster), client, frontend, begins=not ack)
        found: Trace | SpecTrace
        if engine == "spec":
            found = by_the_specification(cluster, one, via)
        else:
            found = _by_the_kernel(access, cluster, one, via)
    except (QuestionError, OSError) as error:
        fail(str(error))
    if as_json:
        print_json(found.json())
    else:
        click.echo(trace_text(found, Names(cluster)) if isinstance(found, Trace) else found.text())
    raise SystemExit(0 if found.reaches else 1)


# ---- Inside ----------------------------------------------------------------------


def views_of(access: Access, node: str, questions: list[Row]) -> list[Row | None]:
    """What a node has in force at frontends. QuestionError if it does not answer."""
    try:
        answer = access.call(node, "agent", "POST", "/v1/frontends", {"frontends": questions})
    except (OSError, Refused) as error:
        raise QuestionError(f"node {node}: its agent does not answer: {error}") from error
    found: list[Row | None] = answer["answers"]
    return found


def firewall_of(access: Access, node: str, packet: Row) -> Row | None:
    """What a node's firewall says of a packet; None if none looks at it. QuestionError."""
    try:
        answer = access.call(node, "agent", "POST", "/v1/firewall/ask", packet)
    except (OSError, Refused) as error:
        raise QuestionError(f"node {node}: its agent does not answer: {error}") from error
    found: Row | None = answer["answer"]
    return found


def _named(cluster: Cluster, name: str) -> Service:
    parts = name.removeprefix("svc/").removeprefix("service/").split("/")
    found = cluster.services.get((parts[0], parts[-1])) if len(parts) == 2 else None
    if found is None:
        wanted = "" if len(parts) == 2 and all(parts) else ": expected NAMESPACE/NAME"
        raise QuestionError(f"no service {name}{wanted}")
    return found


def _by_the_kernel(access: Access, cluster: Cluster, one: Asked, via: str) -> Trace:
    from lockgate.bpf.btf import Schema
    from lockgate.paths import bpf_object

    schema = Schema.from_object(bpf_object())
    with closing(
        Tracer(
            cluster,
            lambda node: kernel_of(access, node, schema),
            lambda node, questions: views_of(access, node, questions),
            lambda node, packet: firewall_of(access, node, packet),
            schema,
        )
    ) as tracer:
        return tracer.trace(one, via)

"""`lockgate probe`: every pod tries every port, with real connections; compared with the spec."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import click

from lockgate.access import Access, Place, Target
from lockgate.cli.checks import Check, Summary, check_of, plan
from lockgate.cli.common import (
    Refused,
    access_options,
    fail,
    json_option,
    load_objects,
    print_json,
)
from lockgate.cli.matrix import differences_text, matrix
from lockgate.cli.verdicts import Recorder
from lockgate.explain.question import Family, Question, QuestionError
from lockgate.explain.spec import SpecEngine
from lockgate.objects.address import parse_address
from lockgate.objects.model import Cluster

__all__ = ["measure", "probe"]

_AT_ONCE = 6  # pods that probe at the same time
_RETRY = 3  # times the timeout, for what differed


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
    checks = plan(cluster, namespace, family, access.standalone)
    summary = Summary(checks)
    bar: Any = nullcontext(None)
    if progress and sys.stderr.isatty():
        bar = click.progressbar(
            length=len(checks), label="Probing", show_eta=False, file=sys.stderr
        )
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
                    check_of(
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

"""What commands share: the cluster option, the supervisor's and agents' sockets, output, errors."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any, NoReturn, TypeVar

import click

from lockgate.access import Access, Refused
from lockgate.access.choose import Choice, Wrong, choose
from lockgate.access.sockets import call, connect, stream
from lockgate.cli.plugin import called_as_plugin
from lockgate.objects.model import Cluster
from lockgate.standalone.state import State, valid_name

__all__ = [
    "Refused",
    "Wrong",
    "access_options",
    "call",
    "cluster_option",
    "connect",
    "fail",
    "fail_unanswered",
    "forwarding_of",
    "json_option",
    "load_objects",
    "need_root",
    "not_ready",
    "print_json",
    "reach",
    "running",
    "stream",
]

USAGE = 2
NO_FEATURE = 77

F = TypeVar("F", bound=Callable[..., Any])


def fail(sentence: str, code: int = USAGE) -> NoReturn:
    """One sentence on stderr, and out."""
    click.echo(f"lockgate: {sentence}", err=True)
    sys.exit(code)


def fail_unanswered(access: Access, error: OSError | Refused) -> NoReturn:
    """Out, with why the cluster told nothing: it does not answer; or it refused, or we have
    nothing to ask it with, as when a credential plugin fails."""
    if isinstance(error, Refused):
        fail(f"{access.title}: {error}")
    fail(f"{access.title} does not answer: {error}")


def need_root() -> None:
    if os.geteuid() != 0:
        fail("this needs root (network namespaces and eBPF): run it with sudo")


def cluster_option(command: F) -> F:
    return click.option(
        "--cluster",
        default="default",
        show_default=True,
        envvar="LOCKGATE_CLUSTER",
        help="Name of the cluster; several can run side by side.",
        callback=_check_name,
    )(command)


_WHICH = """
Which cluster: with --cluster, the standalone one of that name; with --kubeconfig or --context, a
real one; with neither, the standalone cluster "default" if it runs, else the current context of
$KUBECONFIG or ~/.kube/config. `kubectl lockgate` never takes a standalone cluster by itself.
"""


def access_options(command: F) -> F:
    """The options that say which cluster; the command gets `access: Access`, closed when it
    is over."""

    @functools.wraps(command)
    def chosen(
        *arguments: Any, cluster: str | None, kubeconfig: str, context: str, **rest: Any
    ) -> Any:
        with closing(reach(cluster or "", kubeconfig, context)) as access:
            return command(*arguments, access=access, **rest)

    chosen.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n{_WHICH}"
    for option in (
        click.option("--context", default="", metavar="NAME", help="Of the kubeconfig."),
        click.option("--kubeconfig", default="", metavar="FILE", help="A real cluster's."),
        click.option(
            "--cluster",
            metavar="NAME",
            envvar="LOCKGATE_CLUSTER",
            help="A standalone cluster's name.",
            callback=lambda c, p, value: value if value is None else _check_name(c, p, value),
        ),
    ):
        chosen = option(chosen)
    return chosen  # type: ignore[return-value]


def reach(cluster: str = "", kubeconfig: str = "", context: str = "") -> Access:
    """The cluster that is meant, or a sentence and exit code 2."""
    try:
        choice = choose(cluster, kubeconfig, context, os.environ, _runs, plugin=called_as_plugin())
        return open_choice(choice)
    except ValueError as error:
        fail(str(error))


def open_choice(choice: Choice) -> Access:
    if choice.cluster:
        from lockgate.access.standalone import StandaloneAccess

        return StandaloneAccess(running(choice.cluster))
    from lockgate.access.kubernetes import KubernetesAccess
    from lockgate.kube.client import Settings

    settings = Settings(kubeconfig=choice.kubeconfig, context=choice.context)
    return KubernetesAccess(settings, f"context {choice.context!r}")


def _runs(cluster: str) -> bool:
    return State(cluster).control.exists()


def load_objects(access: Access) -> Cluster:
    """All objects, or a sentence and exit code 2."""
    try:
        return access.objects()
    except (OSError, Refused) as error:
        fail(f"cannot read the objects of {access.title}: {error}")


def forwarding_of(access: Access, cluster: Cluster) -> str | None:
    """The agents' setting `forwarding`, by the first that answers."""
    for node in sorted(cluster.nodes)[:3]:
        try:
            return str(access.call(node, "agent", "GET", "/v1/status")["forwarding"])
        except (OSError, Refused):
            continue
    return None


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")(command)


def _check_name(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if not valid_name(value):
        raise click.BadParameter("expected 1 to 20 lower case letters, digits and '-'")
    return value


def running(cluster: str) -> State:
    """The state folder of a cluster whose supervisor answers, or a sentence and exit code 2."""
    need_root()
    state = State(cluster)
    try:
        connect(state.control, 5).close()
    except OSError:
        fail(f"no cluster {cluster!r} is running: start one with `lockgate up DIR`")
    return state


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


def not_ready(status: dict[str, Any]) -> list[str]:
    """The pods of a status that are not ready, with the reason where it is known."""
    why = status.get("waitingFor", {})
    return [f"{pod}: {why[pod]}" if pod in why else pod for pod in status["notReady"]]

"""lockgate exec: a command in a pod's namespaces and cgroup."""

from __future__ import annotations

import os
from urllib.parse import quote

import click

from lockgate.cli.common import Refused, call, cluster_option, fail, running

__all__ = ["exec_"]


@click.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("pod", metavar="NS/POD")
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@cluster_option
def exec_(pod: str, command: tuple[str, ...], cluster: str) -> None:
    """Run CMD in a pod: its network, names, processes and cgroup, on the host's files.

    The exit code is CMD's; 127 if it was not found.
    """
    state = running(cluster)
    try:
        found = call(state.control, "GET", f"/v1/exec?pod={quote(pod)}")
    except (Refused, OSError) as error:
        fail(str(error), 1)
    from lockgate.paths import pod_binary

    binary = os.environ.get("LOCKGATE_POD") or str(pod_binary())
    environment = {"TERM": os.environ.get("TERM", "dumb"), **found["environment"]}
    os.execve(
        binary,
        [binary, "exec", "--pid", str(found["pid"]), "--cgroup", found["cgroup"], "--", *command],
        environment,
    )

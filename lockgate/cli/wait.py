"""lockgate wait: until everything that is saved is in force."""

from __future__ import annotations

import sys

import click

from lockgate.cli.common import (
    Refused,
    call,
    cluster_option,
    fail,
    json_option,
    print_json,
    running,
)

__all__ = ["wait"]


@click.command()
@click.option("--timeout", default=30.0, show_default=True, help="Seconds to wait at most.")
@cluster_option
@json_option
def wait(timeout: float, cluster: str, as_json: bool) -> None:
    """Wait until everything saved so far is in force on all nodes.

    Leaves with 0 when it is; with 1, and the reasons, when it is not.
    """
    state = running(cluster)
    try:
        answer = call(state.control, "POST", f"/v1/wait?timeout={timeout}", timeout=timeout + 5)
    except (Refused, OSError) as error:
        fail(f"the cluster does not answer: {error}", 1)
    if as_json:
        print_json(answer)
        sys.exit(0 if answer["ok"] else 1)
    for warning in answer["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    if answer["ok"]:
        click.echo(f"In force on all nodes (revision {answer['revision']}).")
    else:
        for reason in answer["reasons"]:
            click.echo(f"lockgate: {reason}", err=True)
    sys.exit(0 if answer["ok"] else 1)

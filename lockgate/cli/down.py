"""lockgate down: ends a cluster and removes every trace, also of one that crashed."""

from __future__ import annotations

import click

from lockgate.cli.common import cluster_option, fail, json_option, need_root, print_json
from lockgate.standalone.state import State

__all__ = ["down"]


@click.command()
@cluster_option
@json_option
def down(cluster: str, as_json: bool) -> None:
    """End a cluster and remove its processes, namespaces, cgroups, pins and files.

    Right again when there is nothing left, and after a crash.
    """
    need_root()
    from lockgate.standalone import teardown

    try:
        removed = teardown.remove(State(cluster))
    except OSError as error:
        fail(f"not everything could be removed: {error}", 1)
    if as_json:
        print_json(removed)
    elif removed:
        for line in removed:
            click.echo(f"removed {line}")
    else:
        click.echo(f"There is no trace of a cluster {cluster!r}.")

"""`lockgate flows`: verdicts as the kernels of the nodes gave them."""

from __future__ import annotations

import queue
import threading
import time
from http.client import HTTPException
from typing import Any
from urllib.parse import urlencode

import click

from lockgate.cli.common import Refused, cluster_option, fail, json_option, print_json, running
from lockgate.cli.common import stream as lines_of
from lockgate.cli.render import flow_line
from lockgate.standalone.state import State

__all__ = ["flows", "nodes_of", "recent"]

_AGAIN = 0.5  # seconds between attempts to reach an observer that went away


def nodes_of(state: State) -> list[str]:
    """Names of the nodes, by their folders."""
    folder = state.root / "nodes"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def recent(state: State, query: dict[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of all nodes by time, and a sentence for each node that did not answer."""
    records: list[dict[str, Any]] = []
    complaints = []
    for node in nodes_of(state):
        try:
            records += lines_of(state.observer(node), f"/v1/flows?{urlencode(query)}", timeout=30)
        except Refused as error:
            fail(_sentence(error))
        except OSError as error:
            complaints.append(f"the observer of node {node} does not answer: {error}")
    records.sort(key=lambda record: str(record["time"]))
    if query.get("limit"):
        records = records[max(0, len(records) - int(query["limit"])) :]
    return records, complaints


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@click.option("--verdict", type=click.Choice(["allow", "deny"]))
@click.option("-n", "--namespace", help="Of a pod at either end.")
@click.option("--pod", help="[NAMESPACE/]NAME of a pod at either end.")
@click.option("--policy", help="[NAMESPACE/]NAME of a policy that decided.")
@click.option("--cause", help="Of a drop: policy, no-backend, spoofed-source, …")
@click.option("--direction", type=click.Choice(["ingress", "egress"]))
@click.option("--port", type=click.IntRange(0, 65535), help="Of the destination.")
@click.option(
    "--protocol", type=click.Choice(["tcp", "udp", "sctp", "icmp", "icmpv6"], case_sensitive=False)
)
@click.option("--since", help="30s, 5m, 2h ago, or an RFC 3339 time.")
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="At most so many of the past.",
)
@json_option
@cluster_option
def flows(follow: bool, as_json: bool, cluster: str, **filters: Any) -> None:
    """Show new connections with their verdicts, and who decided.

    Each line names the policy and rule that allowed, or the policies that isolate the pod
    that may not be reached. With --json, one object a line.

    Exit codes: 0 shown, 2 no such cluster or a filter that means nothing.
    """
    state = running(cluster)
    query = {key: str(value) for key, value in filters.items() if value is not None}
    if follow:
        _follow(state, query, as_json)
        return
    records, complaints = recent(state, query)
    for record in records:
        _show(record, as_json)
    for complaint in complaints:
        click.echo(f"lockgate: {complaint}", err=True)


def _show(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        click.echo(flow_line(record))


def _follow(state: State, query: dict[str, str], as_json: bool) -> None:
    """One thread per node reads; this one prints."""
    arrived: queue.Queue[dict[str, Any] | Exception | str] = queue.Queue(10_000)

    def read(node: str) -> None:
        asked, last = query | {"follow": "1"}, ""
        reached = True
        while state.node(node).exists():
            shown = last
            if shown:  # an observer that came back: go on after what was shown
                asked = {k: v for k, v in asked.items() if k != "limit"} | {"since": last}
            try:
                for record in lines_of(state.observer(node), f"/v1/flows?{urlencode(asked)}"):
                    reached = True
                    moment = str(record.get("time", ""))
                    if not moment or moment > shown:
                        last = max(last, moment)
                        arrived.put(record)
            except Refused as error:
                arrived.put(error)
                return
            except (OSError, ValueError, HTTPException):
                pass
            if reached:
                arrived.put(f"the observer of node {node} went away: waiting for it")
            reached = False
            time.sleep(_AGAIN)

    readers = [threading.Thread(target=read, args=(n,), daemon=True) for n in nodes_of(state)]
    for reader in readers:
        reader.start()
    try:
        while any(reader.is_alive() for reader in readers) or not arrived.empty():
            try:
                item = arrived.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(item, Refused):
                fail(_sentence(item))
            elif isinstance(item, dict):
                _show(item, as_json)
            else:
                click.echo(f"lockgate: {item}", err=True)
    except (KeyboardInterrupt, BrokenPipeError):
        return


def _sentence(error: Refused) -> str:
    """The text of {"error": …}."""
    text = str(error)
    return text.removeprefix('{"error": "').removesuffix('"}')

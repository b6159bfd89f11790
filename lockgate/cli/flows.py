"""`lockgate flows`: verdicts as the kernels of the nodes gave them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import click

from lockgate.access import Access
from lockgate.cli.common import Refused, access_options, fail, json_option, print_json
from lockgate.cli.render import flow_line

__all__ = ["flows", "recent"]

_NODES_AT_ONCE = 32
_AGAIN = 0.5  # seconds between attempts to reach an observer that went away
_AGAIN_REMOTE = 3.0
_LOOK = 1.0  # seconds between looks for nodes that joined
_LOOK_REMOTE = 5.0


def recent(access: Access, query: dict[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of all nodes by time, and a sentence for each node that did not answer."""
    url = f"/v1/flows?{urlencode(query)}"

    def read(node: str) -> list[dict[str, Any]] | str:
        try:
            return list(access.stream(node, "observer", url, timeout=30))
        except OSError as error:
            return f"the observer of node {node} does not answer: {error}"

    records: list[dict[str, Any]] = []
    complaints = []
    try:
        with ThreadPoolExecutor(_NODES_AT_ONCE) as pool:
            for found in pool.map(read, access.nodes()):
                if isinstance(found, str):
                    complaints.append(found)
                else:
                    records += found
    except (Refused, OSError) as error:
        fail(str(error))
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
@access_options
def flows(follow: bool, as_json: bool, access: Access, **filters: Any) -> None:
    """Show new connections with their verdicts, and who decided.

    Each line names the policy and rule that allowed, or the policies that isolate the pod
    that may not be reached. With --json, one object a line;
    `packet` has the first bytes where the agents' `capture` asks for them.

    Exit codes: 0 shown, 2 no such cluster or a filter that means nothing.
    """
    query = {key: str(value) for key, value in filters.items() if value is not None}
    if follow:
        _follow(access, query, as_json)
        return
    records, complaints = recent(access, query)
    for record in records:
        _show(record, as_json)
    for complaint in complaints:
        click.echo(f"lockgate: {complaint}", err=True)


def _show(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        click.echo(flow_line(record))


def _follow(access: Access, query: dict[str, str], as_json: bool) -> None:
    """One thread per node reads, one looks for nodes that join; this one prints."""
    arrived: queue.Queue[dict[str, Any] | Exception | str] = queue.Queue(10_000)
    over = threading.Event()

    def read(node: str) -> None:
        asked, last = query | {"follow": "1"}, ""
        reached = True
        while not over.is_set() and _there(access, node):
            shown = last
            if shown:  # an observer that came back: go on after what was shown
                asked = {k: v for k, v in asked.items() if k != "limit"} | {"since": last}
            try:
                for record in access.stream(node, "observer", f"/v1/flows?{urlencode(asked)}"):
                    reached = True
                    moment = str(record.get("time", ""))
                    if not moment or moment > shown:
                        last = max(last, moment)
                        arrived.put(record)
            except Refused as error:
                arrived.put(error)
                return
            except (OSError, ValueError):
                pass
            if reached:
                arrived.put(f"the observer of node {node} went away: waiting for it")
            reached = False
            time.sleep(_AGAIN if access.standalone else _AGAIN_REMOTE)

    readers: dict[str, threading.Thread] = {}

    def read_all(nodes: list[str]) -> None:
        for node in nodes:
            if node not in readers or not readers[node].is_alive():
                reader = threading.Thread(target=read, args=(node,), daemon=True)
                reader.start()
                readers[node] = reader

    def look() -> None:
        while not over.wait(_LOOK if access.standalone else _LOOK_REMOTE):
            with contextlib.suppress(OSError, Refused):
                read_all(access.nodes())

    read_all(_nodes(access))
    threading.Thread(target=look, daemon=True).start()
    try:
        while any(one.is_alive() for one in list(readers.values())) or not arrived.empty():
            try:
                item = arrived.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(item, Refused):
                fail(str(item))
            elif isinstance(item, dict):
                _show(item, as_json)
            else:
                click.echo(f"lockgate: {item}", err=True)
    except (KeyboardInterrupt, BrokenPipeError):
        return
    finally:
        over.set()


def _nodes(access: Access) -> list[str]:
    try:
        return access.nodes()
    except (OSError, Refused) as error:
        fail(str(error))


def _there(access: Access, node: str) -> bool:
    """Whether the node is one of the cluster, as far as one knows."""
    try:
        return node in access.nodes()
    except (OSError, Refused):
        return True

"""`lockgate firewall`: entries on the fly, and what they hit."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode

import click

from lockgate.access import Access, Refused
from lockgate.cli.common import access_options, fail, fail_unanswered, json_option, print_json
from lockgate.cli.render import table
from lockgate.objects.blocks import pack_cidrs
from lockgate.objects.errors import FieldError
from lockgate.objects.firewall import LIFETIME_MAX, RATE_MAX, ranges_text, read_ranges

__all__ = ["firewall", "merge", "read_list", "seconds_of"]

Row = dict[str, Any]
_AT_ONCE = 32
#: A million prefixes are in force in seconds, on a busy machine in more.
_PATIENCE = 300
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_port_option = click.option(
    "--port",
    "ports",
    multiple=True,
    metavar="PROTOCOL[/PORT[-PORT]]",
    help="Only these destination ports: tcp/80, udp/30000-32767, sctp, icmp; may be repeated.",
)
_file_option = click.option(
    "--file",
    "path",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="One address or CIDR block a line, # begins a comment; - is standard input.",
)
_node_option = click.option(
    "--node", "only", metavar="NODE", multiple=True, help="On this node; absent, on all."
)


@click.group()
def firewall() -> None:
    """What nodes' network cards let in: entries on the fly, and what they hit.

    Entries added here are kept on each node until they expire or are deleted. Firewall objects are
    changed where they are.
    """


@firewall.command()
@click.argument("action", type=click.Choice(["allow", "deny"]))
@click.argument("cidrs", nargs=-1, metavar="[CIDR]...")
@_file_option
@_port_option
@click.option(
    "--rate", type=click.IntRange(1, RATE_MAX), help="With allow: packets a second of each source."
)
@click.option("--for", "lifetime", metavar="TIME", help="Until then: 90s, 10m, 2h, 1d.")
@_node_option
@json_option
@access_options
def add(
    action: str,
    cidrs: tuple[str, ...],
    path: str | None,
    ports: tuple[str, ...],
    rate: int | None,
    lifetime: str | None,
    only: tuple[str, ...],
    as_json: bool,
    access: Access,
) -> None:
    """Allow or deny what comes from addresses or CIDR blocks.

    It is in force on all nodes when this returns.

    Exit codes: 0, 1 not on all nodes, 2 nothing done.
    """
    if rate and action == "deny":
        fail("--rate is for allow: what is denied is dropped whatever its rate")
    body = {
        "action": action,
        "cidrs": _sources(cidrs, path),
        "ports": _ports(ports),
        "rate": rate or 0,
        "seconds": seconds_of(lifetime) if lifetime else 0,
    }
    answers = _ask(access, only, "POST", "/v1/firewall", body)
    if not as_json:
        for node, told in sorted(answers.items()):
            if "error" not in told:
                known = f", {told['known']} were there" if told["known"] else ""
                click.echo(f"{node}: {_entries(told['added'])} added{known}")
    _end(answers, as_json)


@firewall.command("del")
@click.argument("cidrs", nargs=-1, metavar="[CIDR]...")
@_file_option
@_port_option
@click.option("--all", "all_", is_flag=True, help="Everything that was added by command.")
@_node_option
@json_option
@access_options
def delete(
    cidrs: tuple[str, ...],
    path: str | None,
    ports: tuple[str, ...],
    all_: bool,
    only: tuple[str, ...],
    as_json: bool,
    access: Access,
) -> None:
    """Delete entries that were added by command, allowed or denied, whatever their ports or those
    with the ports given.

    Exit codes: 0, 1 not all of them or not on all nodes, 2 nothing done.
    """
    if all_ and (cidrs or path):
        fail("either --all or addresses")
    body: Row = {"all": True} if all_ else {"cidrs": _sources(cidrs, path)}
    if ports:
        body["ports"] = _ports(ports)
    answers = _ask(access, only, "POST", "/v1/firewall/delete", body)
    missed = False
    for node, told in sorted(answers.items()):
        if "error" in told:
            continue
        missed |= bool(told["ofObjectsCount"] or told["unknownCount"])
        if as_json:
            continue
        click.echo(f"{node}: {_entries(told['deleted'])} deleted")
        for key, what in (
            ("ofObjects", "of Firewall objects, to be changed there"),
            ("unknown", "not there"),
        ):
            if told[key]:
                more = told[f"{key}Count"] - len(told[key])
                also = f" and {more} more" if more else ""
                click.echo(f"  {what}: {', '.join(told[key])}{also}")
    _end(answers, as_json, failed=missed)


@firewall.command("list")
@click.option(
    "--top", default=20, show_default=True, type=click.IntRange(0, 10000), help="Entries to show."
)
@_node_option
@json_option
@access_options
def list_(top: int, only: tuple[str, ...], as_json: bool, access: Access) -> None:
    """Rules, and the entries with the most packets; counters are those of all nodes together."""
    answers = _ask(access, only, "GET", f"/v1/firewall?{urlencode({'top': top})}")
    told = {node: one for node, one in answers.items() if "error" not in one}
    found = merge(told, top)
    if as_json:
        print_json({**found, "nodes": answers})
    else:
        _print(found)
    for node, one in sorted(answers.items()):
        if "error" in one:
            click.echo(f"lockgate: node {node}: {one['error']}", err=True)
    raise SystemExit(0 if len(told) == len(answers) else 1)


def merge(answers: dict[str, Row], top: int) -> Row:
    """What nodes told, as one: rules and entries with their counters added up. Pure."""
    rules: dict[str, Row] = {}
    entries: dict[str, Row] = {}
    for node, told in sorted(answers.items()):
        for kind, rows in ((rules, told["rules"]), (entries, told["top"])):
            for row in rows:
                key = json.dumps(
                    [row[name] for name in ("action", "ports", "rate", "source", "name", "rule")]
                    + [row.get("cidr")]
                )
                one = kind.setdefault(key, {**row, "packets": 0, "bytes": 0, "nodes": []})
                one["packets"] += row["packets"]
                one["bytes"] += row["bytes"]
                one["nodes"].append(node)
                if "entries" in row:
                    one["entries"] = max(one["entries"], row["entries"])
                if "expires" in row:
                    ends = (one["expires"], row["expires"])
                    one["expires"] = None if None in ends else max(ends)
    most = sorted(entries.values(), key=lambda row: -row["packets"])[:top]
    return {
        "default": {node: told["default"] for node, told in sorted(answers.items())},
        "entries": {node: told["entries"] for node, told in sorted(answers.items())},
        "rules": list(rules.values()),
        "top": most,
    }


# ---- Inside --------------------------------------------------------------------


def read_list(text: str, where: str) -> list[str]:
    """The addresses and blocks of a file. ValueError names the line."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = [line for line in lines if line]
    _, _, bad = pack_cidrs(found, bare=True)
    if bad:
        wrong = found[bad[0]]
        number = lines.index(wrong) + 1
        raise ValueError(f"{where}, line {number}: expected an address or a CIDR block: {wrong!r}")
    return found


def seconds_of(text: str) -> float:
    """Of 90s, 10m, 2h, 1d. Fails with a sentence."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text)
    if not match or not float(match[1]):
        fail(f"--for: expected a time such as 90s, 10m, 2h or 1d, got {text!r}")
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds > LIFETIME_MAX:
        fail(f"--for: expected {LIFETIME_MAX // 86400}d at most, got {text!r}")
    return seconds


def _sources(cidrs: Sequence[str], path: str | None) -> list[str]:
    found = list(cidrs)
    _, _, bad = pack_cidrs(found, bare=True)
    if bad:
        fail(f"expected an address or a CIDR block, got {found[bad[0]]!r}")
    if path is not None:
        try:
            text = sys.stdin.read() if path == "-" else Path(path).read_text()
            found += read_list(text, path)
        except (OSError, ValueError) as error:
            fail(str(error))
    if not found:
        fail("expected addresses or CIDR blocks, as arguments or with --file")
    return found


def _ports(texts: Sequence[str]) -> list[str]:
    try:
        return ranges_text(read_ranges(texts))
    except FieldError as error:
        fail(re.sub(r"^ports[^:]*", "--port", str(error)))


def _ask(
    access: Access, only: Sequence[str], method: str, url: str, body: Any = None
) -> dict[str, Row]:
    """Each node's answer, or {"error"}."""
    try:
        nodes = access.nodes()
    except (OSError, Refused) as error:
        fail_unanswered(access, error)
    if unknown := [node for node in only if node not in nodes]:
        fail(f"{access.title} has no node {unknown[0]}")
    wanted = list(only) or nodes
    if not wanted:
        fail(f"{access.title} has no nodes")

    def ask(node: str) -> Row:
        try:
            answer: Row = access.call(node, "agent", method, url, body, timeout=_PATIENCE)
            return answer
        except (OSError, Refused) as error:
            return {"error": str(error)}

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(wanted, pool.map(ask, wanted), strict=True))


def _end(answers: dict[str, Row], as_json: bool, *, failed: bool = False) -> NoReturn:
    if as_json:
        print_json(answers)
    for node, told in sorted(answers.items()):
        if "error" in told:
            click.echo(f"lockgate: node {node}: {told['error']}", err=True)
    errors = sum("error" in told for told in answers.values())
    raise SystemExit(2 if errors == len(answers) else 1 if errors or failed else 0)


def _entries(count: int) -> str:
    return f"{count} entr{'y' if count == 1 else 'ies'}"


def _print(found: Row) -> None:
    for node, default in found["default"].items():
        entries = found["entries"][node]
        click.echo(
            f"{node}: {_entries(entries)}, default {default}" if entries else f"{node}: none"
        )
    if found["rules"]:
        head = ["ACTION", "PORTS", "RATE", "BY", "ENTRIES", "PACKETS", "BYTES"]
        click.echo("\n" + table(head, [_cells(one, "entries") for one in found["rules"]]))
    hit = [one for one in found["top"] if one["packets"] or one["source"] != "builtin"]
    if hit:
        head = ["PREFIX", "ACTION", "PORTS", "RATE", "BY", "LEFT", "PACKETS", "BYTES"]
        rows = [[one["cidr"], *_cells(one, "left")] for one in hit]
        click.echo("\n" + table(head, rows))


_LEFT: dict[str, Callable[[Row], str]] = {
    "entries": lambda one: str(one["entries"]),
    "left": lambda one: _remaining(one["expires"]),
}


def _cells(one: Row, what: str) -> list[str]:
    by = one["source"]
    if by == "object":
        by = f"{one['name']} rules[{one['rule']}]"
    return [
        one["action"],
        ",".join(one["ports"]) or "all",
        f"{one['rate']}/s" if one["rate"] else "-",
        by,
        _LEFT[what](one),
        str(one["packets"]),
        str(one["bytes"]),
    ]


def _remaining(expires: float | None) -> str:
    if expires is None:
        return "-"
    seconds = max(0, round(expires - time.time()))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"

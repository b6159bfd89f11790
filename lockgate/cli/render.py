"""How things look on a terminal: tables, flow lines, the matrix. Pure text, colour by request."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

__all__ = [
    "WIDTH",
    "columns",
    "end_name",
    "flow_line",
    "heading",
    "paint",
    "policies_text",
    "table",
]

WIDTH = 100


def coloured() -> bool:
    """Colour is for terminals only."""
    return sys.stdout.isatty()


def paint(text: str, colour: str, *, bold: bool = False) -> str:
    return click.style(text, fg=colour, bold=bold) if coloured() else text


def heading(text: str) -> str:
    return click.style(text, bold=True) if coloured() else text


def _width() -> int:
    """A terminal's own width; files get what fits the documentation."""
    return shutil.get_terminal_size((WIDTH, 24)).columns if coloured() else WIDTH


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, cut: bool = True) -> str:
    """Columns by their widest cell, two spaces apart. `cut` shortens lines to the screen."""
    if not rows:
        return ""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = []
    for line in [head, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text = "  ".join(cells).rstrip()
        if cut and len(text) > _width():
            text = text[: _width() - 1] + "…"
        lines.append(text)
    return "\n".join([heading(lines[0]), *lines[1:]])


def columns(items: Sequence[str], *, indent: int = 2) -> str:
    """Short texts side by side, read downwards."""
    if not items:
        return ""
    widest = max(len(item) for item in items) + 3
    across = max(1, (WIDTH - indent) // widest)
    down = -(-len(items) // across)
    lines = []
    for row in range(down):
        cells = [items[i].ljust(widest) for i in range(row, len(items), down)]
        lines.append((" " * indent + "".join(cells)).rstrip())
    return "\n".join(lines)


def end_name(end: Mapping[str, Any]) -> str:
    """One end of a flow: the pod, the node, or the address; with its port."""
    ip, port = str(end.get("ip", "")), end.get("port")
    if end.get("pod"):
        name = f"{end['namespace']}/{end['pod']}"
    elif end.get("node"):
        name = f"node {end['node']}"
    else:
        name = f"[{ip}]" if ":" in ip and port is not None else ip
    return name if port is None else f"{name}:{port}"


def policies_text(policies: Sequence[Mapping[str, Any]]) -> str:
    """Policies with the rules that matched."""
    texts = []
    for policy in policies:
        rules = " ".join(policy.get("rules") or ())
        texts.append(f"{policy['namespace']}/{policy['name']}{' ' + rules if rules else ''}")
    return ", ".join(texts)


def flow_line(record: Mapping[str, Any]) -> str:
    """One flow record as a line."""
    if record.get("type") == "missed":
        return f"… {record['count']} records missed: they came faster than they were read"
    allowed = record["verdict"] == "allow"
    verdict = paint("allow", "green") if allowed else paint("deny ", "red")
    direction = record["direction"] or "-"
    flags = record.get("tcpFlags")
    protocol = record["protocol"] + (f" {','.join(flags)}" if flags and flags != ["SYN"] else "")
    why = ""
    if record["policies"]:
        by = "by" if allowed else "isolated by"
        why = f"  {by} {policies_text(record['policies'])}"
    elif record.get("cause") and record["cause"] != "policy":
        why = f"  {record['cause']}"
    service = record.get("service")
    via = f"  (service {service['namespace']}/{service['name']})" if service else ""
    return (
        f"{record['time'][11:23]}  {verdict}  {direction:<7}  {end_name(record['source'])} → "
        f"{end_name(record['destination'])}  {protocol}{why}{via}"
    )

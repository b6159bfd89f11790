"""How things look on a terminal: tables, flow lines, the matrix. Pure text, colour by request."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import click

__all__ = [
    "columns",
    "end_name",
    "flow_line",
    "heading",
    "paint",
    "policies_text",
    "table",
    "width",
    "wrapped",
]

WIDTH = 100


def coloured() -> bool:
    """Colour is for terminals only."""
    return sys.stdout.isatty()


def paint(text: str, colour: str, *, bold: bool = False) -> str:
    return click.style(text, fg=colour, bold=bold) if coloured() else text


def heading(text: str) -> str:
    return click.style(text, bold=True) if coloured() else text


def width() -> int:
    """A terminal's own width; files get what fits the documentation."""
    return shutil.get_terminal_size((WIDTH, 24)).columns if coloured() else WIDTH


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, cut: bool = True) -> str:
    """Columns by their widest cell, two spaces apart; a cell may have several lines. `cut`
    fits it to the screen: the last column goes below the others, what is still too wide is
    shortened."""
    if not rows:
        return ""
    lines = _side_by_side([head, *rows])
    most = width()
    if cut and max(map(len, lines)) > most:
        if len(head) > 2 and max(map(len, _side_by_side([r[:-1] for r in (head, *rows)]))) <= most:
            *others, last = zip(head, *rows, strict=True)
            lines = []
            # Row by row, so that each has its last cell below it.
            blocks = _side_by_side(list(zip(*others, strict=True)), blocks=True)
            for block, cell in zip(blocks, last, strict=True):
                below = wrapped(cell.replace(",\n", "\n").split("\n"), most - 4)
                lines += [*block.split("\n"), *(f"    {line}" for line in below.split("\n"))]
        lines = [text if len(text) <= most else text[: most - 1] + "…" for text in lines]
    return "\n".join([heading(lines[0]), *lines[1:]])


def _side_by_side(rows: Sequence[Sequence[str]], *, blocks: bool = False) -> list[str]:
    """The lines of the rows; with `blocks`, one text for each row."""
    split = [list(zip_longest(*(cell.split("\n") for cell in row), fillvalue="")) for row in rows]
    widths = [max(map(len, column)) for column in zip(*(x for r in split for x in r), strict=True)]
    texts = [
        ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines] for lines in split
    ]
    return (
        ["\n".join(lines) for lines in texts] if blocks else [x for lines in texts for x in lines]
    )


def wrapped(items: Sequence[str], width: int, separator: str = ", ") -> str:
    """Items one after the other, on as many lines as they need."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(separator) + len(item) <= width:
            lines[-1] += separator + item
        else:
            if lines:
                lines[-1] += separator.rstrip()
            lines.append(item)
    return "\n".join(lines)


def columns(items: Sequence[str], *, indent: int = 2) -> str:
    """Short texts side by side, read downwards."""
    if not items:
        return ""
    widest = max(len(item) for item in items) + 3
    across = max(1, (width() - indent) // widest)
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
        name = "/".join(filter(None, (policy["namespace"], policy["name"])))
        if policy.get("kind") == "Firewall":
            name = f"Firewall {name}" if name else "lockgate firewall"
        texts.append(f"{name}{' ' + rules if rules else ''}")
    return ", ".join(texts)


def flow_line(record: Mapping[str, Any]) -> str:
    """One flow record as a line; who decided comes below it when both do not fit beside."""
    if record.get("type") == "missed":
        return f"… {record['count']} records missed: they came faster than they were read"
    allowed = record["verdict"] == "allow"
    verdict = paint("allow", "green") if allowed else paint("deny ", "red")
    direction = record["direction"] or "-"
    flags = record.get("tcpFlags")
    protocol = record["protocol"] + (f" {','.join(flags)}" if flags and flags != ["SYN"] else "")
    notes = []
    if record["policies"]:
        by = "by" if allowed else "isolated by"
        if (cause := record.get("cause") or "").startswith("firewall"):
            by = f"{cause}, by"
        notes.append(f"{by} {policies_text(record['policies'])}")
    elif record.get("cause") and record["cause"] != "policy":
        notes.append(record["cause"])
    if service := record.get("service"):
        notes.append(f"(service {service['namespace']}/{service['name']})")
    time = record["time"][11:23]
    what = (
        f"{direction:<7}  {end_name(record['source'])} → {end_name(record['destination'])}"
        f"  {protocol}"
    )
    beside = "  ".join(["", *notes])
    if len(f"{time}  allow  {what}{beside}") > width():
        room = width() - len(time) - 9
        beside = "".join(f"\n{' ' * (len(time) + 9)}{x}" for x in _lines(notes, room) if x)
    return f"{time}  {verdict}  {what}{beside}"


def _lines(notes: list[str], room: int) -> list[str]:
    together = "  ".join(notes)
    return [together] if len(together) <= room else notes

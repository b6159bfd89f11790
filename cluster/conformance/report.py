"""What became of the specs: a table for people, JUnit for programs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from cluster.conformance.batches import Result

__all__ = ["good", "print_table", "write_junit"]

_MESSAGE_LINES = 6


def good(results: Sequence[Result]) -> bool:
    """Whether every spec that was to run ran and passed."""
    return all(result.state == "passed" for result in results)


def print_table(console: Console, results: Sequence[Result], left_out: Mapping[str, str]) -> None:
    """Counts by what is tested, counts by reason, and what went wrong."""
    table = Table("tests of", box=None)
    for column in ("passed", "failed", "left out"):
        table.add_column(column, justify="right")
    counts: Counter[tuple[str, str]] = Counter()
    for result in results:
        counts[_topic(result.name), "passed" if result.state == "passed" else "failed"] += 1
    for name in left_out:
        counts[_topic(name), "left out"] += 1
    states = ("passed", "failed", "left out")
    for topic in sorted({topic for topic, _ in counts}):
        table.add_row(topic, *(str(counts[topic, state] or "") for state in states))
    table.add_section()
    totals = [str(sum(n for (_, s), n in counts.items() if s == state)) for state in states]
    table.add_row("all", *totals)
    console.print(table)
    for reason, count in Counter(left_out.values()).most_common():
        console.print(f"  left out: {count:3} {reason}", highlight=False)
    for result in results:
        if result.state != "passed":
            lines = result.message.strip().splitlines()[:_MESSAGE_LINES]
            console.print(f"\n  {result.state}: {result.name}", highlight=False, markup=False)
            for line in lines:
                console.print(f"    {line}", highlight=False, markup=False)


def write_junit(path: Path, results: Sequence[Result], left_out: Mapping[str, str]) -> None:
    """One test case per spec; those left out are skipped, with the reason."""
    suite = ElementTree.Element("testsuite", name="sig-network")
    for result in results:
        case = _case(suite, result.name, result.seconds)
        if result.state != "passed":
            kind = f"{result.state}: " if result.state != "failed" else ""
            ElementTree.SubElement(case, "failure", message=kind + _printable(result.message))
    for name, reason in left_out.items():
        ElementTree.SubElement(_case(suite, name, 0), "skipped", message=reason)
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(sum(result.state != "passed" for result in results)))
    suite.set("skipped", str(len(left_out)))
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.indent(suite)
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _case(suite: ElementTree.Element, name: str, seconds: float) -> ElementTree.Element:
    attributes = {"classname": _topic(name), "name": name, "time": f"{seconds:.3f}"}
    return ElementTree.SubElement(suite, "testcase", attributes)


def _topic(name: str) -> str:
    """The words of the outer container: "Netpol", "Networking Granular Checks: Pods"."""
    plain = re.sub(r"\[[^]]*\] ?", "", re.sub(r"^\[Feature:(\w+)\]", r"\1", name))
    return re.split(r" (?:[Ss]hould|validates|NetworkPolicy|A set|version) ", plain, maxsplit=1)[0]


def _printable(text: str) -> str:
    """Without what XML does not allow (XML 1.0, 2.2)."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd]", "?", text)

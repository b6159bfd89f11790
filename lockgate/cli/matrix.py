"""What `lockgate probe` found, as text: the matrix of workloads, and what differs."""

from __future__ import annotations

import textwrap

from lockgate.cli.checks import Check, Summary, workload
from lockgate.cli.render import columns, heading, paint, width

__all__ = ["differences_text", "matrix"]

_SHOWN = 10  # unanswered connections that are listed


def matrix(summary: Summary) -> str:
    """Rows are workloads that ask, columns are workloads (or services) and their ports. Fits
    the screen: what does not fit beside comes below."""
    rows: dict[str, dict[str, list[Check]]] = {}
    heads: dict[str, int] = {}
    for check in summary.checks:
        name = workload(check.source)
        rows.setdefault(name, {}).setdefault(check.column, []).append(check)
        heads.setdefault(check.column, len(heads) + 1)
    if not rows:
        return "no pair of pods to try"
    legend = [f"{number:>2} {column}" for column, number in heads.items()]
    side = min(34, max(map(len, rows)))
    across = max(1, (width() - side - 2) // 3)
    ordered = list(heads)
    lines = [columns(legend, indent=0), ""]
    for start in range(0, len(ordered), across):
        block = ordered[start : start + across]
        lines.append(" " * side + "  " + "".join(f"{heads[c]:>3}" for c in block))
        for name, cells in sorted(rows.items()):
            label = name if len(name) <= side else name[: side - 1] + "…"
            marks = "".join("  " + _mark(cells.get(column, [])) for column in block)
            lines.append(f"{label:<{side}}  {marks}")
        lines.append("")
    lines.append(
        "● allowed   · denied   ◐ some of each   ? nobody to answer   ○ no answer   ✗ differs"
    )
    return "\n".join(lines)


def _mark(checks: list[Check]) -> str:
    if not checks:
        return " "
    if any(check.difference for check in checks):
        return paint("✗", "red", bold=True)
    if any(check.unanswered for check in checks):
        return paint("○", "yellow")
    # A pod always reaches itself; that hides what is asked when there are others.
    others = [check for check in checks if "/".join(check.source.key) != check.target]
    measured = {check.measured for check in others or checks} - {"unknown"}
    if measured == {"allow"}:
        return paint("●", "green")
    if measured == {"deny"}:
        return paint("·", "red")
    return paint("◐", "yellow") if measured else "?"


def _told(check: Check, what: str | None) -> str:
    return (
        f"  {'/'.join(check.source.key)} → {check.target} ({check.address}) "
        f"port {check.port}/{check.protocol}:\n"
        + textwrap.fill(what or "", width(), initial_indent="    ", subsequent_indent="    ")
    )


def differences_text(summary: Summary) -> str:
    """A line for the whole, and one for each difference."""
    checks = summary.checks
    allowed = sum(check.measured == "allow" for check in checks)
    unknown = sum(check.measured == "unknown" for check in checks)
    lines = [
        f"{len(checks)} connections tried: {allowed} allowed, "
        f"{len(checks) - allowed - unknown} denied"
        + (f", {unknown} that nobody would answer" if unknown else "")
    ]
    found = summary.differences
    if found:
        lines.append(heading(f"{len(found)} differ from the specification:"))
        lines += [_told(check, check.difference) for check in found]
    elif checks and not summary.complaints:
        lines.append("Every one is as the specification says.")
    silent = [check for check in checks if check.unanswered]
    if silent:
        lines.append(heading(f"{len(silent)} were allowed, but the server did not answer:"))
        lines += [_told(check, check.unanswered) for check in silent[:_SHOWN]]
        if len(silent) > _SHOWN:
            lines.append(f"  … and {len(silent) - _SHOWN} more (--json has all)")
    lines += [f"  {complaint}" for complaint in summary.complaints]
    return "\n".join(lines)

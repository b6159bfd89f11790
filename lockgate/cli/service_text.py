"""What `lockgate service` prints, for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lockgate.cli.explain import REFUSALS
from lockgate.cli.render import heading, paint, policies_text, table, wrapped
from lockgate.explain.names import Names
from lockgate.explain.trace import Step, Trace, join
from lockgate.objects.address import format_address, parse_address

__all__ = ["list_text", "show_text", "trace_text"]

Row = dict[str, Any]
_BAR = 24


def list_text(rows: Sequence[Row]) -> str:
    head = ["NAMESPACE", "NAME", "TYPE", "MODE", "OUTSIDE", "INSIDE", "ENDPOINTS", "FRONTENDS"]
    return table(
        head,
        [
            [
                row["namespace"],
                row["name"],
                row["type"],
                _mode(row),
                row["externalTrafficPolicy"] or "-",
                row["internalTrafficPolicy"],
                endpoints_text(row["endpoints"]),
                ",\n".join(frontend_texts(row["frontends"])),
            ]
            for row in rows
        ],
    )


def _mode(row: Row) -> str:
    if row["externalTrafficPolicy"] is None:
        return "-"
    return row["forwarding"] or "?"


def endpoints_text(counts: Row) -> str:
    """3 ready, 1 ending; by family where they differ."""

    def one(count: Row) -> str:
        ending = f", {count['ending']} ending" if count["ending"] else ""
        return f"{count['ready']} ready{ending}"

    if len({one(count) for count in counts.values()}) == 1:
        return one(next(iter(counts.values())))
    return "\n".join(f"{family} {one(count)}" for family, count in counts.items()) or "-"


def frontend_texts(frontends: Sequence[Row]) -> list[str]:
    """One of each; node ports once for all nodes."""
    found = []
    for one in frontends:
        host = f"node:{one['port']}" if one["kind"] == "node" else join(one["address"], one["port"])
        taken = f" ({one['takenBy']} has it)" if one["takenBy"] else ""
        found.append(f"{host}/{one['protocol']}{taken}")
    return list(dict.fromkeys(found))


# ---- One service -----------------------------------------------------------------


def show_text(row: Row, names: Names) -> str:
    title = f"{row['namespace']}/{row['name']}"
    lines = [f"{heading(title)}  {row['type']}, {endpoints_text(row['endpoints'])}", ""]
    lines += [f"  {label:<16} {text}" for label, text in _facts(row)]
    if not row["frontends"]:
        lines += ["", f"  not served: {row['unserved']}"]
    for one in row["inForce"]:
        groups = _alike(one["nodes"])
        named = f" {one['name']}" if one["name"] else ""
        lines += [
            "",
            heading(
                f"{one['port']}/{one['protocol']}{named}, {one['family']}, clients {one['clients']}"
            ),
        ]
        for nodes, view in groups:
            where = "" if len(groups) == 1 else f"on {', '.join(nodes)}: "
            other = view and _another(view["of"], title)
            if other:
                lines.append(f"  {where}{other} has it")
            else:
                lines += _view_lines(one["clients"], view, where, names)
        if not groups:
            lines.append("  no node was asked")
    lines += ["", *(f"node {node}: {told}" for node, told in row["unanswered"].items())]
    return "\n".join(lines).rstrip()


def _facts(row: Row) -> list[tuple[str, str]]:
    inside = [row["internalTrafficPolicy"]]
    if row["trafficDistribution"]:
        inside.append(row["trafficDistribution"])
    outside = []
    if row["externalTrafficPolicy"]:
        outside = [row["externalTrafficPolicy"], *filter(None, [row["forwarding"]])]
        if row["sourceRanges"]:
            outside.append(f"only from {', '.join(row['sourceRanges'])}")
    found = [("clients inside", ", ".join(inside))]
    found += [("clients outside", ", ".join(outside))] if outside else []
    if row["affinitySeconds"]:
        found.append(("affinity", f"a client keeps its backend for {row['affinitySeconds']} s"))
    if row["healthCheckNodePort"]:
        found.append(("health checks", f"port {row['healthCheckNodePort']}"))
    below = "\n" + " " * 19
    for kind, label in (
        ("cluster", "cluster IPs"),
        ("balancer", "load balancer"),
        ("external", "external IPs"),
        ("node", "node ports"),
    ):
        there = [one for one in row["frontends"] if one["kind"] == kind]
        if there:
            found.append((label, wrapped(frontend_texts(there), 78).replace("\n", below)))
    return found


def _another(of: Row | None, title: str) -> str | None:
    """Who has it, if it is not the service of that name."""
    if of is None or (of["kind"] == "Service" and f"{of['namespace']}/{of['name']}" == title):
        return None
    return f"{of['kind']} {of['namespace']}/{of['name']}"


def _alike(nodes: dict[str, Row | None]) -> list[tuple[list[str], Row | None]]:
    """Nodes that have the same in force, together. Where a backend is to a node does not count."""
    found: dict[str, tuple[list[str], Row | None]] = {}
    for node, view in nodes.items():
        told = None
        if view is not None:
            owners = [
                {k: v for k, v in one.items() if k not in ("target", "hop", "node")}
                for one in view["owners"]
            ]
            told = {k: v for k, v in view.items() if k not in ("service", "slot")} | {
                "owners": owners
            }
        found.setdefault(json.dumps(told), ([], view))[0].append(node)
    return list(found.values())


def _view_lines(clients: str, view: Row | None, where: str, names: Names) -> list[str]:
    if view is None:
        return [f"  {where}nothing is in force"]
    if clients == "inside":
        backends = view["backends"]
        if not backends:
            dropped = view["localInside"]
            return [f"  {where}no backend: {'dropped' if dropped else 'refused'}"]
        kept = f"; a client keeps it for {view['affinity']} s" if view["affinity"] else ""
        text = f"  {where}one of {len(backends)} at random{kept}"
        return [text, *_rows([[*_end(one, names)] for one in backends])]
    if not view["frontend"]:
        return [f"  {where}no frontend for clients outside"]
    if not view["owners"]:
        dropped = view["localOutside"]
        return [f"  {where}no backend: {'dropped' if dropped else 'refused'}"]
    notes = []
    if all(one["ends"] for one in view["owners"]):
        notes.append(f"new connections {'dropped' if view['localOutside'] else 'refused'}")
    notes += [view["forwarding"], f"{view['slots']} slot{'s' * (view['slots'] != 1)}"]
    if view["localOutside"]:
        notes.append("only backends of the node")
    if view["ranges"]:
        notes.append("only from the source ranges")
    most = max(one["slots"] for one in view["owners"]) or 1
    rows = []
    for one in view["owners"]:
        bar = "█" * round(_BAR * one["slots"] / most)
        share = f"{100 * one['slots'] / view['slots']:5.1f} %"
        ends = "ends: no new connections" if one["ends"] else ""
        rows.append([*_end(one, names), f"{one['slots']:>5}", share, ends or bar])
    return [f"  {where}{', '.join(notes)}", *_rows(rows)]


def _rows(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["    " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _end(one: Row, names: Names) -> tuple[str, str, str]:
    end = names.end_at(parse_address(one["address"]))
    name = "/".join(end.pod.key) if end.pod else f"node {end.node}" if end.node else "-"
    node = end.pod.spec.node_name if end.pod else end.node or "-"
    return join(one["address"], one["port"]), name, node


# ---- One packet ------------------------------------------------------------------


def trace_text(trace: Trace, names: Names) -> str:
    asked = trace.asked
    service = asked.service
    of = (
        f"service {service.metadata.namespace}/{service.metadata.name}" if service else "no service"
    )
    lines = [f"{asked.text}  ({of})", ""]
    for step in trace.steps:
        told = _step_lines(step, trace, names)
        label = f"{step.node}  "
        lines += [f"{label if not i else ' ' * len(label)}{line}" for i, line in enumerate(told)]
    last = trace.steps[-1]
    lines.append("")
    if last.verdict == "none":
        lines.append(paint("none", "yellow", bold=True) + f"  {_arrives(last)}")
    elif trace.reaches:
        by = f": by {last.direction}, {policies_text(last.policies)}" if last.policies else ""
        lines.append(paint("allow", "green", bold=True) + f"  {_arrives(last)}{by}")
    else:
        lines.append(paint("deny", "red", bold=True) + f"  at {last.node}: {_why(last)}")
    return "\n".join(lines)


def _step_lines(step: Step, trace: Trace, names: Names) -> list[str]:
    lines = []
    view = step.view
    if step.firewall and step.firewall["rule"] and not step.firewall["cause"]:
        lines += _firewall_lines(step.firewall)
    if step.program == "from_pod":
        if view is not None:
            lines.append(f"one of {len(view['backends'])} backends at random, for its pod")
    elif view is not None and view["slot"] and _chooses(step, trace):
        lines.append(
            f"hash {trace.hash:08x}, slot {view['slot']['number']} of {view['slots']}, owned by"
        )
        for place, owner in enumerate(step.owners, 1):
            address, name, node = _end(owner, names)
            ends = ", ends" if owner["ends"] else ""
            lines.append(f"  {place}. {name} {address} on {node}{ends}")
    went = step.went
    if step.verdict == "deny" or went is None:
        lines.append(f"dropped: {_why(step)}")
        return lines
    backend = join(format_address(went.destination), went.dport)
    if step.mode == "dsr" and went.outer:
        source, to = map(format_address, went.outer)
        lines.append(f"dsr: encapsulated {source} → {to}, to node {step.name}")
    elif step.mode == "snat":
        lines.append(
            f"snat: as {join(format_address(went.source), went.sport)} → {backend},"
            f" to node {step.name}"
        )
    elif step.to == "pod":
        lines.append(f"into pod {step.name}, {backend}")
    elif step.to == "stack":
        lines.append(f"to the node's own stack, {backend}")
    else:
        lines.append(f"→ {backend}, to {step.to} {step.name}")
    return lines


def _chooses(step: Step, trace: Trace) -> bool:
    """Whether the node asked its table: what comes for a pod of its own was chosen before."""
    if step.came.outer is None:
        return step.came.destination == trace.asked.frontend
    return step.to != "pod" and not step.policies


def _arrives(step: Step) -> str:
    if step.to == "pod":
        return f"pod {step.name} answers"
    if step.to != "stack":
        asks = ": no frontend of a service" if step.verdict == "none" else ""
        return f"it leaves for {step.name}{asks}"
    if step.verdict == "none":
        return f"left to the stack of {step.node}: no frontend of a service"
    return f"the stack of {step.node} answers"


def _firewall_lines(told: Row) -> list[str]:
    rule = told["rule"]
    if rule["source"] == "builtin":
        return []
    rate = f", up to {rate} packets a second" if (rate := rule["rate"]) else ""
    return [f"firewall: {told['prefix']} is allowed by {_rule_text(rule)}{rate}"]


def _rule_text(rule: Row) -> str:
    return "a command" if rule["source"] == "command" else f"{rule['name']} rules[{rule['rule']}]"


def _why(step: Step) -> str:
    if step.firewall and step.firewall["cause"] == step.cause == "firewall":
        rule = step.firewall["rule"]
        if rule is None:
            return "firewall: no entry allows it, and the default is Drop"
        return f"firewall: {step.firewall['prefix']} is denied by {_rule_text(rule)}"
    if step.cause is not None:
        return REFUSALS.get(step.cause, step.cause)
    return f"{step.direction}: isolated by {policies_text(step.policies)}"

"""The screen of `lockgate up`: what is there, who may talk to whom as measured, what to try."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from lockgate.access import Access
from lockgate.cli.checks import Summary
from lockgate.cli.common import load_objects
from lockgate.cli.flows import recent
from lockgate.cli.matrix import differences_text, matrix
from lockgate.cli.probe import measure
from lockgate.cli.render import flow_line, heading
from lockgate.cli.views import as_table, node_rows, pod_rows, service_rows

__all__ = ["everything", "show"]


def show(access: Access, options: str) -> bool:
    """Prints it all; True when everything measured is as the specification says. `options` make
    a command mean this cluster: " --cluster NAME"."""
    cluster = load_objects(access)
    for title, command, text in (
        ("Nodes", "get nodes", as_table("nodes", node_rows(cluster))),
        ("Pods", "get pods", as_table("pods", pod_rows(cluster))),
        (
            "Services and their backends",
            "get services",
            as_table("services", service_rows(cluster)),
        ),
    ):
        if text:
            click.echo(f"{_title(title, command)}{text}")
    click.echo(_title("Who may talk to whom, measured with real connections", "probe"), nl=False)
    summary = measure(access, cluster)
    click.echo(f"{matrix(summary)}\n\n{differences_text(summary)}")
    records, complaints = recent(access, {"verdict": "deny", "limit": "2000"})
    if records:
        title = "The last denied connections, and the policies that denied them"
        click.echo(_title(title, "flows --verdict deny"), nl=False)
        for record in _various(records, 8):
            click.echo(flow_line(record))
    for complaint in complaints:
        click.echo(f"lockgate: {complaint}", err=True)
    click.echo(_title("What to try next, in another terminal", ""), nl=False)
    for command, meaning in _next_steps(summary, access.standalone, options):
        click.echo(f"  # {meaning}\n  {command}")
    return summary.good


def everything(access: Access) -> tuple[dict[str, Any], bool]:
    """The same as one object, and whether everything measured is as the specification says."""
    cluster = load_objects(access)
    summary = measure(access, cluster, progress=False)
    records, complaints = recent(access, {"verdict": "deny", "limit": "10"})
    return {
        "nodes": node_rows(cluster),
        "pods": pod_rows(cluster),
        "services": service_rows(cluster),
        "probe": [check.json() for check in summary.checks],
        "denied": records,
        "complaints": summary.complaints + complaints,
    }, summary.good


def _title(title: str, command: str) -> str:
    text = f"── {title}" + (f": lockgate {command}" if command else "")
    return f"\n{heading(text)}\n\n"


def _various(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The last record of each pair of source and deciding policies, the newest pairs."""
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        policies = tuple((p["namespace"], p["name"]) for p in record["policies"])
        source = record["source"]
        key = (source.get("namespace"), source.get("pod"), record["cause"], policies)
        last.pop(key, None)
        last[key] = record
    return list(last.values())[-most:]


def _next_steps(summary: Summary, standalone: bool, options: str) -> list[tuple[str, str]]:
    # Among the user's own pods, which rather have a shell.
    checks = [c for c in summary.checks if c.source.metadata.namespace != "kube-system"]
    denied = next((c for c in checks if c.expected == "deny" and not c.refusal), None)
    check = denied or next(iter(checks), None)
    steps = []
    program = _program() if standalone else "lockgate"
    if check is not None:
        source = "/".join(check.source.key)
        run = f"{program} exec{options} {source}"
        if not standalone:
            run = f"kubectl exec -n {source.replace('/', ' ')}"
        steps = [
            (
                f"{program} explain{options} {source} {check.target} {check.port}/"
                f"{check.protocol.lower()}",
                "who decides, and what would change it",
            ),
            (f"{run} -- ip addr", "run something in a pod"),
        ]
    return [
        *steps,
        (f"{program} flows{options} -f --verdict deny", "denials as they happen"),
        (f"{program} probe{options}", "measure again, after you changed a policy and saved it"),
    ]


def _program() -> str:
    """This command as a shell in the same folder finds it: in a checkout it is on no PATH."""
    called = Path(sys.argv[0])
    if called.name != "lockgate" or shutil.which("lockgate"):
        return "lockgate"
    path = called.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)

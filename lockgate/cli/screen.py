"""The screen of `lockgate up`: what is there, who may talk to whom as measured, what to try."""

from __future__ import annotations

import click

from lockgate.cli.common import running
from lockgate.cli.flows import recent
from lockgate.cli.probe import Summary, differences_text, matrix, measure
from lockgate.cli.render import flow_line, heading
from lockgate.cli.views import as_table, load_cluster, node_rows, pod_rows, service_rows

__all__ = ["show"]


def show(cluster_name: str) -> bool:
    """Prints it all; True when everything measured is as the specification says."""
    state = running(cluster_name)
    cluster = load_cluster(state)
    for title, text in (
        ("Nodes", as_table("nodes", node_rows(cluster))),
        ("Pods", as_table("pods", pod_rows(cluster))),
        ("Services", as_table("services", service_rows(cluster))),
    ):
        if text:
            click.echo(f"\n{heading(title)}\n\n{text}")
    click.echo(f"\n{heading('Who may talk to whom, measured with real connections')}\n")
    summary = measure(state, cluster)
    click.echo(matrix(summary))
    click.echo(f"\n{differences_text(summary)}")
    records, complaints = recent(state, {"verdict": "deny", "limit": "5"})
    if records:
        click.echo(f"\n{heading('The last denied connections')}\n")
        for record in records:
            click.echo(flow_line(record))
    for complaint in complaints:
        click.echo(f"lockgate: {complaint}", err=True)
    click.echo(f"\n{heading('What to try next')}\n")
    for command, meaning in _next_steps(summary, cluster_name):
        click.echo(f"  {command:<58} {meaning}")
    return summary.good


def _next_steps(summary: Summary, cluster_name: str) -> list[tuple[str, str]]:
    option = "" if cluster_name == "default" else f" --cluster {cluster_name}"
    denied = next((c for c in summary.checks if c.expected == "deny" and not c.refusal), None)
    check = denied or next(iter(summary.checks), None)
    steps = []
    if check is not None:
        source = "/".join(check.source.key)
        steps = [
            (
                f"lockgate explain{option} {source} {check.target} {check.port}/"
                f"{check.protocol.lower()}",
                "who decides, and what would change it",
            ),
            (f"lockgate exec{option} {source} -- ip addr", "run something in a pod"),
        ]
    return [
        *steps,
        (f"lockgate flows{option} -f --verdict deny", "denials as they happen"),
        (f"lockgate probe{option}", "measure again, after you changed a policy"),
    ]

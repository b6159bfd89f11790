"""`lockgate doctor`: tries every way, looks for what stands in it, and says what to do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec

from lockgate.access import Access, Refused
from lockgate.agent.doctor import Finding
from lockgate.cli import paths
from lockgate.cli.common import access_options, fail_unanswered, json_option, print_json
from lockgate.cli.render import heading, paint
from lockgate.cli.status import gather, problems
from lockgate.objects.model import Cluster, Pod

__all__ = ["FOREIGN_POLICIES", "daemons", "doctor", "examine", "of_ours", "policies"]

Row = dict[str, Any]
#: Policies that only other data planes enforce: plural.group → their daemons (label k8s-app, app).
FOREIGN_POLICIES = {
    "ciliumnetworkpolicies.cilium.io": ("cilium",),
    "ciliumclusterwidenetworkpolicies.cilium.io": ("cilium",),
    "networkpolicies.crd.projectcalico.org": ("calico-node",),
    "globalnetworkpolicies.crd.projectcalico.org": ("calico-node",),
    # The same by Calico's API server, and the only ones where it keeps them as they are.
    "networkpolicies.projectcalico.org": ("calico-node",),
    "globalnetworkpolicies.projectcalico.org": ("calico-node",),
    "networkpolicies.crd.antrea.io": ("antrea",),
    "clusternetworkpolicies.crd.antrea.io": ("antrea",),
    "adminnetworkpolicies.policy.networking.k8s.io": ("calico-node", "antrea"),
    "baselineadminnetworkpolicies.policy.networking.k8s.io": ("calico-node", "antrea"),
    "clusternetworkpolicies.policy.networking.k8s.io": ("calico-node", "antrea"),
}
_DAEMONS = {
    "cilium": "Cilium",
    "calico-node": "Calico",
    "antrea": "Antrea",
    "flannel": "flannel",
    "weave-net": "Weave Net",
    "kube-router": "kube-router",
    "kindnet": "kindnet",
    "kube-proxy": "kube-proxy",
}
_MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "ok": ("✓", "green")}


@click.command()
@click.option(
    "--outside",
    metavar="ADDRESS:PORT",
    multiple=True,
    help="Beyond the cluster: pods try it. Once for each family.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show what is well, too.")
@json_option
@access_options
def doctor(outside: tuple[str, ...], verbose: bool, as_json: bool, access: Access) -> None:
    """Try every way through the cluster, and look for what stands in it.

    From each node: pod to pod (same node, other node), node to pod, to a service (at each kind of
    address that there is), to the API server, outside, DNS; connections that the policies allow,
    so silence is a fault. Then each node's kernel, MTU, reverse path filter, firewalls, other CNI
    plugins, kube-proxy, and policies of other systems that nobody enforces. Each finding says what
    to do.

    Exit codes: 0 no error (perhaps warnings), 1 errors, 2 no such cluster.
    """
    beyond = _outside(outside)
    try:
        findings = examine(access, beyond)
    except (OSError, Refused) as error:
        fail_unanswered(access, error)
    if as_json:
        print_json(msgspec.to_builtins(findings))
    else:
        _print(findings, verbose)
    raise SystemExit(1 if any(one.severity == "error" for one in findings) else 0)


def _outside(texts: tuple[str, ...]) -> dict[int, tuple[str, int]]:
    found = {}
    for text in texts:
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit():
            raise click.BadParameter("expected ADDRESS:PORT", param_hint="--outside")
        host = host.strip("[]")
        found[6 if ":" in host else 4] = (host, int(port))
    return found


def examine(access: Access, outside: dict[int, tuple[str, int]]) -> list[Finding]:
    """All findings. Raises Refused or OSError when the cluster does not answer."""
    told = gather(access)
    findings = [
        Finding("error", "status", one["text"], "lockgate status shows all nodes", one["node"])
        for one in problems(told)
    ]
    names = [node["name"] for node in told["nodes"] if "node" in node["agentStatus"]]
    cluster = access.objects()
    for name, facts, of_node in _nodes(access, names, findings):
        findings += [msgspec.structs.replace(one, node=name) for one in of_node]
        told_of = next(node for node in told["nodes"] if node["name"] == name)
        told_of["facts"] = facts
    findings += _alike(told["nodes"])
    findings += daemons(cluster)
    findings += policies(access, cluster)
    ways = of_ours(cluster, told["nodes"])
    if access.standalone and not outside:
        from lockgate.standalone.underlay import OUTSIDE4, OUTSIDE6

        outside = {4: (OUTSIDE4, 9), 6: (OUTSIDE6, 9)}
    tried = paths.plan(ways, names, outside, _server(told["nodes"]))
    paths.try_all(access, tried)
    families = {path.family for path in tried}
    findings += [_untried(family) for family in sorted(families - outside.keys())]
    return findings + [_of_path(path) for path in tried]


def _nodes(
    access: Access, names: list[str], findings: list[Finding]
) -> list[tuple[str, Row, list[Finding]]]:
    """What each agent finds on its node."""

    def ask(name: str) -> tuple[str, Row, list[Finding]] | Finding:
        try:
            answer = access.call(name, "agent", "GET", "/v1/doctor")
        except (OSError, Refused) as error:
            return Finding("error", "agent", f"the node can't be examined: {error}", "", name)
        return name, answer["facts"], msgspec.convert(answer["findings"], list[Finding])

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, names))
    findings += [one for one in found if isinstance(one, Finding)]
    return [one for one in found if not isinstance(one, Finding)]


def of_ours(cluster: Cluster, nodes: list[Row]) -> Cluster:
    """Pure: the cluster without the pods that another CNI plugin wired on nodes of ours: to those
    of ours there they have no way (docs/migrate.md)."""
    foreign = {
        tuple(name.split("/"))
        for node in nodes
        for name in node.get("facts", {}).get("foreign", ())
    }
    pods = {key: pod for key, pod in cluster.pods.items() if key not in foreign}
    return msgspec.structs.replace(cluster, pods=pods)


def _alike(nodes: list[Row]) -> list[Finding]:
    """Pods' MTU must be one: no node tells another's pods of a smaller one."""
    mtus: dict[int, list[str]] = {}
    for node in nodes:
        if "facts" in node:
            mtus.setdefault(node["facts"]["pod_mtu"], []).append(node["name"])
    if len(mtus) < 2:
        return []
    text = "; ".join(f"{mtu} on {', '.join(names)}" for mtu, names in sorted(mtus.items()))
    advice = f"set mtu in the ConfigMap lockgate to {min(mtus)}"
    return [Finding("warning", "mtu", f"pods' MTU differs between nodes: {text}", advice)]


def daemons(cluster: Cluster) -> list[Finding]:
    """Pure: other data planes that run."""
    running: dict[str, int] = {}
    for pod in cluster.pods.values():
        name = _daemon(pod)
        if name:
            running[name] = running.get(name, 0) + 1
    return [
        Finding(
            "warning",
            "daemons",
            f"{_DAEMONS[name]} runs on this cluster ({count} pod{'s' * (count > 1)})",
            "Lockgate does its work: delete its DaemonSet (docs/migrate.md)",
        )
        for name, count in sorted(running.items())
    ]


def _daemon(pod: Pod) -> str:
    labels = pod.metadata.labels
    name = labels.get("k8s-app") or labels.get("app") or labels.get("name", "")
    live = pod.status.phase == "Running" and pod.spec.host_network
    return name if live and name in _DAEMONS else ""


def policies(access: Access, cluster: Cluster) -> list[Finding]:
    """Policies of other systems that nobody enforces."""
    running = {_daemon(pod) for pod in cluster.pods.values()}
    found = []
    try:
        there = [name for name in access.resources() if name in FOREIGN_POLICIES]
    except (OSError, Refused) as error:
        text = f"policies of other systems could not be looked for: {error}"
        return [Finding("warning", "policies", text)]
    for name in there:
        try:
            count = access.count(name)
        except (OSError, Refused) as error:
            found.append(Finding("warning", "policies", f"{name} could not be counted: {error}"))
            continue
        if count and running.isdisjoint(FOREIGN_POLICIES[name]):
            text = f"{count} {name}: nobody enforces them any more"
            advice = f"write them as NetworkPolicy, then delete them: kubectl get {name} -A -o yaml"
            found.append(Finding("error", "policies", text, advice))
    return found or [Finding("ok", "policies", "no policy of another system is left alone")]


def _server(nodes: list[Row]) -> dict[int, tuple[str, int]]:
    """Address and port of the API server, as the nodes see it, by family; none on a standalone
    cluster."""
    found: dict[int, tuple[str, int]] = {}
    for node in nodes:
        parts = urlsplit(node["agentStatus"].get("api", {}).get("server", ""))
        if parts.hostname:
            found[6 if ":" in parts.hostname else 4] = (parts.hostname, parts.port or 443)
    return found


def _untried(family: int) -> Finding:
    text = f"pod → outside (IPv{family}): not tried, give --outside ADDRESS:PORT"
    return Finding("ok", "untried", text)


def _of_path(path: paths.Path) -> Finding:
    if not path.candidates:
        text = f"{path}: not tried, the policies allow none that could be"
        return Finding("ok", "path", text, "", path.node)
    origin = "/".join(path.place.pod.key) if path.place.pod else path.node
    ends = " and ".join(
        f"{name} ({target.address} port {target.port})"
        for name, target in zip(path.names, path.candidates, strict=True)
    )
    if path.error:
        return Finding(
            "warning", "path", f"{path}: could not be tried: {path.error}", "", path.node
        )
    if path.open:
        return Finding("ok", "path", f"{path}: open", "", path.node)
    if path.silent:
        text = f"{path}: no answer from {ends}, which over UDP need not be a fault"
        return Finding("ok", "path", text, "", path.node)
    results = " and ".join(dict.fromkeys(r.result for r in path.results))
    end = path.candidates[0]
    source = origin if path.place.pod else "the node's address"
    advice = (
        f"the policies allow it. lockgate explain {source} {end.address} {end.port}/{end.protocol} "
        f"asks the kernel; the findings about node {path.node} tell what may stand in the way"
    )
    return Finding("error", "path", f"{path}: {origin} → {ends}: {results}", advice, path.node)


def _print(findings: list[Finding], verbose: bool) -> None:
    counts = dict.fromkeys(_MARKS, 0)
    for one in findings:
        counts[one.severity] += 1
    nodes = dict.fromkeys(one.node for one in findings)
    for node in sorted(nodes):
        mine = [one for one in findings if one.node == node]
        shown = [one for one in mine if verbose or one.severity != "ok"]
        well = len(mine) - len(shown)
        click.echo(heading(f"node {node}" if node else "cluster"))
        for one in sorted(shown, key=lambda one: list(_MARKS).index(one.severity)):
            mark, colour = _MARKS[one.severity]
            click.echo(f"  {paint(mark, colour, bold=True)} {one.text}")
            if one.advice:
                click.echo(f"      → {one.advice}")
        if well:
            click.echo(f"  {paint('✓', 'green')} {well} more looked at and well")
    for one in findings:
        if one.check == "untried" and not verbose:
            click.echo(f"\n{one.text}")
    click.echo(
        f"\n{_number(counts['error'], 'error')}, {_number(counts['warning'], 'warning')}, "
        f"{counts['ok']} well" + ("" if verbose else " (-v shows them)")
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")

"""`lockgate uninstall`: leaves a node as it was; says how a cluster is left."""

from __future__ import annotations

import os
from pathlib import Path

import click

from lockgate.access import Refused
from lockgate.access.kubernetes import NAMESPACE, KubernetesAccess
from lockgate.cli.common import fail, json_option, need_root, print_json, reach
from lockgate.cli.plugin import called_as_plugin

__all__ = ["uninstall"]

REFUSED = 3
_IN_CONTAINER = Path("/etc/lockgate/agent.json")


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="The agent's configuration.")
@click.option(
    "--node",
    default="",
    metavar="NAME",
    help="This node's; else its host name. With --manifest: only for this one.",
)
@click.option(
    "--cluster", default="", metavar="NAME", help="Setting `cluster` of the chart, if there is one."
)
@click.option("--force", is_flag=True, help="Even if running pods lose their network.")
@click.option("--kubeconfig", default="", metavar="FILE", help="A cluster's: say what to do there.")
@click.option("--context", default="", metavar="NAME", help="Of the kubeconfig.")
@click.option(
    "--manifest", is_flag=True, help="Print the pods that do it on each node of the cluster."
)
@json_option
def uninstall(
    config: Path | None,
    node: str,
    cluster: str,
    force: bool,
    kubeconfig: str,
    context: str,
    manifest: bool,
    as_json: bool,
) -> None:
    """Leave this node as it was before Lockgate; with a kubeconfig, say how to leave a cluster.

    On a node, as root, when its agent has ended: takes away the CNI configuration and plugin,
    then programs, maps and pins, links, routes and addresses of ours, then state and sockets.
    Nothing of others is touched; files of others in our folders are named. Refuses while the
    agent runs, and while pods have their network from Lockgate. Can be repeated.

    With --kubeconfig or --context, or as `kubectl lockgate`: prints the steps, in their order,
    and with --manifest the pods that clean the nodes: those that have a pod of ours now, or the
    one that --node names. Changes nothing. (A standalone cluster goes by `lockgate down`.)

    Exit codes: 0 done, 1 something resisted, 2 wrong use, 3 refused: nothing was changed.
    """
    if kubeconfig or context or manifest or called_as_plugin():
        if config or cluster or (node and not manifest):
            fail("--config, --cluster, and --node without --manifest, are of a node itself")
        _tell(kubeconfig, context, manifest, node, force)
    else:
        _leave(config, node, cluster, force, as_json)


def _leave(path: Path | None, node: str, cluster: str, force: bool, as_json: bool) -> None:
    need_root()
    from lockgate.agent import uninstall as work
    from lockgate.agent.config import Config, read
    from lockgate.net.namespaces import enter

    if path is None and not (node or cluster) and _IN_CONTAINER.exists():
        path = _IN_CONTAINER
    try:
        if path is not None:
            config = read(path)
        else:
            config = Config(
                cluster=cluster or "default",
                node=node or os.environ.get("NODE_NAME", "") or os.uname().nodename.lower(),
                run_dir="/run/lockgate",
                cni_bin="/opt/cni/bin",
                cni_conf="/etc/cni/net.d",
            )
            _check_pins(config.pins)
        if config.netns_path is not None:
            enter(config.netns_path)
        removed, kept = work.uninstall(config, force)
    except work.Refused as error:
        fail(str(error), REFUSED)
    except (OSError, ValueError) as error:
        fail(f"not everything could be removed: {error}", 1)
    if as_json:
        print_json({"removed": removed, "kept": kept})
        return
    for line in removed:
        click.echo(f"removed {line}")
    for line in kept:
        click.echo(f"left, for it is not ours: {line}")
    if not removed:
        click.echo("There is no trace of Lockgate on this node.")


def _check_pins(pins: Path) -> None:
    """Where another node's are and not this one's, the name is probably wrong."""
    others = sorted(str(one.relative_to(pins.parents[1])) for one in pins.parents[1].glob("*/*"))
    if others and not pins.exists():
        fail(
            f"there are no programs of node {pins.name} of cluster {pins.parent.name}, but of "
            f"{', '.join(others)}: say which with --cluster and --node",
            REFUSED,
        )


# ---- A cluster ---------------------------------------------------------------------


def _tell(kubeconfig: str, context: str, manifest: bool, node: str, force: bool) -> None:
    access = reach("", kubeconfig, context)
    if not isinstance(access, KubernetesAccess):
        access.close()
        fail("give --kubeconfig FILE or --context NAME; a standalone cluster goes by lockgate down")
    try:
        daemonset = access.daemonset()
        if node and node not in access.objects().nodes:
            fail(f"{access.title} has no node {node!r}")
        nodes = [node] if node else access.nodes()
        if manifest:
            click.echo(cleaners(daemonset, nodes, force), nl=False)
            return
        objects = access.objects()
    except (OSError, Refused) as error:
        fail(f"{access.title} does not answer: {error}")
    finally:
        access.close()
    pods = [
        pod
        for pod in objects.pods.values()
        if pod.spec.node_name in nodes and not pod.spec.host_network
    ]
    asked = "kubectl lockgate" if called_as_plugin() else "lockgate"
    given = f" --kubeconfig {kubeconfig}" if kubeconfig else ""
    given += f" --context {context}" if context else ""
    click.echo(
        f"""\
Lockgate runs on {len(nodes)} nodes of {access.title}; {len(pods)} pods have their network from it.
While an agent runs, pods can end; without one, they cannot be taken down. So, in this order:

  1. Keep what cleans the nodes:
       {asked} uninstall{given} --manifest > uninstall.yaml
  2. Move the pods away, or delete them:
       kubectl drain {nodes[0] if nodes else "NODE"} --ignore-daemonsets   (each node)
  3. End the agents:
       kubectl -n {NAMESPACE} delete daemonset lockgate --wait
  4. Clean the nodes; each pod's log says what was removed, or why nothing was:
       kubectl apply -f uninstall.yaml
       kubectl -n {NAMESPACE} logs -l app.kubernetes.io/name=lockgate-uninstall --prefix
  5. Take away the rest:
       kubectl delete -f uninstall.yaml
       kubectl delete -f deploy/lockgate.yaml       (or: helm uninstall lockgate -n {NAMESPACE})

Then the nodes have no CNI plugin: install another, or they stay NotReady."""
    )


def cleaners(daemonset: dict[str, object], nodes: list[str], force: bool) -> str:
    """A pod for each node: the agent's container, with another command. JSON, one List."""
    import copy
    import json

    items = []
    for node in nodes:
        spec = copy.deepcopy(daemonset["spec"]["template"]["spec"])  # type: ignore[index]
        (agent,) = (one for one in spec["containers"] if one["name"] == "agent")
        for probe in ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle"):
            agent.pop(probe, None)
        # The kubelet refuses a pod that names a node which its selectors exclude: one that goes
        # back has the label not-yet (docs/migrate.md).
        for choice in ("affinity", "nodeSelector"):
            spec.pop(choice, None)
        agent["command"] = ["lockgate", "uninstall", "--config", str(_IN_CONTAINER)]
        agent["command"] += ["--force"] if force else []
        spec |= {"containers": [agent], "restartPolicy": "Never", "nodeName": node}
        meta = {
            "name": f"lockgate-uninstall-{node}",
            "namespace": NAMESPACE,
            "labels": {"app.kubernetes.io/name": "lockgate-uninstall"},
        }
        items.append({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=2) + "\n"

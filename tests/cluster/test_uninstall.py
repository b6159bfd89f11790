"""Uninstalled, a node is as it was before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster import Cluster
from cluster.commands import until
from cluster.install import install

POD = """
apiVersion: v1
kind: Pod
metadata: {name: guest, namespace: default}
spec:
  containers: [{name: a, image: "localhost/agnhost:1", args: [netexec]}]
"""
UNINSTALL = ["python3", "-m", "lockgate.agent.uninstall", "--config", "/etc/lockgate/agent.json"]


@pytest.fixture
def small() -> Iterator[Cluster]:
    """One node, nothing on it."""
    with Cluster.up(f"u{os.getpid()}", nodes=1) as cluster:
        yield cluster


def traces(cluster: Cluster) -> dict[str, str]:
    """What an installation may change on the node."""
    node = cluster.nodes[0]

    def said(*command: str) -> str:
        return cluster.node_exec(node, *command)

    return {
        "links": said("ip", "-br", "link"),
        "addresses": said("ip", "-br", "addr"),
        "routes": said("ip", "route", "show", "table", "all"),
        "routes6": said("ip", "-6", "route", "show", "table", "main"),
        "plugins": said("ls", "/opt/cni/bin"),
        "configurations": said("ls", "-A", "/etc/cni/net.d"),
        "programs": said("ls", "-A", "/sys/fs/bpf"),
        "namespaces": said("find", "/run/netns", "-type", "f"),
        "state": said("find", "/run/lockgate", "/var/lib/lockgate", "-mindepth", "1"),
    }


def uninstaller(cluster: Cluster) -> str:
    """A pod that uninstalls: the agent's container, with another command."""
    daemonset = cluster.json("-n", "kube-system", "get", "daemonset", "lockgate")
    pod: dict[str, Any] = daemonset["spec"]["template"]["spec"]
    (agent,) = (one for one in pod["containers"] if one["name"] == "agent")
    for probe in ("livenessProbe", "readinessProbe"):
        del agent[probe]
    pod |= {"containers": [agent | {"command": UNINSTALL}], "restartPolicy": "Never"}
    pod["nodeName"] = cluster.nodes[0]
    meta = {"name": "uninstall", "namespace": "kube-system"}
    return yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod})


def finished(cluster: Cluster) -> str:
    phase = cluster.json("-n", "kube-system", "get", "pod", "uninstall")["status"]["phase"]
    return phase if phase in ("Succeeded", "Failed") else ""


def log(cluster: Cluster) -> str:
    return cluster.kubectl("-n", "kube-system", "logs", "uninstall")


def run(cluster: Cluster, manifest: str) -> tuple[str, str]:
    """Phase and output of the pod that uninstalls."""
    cluster.kubectl("-n", "kube-system", "delete", "pod", "uninstall", "--ignore-not-found")
    cluster.apply(manifest)
    phase = until("the pod to finish", lambda: finished(cluster), 60)
    return phase, log(cluster)


def test_a_node_is_as_it_was_after_uninstalling(small: Cluster) -> None:
    small.node_exec(small.nodes[0], "mkdir", "-p", "/run/netns", "/var/lib/lockgate")
    before = traces(small)
    install(small)
    small.apply(POD)
    wait = ("wait", "--for=condition=Ready", "pod/guest", "--timeout=60s")
    small.kubectl(*wait, timeout=70)
    assert traces(small) != before
    manifest = uninstaller(small)
    phase, said = run(small, manifest)
    assert phase == "Failed" and "still runs" in said, "while an agent runs it refuses"
    _delete_daemonset(small)
    phase, said = run(small, manifest)
    assert phase == "Failed" and "have their network from Lockgate" in said
    assert "(kubectl drain)" in said, "and it says what to do"
    # Without an agent nobody takes down pods' networks: it comes back, and pods go first.
    install(small)
    small.kubectl("delete", "pod", "guest", "--wait=true")
    small.kubectl("-n", "kube-system", "delete", "deployment", "coredns", "--cascade=foreground")
    _delete_daemonset(small)
    phase, said = run(small, manifest)
    assert phase == "Succeeded", said
    assert traces(small) == before
    phase, said = run(small, manifest)
    assert (phase, said) == ("Succeeded", ""), "again, there is nothing left to do"


def _delete_daemonset(cluster: Cluster) -> None:
    cluster.kubectl("-n", "kube-system", "delete", "daemonset", "lockgate", "--wait=true")
    until("the agent's end", lambda: not _agents(cluster), 60)


def _agents(cluster: Cluster) -> str:
    what = ("get", "pods", "-l", "app.kubernetes.io/name=lockgate", "-o", "name")
    return cluster.kubectl("-n", "kube-system", *what)

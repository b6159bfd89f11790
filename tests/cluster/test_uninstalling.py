"""Uninstalled, a node is as it was before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

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


CLEANERS = "app.kubernetes.io/name=lockgate-uninstall"


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


def lockgate(cluster: Cluster, *words: str) -> str:
    """A command from outside the cluster."""
    config = str(cluster.state.root / "kubeconfig")
    command = [sys.executable, "-m", "lockgate.cli.main", *words, "--kubeconfig", config]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finished(cluster: Cluster) -> str:
    pods = cluster.json("-n", "kube-system", "get", "pods", "-l", CLEANERS)["items"]
    (phase,) = (one["status"]["phase"] for one in pods)
    return phase if phase in ("Succeeded", "Failed") else ""


def log(cluster: Cluster) -> str:
    return cluster.kubectl("-n", "kube-system", "logs", "-l", CLEANERS)


def run(cluster: Cluster, manifest: str) -> tuple[str, str]:
    """Phase and output of the pod that uninstalls."""
    cluster.kubectl("-n", "kube-system", "delete", "pods", "-l", CLEANERS)
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
    said = lockgate(small, "uninstall")
    assert "runs on 1 nodes" in said and f"kubectl drain {small.nodes[0]}" in said
    manifest = lockgate(small, "uninstall", "--manifest")
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
    assert phase == "Succeeded" and "There is no trace" in said


def _delete_daemonset(cluster: Cluster) -> None:
    cluster.kubectl("-n", "kube-system", "delete", "daemonset", "lockgate", "--wait=true")
    until("the agent's end", lambda: not _agents(cluster), 60)


def _agents(cluster: Cluster) -> str:
    what = ("get", "pods", "-l", "app.kubernetes.io/name=lockgate", "-o", "name")
    return cluster.kubectl("-n", "kube-system", *what)

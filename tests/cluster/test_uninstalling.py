"""Uninstalled, a node is as it was before, but for empty folders."""

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


#: Where an installation writes, besides the BPF file system; the first two are made with the node.
WRITTEN = ("/etc/cni", "/opt/cni", "/run/lockgate", "/run/netns", "/var/lib/lockgate")
#: What stays of it (docs/install.md): where pods uninstall, ours are mounts; one is the runtime's.
STAYING = {"/run/lockgate", "/run/netns", "/var/lib/lockgate"}
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
        "rules": said("ip", "rule") + said("ip", "-6", "rule"),
        "neighbours": said("ip", "neigh", "show", "nud", "permanent"),
        "programs": said("find", "/sys/fs/bpf", "-mindepth", "1"),
        "files": "\n".join(found(cluster, "!", "-type", "d")),
    }


def found(cluster: Cluster, *tests: str) -> list[str]:
    """Paths below WRITTEN, themselves included, of those that are there."""
    command = f"find {' '.join(WRITTEN)} {' '.join(tests)} 2>/dev/null || true"
    return cluster.node_exec(cluster.nodes[0], "sh", "-c", command).splitlines()


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
    small.node_exec(small.nodes[0], "rmdir", "/run/lockgate")  # the test's own clusters have it
    before, folders = traces(small), set(found(small, "-type", "d"))
    assert not folders & STAYING
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
    assert set(found(small, "-type", "d")) - folders == STAYING
    phase, said = run(small, manifest)
    assert phase == "Succeeded" and "There is no trace" in said


def _delete_daemonset(cluster: Cluster) -> None:
    cluster.kubectl("-n", "kube-system", "delete", "daemonset", "lockgate", "--wait=true")
    until("the agent's end", lambda: not _agents(cluster), 60)


def _agents(cluster: Cluster) -> str:
    what = ("get", "pods", "-l", "app.kubernetes.io/name=lockgate", "-o", "name")
    return cluster.kubectl("-n", "kube-system", *what)

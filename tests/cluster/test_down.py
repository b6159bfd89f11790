"""Nothing of a cluster is left on the machine, however it ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from cluster import Cluster, processes
from cluster.down import remove
from cluster.machines import cgroup_v1_hierarchies
from cluster.network import interface
from cluster.state import State
from lockgate.net import cgroup
from tests.system.harness import ROOT

POD = """
apiVersion: v1
kind: Pod
metadata: {name: a}
spec:
  containers: [{name: main, image: "localhost/agnhost:1", args: [pause]}]
"""

EXAMPLE = """
apiVersion: v1
kind: Namespace
metadata: {name: small}
---
apiVersion: v1
kind: Pod
metadata: {name: asks, namespace: small}
spec: {containers: [{name: a, image: "localhost/lockgate-pod:1", args: [answer, tcp/8080]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: closed, namespace: small}
spec:
  containers:
  - name: a
    image: "localhost/lockgate-pod:1"
    args: [answer, tcp/8080]
    ports: [{containerPort: 8080}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: small}
spec: {podSelector: {}, policyTypes: [Ingress]}
"""


def traces(state: State) -> list[str]:
    """What carries the cluster's name: namespaces, mounts, cgroups, folders; and its link."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found = [line for line in mounts if state.cluster in line]
    found += [str(path) for path in Path("/run/netns").glob(f"lgk-{state.cluster}-*")]
    for root in (cgroup.find(), *cgroup_v1_hierarchies()):
        path = root / "lockgate-cluster" / state.cluster
        found += [str(path)] if path.exists() else []
    found += [str(path) for path in (state.root, state.data) if path.exists()]
    return found + [name for _, name in socket.if_nameindex() if name == interface(state)]


def test_a_crash_leaves_nothing_that_down_does_not_find() -> None:
    state = State(f"d{os.getpid()}")
    panic = Path("/proc/sys/kernel/panic").read_text()
    cluster = Cluster.up(state.cluster, nodes=1, cni="bridge")
    try:
        assert traces(state)
        cluster.apply(POD)
        cluster.kubectl("wait", "--for=condition=Ready", "pod/a", "--timeout=60s")
        cluster.stop("containerd", "node-1", grace=0)
        cluster.stop("etcd", grace=0)
        processes.stop(state.program("node-1", "init"), 0)
        state.settings.unlink()
    finally:
        removed = remove(state)
    assert any("processes" in line for line in removed)
    assert traces(state) == []
    assert remove(state) == []
    assert Path("/proc/sys/kernel/panic").read_text() == panic


def test_make_cluster_shows_the_example_and_leaves_nothing(tmp_path: Path) -> None:
    state = State(f"o{os.getpid()}")
    (tmp_path / "small.yaml").write_text(EXAMPLE)
    command = [sys.executable, "-m", "cluster", "run", str(tmp_path), "--once", "--nodes", "1"]
    command += ["--name", state.cluster]
    try:
        done = subprocess.run(
            command, cwd=ROOT, text=True, capture_output=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert traces(state) == []
    finally:
        remove(state)
    for words in (
        f"export KUBECONFIG={state.kubeconfig}",
        "node-1",
        "Who may talk to whom",
        "Every one is as the specification says.",
        "isolated by small/closed",
        f"lockgate explain --kubeconfig {state.kubeconfig} small/asks small/closed 8080/tcp",
    ):
        assert words in done.stdout, done.stdout
    assert "everything that the cluster made is removed" in done.stderr

"""Nothing of a cluster is left on the machine, however it ended."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from cluster import Cluster, processes
from cluster.down import remove
from cluster.machines import cgroup_v1_hierarchies
from cluster.network import interface
from cluster.state import State
from lockgate.net import cgroup

POD = """
apiVersion: v1
kind: Pod
metadata: {name: a}
spec:
  containers: [{name: main, image: "localhost/agnhost:1", args: [pause]}]
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

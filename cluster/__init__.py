"""A real Kubernetes cluster on one machine, for development and tests (not part of the wheel).

etcd, API server, controller manager, scheduler, and nodes with a kubelet and a containerd each,
all from their own sources (binaries.py). A node is a set of namespaces (network, mount, process,
cgroup, host name) with its own /etc, /run, /var/lib, /opt, /sys/fs/bpf and cgroup root, so that
what is installed on it cannot tell it from a machine.

    python -m cluster build                              # fills the cache: 10 minutes, once
    python -m cluster run [DIR] [--once]                 # with Lockgate and the shop: make cluster
    python -m cluster up [--name NAME] [--nodes 2] [--zones 0] [--cni none|bridge] [--install]
    python -m cluster status|down [--name NAME]
    python -m cluster kubectl [--name NAME] -- get pods -A
    python -m cluster node [--name NAME] node-1 -- ip route

    from cluster import Cluster

    with Cluster.up("t1", cni="bridge") as cluster:      # leaves no trace at the end
        cluster.load_image("dist/lockgate-image.tar")    # into every node's containerd
        cluster.apply(manifest)                          # text, or a path
        cluster.kubectl("get", "nodes")                  # -> str; raises Failed with stderr
        cluster.json("get", "pods", "-A")["items"]
        cluster.node_exec("node-1", "crictl", "ps")      # in the node's namespaces
        cluster.node_path("node-1", "/etc/cni/net.d")    # its files, from here
        cluster.pod_exec("default", "a", "cat", "/proc/1/status")
        cluster.stop("kube-apiserver"); cluster.start("kube-apiserver")
        cluster.stop("kubelet", "node-1"); cluster.start("kubelet", "node-1")
        cluster.leave(cluster.join())                    # a machine comes, and goes for good

Networks, the same in each cluster (each is in network namespaces of its own):

    control     172.30.0.10, fd00:172:30::10   API server on :6443; no node, runs no pods
    node-N      172.30.0.(10+N), fd00:172:30::(10+N) on underlay0; 172.31.0.(10+N) on outside0
    outside     172.31.0.1, fd00:172:31::1     a machine beyond the cluster
    pods        10.244.0.0/16 (/24 a node), fd00:10:244::/48 (/64 a node)
    services    10.96.0.0/16, fd00:10:96::/112; DNS is to be 10.96.0.10

From this machine the API server answers at the address in the kubeconfig file (a /30 of
198.18.0.0/15 per cluster). Network namespaces are `lgk-NAME-{underlay,outside,control,node-N}`.
State: /run/lockgate-cluster/NAME/{kubeconfig,cluster.json,certificates/,logs/,nodes/NODE/};
containerd's and the kubelets' files: /var/lib/lockgate-cluster/NAME/NODE/; processes: cgroup
`<cgroup2>/lockgate-cluster/NAME/`, one cgroup per program, the one record of what runs.

With `--cni bridge` a cluster is an ordinary one: the distribution's bridge plugin, kube-proxy and
CoreDNS. With none, install.install(cluster) puts Lockgate and CoreDNS on it.

Images in each node: localhost/{pause,agnhost,busybox,coredns}:1. Kubernetes' conformance tests
bring theirs (conformance/).
"""

from __future__ import annotations

from cluster.cluster import Cluster
from cluster.commands import Failed

__all__ = ["Cluster", "Failed"]

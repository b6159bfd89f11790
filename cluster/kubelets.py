"""Makes a machine a node: containerd and kubelet."""

from __future__ import annotations

from pathlib import Path

import yaml

from cluster.binaries import Binaries
from cluster.certificates import Authority
from cluster.commands import Failed, run
from cluster.machines import Machine
from cluster.state import DNS4, PODS4, PODS6, node_addresses

__all__ = ["SOCKET", "Kubelet"]

SOCKET = "/run/containerd/containerd.sock"

_CONTAINERD = """\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
"""


class Kubelet:
    """The programs of one node. `number` gives it its addresses; `zone` is "" where none is."""

    def __init__(self, machine: Machine, number: int, binaries: Binaries, zone: str = "") -> None:
        self.machine = machine
        self.number = number
        self.zone = zone
        self.binaries = binaries

    def configure(self, authority: Authority, server: str) -> None:
        """Write /etc/kubernetes and /etc/containerd of the node, before it is up."""
        etc, name = self.machine.etc, self.machine.name
        kubernetes = etc / "kubernetes"
        (kubernetes / "manifests").mkdir(parents=True, exist_ok=True)
        addresses = [f"IP:{address}" for address in node_addresses(self.number)]
        certificate, key = authority.sign(
            name, f"system:node:{name}", "system:nodes", [*addresses, f"DNS:{name}"]
        )
        for source, target in (
            (authority.certificate, "ca.crt"),
            (certificate, "kubelet.crt"),
            (key, "kubelet.key"),
        ):
            (kubernetes / target).write_bytes(source.read_bytes())
        authority.kubeconfig(kubernetes / "kubelet.conf", server, certificate, key)
        files = authority.sign(f"{name}-proxy", "system:kube-proxy")
        authority.kubeconfig(kubernetes / "kube-proxy.conf", server, *files)
        (kubernetes / "kubelet.yaml").write_text(yaml.safe_dump(_configuration()))
        containerd = etc / "containerd"
        containerd.mkdir(exist_ok=True)
        (containerd / "config.toml").write_text(_CONTAINERD)
        (etc / "crictl.yaml").write_text(f"runtime-endpoint: unix://{SOCKET}\n")

    def start_containerd(self) -> None:
        self.machine.start("containerd", "containerd", "--config", "/etc/containerd/config.toml")

    def start(self) -> None:
        """Start the kubelet; it registers the node when the API server answers."""
        self.machine.start(
            "kubelet",
            self.binaries.path("kubelet"),
            "--config=/etc/kubernetes/kubelet.yaml",
            "--kubeconfig=/etc/kubernetes/kubelet.conf",
            f"--hostname-override={self.machine.name}",
            f"--node-ip={','.join(node_addresses(self.number))}",
            *((f"--node-labels=topology.kubernetes.io/zone={self.zone}",) if self.zone else ()),
            "--v=2",
        )

    def start_proxy(self) -> None:
        """Start kube-proxy, for clusters whose CNI has no services of its own."""
        self.machine.start(
            "kube-proxy",
            self.binaries.path("kube-proxy"),
            "--kubeconfig=/etc/kubernetes/kube-proxy.conf",
            f"--hostname-override={self.machine.name}",
            "--proxy-mode=nftables",
            f"--cluster-cidr={PODS4},{PODS6}",
            "--conntrack-max-per-core=0",  # the machine's, not the node's
        )

    def load_image(self, archive: Path) -> None:
        """Import an archive (docker or OCI layout) into containerd. Raises Failed."""
        try:
            with archive.open("rb"):
                pass
        except OSError as error:
            raise Failed(f"{archive}: {error.strerror}") from None
        run(*self.machine.command("ctr", "-n", "k8s.io", "images", "import", archive))


def _configuration() -> dict[str, object]:
    """A KubeletConfiguration (kubelet.config.k8s.io/v1beta1)."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": "/etc/kubernetes/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": "/etc/kubernetes/kubelet.crt",
        "tlsPrivateKeyFile": "/etc/kubernetes/kubelet.key",
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "staticPodPath": "/etc/kubernetes/manifests",
        "clusterDNS": [DNS4],
        "clusterDomain": "cluster.local",
        # The root of the node's cgroup namespace is the node's own cgroup.
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": "/",
        "failCgroupV1": False,
        "failSwapOn": False,
        # The disk is the developer's; no pod is to go because it is full.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%"},
        "makeIPTablesUtilChains": False,
        "serializeImagePulls": False,
        "nodeStatusUpdateFrequency": "2s",
    }

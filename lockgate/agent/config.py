"""The agent's configuration file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from lockgate.agent.cards import AUTO
from lockgate.agent.edge import Setting
from lockgate.agent.flows import Flows
from lockgate.agent.limits import CAPTURE_MAX, Limits
from lockgate.agent.sizes import SHARE
from lockgate.agent.ways import Routing
from lockgate.bpf.pins import node_folder
from lockgate.kube.client import Settings
from lockgate.net import cgroup
from lockgate.objects.address import listen
from lockgate.paths import bpf_object, xdp_object

__all__ = ["Config", "listen", "read"]


class Config(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """One JSON object; paths absolute. Objects come from the API server if there is
    `kubernetes`, from the supervisor's socket `control` otherwise."""

    cluster: str = "default"
    node: str = ""  # "" = the environment's NODE_NAME
    state_dir: str = "/var/lib/lockgate"  # journal.jsonl, ipam.json, snapshot: survive a reboot
    run_dir: str = ""  # agent.sock; "" = the state folder
    control: str = ""  # socket of the watch stream
    kubernetes: Settings | None = None
    # HOST:PORT of /healthz, /readyz and /metrics; "" = none; absent: port 9781 with `kubernetes`
    web: str | None = None
    # Of /healthz for load balancers, as kube-proxy's; 0 = none; absent: 10256 with `kubernetes`
    proxy_health_port: int | None = None
    netns: str = ""  # name in /run/netns or a path; "" = the agent's own
    cgroup: str = ""  # the node's cgroup v2 directory; "auto" = its root, "" = none
    # Links to other nodes and to the world (several names with commas between); "auto" = those with
    # the node's InternalIP and with the default route, "" = none, and the link to other nodes
    underlay: str = AUTO
    outside: str = AUTO
    service_cidrs: list[str] = []
    # How clients outside reach backends on other nodes, where a Service does not say it
    forwarding: Literal["dsr", "snat"] = "dsr"
    bpffs: str = "/sys/fs/bpf"
    object: str = ""  # "" = the one that was built or installed
    xdp_object: str = ""  # likewise
    mtu: int = 0  # of pods; 0 = of the way to another node with the smallest
    routing: Routing = "auto"  # docs/cluster.md, Ways to other nodes
    vxlan_port: int = 8472  # UDP; what Linux and most CNIs use
    sweep_seconds: float = 30
    guard_seconds: float = 5  # between looks whether our programs are first on pods' links
    cni_bin: str = ""  # the host's /opt/cni/bin as it is mounted here; "" = nothing is put there
    cni_conf: str = ""  # the host's /etc/cni/net.d, likewise
    cni_chain: list[dict[str, Any]] = []  # CNI plugins to run after ours
    # Of the machine's memory, for the tables that remember connections, when they are made
    memory_share: float = SHARE
    limits: Limits = Limits()
    xdp: Setting = "auto"  # docs/services.md, XDP
    flows: Flows = Flows()
    capture: int = 0  # first bytes of the packet that each flow record keeps; 0 = none

    @property
    def socket(self) -> Path:
        return Path(self.run_dir or self.state_dir, "agent.sock")

    @property
    def cni_bin_dir(self) -> Path | None:
        return Path(self.cni_bin) if self.cni_bin else None

    @property
    def cni_conf_dir(self) -> Path | None:
        return Path(self.cni_conf) if self.cni_conf else None

    @property
    def object_path(self) -> Path:
        return Path(self.object) if self.object else bpf_object()

    @property
    def xdp_object_path(self) -> Path:
        return Path(self.xdp_object) if self.xdp_object else xdp_object()

    @property
    def cgroup_path(self) -> Path | None:
        """Where programs on sockets are attached. FileNotFoundError if there is no cgroup v2."""
        if not self.cgroup:
            return None
        return cgroup.find() if self.cgroup == "auto" else Path(self.cgroup)

    @property
    def pins(self) -> Path:
        return node_folder(self.bpffs, self.cluster, self.node)

    @property
    def netns_path(self) -> Path | None:
        if not self.netns:
            return None
        return Path(self.netns) if "/" in self.netns else Path("/run/netns", self.netns)


def read(path: Path) -> Config:
    """ValueError names the file and the field."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=Config)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: {error}") from error
    config.node = config.node or os.environ.get("NODE_NAME", "")
    if not config.node:
        raise ValueError(f"{path}, field node: expected the node's name, here or in NODE_NAME")
    if bool(config.control) == (config.kubernetes is not None):
        raise ValueError(f"{path}: expected one of control and kubernetes")
    if config.web is None:
        config.web = ":9781" if config.kubernetes is not None else ""
    if config.proxy_health_port is None:
        config.proxy_health_port = 10256 if config.kubernetes is not None else 0
    if not 0 <= config.proxy_health_port < 65536:
        raise ValueError(
            f"{path}, field proxyHealthPort: expected 0 to 65535, got {config.proxy_health_port}"
        )
    if not 0 < config.vxlan_port < 65536:
        raise ValueError(f"{path}, field vxlanPort: expected 1 to 65535, got {config.vxlan_port}")
    if not 0 < config.memory_share <= 0.5:
        raise ValueError(
            f"{path}, field memoryShare: expected more than 0 and at most 0.5,"
            f" got {config.memory_share}"
        )
    if not 0 <= config.capture <= CAPTURE_MAX:
        raise ValueError(
            f"{path}, field capture: expected 0 to {CAPTURE_MAX} bytes, got {config.capture}"
        )
    try:
        config.flows.constants(1)
    except ValueError as error:
        raise ValueError(f"{path}, field flows: {error}") from error
    if config.web:
        listen(config.web, f"{path}, field web")
    return config

"""Where a cluster keeps what: names and paths (docs/architecture.md, Processes)."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

__all__ = ["State", "clusters", "valid_name"]

RUN = Path("/run/lockgate")
#: Bytes of a unix socket's path (struct sockaddr_un), without the zero and the node's slash.
SOCKET_PATH = 106
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,18}[a-z0-9])?")


def valid_name(name: str) -> bool:
    """Whether a cluster may be called so: short, as it is part of namespaces' and links' names."""
    return _NAME.fullmatch(name) is not None


def clusters() -> list[str]:
    """Names of clusters that have a state folder, running or crashed."""
    if not RUN.is_dir():
        return []
    return sorted(path.name for path in RUN.iterdir() if (path / "cluster.json").exists())


class State:
    """Paths of one cluster. Making a State makes no file."""

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster
        self.root = RUN / cluster
        self.settings = self.root / "cluster.json"
        self.control = self.root / "control.sock"
        self.log = self.root / "supervisor.log"
        self.hosts = self.root / "hosts"
        self.logs = self.root / "logs"
        self.underlay_netns = f"lg-{cluster}-underlay"
        self.outside_netns = f"lg-{cluster}-outside"

    def node(self, node: str) -> Path:
        return self.root / "nodes" / node

    def node_problem(self, node: str) -> str:
        """Why a node may not be called so here, or ""."""
        if node in ("underlay", "outside"):
            return "expected another name: the cluster has a network namespace of this one"
        longest = SOCKET_PATH - len(str(self.observer("")))
        if len(node) > longest:
            return f"expected at most {longest} characters, as it is part of sockets' paths"
        return ""

    def agent(self, node: str) -> Path:
        return self.node(node) / "agent.sock"

    def observer(self, node: str) -> Path:
        return self.node(node) / "observer.sock"

    def netns(self, node: str) -> str:
        return f"lg-{self.cluster}-{node}"

    def netns_path(self, node: str) -> Path:
        return Path("/run/netns") / self.netns(node)

    def hosts_file(self, namespace: str) -> Path:
        return self.hosts / namespace

    def pod_log(self, namespace: str, name: str) -> Path:
        return self.logs / f"{namespace}_{name}.log"

    def cgroup_root(self) -> Path:
        """The cluster's cgroup v2 directory. Raises FileNotFoundError when none is mounted."""
        return cgroup2() / "lockgate" / self.cluster

    def cgroup(self, node: str) -> Path:
        return self.cgroup_root() / node

    def pins(self) -> Path:
        return bpffs() / "lockgate" / self.cluster


def short(text: str, length: int = 6) -> str:
    """A few hexadecimal digits of a name, for interface names."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def cgroup2() -> Path:
    """Where cgroup v2 is mounted."""
    return _mounted("cgroup2", "cgroup v2 is not mounted: mount it at /sys/fs/cgroup")


def bpffs() -> Path:
    """Where the BPF file system is mounted."""
    return _mounted("bpf", "the BPF file system is not mounted: mount -t bpf bpf /sys/fs/bpf")


def _mounted(kind: str, complaint: str) -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, found, *_ = line.split()
        if found == kind:
            return Path(place)
    raise FileNotFoundError(complaint)

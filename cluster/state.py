"""Names, paths and addresses of a cluster."""

from __future__ import annotations

import os
from pathlib import Path

from lockgate.net import cgroup
from lockgate.standalone import state

__all__ = [
    "API_SERVICE4",
    "API_SERVICE6",
    "CONTROL",
    "CONTROL4",
    "CONTROL6",
    "DNS4",
    "OUTSIDE_CONTROL4",
    "PODS4",
    "PODS6",
    "SERVICES4",
    "SERVICES6",
    "State",
    "cache",
    "clusters",
    "node_addresses",
    "valid_name",
    "zone",
]

RUN = Path("/run/lockgate-cluster")
DATA = Path("/var/lib/lockgate-cluster")

# The control plane is a machine on the underlay like the nodes, with number 0.
CONTROL = "control"
CONTROL4, CONTROL6 = "172.30.0.10", "fd00:172:30::10"
OUTSIDE_CONTROL4 = "172.31.0.10"
PODS4, PODS6 = "10.244.0.0/16", "fd00:10:244::/48"
SERVICES4, SERVICES6 = "10.96.0.0/16", "fd00:10:96::/112"
API_SERVICE4, API_SERVICE6 = "10.96.0.1", "fd00:10:96::1"
DNS4 = "10.96.0.10"

valid_name = state.valid_name


def clusters() -> list[str]:
    """Names of clusters that have a state folder, running or crashed."""
    return sorted(path.name for path in RUN.iterdir()) if RUN.is_dir() else []


def cache() -> Path:
    """What is built once and kept between clusters and checkouts."""
    if chosen := os.environ.get("LOCKGATE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockgate"


def zone(number: int, zones: int) -> str:
    """The zone of the node with this number, where there are that many; "" where none."""
    return f"zone-{(number - 1) % zones + 1}" if zones else ""


def node_addresses(number: int) -> tuple[str, str]:
    """The node's addresses on the underlay (lockgate.standalone.underlay gives them)."""
    return f"172.30.0.{10 + number}", f"fd00:172:30::{10 + number}"


class State(state.State):
    """Paths of one cluster, and the names by which underlay.build makes its networks.

    Prefix and folder differ from a standalone cluster's, so that the two may share a name.
    """

    def __init__(self, cluster: str) -> None:
        super().__init__(cluster)
        self.root = RUN / cluster
        self.data = DATA / cluster
        self.settings = self.root / "cluster.json"
        self.logs = self.root / "logs"
        self.certificates = self.root / "certificates"
        self.kubeconfig = self.root / "kubeconfig"
        self.outside_kubeconfig = self.root / "kubeconfig-outside"
        self.underlay_netns = f"lgk-{cluster}-underlay"
        self.outside_netns = f"lgk-{cluster}-outside"

    def netns(self, node: str) -> str:
        return f"lgk-{self.cluster}-{node}"

    def cgroup_root(self) -> Path:
        return cgroup.find() / "lockgate-cluster" / self.cluster

    def program(self, machine: str, program: str) -> Path:
        """The cgroup that a program runs in alone."""
        return self.cgroup(machine) / "programs" / program

    def log_of(self, machine: str, program: str) -> Path:
        return self.logs / f"{machine}-{program}.log"

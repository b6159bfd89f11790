"""The agent's configuration file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from lockgate.paths import bpf_object

__all__ = ["Config", "read"]


class Config(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """One JSON object; paths absolute. Only the first four must be there."""

    cluster: str
    node: str
    state_dir: str  # agent.sock, journal.jsonl, ipam.json
    control: str  # socket of the watch stream
    netns: str = ""  # name in /run/netns or a path; "" = the agent's own
    cgroup: str = ""  # the node's cgroup v2 directory; "" = no programs on sockets
    underlay: str = "underlay"  # link to other nodes; "" = none
    outside: str = ""  # link to the world; "" = the underlay leads there
    service_cidrs: list[str] = []
    bpffs: str = "/sys/fs/bpf"
    object: str = ""  # "" = the one that was built or installed
    mtu: int = 0  # of pods; 0 = the underlay's
    sweep_seconds: float = 30

    @property
    def object_path(self) -> Path:
        return Path(self.object) if self.object else bpf_object()

    @property
    def pins(self) -> Path:
        return Path(self.bpffs, "lockgate", self.cluster, self.node)

    @property
    def netns_path(self) -> Path | None:
        if not self.netns:
            return None
        return Path(self.netns) if "/" in self.netns else Path("/run/netns", self.netns)


def read(path: Path) -> Config:
    """ValueError names the file and the field."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Config)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: {error}") from error

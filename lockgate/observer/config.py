"""The observer's configuration file."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from lockgate.bpf.pins import node_folder
from lockgate.objects.address import listen

__all__ = ["Config", "read"]


class Config(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """One JSON object; paths absolute."""

    cluster: str = "default"
    node: str = ""  # "" = the environment's NODE_NAME
    bpffs: str = "/sys/fs/bpf"
    journal: str = "/var/lib/lockgate/journal.jsonl"  # the agent's; only read
    socket: str = "/run/lockgate/observer.sock"
    control: str = ""  # the agent's or supervisor's socket, for the nodes' addresses; "" = none
    web: str = ""  # HOST:PORT of /healthz, /readyz and /metrics; "" = none

    @property
    def pins(self) -> Path:
        return node_folder(self.bpffs, self.cluster, self.node)


def read(path: Path) -> Config:
    """ValueError names the file and the field."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=Config)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: {error}") from error
    config.node = config.node or os.environ.get("NODE_NAME", "")
    if not config.node:
        raise ValueError(f"{path}, field node: expected the node's name, here or in NODE_NAME")
    if config.web:
        listen(config.web, f"{path}, field web")
    return config

"""Pod networks other than Lockgate's: the distribution's bridge plugin, as a yardstick and as what
a cluster migrates from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cluster.commands import Failed

__all__ = ["CHOICES", "bridge_conflist", "check_plugins", "write_bridge"]

CHOICES = ("none", "bridge")
_PLUGINS = Path("/usr/lib/cni")


def check_plugins() -> None:
    """containerd itself calls the plugin `loopback` for each pod. Raises Failed."""
    for name in ("loopback", "bridge", "host-local"):
        if not (_PLUGINS / name).exists():
            raise Failed(f"{_PLUGINS / name} is missing: scripts/setup.sh cluster installs it")


def bridge_conflist(pod_ranges: Sequence[str]) -> dict[str, object]:
    """A CNI configuration for the node with these podCIDRs."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": network}] for network in pod_ranges],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    }
    return {"cniVersion": "1.0.0", "name": "bridge", "plugins": [bridge]}


def write_bridge(folder: Path, pod_ranges: Sequence[str]) -> None:
    """Put the configuration into a node's /etc/cni/net.d."""
    unfinished = folder / ".10-bridge.new"
    unfinished.write_text(json.dumps(bridge_conflist(pod_ranges), indent=2))
    unfinished.rename(folder / "10-bridge.conflist")

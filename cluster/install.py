"""Installs Lockgate on a cluster as a user would."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.commands import Failed

if TYPE_CHECKING:
    from cluster.cluster import Cluster

__all__ = ["IMAGE", "MANIFEST", "install"]

_ROOT = Path(__file__).resolve().parent.parent
IMAGE = _ROOT / "dist" / "lockgate-image.tar"
MANIFEST = _ROOT / "deploy" / "lockgate.yaml"


def install(cluster: Cluster, deadline: float = 120) -> None:
    """Load the image that `make image` built into every node, apply deploy/lockgate.yaml, and wait
    until the DaemonSet is there, every node is Ready and DNS answers. Raises Failed."""
    for path, advice in ((IMAGE, "make image builds it"), (MANIFEST, "it is part of a checkout")):
        if not path.exists():
            raise Failed(f"{path} is missing: {advice}")
    cluster.load_image(IMAGE)
    cluster.apply(MANIFEST)
    cluster.kubectl(
        *("-n", "kube-system", "rollout", "status", "daemonset/lockgate"),
        f"--timeout={deadline:.0f}s",
        timeout=deadline + 10,
    )
    cluster.wait_ready(deadline)
    cluster.start_dns(deadline)

"""The example of the standalone cluster, examples/shop, on a real one: the same manifests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster import images
from cluster.commands import until

if TYPE_CHECKING:
    from cluster.cluster import Cluster

__all__ = ["FOLDER", "apply", "wait"]

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "shop"


def apply(cluster: Cluster, folder: Path = FOLDER) -> None:
    """Load the image that its containers name into every node, and apply the manifests. Raises
    Failed."""
    cluster.load_image(images.build_answering(cluster.binaries))
    # Namespaces come first, by the files' names.
    cluster.apply(folder)


def wait(cluster: Cluster, deadline: float = 120) -> None:
    """Until every pod of the cluster is Ready. Raises Failed, which names those that are not."""
    late: list[str] = []

    def ready() -> bool:
        late[:] = not_ready(cluster)
        return not late

    until("every pod to be ready", ready, deadline, pause=0.3)


def not_ready(cluster: Cluster) -> list[str]:
    """Names of pods that are not Ready, as namespace/name, and of workloads that lack pods."""
    late = []
    for pod in cluster.json("get", "pods", "-A")["items"]:
        conditions = pod["status"].get("conditions", [])
        if not any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
            late.append(f"{pod['metadata']['namespace']}/{pod['metadata']['name']}")
    for item in cluster.json("get", "deployments,statefulsets,daemonsets", "-A")["items"]:
        status = item["status"]
        wanted = item["spec"].get("replicas", status.get("desiredNumberScheduled", 0))
        found = status.get("readyReplicas", status.get("numberReady", 0))
        if status.get("observedGeneration") != item["metadata"]["generation"] or found < wanted:
            late.append(f"{item['metadata']['namespace']}/{item['metadata']['name']}")
    return late

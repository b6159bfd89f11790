"""From a saved policy file to its being in force on both nodes, with many pods known.

A cluster of real pods on two nodes; one policy file is replaced again and again, and selects
pods of both nodes. A change is in force on a node when its epoch, read from the pinned map,
has moved; the figure is from the rename that saves the file to the later of the two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench.setups import CLUSTER, LOCKGATE, run
from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import MappedArray
from lockgate.bpf.pins import pin_names
from lockgate.paths import bpf_object
from lockgate.standalone.state import State

NODES = ("node-1", "node-2")
PATIENCE = 10.0


def manifests(pods: int) -> list[dict[str, object]]:
    items: list[dict[str, object]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}}
    ]
    for number, node in enumerate(NODES, 1):
        items.append(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node},
                "spec": {"podCIDRs": [f"10.{200 + number}.0.0/16"]},
            }
        )
    for n in range(pods):
        items.append(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"pod-{n}",
                    "namespace": "bench",
                    "labels": {"app": f"app-{n // 2 % 50}", "tier": f"tier-{n % 3}"},
                },
                "spec": {
                    "nodeName": NODES[n % 2],
                    "containers": [{"name": "main", "ports": [{"containerPort": 8080}]}],
                },
            }
        )
    return items


def policy(step: int) -> dict[str, object]:
    """Each step admits another port and another peer, and so changes tables on both nodes."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "moving", "namespace": "bench"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "app-0"}},
            "ingress": [
                {
                    "from": [{"podSelector": {"matchLabels": {"app": f"app-{step % 49 + 1}"}}}],
                    "ports": [{"port": 8000 + step % 50}],
                }
            ],
        },
    }


def save(folder: Path, step: int) -> float:
    """Replace the policy's file; the time of the rename."""
    draft = folder / ".policy.json.new"
    draft.write_text(json.dumps(policy(step)))
    began = time.monotonic()
    draft.rename(folder / "policy.json")
    return began


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.publish")
    parser.add_argument("--quick", action="store_true", help="30 changes, 100 pods")
    parser.add_argument("--pods", type=int, help="pods that the cluster has (1,000)")
    options = parser.parse_args()
    pods = options.pods or (100 if options.quick else 1000)
    steps = 30 if options.quick else 300
    times: list[float] = []
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="lockgate-bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "cluster.json").write_text(
            json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests(pods)})
        )
        save(folder, 0)
        stack.callback(run, *LOCKGATE, "down", "--cluster", CLUSTER)
        run(*LOCKGATE, "up", str(folder), "--detach", "--timeout", "900", "--cluster", CLUSTER)
        run(*LOCKGATE, "wait", "--cluster", CLUSTER)
        schema = Schema.from_object(bpf_object())
        state, record = pin_names(schema)["state"], schema.dtype("node_state")
        pins = State(CLUSTER).pins()
        epochs = [
            MappedArray.open(str(pins / node / state), record).view["epoch"] for node in NODES
        ]
        for step in range(1, steps + 1):
            time.sleep(0.05)
            before = [int(epoch[0]) for epoch in epochs]
            began = save(folder, step)
            while any(int(epoch[0]) == old for epoch, old in zip(epochs, before, strict=True)):
                if time.monotonic() - began > PATIENCE:
                    raise TimeoutError(f"change {step} was not in force after {PATIENCE} s")
                time.sleep(0.0001)
            times.append((time.monotonic() - began) * 1e3)
    cuts = statistics.quantiles(times, n=100)
    print(
        json.dumps(
            {
                "name": "publish",
                "title": "Saved policy file to in force on both nodes, ms (aim: p99 < 20)",
                "columns": ["pods", "changes", "p50 ms", "p99 ms", "max ms"],
                "rows": [
                    {
                        "pods": pods,
                        "changes": steps,
                        "p50 ms": cuts[49],
                        "p99 ms": cuts[98],
                        "max ms": max(times),
                    }
                ],
                "notes": ["real pods on two nodes here; in force: both nodes' epochs have moved"],
            }
        )
    )


if __name__ == "__main__":
    main()

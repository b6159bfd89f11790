"""From a cluster to a table: the whole run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from cluster.binaries import Binaries
from cluster.cluster import Cluster
from cluster.conformance import batches, images, report, specs
from cluster.install import install
from cluster.load_balancers import LoadBalancers
from cluster.state import clusters

__all__ = ["RESULTS", "run"]

_WIDE = "-wide"
RESULTS = Path(__file__).resolve().parent.parent.parent / "build" / "conformance"


def run(name: str, focus: str, parallel: int, folder: Path, console: Console) -> bool:
    """Run the specs on cluster `name`, and those that need more nodes on `name`-wide, started for
    this run unless they are up; a line per spec, a table at the end. Returns whether all that were
    to run passed. Raises Failed."""
    binaries = Binaries.get(console)
    e2e = binaries.conformance()
    plan = specs.plan(e2e, focus)
    console.print(f"  {len(plan)} specs to run, {len(plan.left_out)} left out", highlight=False)
    archive = images.build(binaries)
    results: list[batches.Result] = []
    begin = time.monotonic()
    for wide, suffix in ((False, ""), (True, _WIDE)):
        part = plan.only(wide)
        if not len(part):
            continue
        with _cluster(name + suffix, wide, console) as cluster, LoadBalancers(cluster.state):
            cluster.load_image(archive)
            logs = folder / suffix.lstrip("-")
            for result in batches.run_all(cluster, e2e, part, logs, parallel):
                results.append(result)
                console.print(
                    f"  {len(results):3}/{len(plan)} {result.state} {result.seconds:5.1f} s  "
                    f"{result.name}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
    report.write_junit(folder / "junit.xml", results, plan.left_out)
    report.print_table(console, results, plan.left_out)
    seconds = time.monotonic() - begin
    console.print(f"\n  {seconds / 60:.0f} min; {folder}/junit.xml", highlight=False)
    return report.good(results)


@contextlib.contextmanager
def _cluster(name: str, wide: bool, console: Console) -> Iterator[Cluster]:
    if name in clusters():
        yield Cluster(name)
        return
    nodes, zones = (6, 3) if wide else (2, 0)
    console.print(f"  a cluster of {nodes} nodes", highlight=False)
    with Cluster.up(
        name, nodes=nodes, zones=zones, progress=lambda text: console.print(f"  {text}")
    ) as cluster:
        console.print("  installing Lockgate")
        install(cluster, deadline=60 * nodes)
        yield cluster

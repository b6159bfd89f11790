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
from cluster.state import clusters

__all__ = ["RESULTS", "run"]

RESULTS = Path(__file__).resolve().parent.parent.parent / "build" / "conformance"


def run(name: str, focus: str, parallel: int, folder: Path, console: Console) -> bool:
    """Run the specs on cluster `name`, started for this run unless it is up; a line per spec, a
    table at the end. Returns whether all that were to run passed. Raises Failed."""
    binaries = Binaries.get(console)
    e2e = binaries.conformance()
    plan = specs.plan(e2e, focus)
    count = len(plan.together) + len(plan.alone)
    console.print(f"  {count} specs to run, {len(plan.left_out)} left out", highlight=False)
    archive = images.build(binaries)
    results: list[batches.Result] = []
    with _cluster(name, console) as cluster:
        cluster.load_image(archive)
        begin = time.monotonic()
        for result in batches.run_all(cluster, e2e, plan, folder, parallel):
            results.append(result)
            console.print(
                f"  {len(results):3}/{count} {result.state} {result.seconds:5.1f} s  {result.name}",
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
def _cluster(name: str, console: Console) -> Iterator[Cluster]:
    if name in clusters():
        yield Cluster(name)
        return
    with Cluster.up(name, progress=lambda text: console.print(f"  {text}")) as cluster:
        console.print("  installing Lockgate")
        install(cluster)
        yield cluster

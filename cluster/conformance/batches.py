"""Runs specs, some at a time in a process of e2e.test, and reads its report."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from cluster.cluster import Cluster
from cluster.conformance.specs import GROUP, Plan

__all__ = ["Result", "in_batches", "run_all"]

# Starting e2e.test costs 1.5 s of CPU: not one process a spec; but results are to come as they are.
_BATCH = 4
# These take ten minutes each, and little of the processors: beside all others, each by itself.
_LONG = re.compile(r"connectivity disruption during rolling update")
_DEADLINE = "45m"  # of a batch; each spec has deadlines of its own


class Result(NamedTuple):
    """What became of one spec: "passed", "failed", or "skipped" by itself."""

    name: str
    state: str
    seconds: float
    message: str = ""


def run_all(
    cluster: Cluster, e2e: Path, plan: Plan, folder: Path, parallel: int
) -> Iterator[Result]:
    """Run what is planned, `parallel` batches at once and what must be alone after the others;
    results as they come. `folder` gets a log per batch. e2e.test is outside the cluster, where
    addresses of load balancers lead to nodes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("batch-*"):
        old.unlink()
    numbers = itertools.count(1)

    def run(names: Sequence[str], number: int) -> list[Result]:
        return _run(cluster, e2e, names, folder / f"batch-{number:02}")

    batches = in_batches(plan.together)
    with ThreadPoolExecutor(parallel + sum(map(_is_long, plan.together))) as pool:
        for done in as_completed(pool.submit(run, b, next(numbers)) for b in batches):
            yield from done.result()
    for batch in in_batches(plan.alone):
        yield from run(batch, next(numbers))


def in_batches(names: Sequence[str]) -> list[Sequence[str]]:
    """What one process of e2e.test runs, one after the other; the longest first."""
    short = [name for name in names if not _is_long(name)]
    return [
        *([name] for name in names if _is_long(name)),
        *(short[i : i + _BATCH] for i in range(0, len(short), _BATCH)),
    ]


def _is_long(name: str) -> bool:
    return bool(_LONG.search(name))


def _run(cluster: Cluster, e2e: Path, names: Sequence[str], at: Path) -> list[Result]:
    report, log = at.with_suffix(".json"), at.with_suffix(".log")
    command = cluster.outside_command(
        e2e,
        f"--kubeconfig={cluster.state.outside_kubeconfig}",
        f"--kubectl-path={cluster.binaries.path('kubectl')}",
        "--provider=skeleton",
        "--ginkgo.v",
        "--ginkgo.no-color",
        "--ginkgo.silence-skips",
        f"--ginkgo.timeout={_DEADLINE}",
        f"--ginkgo.json-report={report}",
        *(f"--ginkgo.focus={_exactly(GROUP + name)}" for name in names),
    )
    with log.open("wb") as output:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
    try:
        suites = json.loads(report.read_bytes())
    except (OSError, ValueError):
        return [
            Result(name, "failed", 0, f"e2e.test ended without a report: {log}") for name in names
        ]
    report.unlink()
    return _read(suites, names, log)


def _read(suites: Any, names: Sequence[str], log: Path) -> list[Result]:
    """Results of `names` in ginkgo's JSON report (github.com/onsi/ginkgo/v2/types, Report)."""
    found: dict[str, Result] = {}
    broken = ""
    for suite in suites:
        broken = "; ".join(suite["SpecialSuiteFailureReasons"] or [])
        for spec in suite["SpecReports"] or []:
            failure = spec.get("Failure", {}).get("Message", "")
            name = " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])
            name = name.removeprefix(GROUP)
            if name in names:
                state = spec["State"] if spec["State"] in ("passed", "skipped") else "failed"
                found[name] = Result(name, state, spec["RunTime"] / 1e9, failure)
            elif spec["LeafNodeType"] != "It" and failure:
                broken = broken or failure
    lost = Result("", "failed", 0, f"did not run: {broken or log}")
    return [found.get(name) or lost._replace(name=name) for name in names]


def _exactly(text: str) -> str:
    """A regular expression for Go, whose escapes do not include the space's."""
    return re.escape(text).replace("\\ ", " ") + "$"

"""Questions a second to `lockgate explain --batch`: to the kernel's programs and the specification.

The example's cluster on two nodes; every pod to every pod and to each service, on ports that
policies name and others. The whole command is timed, its start and the reading of the cluster
included; the engines take turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench.setups import CLUSTER, LOCKGATE, run

SHOP = Path(__file__).resolve().parents[1] / "examples" / "shop"
PORTS = [(80, "TCP"), (5432, "TCP"), (8000, "TCP"), (8080, "TCP"), (9100, "TCP"), (53, "UDP")]
ENGINES = ("kernel", "spec")


def questions(least: int) -> list[dict[str, object]]:
    """So many at least, whole rounds over all pairs."""
    pods = [
        f"{pod['namespace']}/{pod['name']}"
        for pod in json.loads(run(*LOCKGATE, "get", "pods", "--json", "--cluster", CLUSTER))
    ]
    services = [
        f"svc/{service['namespace']}/{service['name']}"
        for service in json.loads(run(*LOCKGATE, "get", "services", "--json", "--cluster", CLUSTER))
    ]
    once: list[dict[str, object]] = [
        {"from": source, "to": target, "port": port, "protocol": protocol}
        for source, target, (port, protocol) in itertools.product(pods, pods + services, PORTS)
    ]
    return once * -(-least // len(once))


def ask(file: Path, engine: str) -> tuple[float, int]:
    """Seconds of the whole command, and how many answers have a verdict."""
    began = time.monotonic()
    command = [*LOCKGATE, "explain", "--batch", str(file), "--engine", engine]
    done = subprocess.run([*command, "--cluster", CLUSTER], capture_output=True, text=True)
    spent = time.monotonic() - began
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode not in (0, 2) or not answers:
        raise RuntimeError(done.stderr.strip())
    return spent, sum(answer["verdict"] is not None for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.explain")
    parser.add_argument("--quick", action="store_true", help="one round of 10,000 questions")
    options = parser.parse_args()
    least, rounds = (10_000, 1) if options.quick else (50_000, 3)
    times: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    verdicts: dict[str, int] = {}
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockgate-bench-")))
        file /= "questions.jsonl"
        stack.callback(run, *LOCKGATE, "down", "--cluster", CLUSTER)
        run(*LOCKGATE, "up", str(SHOP), "--detach", "--cluster", CLUSTER)
        asked = questions(least)
        file.write_text("".join(json.dumps(question) + "\n" for question in asked))
        for _ in range(rounds):
            for engine in ENGINES:
                spent, verdicts[engine] = ask(file, engine)
                times[engine].append(spent)
    medians = {engine: statistics.median(found) for engine, found in times.items()}
    print(
        json.dumps(
            {
                "name": "explain",
                "title": "Questions to explain --batch, a second (aim: 10,000 to the kernel)",
                "columns": ["engine", "questions", "verdicts", "seconds", "a second", "x spec"],
                "rows": [
                    {
                        "engine": engine,
                        "questions": len(asked),
                        "verdicts": verdicts[engine],
                        "seconds": median,
                        "a second": len(asked) / median,
                        "x spec": medians["spec"] / median,
                    }
                    for engine, median in medians.items()
                ],
                "notes": [
                    f"whole commands, start included; medians of {rounds}, engines by turns",
                    "the example's pods to each other and to its services, on two nodes",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()

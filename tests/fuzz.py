"""`python -m tests.fuzz --seconds N`: compare the kernel with the specifications for a while.

Policies first, then services, each for half of the time. Prints its seed; `--seed` repeats a run.
Ends with 1 and the smallest cluster at a difference.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import sys

from tests.bytecode import rounds, service_rounds
from tests.bytecode.service_nodes import Nodes
from tests.bytecode.world import World

ALL = ("policies", "services")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long (60)")
    parser.add_argument("--seed", type=int, default=0, help="repeat the run of this seed")
    parser.add_argument("--only", choices=ALL, help="one of both, all the time")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("loading programs needs root", file=sys.stderr)
        return 2
    seed = options.seed or secrets.randbits(32)
    print(f"seed {seed}; repeat with --seed {seed}", file=sys.stderr)
    chosen = [options.only] if options.only else ALL
    seconds = options.seconds / len(chosen)
    try:
        for what in chosen:
            clusters, packets = (_policies if what == "policies" else _services)(seed, seconds)
            print(f"{what}: {clusters} clusters, {packets} packets, no difference")
    except (rounds.Difference, service_rounds.Difference) as difference:
        print(difference)
        return 1
    return 0


def _policies(seed: int, seconds: float) -> tuple[int, int]:
    with contextlib.closing(World()) as world, world.inside():
        score = rounds.play_for(world, seed, seconds, rounds.show)
    return score.clusters, score.packets


def _services(seed: int, seconds: float) -> tuple[int, int]:
    with contextlib.closing(Nodes()) as nodes, nodes.inside():
        score = service_rounds.play_for(nodes, seed, seconds, service_rounds.show)
    return score.clusters, score.packets


if __name__ == "__main__":
    sys.exit(main())

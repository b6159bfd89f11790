"""`python -m tests.fuzz --seconds N`: compare the kernel with the specification for a while.

Prints its seed; `--seed` repeats a run. Ends with 1 and the smallest cluster at a difference.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys

from tests.bytecode.rounds import Difference, play_for, show
from tests.bytecode.world import World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long (60)")
    parser.add_argument("--seed", type=int, default=0, help="repeat the run of this seed")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("loading programs needs root", file=sys.stderr)
        return 2
    seed = options.seed or secrets.randbits(32)
    print(f"seed {seed}; repeat with --seed {seed}", file=sys.stderr)
    world = World()
    try:
        with world.inside():
            score = play_for(world, seed, options.seconds, show)
    except Difference as difference:
        print(difference)
        return 1
    finally:
        world.close()
    print(f"{score.clusters} clusters, {score.packets} packets, no difference")
    return 0


if __name__ == "__main__":
    sys.exit(main())

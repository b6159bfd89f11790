"""Events a second: real ring writes by the program on one core, decoded on the other.

The writer is `from_pod` itself in repeated test runs of a denied first packet (the program
leaves such a packet alone), in a process of its own. The reader copies the records out
and counts them by verdict and reason. Written, decoded and lost must add up exactly.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time

import numpy as np

from bench import kernel, packet
from bench.clusters import with_rules
from bench.kernel import IFINDEX_BASE, SYN, World
from lockgate.bpf import syscall
from lockgate.observer.records import events_of


def pin(core: int) -> None:
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {core})


def write(world: World, seconds: float) -> None:
    fd = world.object.prog_fd("from_pod")
    context = syscall.skb_context(ifindex=IFINDEX_BASE)
    _, frame = packet.there(20000, 9, SYN)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        syscall.prog_test_run(fd, frame, context, repeat=20000)


def main() -> None:
    seconds = 1.0 if "--quick" in sys.argv else 5.0
    kernel.own_namespace((0, 1))
    world = World()
    world.publish(with_rules(1000), "a")
    counter = world.schema.enum("counter")
    ring, counters = world.ring(), world.counters()
    cores = sorted(os.sched_getaffinity(0))
    writer = os.fork()
    if not writer:
        pin(cores[0])
        write(world, seconds)
        os._exit(0)
    pin(cores[-1])
    decoded, verdicts, begin = 0, np.zeros(4, np.int64), time.monotonic()
    finished = False
    while True:
        records = ring.read()
        if len(records):
            records, _ = events_of(records)
            decoded += len(records)
            verdicts += np.bincount(records["verdict"], minlength=4)
            np.unique(records["reason"])
        elif finished:
            break
        else:
            finished = os.waitpid(writer, os.WNOHANG)[0] != 0
            if not finished:
                ring.wait(0.01)
    took = time.monotonic() - begin
    totals = counters.values().sum(axis=1)
    written, lost = int(totals[counter["COUNT_EVENTS"]]), int(totals[counter["COUNT_EVENTS_LOST"]])
    if written != decoded:
        raise AssertionError(f"{written} events were written but {decoded} decoded")
    print(
        json.dumps(
            {
                "name": "events",
                "title": "Events: written on one core, decoded on the other (aim: 1 M/s)",
                "columns": ["seconds", "written", "M/s written", "M/s decoded", "lost", "lost %"],
                "rows": [
                    {
                        "seconds": took,
                        "written": written,
                        "M/s written": written / took / 1e6,
                        "M/s decoded": decoded / took / 1e6,
                        "lost": lost,
                        "lost %": 100 * lost / max(written + lost, 1),
                    }
                ],
                "notes": [
                    "each event is a whole run of from_pod that denies a first packet",
                    "written and lost by the kernel's counters; written = decoded is checked",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()

"""One sweep over a full connection table: what it costs the agent, and what a packet notices.

500,000 connections, one in a hundred expired. While the sweep runs on one core, single test
runs of an established packet are timed on the other, and compared with those without a sweep.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np

from bench import kernel
from bench.clusters import with_rules
from bench.kernel import ACK, SYN, World
from bench.packet import PORT, SOURCE, TARGET, back, runner, there
from lockgate.agent.sweep import sweep
from lockgate.bpf.maps import HashMap

ENTRIES = 500_000


def tables(world: World) -> SimpleNamespace:
    """The maps that a sweep reads, as `Datapath` has them."""
    dtype = world.schema.dtype

    def table(name: str, key: str, value: str) -> HashMap:
        return HashMap.of(world.object, name, dtype(key), dtype(value))

    return SimpleNamespace(
        object=world.object,
        connections=table("connections", "ct_key", "ct"),
        half_open=table("half_open", "ct_key", "ct"),
        crowd=table("crowd", "ct_key", "ct"),
        nat=table("nat", "tuple", "nat"),
        fragments=table("fragments", "frag_key", "frag"),
    )


def fill(world: World, table: HashMap) -> None:
    random = np.random.default_rng(1)
    keys = np.zeros(ENTRIES, world.schema.dtype("ct_key"))
    keys["lo"] = random.integers(0, 256, (ENTRIES, 16), np.uint8)
    keys["hi"] = random.integers(0, 256, (ENTRIES, 16), np.uint8)
    keys["proto"] = 6
    values = np.zeros(ENTRIES, world.schema.dtype("ct"))
    values["state"] = world.schema.enum("ct_state")["CT_ESTABLISHED"]
    values["seen"] = int(time.clock_gettime(time.CLOCK_MONOTONIC))
    values["state"][::100] = world.schema.enum("ct_state")["CT_CLOSED"]
    values["seen"][::100] -= 60
    table.update_many(keys, values)


def main() -> None:
    passes = 2 if "--quick" in sys.argv else 8
    kernel.own_namespace((SOURCE, TARGET))
    world = World()
    world.publish(with_rules(10), "a")
    run = runner(world)
    maps = tables(world)
    took, used, deleted, slowest = [], [], 0, 0.0
    quiet: list[int] = []
    beside: list[int] = []
    for _ in range(passes):
        fill(world, maps.connections)
        for frame in (there(2, PORT, SYN), back(2, PORT, SYN | ACK), there(2, PORT, ACK)):
            run(*frame)
        established = there(2, PORT, ACK)
        quiet += [run(*established)[1] for _ in range(3000)]
        done = threading.Event()

        def probe(done: threading.Event = done, frame: tuple[int, bytes] = established) -> None:
            os.sched_setaffinity(threading.get_native_id(), {0})
            while not done.is_set():
                beside.append(run(*frame)[1])

        prober = threading.Thread(target=probe)
        os.sched_setaffinity(threading.get_native_id(), {1})
        prober.start()
        begin, cpu = time.monotonic(), time.thread_time()
        last = begin
        for count in sweep(maps):  # type: ignore[arg-type]
            deleted += count
            slowest = max(slowest, time.monotonic() - last)
            last = time.monotonic()
        took.append(time.monotonic() - begin)
        used.append(time.thread_time() - cpu)
        done.set()
        prober.join()
        os.sched_setaffinity(threading.get_native_id(), {0, 1})
    if not deleted:
        raise AssertionError("nothing was swept")
    print(
        json.dumps(
            {
                "name": "sweep",
                "title": f"A sweep over {ENTRIES:,} connections",
                "columns": ["CPU ms", "% of a core", "slice ms max", "packet ns", "beside ns", "x"],
                "rows": [
                    {
                        "CPU ms": statistics.median(used) * 1e3,
                        "% of a core": statistics.median(used) / 30 * 100,
                        "slice ms max": slowest * 1e3,
                        "packet ns": statistics.median(quiet),
                        "beside ns": statistics.median(beside),
                        "x": statistics.median(beside) / statistics.median(quiet),
                    }
                ],
                "notes": [
                    f"{deleted:,} expired entries deleted in {passes} passes",
                    "% of a core: one sweep in 30 s, as the agent does",
                    "beside: an established packet on the other core while the sweep runs",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()

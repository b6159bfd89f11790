"""ns per packet of `from_pod`, by one-shot test runs over an empty program.

The packet is a fresh copy in each run, so the program may change it. The cost of the
test run itself is that of an empty program, measured between the others.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

from bench import kernel
from bench.clusters import local_address, with_rules
from bench.kernel import ACK, IFINDEX_BASE, RST, SYN, World, tcp
from lockgate.bpf import syscall

SOURCE, TARGET, PORT = 0, 1, 1000


def runner(world: World, program: str = "from_pod") -> Callable[[int, bytes], tuple[int, int]]:
    """run(slot, frame) → (return value, ns)"""
    fd = world.object.prog_fd(program)
    contexts: dict[int, bytes] = {}

    def run(slot: int, frame: bytes) -> tuple[int, int]:
        context = contexts.setdefault(slot, syscall.skb_context(ifindex=IFINDEX_BASE + slot))
        done = syscall.prog_test_run(fd, frame, context)
        return done.retval, done.duration

    return run


def there(sport: int, dport: int, flags: int) -> tuple[int, bytes]:
    frame = tcp(SOURCE, local_address(SOURCE), local_address(TARGET), sport, dport, flags)
    return SOURCE, frame


def back(sport: int, dport: int, flags: int) -> tuple[int, bytes]:
    frame = tcp(TARGET, local_address(TARGET), local_address(SOURCE), dport, sport, flags)
    return TARGET, frame


def measure(world: World, rounds: int) -> dict[str, float]:
    """Medians of interleaved single runs, ns, the empty program's included as "empty"."""
    run, ring = runner(world), world.ring()
    empty = kernel.empty_program()
    context = syscall.skb_context(ifindex=IFINDEX_BASE)
    redirect, dropped = 7, 2
    for port in (19999, 20000):
        for frame in (there(port, PORT, SYN), back(port, PORT, SYN | ACK), there(port, PORT, ACK)):
            if run(*frame)[0] != redirect:
                raise AssertionError("the connection that shall be established is not forwarded")
    names = ("empty", "established", "new", "again", "denied")
    times: dict[str, list[int]] = {name: [] for name in names}
    established, reset = there(20000, PORT, ACK), there(19999, PORT, RST | ACK)
    for n in range(rounds):
        sport = 20001 + n % 40000
        times["empty"].append(syscall.prog_test_run(empty, established[1], context).duration)
        run(*reset)
        for name, frame, wanted in (
            ("established", established, redirect),
            ("new", there(sport, PORT, SYN), redirect),
            ("again", there(19999, PORT, SYN), redirect),
            ("denied", there(sport, 9, SYN), dropped),
        ):
            result, ns = run(*frame)
            if result != wanted:
                raise AssertionError(f"{name}: the program answered {result}, not {wanted}")
            times[name].append(ns)
        if n % 1000 == 0:
            while len(ring.read()):
                pass
    ring.close()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    rounds = 2_000 if "--quick" in sys.argv else 30_000
    kernel.own_namespace((SOURCE, TARGET))
    world = World()
    world.publish(with_rules(1000), "a")
    medians = measure(world, rounds)
    empty = medians.pop("empty")
    rows = [
        {
            "packet": name,
            "ns over empty": ns - empty,
            "x established": (ns - empty) / (medians["established"] - empty),
        }
        for name, ns in medians.items()
    ]
    print(
        json.dumps(
            {
                "name": "packet",
                "title": "ns per packet, from_pod, pod to pod on one node, IPv4 TCP, 1,000 rules",
                "columns": ["packet", "ns over empty", "x established"],
                "rows": rows,
                "notes": [
                    f"medians of {rounds:,} interleaved runs; the empty program: {empty:.0f} ns",
                    "new, again, denied: with their events in the ring; new stores the connection",
                    "again: the first packet of one that was closed, of the same ends and ports",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()

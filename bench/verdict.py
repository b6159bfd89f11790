"""What a verdict costs with 10, 1,000 and 10,000 rules, with hot and random keys.

`judge` of bpf/verdict.h runs 65,536 times in the kernel over questions in an array,
against the same loop without it. Hot keys ask one question again and again; random ones
draw the peer and the port anew for each. It is ingress of a pod here: the hook knows its slot,
the other end is to be found. (The egress verdict of a pod does the same the other way round.)
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bench import kernel, packet
from bench.clusters import LOCAL, PORTS, in_block, local_address, remote_address, with_rules
from bench.kernel import IFINDEX_BASE, SYN, World, mapped
from lockgate.bpf import syscall
from lockgate.bpf.maps import ArrayMap

QUESTIONS = 65536


def questions(world: World, rules: int, kind: str) -> npt.NDArray[np.void]:
    """Random sources of one kind (pod, cidr) to random local pods and ports of the rules."""
    draw = random.Random(rules)
    asked = np.zeros(QUESTIONS, world.schema.dtype("question"))
    tuples = asked["tuple"]
    sources = np.empty((QUESTIONS, 16), np.uint8)
    targets = np.empty((QUESTIONS, 16), np.uint8)
    slots = asked["slot"]
    for i in range(QUESTIONS):
        n = draw.randrange(rules)
        if kind == "pod":
            source = remote_address(n & ~1)
        else:
            n |= 1
            source = in_block(n, draw.randrange(16))
        sources[i] = np.frombuffer(mapped(source), np.uint8)
        # Pods of this node are the first, so their numbers are their slots. The first question
        # is the hot one: to an isolated pod.
        slots[i] = draw.randrange(LOCAL) if i else 1
        targets[i] = np.frombuffer(mapped(local_address(int(slots[i]))), np.uint8)
    tuples["saddr"], tuples["daddr"] = sources, targets
    tuples["sport"], tuples["proto"] = 40000, 6
    tuples["dport"] = [1000 + draw.randrange(min(rules, PORTS)) for _ in range(QUESTIONS)]
    return asked


def costs(world: World, rounds: int) -> dict[str, float]:
    """{"hot": ns, "random": ns} of one verdict, medians of interleaved rounds."""
    fd = world.object.prog_fd("verdicts")
    result = ArrayMap.of(world.object, "result", world.schema.dtype("result"))
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, mask in (("hot", 0), ("random", QUESTIONS - 1)):
            for mark in (0, 1):
                syscall.prog_test_run(fd, bytes(64), syscall.skb_context(mark=mark, cb=(mask,)))
                times.setdefault((name, mark), []).append(int(result[0]["ns"]) / QUESTIONS)
    median = {key: statistics.median(values) for key, values in times.items()}
    return {name: median[name, 1] - median[name, 0] for name in ("hot", "random")}


def main() -> None:
    quick = "--quick" in sys.argv
    rounds, starts, runs = (5, 2, 1000) if quick else (31, 9, 3000)
    kernel.own_namespace((0, 1))
    rows = []
    first = first_packets((0, 10, 1000, 10000), starts, runs)
    for rules in (10, 1000, 10000):
        judged = World("build/verdict.bpf.o")
        tables = judged.publish(with_rules(rules), "a")
        array = ArrayMap.of(judged.object, "questions", judged.schema.dtype("question"))
        for kind in ("pod", "cidr"):
            array.update_many(np.arange(QUESTIONS, dtype=np.uint32), questions(judged, rules, kind))
            cost = costs(judged, rounds)
            rows.append(
                {
                    "rules": rules,
                    "peers": kind,
                    "hot ns": cost["hot"],
                    "random ns": cost["random"],
                    "first packet ns": first[rules],
                    "share": f"{100 * cost['random'] / first[rules]:.0f} %",
                    "x no policy": first[rules] / first[0],
                    "image MB": tables.image.nbytes / 1e6,
                }
            )
        judged.close()
    print(
        json.dumps(
            {
                "name": "verdict",
                "title": "Verdict, ns (aim with random keys: 10 rules <= 100, 10,000 rules <= 200)",
                "columns": [
                    "rules",
                    "peers",
                    "hot ns",
                    "random ns",
                    "first packet ns",
                    "share",
                    "x no policy",
                    "image MB",
                ],
                "rows": rows,
                "notes": [
                    f"judge() over a loop without it, medians of {rounds} x 65,536; CIDRs are /28",
                    f"first packet: from_pod over an empty program, {starts} x {runs:,} turns;",
                    "share: of the random verdict in it; x no policy: over one without policy",
                ],
            }
        )
    )


def first_packets(numbers: Sequence[int], rounds: int, runs: int) -> dict[int, float]:
    """By number of rules: ns of a connection's first packet, allowed by rule 0, over an empty
    program. They take turns packet by packet, so that what disturbs one disturbs all, and begin
    anew in each round, as it matters as much where in memory the tables happen to lie."""
    found: dict[int, list[float]] = {number: [] for number in numbers}
    draw = random.Random(0)
    for _ in range(rounds):
        order = draw.sample(numbers, len(numbers))
        worlds = {number: World() for number in order}
        for number, world in worlds.items():
            world.publish(with_rules(number), "a")
        for number, median in _by_turns(worlds, runs, draw).items():
            found[number].append(median)
        for world in worlds.values():
            world.close()
    return {number: statistics.median(medians) for number, medians in found.items()}


def _by_turns(worlds: Mapping[int, World], runs: int, draw: random.Random) -> dict[int, float]:
    runners = {number: packet.runner(world) for number, world in worlds.items()}
    rings = [world.ring() for world in worlds.values()]
    times: dict[int, list[int]] = {number: [] for number in worlds}
    empty, context = kernel.empty_program(), syscall.skb_context(ifindex=IFINDEX_BASE)
    bare = []
    for n in range(runs):
        frame = packet.there(20000 + n % 40000, packet.PORT, SYN)
        bare.append(syscall.prog_test_run(empty, frame[1], context).duration)
        for number in draw.sample(list(worlds), len(worlds)):
            times[number].append(runners[number](*frame)[1])
        if n % 1000 == 0:
            for ring in rings:
                while len(ring.read()):
                    pass
    for ring in rings:
        ring.close()
    nothing = statistics.median(bare)
    return {number: statistics.median(ns) - nothing for number, ns in times.items()}


if __name__ == "__main__":
    main()

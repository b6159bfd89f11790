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
    rounds, runs = (5, 1000) if quick else (31, 15000)
    kernel.own_namespace((0, 1))
    rows = []
    first_open = None
    for rules in (0, 10, 1000, 10000):
        world = World()
        world.publish(with_rules(rules), "a")
        first = first_packet(world, runs)
        world.close()
        if not rules:
            first_open = first
            continue
        assert first_open is not None
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
                    "first packet ns": first,
                    "share": f"{100 * cost['random'] / first:.0f} %",
                    "x no policy": first / first_open,
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
                    f"first packet: from_pod over an empty program, medians of {runs:,} runs;",
                    "share: of the random verdict in it; x no policy: over a first packet without",
                ],
            }
        )
    )


def first_packet(world: World, runs: int) -> float:
    """ns of a connection's first packet, allowed by rule 0, over an empty program."""
    run, ring = packet.runner(world), world.ring()
    empty, context = kernel.empty_program(), syscall.skb_context(ifindex=IFINDEX_BASE)
    bare, first = [], []
    for n in range(runs):
        frame = packet.there(20000 + n % 40000, packet.PORT, SYN)
        bare.append(syscall.prog_test_run(empty, frame[1], context).duration)
        first.append(run(*frame)[1])
        if n % 1000 == 0:
            while len(ring.read()):
                pass
    ring.close()
    return statistics.median(first) - statistics.median(bare)


if __name__ == "__main__":
    main()

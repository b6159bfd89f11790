"""Rounds of random clusters and packets: does the kernel say what the specification says?

hypothesis makes every choice of generate.cluster: it varies them, and when a cluster shows a
difference, looks for one of simpler choices that still does. No choice stands for "without this
pod", so what it finds is made smaller object by object as well.
"""

from __future__ import annotations

import random
import sys
import time
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hypothesis
import msgspec
import yaml
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from lockgate.objects.model import Cluster, Pod
from lockgate.spec.policy import Packet
from tests import generate
from tests.bytecode.compare import Case, Mismatch, random_packet
from tests.bytecode.world import World

BATCH = 100  # clusters of a run by time that hypothesis looks at as one
SHRINKING = 10  # seconds at most that it looks for simpler choices


@dataclass
class Score:
    clusters: int = 0
    packets: int = 0


class Difference(AssertionError):
    """A mismatch with its smallest cluster, to be read by people."""


class SimpleEnough(unittest.SkipTest):
    """Ends a run of hypothesis at once, as every SkipTest does."""


@st.composite
def situations(draw: st.DrawFn, **sizes: int) -> tuple[Cluster, str, random.Random]:
    """A cluster, one of its nodes, and what packets are drawn from. `sizes`: generate.cluster."""
    rng = draw(st.randoms(use_true_random=False))
    cluster = generate.cluster(rng, **sizes)
    hypothesis.assume(any(not pod.spec.host_network for pod in cluster.pods.values()))
    if rng.random() < 0.2:
        reuse_address(rng, cluster)
    node = rng.choice(list(cluster.nodes))
    # A hundred packets are too many choices to be made one by one, and to be shrunk.
    return cluster, node, random.Random(draw(st.integers(0, 2**32 - 1)))


def play(
    world: World,
    seed: int | str,
    rounds: int = 200,
    packets: int = 110,
    progress: Callable[[Score], None] | None = None,
    score: Score | None = None,
    **sizes: int,
) -> Score:
    """So many clusters, each with so many packets that cross the node. Difference when one goes
    wrong. The same seed makes the same clusters."""
    score = score or Score()
    wrong: tuple[Case, Packet, Mismatch] | None = None
    until = 0.0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=rounds,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        database=None,
        deadline=None,
        report_multiple_bugs=False,
    )
    @hypothesis.given(situations(**sizes))
    def agree(situation: tuple[Cluster, str, random.Random]) -> None:
        nonlocal wrong, until
        cluster, node, rng = situation
        case = Case(world, cluster, node)
        case.publish()
        try:
            if wrong is not None:  # simpler clusters are tried with the same packet
                if time.monotonic() > until:
                    raise SimpleEnough
                case.check(wrong[1])
                return
            asked = ask(case, rng, packets)
        except Mismatch as mismatch:
            if wrong is None:
                until = time.monotonic() + SHRINKING
            wrong = case, mismatch.sent or mismatch.packet, mismatch
            raise
        score.clusters += 1
        score.packets += asked
        if progress:
            progress(score)

    try:
        agree()
    except (Mismatch, Flaky, SimpleEnough):
        if wrong is None:
            raise
        raise Difference(explain(*wrong, seed)) from None
    return score


def play_for(
    world: World, seed: int, seconds: float, progress: Callable[[Score], None] | None = None
) -> Score:
    """The same until the seconds are over, and the batch that was begun."""
    score, began, batch = Score(), time.monotonic(), 0
    while time.monotonic() - began < seconds:
        play(world, f"{seed}/{batch}", BATCH, progress=progress, score=score)
        batch += 1
    return score


def ask(case: Case, rng: random.Random, packets: int) -> int:
    """Random packets, of which so many cross the node; how many did. Mismatch at a difference."""
    asked = tries = 0
    while asked < packets and tries < 20 * packets:
        tries += 1
        asked += case.check(random_packet(rng, case.cluster))
    return asked


def reuse_address(rng: random.Random, cluster: Cluster) -> None:
    """Two pods claim the same addresses; mostly one of them is going away."""
    by_node: dict[str, list[Pod]] = {}
    for pod in cluster.pods.values():
        if not pod.spec.host_network and not pod.metadata.deletion_timestamp:
            by_node.setdefault(pod.spec.node_name, []).append(pod)
    pods = rng.choice([pods for pods in by_node.values() if len(pods) > 1] or [[]])
    if not pods:
        return
    going, coming = rng.sample(pods, 2)
    but = msgspec.structs.replace
    metadata = going.metadata
    if rng.random() < 0.7:
        metadata = but(metadata, deletion_timestamp="2026-01-01T00:00:00Z")
    cluster.pods[going.key] = but(going, metadata=metadata, status=coming.status)


# ---- What is told ------------------------------------------------------------------------


def explain(case: Case, packet: Packet, mismatch: Mismatch, seed: int | str) -> str:
    """Shrink the cluster and tell."""
    cluster, last = shrink(case, packet, mismatch)
    kinds = (cluster.namespaces, cluster.pods, cluster.services, cluster.slices, cluster.policies)
    objects = [
        {"kind": item.kind, **msgspec.to_builtins(item)} for kind in kinds for item in kind.values()
    ]
    return (
        f"the kernel and the specification differ (seed {seed}, node {case.node}): {last}\n\n"
        f"the smallest cluster that shows it:\n{yaml.safe_dump_all(objects, sort_keys=False)}"
    )


def shrink(case: Case, packet: Packet, mismatch: Mismatch) -> tuple[Cluster, Mismatch]:
    """The smallest cluster found, object by object and rule by rule, that still differs."""
    best, last = case.cluster, mismatch
    improved = True
    while improved:
        improved = False
        for smaller in _smaller(best):
            attempt = Case(case.world, smaller, case.node)
            try:
                attempt.publish()
                attempt.check(packet)
            except Mismatch as found:
                best, last, improved = smaller, found, True
                break
    return best, last


def _smaller(cluster: Cluster) -> Iterator[Cluster]:
    but = msgspec.structs.replace
    for kind in ("policies", "pods", "services", "slices"):
        items = getattr(cluster, kind)
        for key in items:
            yield but(cluster, **{kind: {k: v for k, v in items.items() if k != key}})
    for key, policy in cluster.policies.items():
        for side in ("ingress", "egress"):
            rules = getattr(policy.spec, side)
            for i, rule in enumerate(rules):
                options = [rules[:i] + rules[i + 1 :]]
                for part in ("from_" if side == "ingress" else "to", "ports"):
                    items = getattr(rule, part)
                    options += [
                        [
                            *rules[:i],
                            but(rule, **{part: items[:j] + items[j + 1 :]}),
                            *rules[i + 1 :],
                        ]
                        for j in range(len(items))
                        if len(items) > 1
                    ]
                for option in options:
                    smaller = but(policy, spec=but(policy.spec, **{side: option}))
                    yield but(cluster, policies={**cluster.policies, key: smaller})


def show(score: Score) -> None:
    """A line of progress, each 20 clusters."""
    if score.clusters % 20 == 0:
        print(f"  {score.clusters} clusters, {score.packets} packets", file=sys.stderr, flush=True)

"""Rounds of random services and clients: does the kernel serve them as the specification says?

Each cluster is in force on its three nodes at once (service_trial.py). Then it changes, and the
clients come again.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import msgspec
import yaml

from lockgate.compile.tables import SVC_FRONTEND, SVC_HOST_ONLY, ServiceView
from lockgate.objects.address import format_address
from lockgate.objects.model import Cluster
from lockgate.spec.services import Client, Frontend
from tests import generate_services as generate
from tests.bytecode.compare import NAMES
from tests.bytecode.service_nodes import Ask, Node, Nodes
from tests.bytecode.service_trial import WORLD, Mismatch, Score, Trial
from tests.bytecode.world import OUTSIDE, UNDERLAY

__all__ = ["Difference", "changed", "frontend", "play", "play_for", "show"]

#: Clients of a node at each step, and steps of a cluster.
CLIENTS, STEPS = 22, 2
AGAIN = 20  # a packet that is sent so often shows what chance does


class Difference(AssertionError):
    """A mismatch with the smallest cluster that shows it, to be read by people."""


# ---- Clients -------------------------------------------------------------------------


def question(rng: Random, trial: Trial, node: Node) -> Ask:
    """A client of this node's, and a frontend in its family."""
    asked = frontend(rng, node, outside := rng.random() < 0.65)
    six = ":" in asked.address
    here, there = [], []
    for pod in trial.cluster.pods.values():
        if not pod.finished and not pod.spec.host_network:
            mine = here if pod.spec.node_name == node.name else there
            mine += [ip for ip in pod.ips if (":" in ip) == six]
    begins = asked.protocol == "UDP" or rng.random() < 0.75
    if here and not outside:
        return Ask(node.name, Client("pod", rng.choice(here)), asked, trial.sport(), 0, begins)
    others = [ip for one in trial.nodes if one is not node for ip in one.own]
    link = rng.choice((UNDERLAY, OUTSIDE))
    source = rng.choice(WORLD[6 if six else 4])
    match rng.randrange(10):
        case 0 | 1 if there:
            source, link = rng.choice(there), rng.choice((UNDERLAY,) * 4 + (OUTSIDE,))
        case 2:
            source = rng.choice([ip for ip in others if (":" in ip) == six])
            link = rng.choice((UNDERLAY,) * 4 + (OUTSIDE,))
        case 3 if rng.random() < 0.3:  # pretends
            source = rng.choice([*here, *(ip for ip in node.own if (":" in ip) == six)])
    return Ask(node.name, Client("outside", source), asked, trial.sport(), link, begins)


def frontend(rng: Random, node: Node, outside: bool) -> Frontend:
    """Mostly one that clients there have, and somebody serves."""
    assert node.tables is not None

    def is_theirs(view: ServiceView) -> bool:
        return bool(view.flags & SVC_FRONTEND) if outside else not view.flags & SVC_HOST_ONLY

    views = node.tables.services
    entries = sorted(key for key in views if key[1])
    theirs = [key for key in entries if is_theirs(views[key])]
    served = [key for key in theirs if views[key].owner_count or views[key].count]
    many = [key for key in served if max(views[key].owner_count, views[key].count) > 1]
    of = rng.choice((many, many, many, served, served, theirs, entries)) or theirs
    if not of or not rng.randrange(8):
        return generate.frontend(rng, node.cluster)
    address, port, number = rng.choice(of)
    return Frontend(format_address(address), port, NAMES[number])


# ---- Rounds ----------------------------------------------------------------------------------


def play(
    nodes: Nodes,
    seed: int | str,
    clusters: int = 200,
    progress: Callable[[Score], None] | None = None,
    score: Score | None = None,
) -> Score:
    """So many clusters. Difference when one goes wrong. The same seed makes the same clusters."""
    score = score or Score()
    for number in range(clusters):
        rng = Random(f"{seed}/{number}")
        trial = Trial(nodes, generate.cluster(rng), rng.random() < 0.3, score)
        try:
            _one(trial, nodes, rng)
        except Mismatch as mismatch:
            raise Difference(explain(nodes, trial, mismatch, f"{seed}/{number}")) from None
        score.clusters += 1
        if progress:
            progress(score)
    return score


def _one(trial: Trial, nodes: Nodes, rng: Random) -> None:
    for step in range(STEPS):
        if step:
            trial.take(changed(rng, trial.cluster), rng.random() < 0.3)
            trial.go_on(rng, CLIENTS)
        for node in nodes:
            for _ in range(CLIENTS):
                trial.check(question(rng, trial, node))
        trial.go_on(rng, CLIENTS // 2)


def changed(rng: Random, cluster: Cluster) -> Cluster:
    """One to three objects are others; all nodes stay."""
    found = copy.deepcopy(cluster)
    for _ in range(rng.choice((1, 1, 2, 3))):
        nodes = {**found.nodes}
        generate.change(rng, found)
        if found.nodes.keys() != nodes.keys():
            found.nodes.update(nodes)
    names = [key[1] for key in found.pods]
    for key in [*found.pods]:
        if names.count(key[1]) > 1:  # in another namespace: these have the same addresses
            names.remove(key[1])
            del found.pods[key]
    return found


def play_for(
    nodes: Nodes, seed: int, seconds: float, progress: Callable[[Score], None] | None = None
) -> Score:
    """The same until the seconds are over."""
    score, began, batch = Score(), time.monotonic(), 0
    while time.monotonic() - began < seconds:
        play(nodes, f"{seed}/{batch}", 10, progress, score)
        batch += 1
    return score


def show(score: Score) -> None:
    """A line of progress, each 20 clusters."""
    if score.clusters % 20 == 0:
        text = f"  {score.clusters} clusters of services, {score.packets} packets"
        print(text, file=sys.stderr, flush=True)


# ---- What is told ------------------------------------------------------------------------------


def explain(nodes: Nodes, trial: Trial, mismatch: Mismatch, seed: str) -> str:
    """Shrink the cluster and tell. A difference that needs what happened before stays large."""
    cluster, last = trial.cluster, mismatch
    improved = True
    alone = _shows(nodes, cluster, trial.snat, mismatch.ask)
    while alone is not None and improved:
        improved = False
        for smaller in _smaller(cluster):
            found = _shows(nodes, smaller, trial.snat, mismatch.ask)
            if found is not None:
                cluster, last, improved = smaller, found, True
                break
    kinds = (cluster.pods, cluster.services, cluster.slices)
    objects = [
        {"kind": item.kind, **msgspec.to_builtins(item)} for kind in kinds for item in kind.values()
    ]
    history = "" if alone else " after all that happened before"
    return (
        f"the kernel and the specification of services differ (seed {seed},"
        f" snat {trial.snat}){history}: {last}\n\n"
        f"the smallest cluster that shows it:\n{yaml.safe_dump_all(objects, sort_keys=False)}"
    )


def _shows(nodes: Nodes, cluster: Cluster, snat: bool, ask: Ask) -> Mismatch | None:
    trial = Trial(nodes, cluster, snat, Score())
    try:
        for number in range(AGAIN):
            trial.check(ask if not number else replace(ask, sport=trial.sport()))
    except Mismatch as mismatch:
        return mismatch
    except StopIteration:
        return None  # the pod that asks is gone
    return None


def _smaller(cluster: Cluster) -> Iterator[Cluster]:
    but = msgspec.structs.replace
    for kind in ("services", "slices", "pods"):
        items = getattr(cluster, kind)
        for key in items:
            yield but(cluster, **{kind: {k: v for k, v in items.items() if k != key}})
    for key, one in cluster.slices.items():
        for number in range(len(one.endpoints)):
            fewer = [e for n, e in enumerate(one.endpoints) if n != number]
            yield but(cluster, slices={**cluster.slices, key: but(one, endpoints=fewer)})
    for key, service in cluster.services.items():
        for name in ("ports", "external_ips", "load_balancer_source_ranges"):
            items = getattr(service.spec, name)
            for number in range(len(items)):
                fewer = [e for n, e in enumerate(items) if n != number]
                if name == "ports" and not fewer:
                    continue  # no such Service
                spec = but(service.spec, **{name: fewer})
                yield but(cluster, services={**cluster.services, key: but(service, spec=spec)})

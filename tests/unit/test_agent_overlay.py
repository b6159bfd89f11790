"""Pods with leases over the objects: patched by key it comes to what it does as a whole."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import pytest

from lockgate.agent.endpoints import Endpoints
from lockgate.agent.ipam import Lease
from lockgate.objects.changes import Changed
from tests import generate
from tests.changes import CHANGES, Ids

PODS = [change for change in CHANGES if change.__name__.startswith("pod_")]


@pytest.mark.parametrize("seed", range(60))
def test_patched_and_whole_overlays_agree(seed: int) -> None:
    rng, ids = Random(seed), Ids()
    cluster = generate.cluster(rng)
    ipam = SimpleNamespace(leases={})
    one = Endpoints(None, ipam, "a")  # type: ignore[arg-type]
    other = Endpoints(None, ipam, "a")  # type: ignore[arg-type]
    before = dict(one.overlay(cluster)[0].pods)
    other.overlay(cluster)
    for _ in range(60):
        changed = Changed()
        for change in rng.choices(PODS, k=rng.randrange(3)):
            change(rng, cluster, changed, ids)
        leased = dict(ipam.leases)
        if rng.random() < 0.5:
            ipam.leases = lease(rng, cluster, leased)
        found, moved = one.overlay(cluster, changed)
        assert moved is not None
        assert found.pods == other.overlay(cluster)[0].pods
        keys = before.keys() | found.pods.keys()
        assert {k for k in keys if before.get(k) is not found.pods.get(k)} <= moved.pods
        for uid in leased.keys() ^ ipam.leases.keys():
            assert all(p.key in moved.pods for p in found.pods.values() if p.metadata.uid == uid)
        before = dict(found.pods)


def lease(rng: Random, cluster, leases: dict[str, Lease]) -> dict[str, Lease]:
    """An ADD for a pod of this node, or a DEL of any, which may be gone already."""
    here = [pod for pod in cluster.pods.values() if pod.spec.node_name == "a"]
    if here and rng.random() < 0.6:
        uid = rng.choice(here).metadata.uid
        slot = rng.randrange(1000)
        leases[uid] = Lease(uid, (f"10.0.1.{slot % 250}",), slot)
    elif leases:
        leases.pop(rng.choice(list(leases)))
    return leases

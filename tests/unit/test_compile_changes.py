"""A compilation that patches the one before comes to the same as one from nothing."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockgate.compile import Tables, compile_node
from lockgate.compile.evaluate import backends_of, lookup
from lockgate.objects.address import parse_address
from lockgate.objects.changes import Changed
from lockgate.objects.model import Cluster
from tests import generate
from tests.changes import CHANGES, Ids

#: (a change, its seed, is what came so far compiled after it)
STEPS = st.lists(
    st.tuples(st.sampled_from(CHANGES), st.integers(0, 2**32), st.booleans()), max_size=25
)
ASKED = [(6, port) for port in (0, 80, 9000)] + [(17, 53), (132, 8080), (1, 0)]


def same(found: Tables, wanted: Tables) -> None:
    """Equal to whoever looks things up: numbers of classes and places may differ."""
    assert {a: view[1:] for a, view in found.peers.items()} == {
        a: view[1:] for a, view in wanted.peers.items()
    }
    assert found.endpoints.keys() == wanted.endpoints.keys()
    peers = [*wanted.peers, *map(parse_address, generate.OUTSIDE)]
    for slot, mine in found.endpoints.items():
        theirs = wanted.endpoints[slot]
        assert mine.isolated == theirs.isolated
        for peer in peers:
            for protocol, port in ASKED:
                for direction in ("ingress", "egress"):
                    assert lookup(found, mine, direction, peer, port, protocol) == lookup(
                        wanted, theirs, direction, peer, port, protocol
                    )
    assert found.services.keys() == wanted.services.keys()
    for key, service in found.services.items():
        other = wanted.services[key]
        assert (service.id, service.count, service.flags) == (other.id, other.count, other.flags)
        assert backends_of(found, service) == backends_of(wanted, other)
    assert found.backends == wanted.backends
    assert sorted(found.errors) == sorted(wanted.errors)


class Mirror:
    """Follows tables by their deltas alone."""

    def __init__(self, tables: Tables) -> None:
        self.serial = tables.serial
        self.peers, self.services = dict(tables.peers), dict(tables.services)
        self.backends, self.image = dict(tables.backends), tables.image.copy()

    def follow(self, tables: Tables) -> None:
        delta = tables.delta
        assert delta is not None and delta.base == self.serial
        self.serial = tables.serial
        for mine, theirs, changes in (
            (self.peers, tables.peers, delta.peers),
            (self.services, tables.services, delta.services),
            (self.backends, tables.backends, delta.backends),
        ):
            for key, was in changes.items():
                assert mine.pop(key, None) == was != theirs.get(key)
                if key in theirs:
                    mine[key] = theirs[key]
            assert mine == dict(theirs)
        if delta.words is None:
            self.image = tables.image.copy()
        else:
            self.image = np.resize(self.image, len(tables.image))
            for first, behind in delta.words:
                self.image[first:behind] = tables.image[first:behind]
        for service in self.services.values():
            assert backends_of(tables, service) == backends_of(Tables(self.image), service)
        ends = [view.rows for view in tables.endpoints.values()]
        assert np.array_equal(
            self.image[: max(ends, default=0)], tables.image[: max(ends, default=0)]
        )


def begin(seed: int) -> tuple[Cluster, Ids]:
    cluster, ids = generate.cluster(Random(seed)), Ids()
    for slot, pod in enumerate(cluster.pods.values()):
        ids.slots[pod.metadata.uid] = slot
    return cluster, ids


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), STEPS)
def test_patching_comes_to_what_a_cold_compilation_does(seed: int, steps) -> None:
    cluster, ids = begin(seed)
    tables = compile_node(cluster, "a", ids)
    mirror, changed = Mirror(tables), Changed()
    for change, step, compiles in steps:
        change(Random(step), cluster, changed, ids)
        if compiles:
            tables = compile_node(cluster, "a", ids, tables, changed)
            mirror.follow(tables)
            changed = Changed()
            same(tables, compile_node(cluster, "a", ids))
    # Without being told what changed, the objects are compared.
    tables = compile_node(cluster, "a", ids, tables)
    mirror.follow(tables)
    same(tables, compile_node(cluster, "a", ids))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_change_on_its_own(change) -> None:
    for seed in range(40):
        cluster, ids = begin(seed)
        tables = compile_node(cluster, "a", ids)
        mirror = Mirror(tables)
        changed = Changed()
        change(Random(seed), cluster, changed, ids)
        tables = compile_node(cluster, "a", ids, tables, changed)
        mirror.follow(tables)
        same(tables, compile_node(cluster, "a", ids))

"""Two views say the same exactly when no look-up tells them apart."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockgate.agent.alike import View, alike
from lockgate.agent.encode import Encoder, EndpointRecord
from lockgate.bpf.btf import Schema
from lockgate.compile import Tables, compile_node
from lockgate.compile.balance import table_words
from lockgate.compile.tables import (
    CIDR_NEXT,
    IMAGE_CIDRS,
    EndpointView,
    PeerView,
    ServiceView,
)
from lockgate.objects.changes import Changed
from lockgate.objects.model import Cluster
from lockgate.paths import bpf_object
from tests import generate_services
from tests.changes import Ids
from tests.unit import test_compile_services as services
from tests.unit.test_compile_changes import STEPS, begin, same

SCHEMA = Schema.from_object(bpf_object())
SLOTS = 128
BEYOND = 0xFFFF_FFF0


def view_of(tables: Tables, ids, cluster) -> View:
    """As the publisher has it."""
    encoder = Encoder(SCHEMA, SLOTS)
    peers, services, backends = encoder.encode(tables)
    pods = {ids.slot(pod.metadata.uid): pod for pod in cluster.pods.values()}
    records = {
        slot: EndpointRecord(ids.endpoint(pods[slot]), bytes(6), bytes(6), 1500, own(pods[slot]))
        for slot in tables.endpoints
    }
    return View(
        tables.image.copy(),
        (peers[0], peers[1].copy().view(SCHEMA.dtype("peer_view")).reshape(-1)),
        (services[0], services[1].copy().view(SCHEMA.dtype("service_view")).reshape(-1)),
        backends,
        encoder.endpoints(tables, records)[1].copy(),
    )


def own(pod) -> tuple[str, ...]:
    return tuple(ip for ip in pod.ips if ip != "nonsense")


def tables_of(view: View, like: Tables) -> Tables:
    """The same as `evaluate` reads it."""
    peers = {bytes(k): PeerView(*v.tolist()) for k, v in zip(*view.peers, strict=True)}
    keys = view.services[0].reshape(-1).view(SCHEMA.dtype("service_key"))
    return Tables(
        view.image,
        peers,
        {slot: EndpointView(*view.endpoints[slot].tolist()[:3]) for slot in like.endpoints},
        {
            (bytes(k["addr"]), int(k["port"]), int(k["proto"])): ServiceView(*v.tolist())
            for k, v in zip(keys, view.services[1], strict=True)
        },
        like.backends,
        like.errors,
    )


def history(seed: int, steps) -> tuple[Tables, object, object]:
    """Tables that were patched, their ids, and the cluster they are of."""
    cluster, ids = begin(seed)
    tables = compile_node(cluster, "a", ids)
    for change, step, _ in steps:
        changed = Changed()
        change(Random(step), cluster, changed, ids)
        tables = compile_node(cluster, "a", ids, tables, changed)
    return tables, ids, cluster


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), STEPS)
def test_what_was_patched_says_what_a_cold_compilation_does(seed: int, steps) -> None:
    patched, ids, cluster = history(seed, steps)
    cold = compile_node(cluster, "a", ids)
    assert alike(view_of(cold, ids, cluster), view_of(patched, ids, cluster))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), STEPS, STEPS)
def test_other_objects_are_told_apart(seed: int, steps, further) -> None:
    before, ids, cluster = history(seed, steps)
    live = view_of(before, ids, cluster)
    after, ids, cluster = history(seed, steps + further)
    wanted, found = view_of(after, ids, cluster), tables_of(live, before)
    found.errors = after.errors
    try:
        same(found, after)
    except AssertionError:
        assert not alike(wanted, live)


def history_of_services(seed: int, steps: int) -> tuple[Tables, Tables]:
    """Tables that were patched, and such as are made from nothing."""
    cluster, ids, rng = services.begin(seed)
    tables = compile_node(cluster, "a", ids, host=services.HOST)
    for _ in range(steps):
        changed = Changed()
        kind, key = generate_services.change(rng, cluster)
        getattr(changed, kind).add(key)
        tables = compile_node(cluster, "a", ids, tables, changed, services.HOST)
    return tables, compile_node(cluster, "a", ids, host=services.HOST)


def view_of_services(tables: Tables) -> View:
    return view_of(replace(tables, endpoints={}), Ids(), Cluster())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 12), st.integers(1, 3))
def test_services_that_were_patched_say_what_cold_ones_do(seed: int, steps: int, more: int) -> None:
    patched, cold = history_of_services(seed, steps)
    assert alike(view_of_services(cold), view_of_services(patched))
    other, _ = history_of_services(seed, steps + more)
    try:
        services.same(other, replace(cold, errors=other.errors))
    except AssertionError:
        assert not alike(view_of_services(cold), view_of_services(other))


def test_damaged_tables_of_slots_are_not_the_same() -> None:
    found = 0
    for seed in range(40):
        tables, _ = history_of_services(seed, 0)
        wanted, rng = view_of_services(tables), Random(seed)
        for view in tables.services.values():
            words = []
            if view.owner_count:
                words += [view.table + rng.randrange(table_words(view.slot_bits, view.number_bits))]
                words += [view.owners + rng.randrange(3 * view.owner_count)]
            if view.ranges:
                words.append(view.ranges)
            for word in words:
                live = view_of_services(tables)
                live.image[word] ^= np.uint64(1 << rng.randrange(64))
                assert not alike(wanted, live)
                found += 1
    assert found > 100


def read_words(view: View, tables: Tables) -> np.ndarray:
    """The words of the image behind the ports that something points at."""
    starts = [view.endpoints[slot][name] for slot in tables.endpoints for name in ("rows", "cols")]
    words = [*range(IMAGE_CIDRS, IMAGE_CIDRS + 3)]
    words += [int(start) + more for start in starts for more in range(4)]
    for service in tables.services.values():
        words += range(service.backends, service.backends + 3 * service.count)
    words += (IMAGE_CIDRS + 3 + np.flatnonzero(view.image[IMAGE_CIDRS + 3 :])).tolist()
    return np.array(words)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_damaged_is_never_taken_for_the_same(seed: int) -> None:
    """Any word, of the image or of what points into it, may be any other: no error, and never
    the same where a look-up says otherwise."""
    rng = Random(seed)
    cluster, ids = begin(seed)
    tables = compile_node(cluster, "a", ids)
    wanted = view_of(tables, ids, cluster)
    words, found = read_words(wanted, tables), 0
    for _ in range(150):
        live = view_of(tables, ids, cluster)
        assert alike(wanted, live)
        damage(rng, live, words)
        if alike(wanted, live):
            same(tables_of(live, tables), tables)
        else:
            found += 1
    assert found > 50


def damage(rng: Random, live: View, words: np.ndarray) -> None:
    records = [live.peers[1], live.services[1], live.endpoints[:8]]
    match rng.randrange(6):
        case 0 | 1 | 2:
            word = int(rng.choice(words))
            live.image[word] ^= np.uint64(1 << rng.randrange(64))
        case 3:
            place = rng.choice([80, 443, 8080, 65536 + 53, rng.randrange(3 << 16)])
            live.image.view("<u2")[place] += 1
        case 4:
            table = rng.choice([one for one in records if len(one)])
            name = rng.choice(table.dtype.names)
            bits = 8 * table.dtype[name].itemsize
            table[name][rng.randrange(len(table))] ^= 1 << rng.randrange(min(16, bits))
        case 5:
            table = rng.choice([one for one in records if len(one)])
            name = rng.choice(table.dtype.names)
            limit = np.iinfo(table.dtype[name]).max
            table[name][rng.randrange(len(table))] = BEYOND & int(limit)


DAMAGED = [
    ("an image cut short", lambda v: replace(v, image=v.image[:-1])),
    ("an image without cells", lambda v: replace(v, image=v.image[: IMAGE_CIDRS + 1])),
    ("no image to speak of", lambda v: replace(v, image=v.image[:100])),
    ("a peer less", lambda v: replace(v, peers=(v.peers[0][1:], v.peers[1][1:]))),
    ("a service less", lambda v: replace(v, services=(v.services[0][1:], v.services[1][1:]))),
    ("a backend less", lambda v: replace(v, backends=(v.backends[0][1:], v.backends[1][1:]))),
    ("no local pods", lambda v: replace(v, endpoints=np.zeros_like(v.endpoints))),
]


@pytest.mark.parametrize("damaged", [d[1] for d in DAMAGED], ids=[d[0] for d in DAMAGED])
def test_what_lacks_something_is_not_the_same(damaged) -> None:
    for seed in range(50):
        cluster, ids = begin(seed)
        tables = compile_node(cluster, "a", ids)
        wanted = view_of(tables, ids, cluster)
        if all(map(len, (wanted.peers[0], tables.services, tables.backends, tables.endpoints))):
            # The last word that anything points at, so that one less is missed.
            end = max(v.backends + 3 * v.count for v in tables.services.values())
            wanted = replace(wanted, image=wanted.image[:end])
            assert alike(wanted, wanted) and not alike(wanted, damaged(wanted))
            return
    raise AssertionError("the generator makes no such cluster any more")


def test_a_trie_that_leads_in_circles_ends() -> None:
    cluster, ids = begin(3)
    tables = compile_node(cluster, "a", ids)
    wanted, live = view_of(tables, ids, cluster), view_of(tables, ids, cluster)
    slots = live.image[IMAGE_CIDRS:].view("<u4")
    slots[:2] = CIDR_NEXT | 1 << 26
    assert not alike(wanted, live)

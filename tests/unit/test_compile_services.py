"""Frontends, lists and tables against the specification of services, and patched against new."""

from __future__ import annotations

from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockgate.compile import Tables, compile_node
from lockgate.compile.balance import Owner, table
from lockgate.compile.evaluate import (
    backends_of,
    in_ranges,
    owners_of,
    slots_of,
)
from lockgate.compile.tables import (
    LIVE_INSIDE,
    LIVE_KEEPS,
    LIVE_LOCAL,
    LIVE_OUTSIDE,
    PROTOCOL_NUMBER,
    SVC_FRONTEND,
    SVC_HOST_ONLY,
    SVC_INTERNAL_LOCAL,
    SVC_LOCAL,
    SVC_OPEN,
    SVC_PRESENT,
    SVC_RANGES,
    BackendKey,
    Host,
    ServiceView,
)
from lockgate.objects.address import format_address, parse_address
from lockgate.objects.changes import Changed
from lockgate.objects.model import Cluster
from lockgate.spec.services import Backend, Choice, Client, Frontend, choose
from tests import generate_services as generate
from tests.changes import Ids

HOST = Host(generate.cards())
CARDS = [ip for ip in generate.CARDS if not ip.startswith("fe80")]


def walk(tables: Tables, client: Client, asked: Frontend) -> Choice:
    """What the programs do with these tables."""
    address = parse_address(asked.address)
    whole = tables.services.get((address, 0, 0))
    view = tables.services.get((address, asked.port, PROTOCOL_NUMBER[asked.protocol]))
    if whole is None:
        assert view is None
        return Choice("none")
    assert whole.flags & SVC_PRESENT and (view is None or view.flags & SVC_PRESENT)
    outside = client.place == "outside"
    if outside and not (view or whole).flags & SVC_FRONTEND:
        return Choice("none")
    if (view or whole).flags & SVC_HOST_ONLY and client.place != "node":
        return Choice("none")
    if view is None:
        others = SVC_OPEN if outside else SVC_OPEN | SVC_FRONTEND
        return Choice("none") if whole.flags & others else Choice("refuse", "unknown-service-port")
    ranged = view.flags & SVC_RANGES and client.place != "node"
    if ranged and not in_ranges(tables, view, parse_address(client.address)):
        return Choice("drop", "source-range")
    if outside:
        found = {
            Backend(format_address(o.address), o.port, o.ends) for o in owners_of(tables, view)
        }
    else:
        found = {Backend(format_address(a), p) for a, p, _ in backends_of(tables, view)}
    if all(one.ends for one in found):
        if view.flags & (SVC_LOCAL if outside else SVC_INTERNAL_LOCAL):
            return Choice("drop", "no-local-backend", frozenset(found))
        return Choice("refuse", "no-backend", frozenset(found))
    return Choice("serve", "", frozenset(found))


def sound(tables: Tables) -> None:
    """What holds of every view, whoever asks."""
    wanted: dict[BackendKey, int] = {}

    def live(key: BackendKey, bits: int) -> None:
        wanted[key] = wanted.get(key, 0) | bits

    for (address, port, protocol), view in tables.services.items():
        if not port:
            continue
        owners = owners_of(tables, view)
        for numbers in slots_of(tables, view):
            assert len(set(numbers)) == len(numbers) == min(4, len(owners))
            assert owners[numbers[0]].ends == all(one.ends for one in owners)
        assert len({one[:2] for one in owners}) == len(owners)
        inside = LIVE_LOCAL if view.flags & SVC_INTERNAL_LOCAL else LIVE_INSIDE
        for backend, number, _ in backends_of(tables, view):
            live((backend, view.id, number, protocol), inside)
        for one in owners:
            bits = LIVE_KEEPS if one.ends else LIVE_OUTSIDE
            live((one.address, view.id, one.port, protocol), bits)
        assert bool(view.owner_count) <= bool(view.flags & SVC_FRONTEND)
        assert (address, 0, 0) in tables.services
    # Of UDP whoever serves keeps its flows, though it may not be this node's turn.
    for key, bits in tables.backends.items():
        assert wanted.pop(key, LIVE_KEEPS) | LIVE_KEEPS == bits | LIVE_KEEPS
    assert not wanted


def begin(seed: int) -> tuple[Cluster, Ids, Random]:
    rng = Random(seed)
    cluster, ids = generate.cluster(rng), Ids()
    ids.hops = {"b": 9, "c": 10}
    for slot, pod in enumerate(cluster.pods.values()):
        if rng.random() < 0.9:
            ids.slots[pod.metadata.uid] = slot
    return cluster, ids, rng


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 2**32))
def test_the_tables_agree_with_the_specification(seed: int) -> None:
    cluster, ids, rng = begin(seed)
    tables = compile_node(cluster, "a", ids, host=HOST)
    sound(tables)
    for _ in range(40):
        asked = generate.frontend(rng, cluster)
        client = generate.client(rng, asked.address)
        wanted = choose(cluster, "a", client, asked, CARDS)
        found = walk(tables, client, asked)
        assert (found.verdict, found.cause) == (wanted.verdict, wanted.cause), (client, asked)
        assert found.backends == wanted.backends, (client, asked)


def meaning(tables: Tables, view: ServiceView) -> object:
    """A view, wherever its lists are."""
    addresses = [*map(parse_address, generate.CLIENTS)]
    return (
        (view.id, view.count, view.flags, view.affinity, view.slot_bits, view.owner_count),
        backends_of(tables, view),
        owners_of(tables, view),
        slots_of(tables, view),
        [in_ranges(tables, view, one) for one in addresses] if view.flags & SVC_RANGES else None,
    )


def same(found: Tables, wanted: Tables) -> None:
    assert found.services.keys() == wanted.services.keys()
    for key, view in found.services.items():
        assert meaning(found, view) == meaning(wanted, wanted.services[key]), key
    assert found.backends == wanted.backends
    assert found.host_backends == wanted.host_backends
    assert sorted(found.errors) == sorted(wanted.errors)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_patching_comes_to_what_a_cold_compilation_does(seed: int, steps: int) -> None:
    cluster, ids, rng = begin(seed)
    host = HOST
    tables = compile_node(cluster, "a", ids, host=host)
    for _ in range(steps):
        changed = Changed()
        for _ in range(rng.choice((1, 1, 3))):
            kind, key = generate.change(rng, cluster)
            getattr(changed, kind).add(key)
        if rng.random() < 0.1:
            host = Host(rng.choice((generate.cards(), frozenset())), rng.random() < 0.5)
        image = tables.image.copy()
        tables = compile_node(cluster, "a", ids, tables, changed, host)
        same(tables, compile_node(cluster, "a", ids, host=host))
        sound(tables)
        # Who follows by the delta alone has the same words.
        assert tables.delta is not None
        if tables.delta.words is not None:
            image = np.resize(image, len(tables.image))
            for first, behind in tables.delta.words:
                image[first:behind] = tables.image[first:behind]
            mirror = Tables(image)
            for view in tables.services.values():
                assert meaning(mirror, view) == meaning(tables, view)
    # Without being told what changed, the objects are compared.
    for _ in range(2):
        generate.change(rng, cluster)
    tables = compile_node(cluster, "a", ids, tables, host=host)
    same(tables, compile_node(cluster, "a", ids, host=host))


@pytest.mark.parametrize("seed", range(20))
def test_every_node_comes_to_the_same_table(seed: int) -> None:
    """Where the policy is Cluster, whatever a node is itself."""
    cluster, _, _ = begin(seed)
    for name, one in cluster.services.items():
        spec = msgspec.structs.replace(one.spec, external_traffic_policy="Cluster")
        cluster.services[name] = msgspec.structs.replace(one, spec=spec)
    by_node = [compile_node(cluster, node, Ids()) for node in generate.NODES]
    for key, view in by_node[0].services.items():
        others = [tables.services.get(key) for tables in by_node]
        if not view.flags & SVC_FRONTEND or not key[1] or not all(others):
            continue
        found = {
            (
                tuple(one[:3] for one in owners_of(tables, one_view)),
                tuple(slots_of(tables, one_view)),
            )
            for tables, one_view in zip(by_node, others, strict=True)
            if one_view
        }
        assert len(found) == 1 or key[1] in generate.HOST_PORTS


def test_the_slots_are_the_balancers() -> None:
    found = 0
    for seed in range(60):
        cluster, ids, _ = begin(seed)
        tables = compile_node(cluster, "a", ids, host=HOST)
        weights = {
            parse_address(ip): int(text)
            for pod in cluster.pods.values()
            if not pod.finished and not pod.spec.host_network
            for ip in pod.ips
            if (text := pod.metadata.annotations.get("lockgate.dev/weight", "100")).isdigit()
        }
        for view in tables.services.values():
            owners = owners_of(tables, view)
            if not owners:
                continue
            of = [Owner(*one[:3], weights.get(one.address, 100)) for one in owners]
            wanted = table(of, view.slot_bits or 14)
            at = view.table
            assert np.array_equal(tables.image[at : at + len(wanted)], wanted)
            found += len(owners) > 4
    assert found > 20

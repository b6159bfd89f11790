"""The publisher against real maps: two views, one epoch."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unittest.mock import Mock

import numpy as np
import pytest

from lockgate.agent.datapath import Datapath
from lockgate.agent.publish import EndpointRecord, Publisher
from lockgate.agent.sizes import Sizes
from lockgate.agent.sweep import sweep
from lockgate.bpf.btf import Schema
from lockgate.bpf.syscall import prog_info
from lockgate.compile import compile_node
from lockgate.compile.tables import (
    NO_CLASS,
    PEER_HOST,
    PEER_LOCAL,
    EndpointView,
    PeerView,
    ServiceView,
    Tables,
)
from lockgate.objects.address import parse_address
from lockgate.objects.changes import Changed
from lockgate.objects.model import Cluster, Pod
from lockgate.paths import bpf_object
from tests import generate
from tests.changes import CHANGES, Ids
from tests.unit.test_compile_changes import same

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
MAX_HOPS = 4096
SIZES = Sizes(1024, 1024, 1024, 1024, 1024)
PINS = Path("/sys/fs/bpf/lockgate", f"test-publish-{os.getpid()}")


@pytest.fixture
def dp() -> Iterator[Datapath]:
    try:
        with Datapath(bpf_object(), PINS, SIZES) as datapath:
            yield datapath
    finally:
        shutil.rmtree(PINS, ignore_errors=True)


def tables(pods: int = 3, words: int = 60000) -> Tables:
    made = Tables(np.arange(words, dtype=np.uint64))
    for n in range(pods):
        made.peers[parse_address(f"10.0.{n >> 8}.{n & 255}")] = PeerView(n, n + 1, 2, 9)
    made.endpoints[4] = EndpointView(100, 200, 3)
    service = parse_address("10.96.0.1")
    made.services[service, 80, 6] = ServiceView(5, 1000, 1, 1)
    made.backends[parse_address("10.0.0.1"), 5, 8080, 6] = 1
    return made


HOP = Schema.from_object(bpf_object()).dtype("hop_view")
HOPS = np.zeros(MAX_HOPS, HOP)
RECORDS = {4: EndpointRecord(2, b"podmac", b"hstmac", 1500, ("10.0.0.1", "fd00::1"))}


def peers(dp: Datapath, view: int) -> dict[bytes, tuple[int, ...]]:
    keys, values = dp.peers.items()
    return {
        bytes(k): tuple(int(x) for x in v["view"][view])
        for k, v in zip(keys, values, strict=True)
        if v["view"][view]["kind"]
    }


def test_a_view_is_whole_before_the_epoch_moves_and_the_other_stays(dp: Datapath) -> None:
    publisher = Publisher(dp)
    first, second = tables(3), tables(2)
    assert publisher.publish(first, RECORDS, HOPS) and publisher.epoch == 1
    assert peers(dp, 1) == first.peers and peers(dp, 0) == {}
    assert publisher.publish(second, RECORDS, HOPS) and publisher.epoch == 2
    assert peers(dp, 0) == second.peers and peers(dp, 1) == first.peers
    service = dp.services.items()
    assert service[0]["port"].tolist() == [80] and service[1]["view"]["id"].tolist() == [[5, 5]]
    backends = dp.backends.items()
    assert backends[0]["port"].tolist() == [8080] and backends[1]["live"].tolist() == [[1, 1]]
    endpoint = dp.endpoints[4]
    assert bytes(endpoint["mac"]) == b"podmac" and bytes(endpoint["host_mac"]) == b"hstmac"
    assert bytes(endpoint["addr4"]) == parse_address("10.0.0.1")
    assert [tuple(v) for v in endpoint["view"].tolist()] == [
        (100, 200, 3, 2, NO_CLASS, NO_CLASS)
    ] * 2
    # What neither view has is deleted.
    assert len(dp.peers) == 3
    publisher.publish(tables(1), RECORDS, HOPS)
    publisher.publish(tables(2), RECORDS, HOPS)
    assert len(dp.peers) == 2


OWN = [
    ("its own, in both families", (9, 2, PEER_LOCAL, 4), (8, 2, PEER_LOCAL, 4), (9, 8)),
    ("one that another pod keeps", (9, 7, PEER_LOCAL, 5), (8, 2, PEER_LOCAL, 4), (NO_CLASS, 8)),
    ("one that the node has", (9, 0, PEER_HOST, 0), None, (NO_CLASS, NO_CLASS)),
    ("of a pod that lost its slot", (9, 2, PEER_LOCAL, 5), None, (NO_CLASS, NO_CLASS)),
]


@pytest.mark.parametrize(("v4", "v6", "classes"), [c[1:] for c in OWN], ids=[c[0] for c in OWN])
def test_a_pod_carries_the_class_of_an_address(dp: Datapath, v4, v6, classes) -> None:
    made = tables(0)
    for ip, view in zip(RECORDS[4].ips, (v4, v6), strict=True):
        if view:
            made.peers[parse_address(ip)] = PeerView(*view)
    Publisher(dp).publish(made, RECORDS, HOPS)
    view = dp.endpoints[4]["view"][1]
    assert view["endpoint"] == 2
    assert (view["class4"], view["class6"]) == classes


def test_nothing_moves_when_nothing_differs_also_after_a_restart(dp: Datapath) -> None:
    Publisher(dp).publish(tables(), RECORDS, HOPS)
    assert not Publisher(dp).publish(tables(), RECORDS, HOPS)
    with Datapath(bpf_object(), PINS, SIZES) as again:
        assert not again.pending
        publisher = Publisher(again)
        assert not publisher.publish(tables(), RECORDS, HOPS)
        assert publisher.epoch == 1


def test_hops_change_with_the_epoch_and_are_known_after_a_restart(dp: Datapath) -> None:
    publisher = Publisher(dp)
    one, two = HOPS.copy(), HOPS.copy()
    one[9]["ifindex"], one[9]["dmac"], two[9]["ifindex"] = 5, 7, 6
    assert publisher.publish(tables(), RECORDS, one)
    assert publisher.publish(tables(), RECORDS, two)
    assert dp.hops[9]["view"]["ifindex"].tolist() == [6, 5]
    assert dp.hops[9]["view"]["dmac"][:, 5].tolist() == [0, 7]
    assert not publisher.publish(tables(), RECORDS, two.copy())
    again = Publisher(dp)
    assert np.array_equal(again.hops().view(np.uint8), two.view(np.uint8))
    assert not again.publish(tables(), RECORDS, again.hops())


@pytest.mark.parametrize("seed", range(10))
def test_changes_failures_and_new_agents_leave_what_was_compiled(dp: Datapath, seed: int) -> None:
    """Each publication leaves in force what was compiled, by deltas or whole; a failure in between
    is made up for; a new agent moves nothing, whatever the history, and goes on from there."""
    rng, ids, cluster = Random(seed), Ids(), generate.cluster(Random(seed))
    publisher, made, changed = Publisher(dp), None, Changed()
    for _ in range(40):
        made = compile_node(cluster, "a", ids, made, changed)
        mine = records(made, ids, cluster)
        if rng.random() < 0.1:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("patch", "write"):
                    patch.setattr(publisher._services, name, Mock(side_effect=OSError(7)))
                before = publisher.epoch, raw(dp, publisher)
                with contextlib.suppress(OSError):
                    publisher.publish(made, mine, HOPS)
            assert before == (publisher.epoch, raw(dp, publisher)) or not made.delta
        publisher.publish(made, mine, HOPS)
        if rng.random() < 0.5:
            publisher.level(made)
        says(dp, publisher, made)
        if rng.random() < 0.3:
            epoch, before = publisher.epoch, raw(dp, publisher)
            publisher, made = Publisher(dp), compile_node(cluster, "a", ids)
            assert not publisher.publish(made, records(made, ids, cluster), HOPS)
            publisher.level(made)
            # Nothing that is looked up here is another: nor does that move anything.
            made = compile_node(cluster, "a", ids, made, Changed())
            assert not publisher.publish(made, records(made, ids, cluster), HOPS)
            assert (publisher.epoch, raw(dp, publisher)) == (epoch, before)
        changed = Changed()
        for change in rng.choices(CHANGES, k=rng.randrange(4)):
            change(rng, cluster, changed, ids)


@pytest.mark.parametrize("seed", range(10))
def test_what_changed_while_no_agent_ran_takes_one_epoch(dp: Datapath, seed: int) -> None:
    rng, ids, cluster = Random(seed), Ids(), generate.cluster(Random(seed))
    publisher, made = Publisher(dp), compile_node(cluster, "a", ids)
    publisher.publish(made, records(made, ids, cluster), HOPS)
    for _ in range(10):
        changed = Changed()
        rng.choice(CHANGES)(rng, cluster, changed, ids)
        made = compile_node(cluster, "a", ids, made, changed)
        publisher.publish(made, records(made, ids, cluster), HOPS)
    epoch = publisher.epoch
    for change in rng.choices(CHANGES, k=3):
        change(rng, cluster, Changed(), ids)
    changes_something = another(dp, cluster, ids)
    publisher, made = Publisher(dp), compile_node(cluster, "a", ids)
    moved = publisher.publish(made, records(made, ids, cluster), HOPS)
    # CIDR blocks that came or went may take an epoch though no answer is another.
    assert moved or not changes_something
    assert publisher.epoch == epoch + moved
    says(dp, publisher, made)


def another(dp: Datapath, cluster: Cluster, ids: Ids) -> bool:
    """Is what is in force another state? Not by the publisher's own comparison."""
    try:
        says(dp, Publisher(dp), compile_node(cluster, "a", ids))
    except AssertionError:
        return True
    return False


def records(made: Tables, ids: Ids, cluster: Cluster) -> dict[int, EndpointRecord]:
    pods = {ids.slot(pod.metadata.uid): pod for pod in cluster.pods.values()}
    return {
        slot: EndpointRecord(ids.endpoint(pods[slot]), b"podmac", b"hstmac", 1500, own(pods[slot]))
        for slot in made.endpoints
    }


def own(pod: Pod) -> tuple[str, ...]:
    return tuple(ip for ip in pod.ips if ip != "nonsense")


def in_force(dp: Datapath, publisher: Publisher) -> Tables:
    """What packets find: peers, local pods, services, backends, the image."""
    view = publisher.epoch & 1
    inner = dp.images.inner(view)
    assert inner is not None
    found = Tables(inner.view.copy())
    inner.close()
    found.peers.update({a: PeerView(*one) for a, one in peers(dp, view).items()})
    for slot in np.flatnonzero(dp.endpoints.view["id"]).tolist():
        rows, cols, isolated = dp.endpoints[slot]["view"][view].tolist()[:3]
        found.endpoints[slot] = EndpointView(rows, cols, isolated)
    for key, value in zip(*dp.services.items(), strict=True):
        if value["view"][view].tobytes().strip(b"\0"):
            where = bytes(key["addr"]), int(key["port"]), int(key["proto"])
            found.services[where] = ServiceView(*value["view"][view].tolist())
    for key, value in zip(*dp.backends.items(), strict=True):
        if value["live"][view]:
            where = bytes(key["addr"]), int(key["service"]), int(key["port"]), int(key["proto"])
            found.backends[where] = int(value["live"][view])
    return found


def says(dp: Datapath, publisher: Publisher, made: Tables) -> None:
    """What is in force says what was compiled."""
    found = in_force(dp, publisher)
    found.errors = made.errors
    same(found, made)


def raw(dp: Datapath, publisher: Publisher) -> tuple[object, ...]:
    """The same byte by byte."""
    found, view = in_force(dp, publisher), publisher.epoch & 1
    endpoints = dp.endpoints.view["view"][:, view].tobytes()
    return found.peers, found.services, found.backends, found.image.tobytes(), endpoints


def test_an_image_that_grew_gets_a_larger_array(dp: Datapath) -> None:
    publisher = Publisher(dp)
    for words in (10, 50000, 200_000, 20):
        made = tables(words=words)
        publisher.publish(made, RECORDS, HOPS)
        inner = dp.images.inner(publisher.epoch & 1)
        assert inner is not None
        assert np.array_equal(inner.view[:words], made.image)
        inner.close()


def test_a_slot_that_is_no_longer_wanted_is_not_live(dp: Datapath) -> None:
    publisher = Publisher(dp)
    publisher.publish(tables(), RECORDS, HOPS)
    assert dp.endpoints[4]["flags"] == 1
    publisher.publish(tables(), {}, HOPS)
    assert dp.endpoints[4]["flags"] == 0 and dp.endpoints[4]["id"] == 0


def test_a_failure_half_way_leaves_what_is_in_force(
    dp: Datapath, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher(dp)
    publisher.publish(tables(3), RECORDS, HOPS)
    with monkeypatch.context() as patch:
        patch.setattr(publisher._services, "write", lambda *a: (_ for _ in ()).throw(OSError(7)))
        with pytest.raises(OSError):
            publisher.publish(tables(200), RECORDS, HOPS)
    assert publisher.epoch == 1 and peers(dp, 1) == tables(3).peers
    assert publisher.publish(tables(200), RECORDS, HOPS)
    assert peers(dp, 0) == tables(200).peers and peers(dp, 1) == tables(3).peers


def test_many_peers(dp: Datapath) -> None:
    publisher = Publisher(dp)
    publisher.publish(tables(20000), RECORDS, HOPS)
    assert peers(dp, 1) == tables(20000).peers


def test_the_sweep_deletes_what_expired_and_nothing_else(dp: Datapath) -> None:
    keys = np.zeros(600, dp.connections.key_dtype)
    keys["lo_port"], keys["proto"] = np.arange(600), 6
    values = np.zeros(600, dp.connections.value_dtype)
    values["state"] = 4  # closed
    values["seen"][::2] = int(time.monotonic())
    dp.connections.update_many(keys, values)
    before = len(dp.connections)
    deleted = sum(sweep(dp, 64))
    assert before - deleted == len(dp.connections)
    left, _ = dp.connections.items()
    assert set((left["lo_port"] % 2).tolist()) == {0}


def test_programs_are_loaded_from_the_object(dp: Datapath) -> None:
    assert prog_info(dp.object.prog_fd("from_pod")).verified_insns > 0

"""Maps of two versions side by side: what the later one takes over, and what it leaves."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import IP
from scapy.layers.l2 import Ether

from lockgate.agent.carry import CarriedTable, Carry
from lockgate.agent.datapath import Datapath
from lockgate.agent.publish import Publisher
from lockgate.agent.sizes import Sizes
from lockgate.bpf import links
from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import HashMap, MappedArray
from lockgate.bpf.pins import convert, other_pins, pin_names
from lockgate.bpf.syscall import prog_test_run, skb_context
from lockgate.compile.tables import PEER_LOCAL, Tables
from lockgate.net import cgroup
from lockgate.objects.address import parse_address
from lockgate.observer.flows import Filter, FlowLog, Names
from lockgate.observer.journal import Journal
from lockgate.observer.source import Source
from lockgate.observer.tally import Tally
from lockgate.paths import bpf_object

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
SIZES = Sizes(1024, 1024, 1024, 1024, 1024)


@pytest.fixture
def pins() -> Iterator[Path]:
    path = Path("/sys/fs/bpf/lockgate", f"test-upgrade-{os.getpid()}")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def publish(dp: Datapath) -> int:
    hops = dp.hops.view["view"][:, 0].copy()
    publisher = Publisher(dp)
    publisher.publish(Tables(np.arange(60000, dtype=np.uint64)), {}, hops)
    return publisher.epoch


def entries(dp: Datapath, ports: range, **fields: int) -> tuple[Any, Any]:
    keys = np.zeros(len(ports), dp.connections.key_dtype)
    keys["lo_port"], keys["proto"] = ports, 6
    values = np.zeros(len(ports), dp.connections.value_dtype)
    for name, value in fields.items():
        values[name] = value
    return keys, values


def states(dp: Datapath) -> dict[int, int]:
    keys, values = dp.connections.items()
    return {int(k["lo_port"]): int(v["state"]) for k, v in zip(keys, values, strict=True)}


def test_nothing_is_attached_before_the_new_maps_are_complete(
    pins: Path, other_object: Path
) -> None:
    with Datapath(bpf_object(), pins, SIZES) as old:
        assert not old.pending
        publish(old)
        old.ids.view["reason"][0] = 77
        old.hops.view["view"]["mtu"][9, old.state.view["epoch"][0] & 1] = 1400
        before = set(pins.iterdir())
        with Datapath(other_object, pins, SIZES) as new:
            assert new.pending and new.beyond == 1
            assert before < set(pins.iterdir()), "both sets are there"
            assert new.state.view["epoch"][0] == 0
            assert new.ids.view["reason"][0] == 77
            assert new.hops.view["view"]["mtu"][9].tolist() == [1400, 1400]
            assert publish(new) > 1, "no epoch means two things"
            new.settle()
            assert not new.pending
            assert not other_pins(pins, new.names)


def test_an_agent_that_ended_anywhere_leaves_a_set_that_works(
    pins: Path, other_object: Path
) -> None:
    Datapath(bpf_object(), pins, SIZES).close()
    with Datapath(other_object, pins, SIZES) as new:
        epoch = publish(new)
    # Not settled: the old one starts again, and must not take up the number where it left it.
    with Datapath(bpf_object(), pins, SIZES) as old:
        assert old.pending and publish(old) > epoch
        old.settle()
        (pins / old.names["peers"]).unlink()
        last = int(old.state.view["epoch"][0])
    with Datapath(bpf_object(), pins, SIZES) as again:
        assert again.pending, "a set with a hole is none"
        assert again.state.view["epoch"][0] == 0 and again.beyond == last
        publish(again)
        again.settle()
        assert sorted(again.names.values()) == sorted(
            one.name for one in pins.iterdir() if one.is_file()
        )


def test_connections_are_carried_over_field_by_field(pins: Path, other_object: Path) -> None:
    with Datapath(bpf_object(), pins, SIZES) as old, Datapath(other_object, pins, SIZES) as new:
        old.connections.update_many(*entries(old, range(300), state=2, seen=100, epoch=7))
        # One that our programs saw later, in an upgrade that was cut off; and one earlier.
        new.connections.update_many(*entries(new, range(1), state=4, seen=101))
        new.connections.update_many(*entries(new, range(1, 2), state=4, seen=99))
        with Carry(new) as carry:
            assert carry.before() == 299
            assert states(new) == {0: 4} | dict.fromkeys(range(1, 300), 2)
            _, values = new.connections.items()
            assert set(values["epoch"].tolist()) == {0, 7}
            old.connections.delete_many(entries(old, range(10, 20))[0])
            old.connections.update_many(*entries(old, range(20, 21), state=3, seen=100))
            assert carry.before() == 11
            assert 15 not in states(new) and states(new)[20] == 3
            # The programs are switched: some connections go on here, some there, some begin.
            new.connections.update_many(*entries(new, range(30, 31), state=4, seen=102))
            old.connections.update_many(*entries(old, range(30, 32), state=3, seen=102))
            old.connections.update_many(*entries(old, range(500, 501), state=1, seen=102))
            assert carry.after() == 2
            found = states(new)
            assert (found[30], found[31], found[500]) == (4, 3, 1)


def test_no_connection_is_carried_without_its_translation(
    pins: Path, other_object: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, ports = CarriedTable.before, iter(range(100, 200))

    def busy(table: CarriedTable) -> int:
        """Between any two tables a connection begins that is translated."""
        copied = copy(table)
        port = next(ports)
        old.connections.update_many(*entries(old, range(port, port + 1), state=1, seen=100))
        keys = np.zeros(1, old.nat.key_dtype)
        keys["sport"] = port
        old.nat.update_many(keys, np.zeros(1, old.nat.value_dtype))
        return copied

    monkeypatch.setattr(CarriedTable, "before", busy)
    with Datapath(bpf_object(), pins, SIZES) as old, Datapath(other_object, pins, SIZES) as new:
        with Carry(new) as carry:
            for _ in range(2):
                carry.before()
                known, translated = set(states(new)), set(new.nat.items()[0]["sport"].tolist())
                assert known and known <= translated


def test_fields_are_converted_by_name() -> None:
    old = np.zeros(2, [("a", "<u2"), ("gone", "<u4"), ("v", [("x", ">u2")], (2,)), ("w", "u1", 3)])
    old["a"], old["v"]["x"], old["w"] = 5, [[1, 2], [3, 4]], 9
    new = np.dtype([("more", "<u8"), ("w", "u1", 2), ("v", [("x", "<u4")], (2,)), ("a", "<u4")])
    made = convert(old, new)
    assert made["a"].tolist() == [5, 5] and made["more"].tolist() == [0, 0]
    assert made["v"]["x"].tolist() == [[1, 2], [3, 4]] and made["w"].tolist() == [[9, 9]] * 2


def sized(dp: Datapath) -> list[HashMap | MappedArray]:
    """The tables that remember."""
    hashes = [dp.connections, dp.half_open, dp.crowd, dp.nat, dp.sockets]
    return [*hashes, dp.flows, dp.flow_tags]


@pytest.mark.parametrize("lost", ["flows", "flow_tags"])
def test_flows_are_not_read_with_the_tags_of_others(pins: Path, lost: str) -> None:
    with Datapath(bpf_object(), pins, SIZES) as before:
        before.flows.view["way"]["epoch"][3] = 7
        before.flow_tags.view[3] = 8
        (pins / before.names[lost]).unlink()
    with Datapath(bpf_object(), pins, SIZES) as after:
        assert not after.flows.view["way"]["epoch"].any()
        assert not after.flow_tags.view.any()


@pytest.mark.parametrize("share", [1e-9, 0.02], ids=["a smaller share", "a larger share"])
def test_tables_keep_their_size_and_their_connections(
    pins: Path, other_object: Path, share: float
) -> None:
    sizes = Sizes(40_000, 30_000, 20_000, 20_000, 20_000)

    def found(dp: Datapath) -> list[int]:
        return [table.info.max_entries for table in sized(dp)]

    with Datapath(bpf_object(), pins, sizes) as before:
        before.connections.update_many(*entries(before, range(20_000), state=2, seen=100))
        wanted = found(before)
        assert wanted == [40_000, 30_000, 30_000, 20_000, 20_000, 20_000, 5_000]
    with Datapath(bpf_object(), pins, share=share) as again:
        assert found(again) == wanted
        assert len(states(again)) == 20_000
        publish(again)
    with Datapath(other_object, pins, share=share) as new:
        assert found(new) == wanted, "in another layout as well"
        with Carry(new) as carry:
            carry.before()
        assert len(states(new)) == 20_000


def memory(dp: Datapath) -> int:
    """Of the tables that are sized, as the kernel counts it."""
    total = 0
    for table in sized(dp):
        facts = Path(f"/proc/self/fdinfo/{table.fd}").read_text()
        total += int(facts.partition("memlock:")[2].split()[0])
    return total


@pytest.mark.parametrize("megabytes", [7, 40])
def test_tables_take_their_share_of_memory(pins: Path, megabytes: int) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = megabytes * 1e6 / machine
    with Datapath(bpf_object(), pins, share=share) as dp:
        sizes = Sizes.from_memory(dp.object.schema, share)
        assert sizes.connections > 1 << 14, "more than the least"
        taken = memory(dp)
    assert 0.9 * share < taken / machine < 1.02 * share
    assert 0.98 < sizes.bytes(Schema.from_object(bpf_object())) / taken < 1.02


def test_versions_follow_the_layout_and_nothing_else(other_object: Path) -> None:
    mine, other = (pin_names(Schema.from_object(p)) for p in (bpf_object(), other_object))
    same = {name for name in mine if mine[name] == other[name]}
    assert {"sockets", "askers", "fragments", "counters"} <= same
    assert not same & {"state", "peers", "images", "connections", "half_open", "nat", "events"}
    for together in (("state", "hops"), ("flows", "flow_tags")):
        assert len({mine[name].rpartition("-")[2] for name in together}) == 1


def test_links_of_a_cgroup_that_went_are_unpinned(pins: Path) -> None:
    place = cgroup.find() / f"lockgate-test-{os.getpid()}"
    place.mkdir()
    try:
        with Datapath(bpf_object(), pins, SIZES) as dp:
            dp.attach_cgroup(place)
            assert dp.tidy() == 0
            count = len(links.links_in(str(dp.links)))
            place.rmdir()
            assert count == 8
            removed = 0
            end = time.monotonic() + 10  # the kernel lets go of it a little later
            while removed < count and time.monotonic() < end:
                removed += dp.tidy()
            assert removed == count
            assert links.links_in(str(dp.links)) == {}
    finally:
        if place.exists():
            place.rmdir()


def lose_a_fragment(dp: Datapath) -> None:
    """The second half of a datagram to a pod, of which nobody knows the first: a drop is told."""
    pod = np.frombuffer(parse_address("10.0.0.2"), np.uint8)
    peer = np.zeros(1, dp.peers.value_dtype)
    peer["view"]["kind"] = PEER_LOCAL
    dp.peers.set(pod, peer)
    dp.state.view["epoch"][0] = 1
    packet = Ether() / IP(src="10.0.0.1", dst="10.0.0.2", proto=17, frag=9) / bytes(64)
    context = skb_context(ifindex=1, ingress_ifindex=1)
    prog_test_run(dp.object.prog_fd("from_net"), bytes(packet), context)


def test_the_observer_reads_rings_of_another_version_to_their_end(
    pins: Path, other_object: Path, tmp_path: Path
) -> None:
    schema = Schema.from_object(bpf_object())
    names = Names(schema.enum("cause"), schema.enum("event_type"), schema.enum("place"))
    (tmp_path / "journal").touch()
    journal = Journal(tmp_path / "journal")
    log = FlowLog(schema.dtype("event"), 128, names, journal, "n1", capacity=8)
    tally = Tally(journal, schema.enum("event_type")["EVENT_VERDICT"])
    source = Source(pins, schema, log, tally)
    with Datapath(other_object, pins, SIZES) as old:
        lose_a_fragment(old)
        source.open()
        with Datapath(bpf_object(), pins, SIZES) as new:
            source.open()
            lose_a_fragment(old)
            new.settle()
            lose_a_fragment(new)
            source.open()
            source.read()
    assert source.decoded == 3
    found = log.select(Filter())
    assert [one["cause"] for one in found] == ["fragment-untracked"] * 3
    assert {one["source"]["ip"] for one in found} == {"10.0.0.1"}
    source.close()

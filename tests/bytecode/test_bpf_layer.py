"""lockgate.bpf against the live kernel: maps, test runs, rings, links, constants. Needs root."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lockgate.bpf import features, grace, links, maps, ring, syscall
from lockgate.bpf.object import LoadError, Object
from tests.compilers import clang

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

SOURCE = r"""
#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

char _license[] SEC("license") = "GPL";

struct key { __u32 a; __be16 port; __u8 proto; __u8 pad; };
struct value { __u64 count; __u32 tag; __u32 pad; };
struct slot { __u32 id; __u8 mac[6]; __u16 pad; };        /* 12 bytes: stride 16 */
struct record { __u64 number; __u32 mark; __u32 len; __u32 odd; };

const volatile __u32 limit = 7;
const volatile __u16 pair[2] = { 1, 2 };
__u32 written;
struct record unused_record;        /* or clang leaves the type out of the BTF */

struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 20000);
         __uint(map_flags, BPF_F_NO_PREALLOC);
         __type(key, struct key); __type(value, struct value); } table SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_LRU_HASH); __uint(max_entries, 512);
         __type(key, struct key); __type(value, struct value); } recent SEC(".maps");
struct lpm { __u32 prefixlen; __u8 addr[4]; };
struct { __uint(type, BPF_MAP_TYPE_LPM_TRIE); __uint(max_entries, 100);
         __uint(map_flags, BPF_F_NO_PREALLOC);
         __type(key, struct lpm); __type(value, __u32); } routes SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1000);
         __uint(map_flags, BPF_F_MMAPABLE);
         __type(key, __u32); __type(value, struct slot); } slots SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 4);
         __type(key, __u32); __type(value, __u64); } counters SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); } events SEC(".maps");
struct inner { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1);
         __uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
         __type(key, __u32); __type(value, __u64); };
struct { __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS); __uint(max_entries, 2);
         __type(key, __u32); __array(values, struct inner); } images SEC(".maps");

/* cb[0] = mark + limit, cb[1] = id of slot cb[1], mark = 0xabcd. */
SEC("tc") int answer(struct __sk_buff *skb)
{
        __u32 index = skb->cb[1], zero = 0;
        struct slot *slot = bpf_map_lookup_elem(&slots, &index);
        __u64 *count = bpf_map_lookup_elem(&counters, &zero);
        __u8 byte = 0x55;

        if (count)
                *count += 1;
        written = limit;
        skb->cb[0] = skb->mark + limit;
        skb->cb[1] = slot ? slot->id : 0;
        skb->cb[2] = pair[1];
        skb->mark = 0xabcd;
        bpf_skb_store_bytes(skb, 0, &byte, 1, 0);
        return 42;
}

/* A record per run; an odd mark discards it. */
SEC("tc") int emit(struct __sk_buff *skb)
{
        struct record *r = bpf_ringbuf_reserve(&events, sizeof(*r), 0);

        if (!r)
                return 0;
        r->number = skb->cb[0];
        r->mark = skb->mark;
        r->len = skb->len;
        r->odd = skb->mark & 1;
        if (skb->mark & 1)
                bpf_ringbuf_discard(r, 0);
        else
                bpf_ringbuf_submit(r, 0);
        return 1;
}

SEC("tc") int word(struct __sk_buff *skb)
{
        __u32 view = skb->cb[0], index = skb->cb[1];
        void *image = bpf_map_lookup_elem(&images, &view);
        __u64 *value = image ? bpf_map_lookup_elem(image, &index) : 0;

        return value ? (int)*value : -1;
}

SEC("tc") int pass(struct __sk_buff *skb) { return -1; }

SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *ctx)
{
        return bpf_ntohs(ctx->user_port) == 9 ? 0 : 1;
}
"""

REFUSED = r"""
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
char _license[] SEC("license") = "GPL";
SEC("tc") int careless(struct __sk_buff *skb)
{
	return *(volatile char *)(long)skb->data;
}
"""

PACKET = bytes(range(64))


def build(folder: Path, name: str, source: str) -> Path:
    file = folder / f"{name}.bpf.c"
    file.write_text(source)
    target = folder / f"{name}.o"
    multiarch = [f"-I/usr/include/{os.uname().machine}-linux-gnu"]
    subprocess.run(
        [clang(), "-O2", "-g", "-target", "bpf", *multiarch, "-c", file, "-o", target], check=True
    )
    return target


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("bpf"), "layer", SOURCE)


@pytest.fixture
def obj(path: Path) -> Iterator[Object]:
    with Object(path) as obj:
        obj.load()
        yield obj


@pytest.fixture
def pins() -> Iterator[str]:
    root = features.mount_point("bpf")
    if root is None:
        pytest.skip("needs a bpffs")
    folder = f"{root}/lockgate-test-{os.getpid()}"
    os.mkdir(folder)
    yield folder
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
    os.rmdir(folder)


def in_new_netns(body: Callable[[], None]) -> None:
    """Run `body` in a thread with a network namespace of its own, which ends with it."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            os_unshare_net()
            body()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def os_unshare_net() -> None:
    import ctypes

    clone_newnet = 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(clone_newnet):
        raise OSError(ctypes.get_errno(), "unshare")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def ifindex(name: str) -> int:
    import socket

    return socket.if_nametoindex(name)


# ---- Maps ----------------------------------------------------------------------


def table(obj: Object, name: str = "table") -> maps.HashMap:
    return maps.HashMap.of(obj, name, obj.schema.dtype("key"), obj.schema.dtype("value"))


def elements(obj: Object, count: int) -> tuple[maps.Records, maps.Records]:
    keys = np.zeros(count, obj.schema.dtype("key"))
    values = np.zeros(count, obj.schema.dtype("value"))
    keys["a"], keys["port"], keys["proto"] = np.arange(count), 443, 6
    values["count"], values["tag"] = np.arange(count) * 3, 1
    return keys, values


def test_hash_round_trip_in_batches(obj: Object) -> None:
    keys, values = elements(obj, 20000)
    with table(obj) as m:
        assert len(m) == 0
        m.update_many(keys, values)
        found_keys, found = m.items()
        order = np.argsort(found_keys["a"])
        assert (found_keys[order] == keys).all()
        assert (found[order] == values).all()
        assert m.delete_many(keys[:15000]) == 15000
        assert m.delete_many(keys[10000:16000]) == 1000, "those gone are passed over"
        assert len(m) == 4000


def test_hash_single_elements(obj: Object) -> None:
    keys, values = elements(obj, 2)
    with table(obj) as m:
        assert m.get(keys[0]) is None
        m.set(keys[0], values[1])
        got = m.get(keys[0])
        assert got is not None and got["count"] == 3
        assert syscall.map_lookup(m.fd, bytes([0, 0, 0, 0, 1, 0xBB, 6, 0]), 16) is not None
        assert m.delete(keys[0]) and not m.delete(keys[0])


def test_full_hash_names_itself(obj: Object) -> None:
    keys, values = elements(obj, 20001)
    with table(obj) as m, pytest.raises(OSError, match=r"map table is full.* 20,000 el") as error:
        m.update_many(keys, values)
    assert error.value.errno == errno.E2BIG


def test_lru_forgets_but_never_refuses(obj: Object) -> None:
    keys, values = elements(obj, 3000)
    with table(obj, "recent") as m:
        m.update_many(keys, values)
        found_keys, found = m.items()
        assert 0 < len(found_keys) <= 512
        assert (found["count"] == found_keys["a"].astype("u8") * 3).all()
        walked, _ = m._walk_keys()
        assert set(walked.tolist()) == set(found_keys.tolist())


def test_prefix_trie(obj: Object) -> None:
    lpm = obj.schema.dtype("lpm")
    with maps.LpmTrie.of(obj, "routes", lpm, "<u4") as m:
        keys = np.array([(8, [10, 0, 0, 0]), (24, [10, 1, 2, 0])], lpm)
        m.update_many(keys, [1, 2])
        got = m.get(np.array((32, [10, 1, 2, 3]), lpm))
        assert got == 2
        assert sorted(m.items()[1].tolist()) == [1, 2]
        assert m.delete_many(keys[:1]) == 1


def test_mapped_array_is_the_kernels_memory(obj: Object) -> None:
    with maps.MappedArray.of(obj, "slots", obj.schema.dtype("slot")) as m:
        assert m.view.shape == (1000,) and m.view.strides == (16,)
        m.view["id"][999] = 77
        m.view[5] = (5, [1, 2, 3, 4, 5, 6], 0)
        run = syscall.prog_test_run(obj.prog_fd("answer"), PACKET, syscall.skb_context(cb=(0, 999)))
        assert run.cb[1] == 77
        raw = maps.ArrayMap.of(obj, "slots", obj.schema.dtype("slot"))
        assert raw[5]["mac"].tolist() == [1, 2, 3, 4, 5, 6]
        raw[6] = np.array((6, [0] * 6, 0), m.value_dtype)
        assert m.view["id"][6] == 6 and raw.values()["id"][999] == 77
        with pytest.raises(IndexError):
            raw[1000]
        raw.close()


def test_mapped_array_of_bytes(obj: Object) -> None:
    with maps.MappedArray.create(("u1", 12), 3, syscall.BPF_F_MMAPABLE) as m:
        m.view[2] = 9
        assert m.view.shape == (3, 12)
        assert maps.ArrayMap(os.dup(m.fd), ("u1", 12))[2].tolist() == [9] * 12


def test_inner_maps_of_different_sizes(obj: Object) -> None:
    with maps.ArrayOfMaps.of(obj, "images", "<u8") as images:
        assert images.inner(0) is None
        for view, size in ((0, 10), (1, 5000), (0, 3000)):
            with images.create_inner(size) as inner:
                inner.view[size - 1] = size
                images.replace(view, inner)
            run = syscall.prog_test_run(
                obj.prog_fd("word"), PACKET, syscall.skb_context(cb=(view, size - 1))
            )
            assert run.retval == size
        opened = images.inner(1)
        assert opened is not None and len(opened) == 5000 and opened.view[4999] == 5000
        opened.close()


def test_wrong_sizes_and_types_are_told(obj: Object) -> None:
    fd = os.dup(obj.map_fd("table"))
    with pytest.raises(TypeError, match="keys of 8 bytes, not 4"):
        maps.HashMap(fd, "<u4", obj.schema.dtype("value"), "table")
    with pytest.raises(TypeError, match="type 1, not array"):
        maps.ArrayMap(fd, "<u4", "table")
    os.close(fd)


# ---- Programs ------------------------------------------------------------------


def test_run_carries_packet_and_context_both_ways(obj: Object) -> None:
    run = syscall.prog_test_run(
        obj.prog_fd("answer"), PACKET, syscall.skb_context(mark=0x6C6B6761, cb=(1, 2000))
    )
    assert run.retval == 42
    assert run.data == b"\x55" + PACKET[1:]
    assert run.mark == 0xABCD
    assert run.cb[:3] == (0x6C6B6761 + 7, 0, 2)
    with maps.PerCpuArray.of(obj, "counters", "<u8") as counters:
        assert counters.values().shape == (4, maps.possible_cpus())
        assert counters.values().sum(axis=1).tolist() == [1, 0, 0, 0]


def test_run_refused_names_the_program(obj: Object) -> None:
    with pytest.raises(OSError, match="cannot test-run answer"):
        syscall.prog_test_run(obj.prog_fd("answer"), b"short", name="answer")


def test_constants_are_set_by_name(path: Path) -> None:
    with Object(path) as obj:
        obj.set_rodata({"limit": 100, "pair": [3, 9]})
        for bad in ({"limit": 1 << 32}, {"written": 1}, {"pair": [1, 2, 3]}):
            with pytest.raises(LoadError):
                obj.set_rodata(bad)
        obj.load()
        run = syscall.prog_test_run(obj.prog_fd("answer"), PACKET, syscall.skb_context(mark=1))
        assert (run.cb[0], run.cb[2]) == (101, 9)
        assert set(obj.verified_insns()) == {"answer", "emit", "word", "pass", "connect4"}
        assert all(0 < n < 1000 for n in obj.verified_insns().values())


def test_map_size_and_pinned_maps(path: Path, pins: str) -> None:
    with Object(path) as obj:
        obj.set_max_entries("table", 17)
        obj.load()
        assert "table" in obj.pin_maps(pins)
        assert not obj.pin_maps(pins)
        first = syscall.map_info(obj.map_fd("table"))
        assert first.max_entries == 17
    with Object(path) as obj:
        assert set(obj.reuse_pinned(pins)) == {
            "table",
            "recent",
            "routes",
            "slots",
            "counters",
            "events",
            "images",
        }
        obj.load()
        assert syscall.map_info(obj.map_fd("table")).id == first.id
    with Object(path) as obj:
        os.unlink(f"{pins}/table")
        os.rename(f"{pins}/counters", f"{pins}/table")
        with pytest.raises(LoadError, match="map table has type 1 but the existing map has 6"):
            obj.reuse_pinned(pins)


def test_refusal_is_one_sentence_with_the_verifiers_words(tmp_path: Path) -> None:
    with Object(build(tmp_path, "refused", REFUSED)) as obj:
        with pytest.raises(LoadError, match=r"the verifier refused careless: .*access") as error:
            obj.load()
        assert "\n" not in str(error.value)
        assert "PROG LOAD LOG" in error.value.log


def test_missing_object_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="build it first"):
        Object(tmp_path / "none.o")


# ---- Rings ---------------------------------------------------------------------


def emit(obj: Object, number: int, mark: int) -> int:
    context = syscall.skb_context(cb=(number,), mark=mark)
    return syscall.prog_test_run(obj.prog_fd("emit"), PACKET, context).retval


def test_ring_is_read_in_order_without_the_discarded(obj: Object) -> None:
    record = obj.schema.dtype("record")
    with ring.Ring.of(obj, "events", record) as r:
        assert not r.wait(0) and len(r.read()) == 0
        for i in range(10):
            emit(obj, i, i)
        assert r.wait(1) and r.pending == 10 * 32
        assert r.read(3)["number"].tolist() == [0, 2]
        got = r.read()
        assert got["number"].tolist() == [4, 6, 8]
        assert got.dtype == record and got["len"].tolist() == [len(PACKET)] * 3
        assert r.pending == 0 and not r.wait(0)


def test_ring_wraps_fills_and_is_continued_by_a_new_reader(obj: Object) -> None:
    record, seen, number = obj.schema.dtype("record"), [], 0
    for _ in range(7):
        with ring.Ring.of(obj, "events", record) as r:
            while emit(obj, number, 0):
                number += 1
            first = r.read(50)
            seen += first["number"].tolist() + r.read()["number"].tolist()
    assert number > 7 * 100
    assert seen == list(range(number))


def test_ring_stops_before_a_record_in_work_and_refuses_another_size(obj: Object) -> None:
    with ring.Ring.of(obj, "events", obj.schema.dtype("record")) as r:
        for i in range(5):
            emit(obj, i, 0)
        memory = r._data.copy()
        memory[2 * 32 + 3] |= 0x80
        r._data = memory
        assert r.read()["number"].tolist() == [0, 1]
        assert len(r.read()) == 0
        memory[2 * 32 + 3] &= 0x7F
        assert r.read()["number"].tolist() == [2, 3, 4]
    emit(obj, 9, 0)
    with ring.Ring.of(obj, "events", "<u8") as r:
        with pytest.raises(ValueError, match="another version"):
            r.read()


# ---- Links ---------------------------------------------------------------------


def test_tcx_link_is_pinned_updated_and_mended(obj: Object, pins: str) -> None:
    def body() -> None:
        path = f"{pins}/veth"
        ip("link", "add", "lgt0", "type", "veth", "peer", "name", "lgt1")
        index = ifindex("lgt0")
        with links.attach_tcx(obj.prog_fd("pass"), index, "ingress", path) as link:
            first = link.info
            assert first.ifindex == index and not link.severed
        with links.attach_tcx(obj.prog_fd("answer"), index, "ingress", path) as link:
            assert link.info.id == first.id and link.info.prog_id != first.prog_id
        assert links.links_in(pins)["veth"].id == first.id
        ip("link", "del", "lgt0")
        stale = links.open_link(path)
        assert stale is not None and stale.severed
        with pytest.raises(OSError) as error:
            stale.update(obj.prog_fd("pass"))
        assert error.value.errno == errno.ENOLINK
        stale.close()
        ip("link", "add", "lgt0", "index", str(index), "type", "veth", "peer", "name", "lgt1")
        with links.attach_tcx(obj.prog_fd("pass"), index, "ingress", path) as link:
            assert link.info.id != first.id and link.info.ifindex == index
        with links.attach_tcx(obj.prog_fd("pass"), index, "egress", path) as link:
            assert link.info.attach_type == syscall.AttachType.TCX_EGRESS
        assert links.remove(path) and not links.remove(path)
        with pytest.raises(OSError, match="interface 99999"):
            links.attach_tcx(obj.prog_fd("pass"), 99999, "egress", path)

    in_new_netns(body)


def test_cgroup_link_refuses_a_connection(obj: Object, pins: str) -> None:
    root = features.cgroup2_mount()
    if root is None:
        pytest.skip("needs cgroup v2")
    group, path = f"{root}/lockgate-test-{os.getpid()}", f"{pins}/connect4"
    os.mkdir(group)
    script = (
        "import os,socket,sys\n"
        f"open('{group}/cgroup.procs','w').write(str(os.getpid()))\n"
        "s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        "print(s.connect_ex(('127.0.0.1',9)), s.connect_ex(('127.0.0.1',10)))\n"
    )
    try:
        with links.attach_cgroup(obj.prog_fd("connect4"), group, "cgroup/connect4", path) as link:
            first = link.info.id
        out = subprocess.run(
            ["python3", "-I", "-S", "-c", script], capture_output=True, text=True, check=True
        )
        assert out.stdout.split() == [str(errno.EPERM), "0"]
        with links.attach_cgroup(obj.prog_fd("connect4"), group, "cgroup/connect4", path) as link:
            assert link.info.id == first
    finally:
        os.rmdir(group)
    stale = links.open_link(path)
    assert stale is not None
    deadline = time.monotonic() + 10  # the kernel detaches from a worker
    while not stale.severed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stale.severed
    stale.close()
    assert links.remove(path)


# ---- The machine ---------------------------------------------------------------


def test_this_machine_has_what_we_need() -> None:
    found = features.probe()
    assert [f.name for f in found if not f.ok] == []
    features.require()


def test_what_is_missing_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "mount_point", lambda _kind: None)
    with pytest.raises(features.MissingFeature, match="no bpf file system: mount it with: mount"):
        features.require()


def test_grace_period_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    grace.wait_grace()
    calls: list[int] = []
    update = syscall.map_update

    def counted(fd: int, key: bytes, value: bytes, flags: int = 0, name: str = "map") -> None:
        calls.append(fd)
        update(fd, key, value, flags, name)

    monkeypatch.setattr(syscall, "map_update", counted)
    monkeypatch.setattr(grace, "_online_cpus", lambda: 1)
    grace.wait_grace()
    assert len(calls) == 1

"""What a packet holds of the view in force stays as it is while the other view is written."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lockgate.agent.encode import Patch, rows
from lockgate.agent.two_views import TwoViews
from lockgate.bpf import syscall
from lockgate.bpf.maps import HashMap
from lockgate.bpf.object import Object
from tests.bytecode.test_bpf_layer import build

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BPF = Path(__file__).resolve().parents[2] / "bpf"
#: With a mark it tells where the value is. Without, it is a packet that is interrupted for some
#: 100 µs between finding and reading: as long as a hypervisor may take away the processor.
SOURCE = f"""
#include "{BPF}/maps.h"

char _license[] SEC("license") = "GPL";

#define HOLD(name, map, keytype, valuetype, field)                          \\
SEC("tc") int name(struct __sk_buff *skb)                                   \\
{{                                                                           \\
        struct keytype key;                                                 \\
        struct valuetype *found;                                            \\
                                                                            \\
        if (bpf_skb_load_bytes(skb, 0, &key, sizeof(key)))                  \\
                return -1;                                                  \\
        found = bpf_map_lookup_elem(&map, &key);                            \\
        if (!found)                                                         \\
                return -2;                                                  \\
        if (skb->mark)                                                      \\
                return (long)found;                                         \\
        for (int i = 0; i < 4000; i++)                                      \\
                bpf_ktime_get_ns();                                         \\
        return ((volatile struct valuetype *)found)->field;                 \\
}}
HOLD(peer, peers, addr, peer, view[1].class)
HOLD(service, services, service_key, service, view[1].id)
HOLD(backend, service_backends, backend_key, backend_state, live[1])
"""
COUNT = 2000
IN_FORCE, IDLE = 1, 0


@pytest.fixture(scope="module")
def obj(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Object]:
    with Object(build(tmp_path_factory.mktemp("bpf"), "hold", SOURCE)) as obj:
        obj.load()
        yield obj


class Table:
    """A table as the publisher has it. The number of a key is what the view in force says."""

    def __init__(
        self, obj: Object, program: str, map_: str, key: str, value: str, view: str | None
    ) -> None:
        dtype = obj.schema.dtype
        self.program = obj.prog_fd(program)
        self.map = HashMap.of(obj, map_, dtype(key), dtype(value))
        self.size = 1 if view is None else dtype(view).itemsize
        self.views = TwoViews(self.map, self.size)
        self.map.delete_many(self.map.keys())
        self.keys = np.zeros((2 * COUNT, dtype(key).itemsize), np.uint8)
        self.keys[:, :4] = rows(np.arange(2 * COUNT, dtype=">u4"), 4)
        self.mine, self.others = self.keys[:COUNT], self.keys[COUNT:]

    def told(self, numbers: np.ndarray) -> np.ndarray:
        """Views that begin with these numbers."""
        found = np.zeros((len(numbers), max(4, self.size)), np.uint8)
        found[:, :4] = rows(numbers.astype("<u4"), 4)
        return found[:, : self.size]


#: A backend's view is one byte.
LIMIT = 250
TABLES = [
    ("peer", "peers", "addr", "peer", "peer_view"),
    ("service", "services", "service_key", "service", "service_view"),
    ("backend", "service_backends", "backend_key", "backend_state", None),
]


def whole(table: Table, turn: int) -> None:
    """All keys of the view in force, and others by turns."""
    keys = table.keys if turn % 2 else table.mine
    table.views.write(IDLE, keys, table.told(1 + (np.arange(len(keys)) + turn) % LIMIT))


def patched(table: Table, turn: int) -> None:
    """Each time all keys; every other time the others are deleted."""
    wanted = table.told(1 + (np.arange(2 * COUNT) + turn) % LIMIT)
    force = table.told(1 + np.arange(2 * COUNT) % LIMIT)
    force[COUNT:] = 0
    if turn % 2:
        wanted[COUNT:] = 0
    table.views.patch(IDLE, Patch(table.keys, wanted, force))


def ask(table: Table, fd: int, number: int, mark: int = 0) -> int:
    packet = table.mine[number].tobytes().ljust(64, b"\0")
    context = syscall.skb_context(mark=mark)
    return syscall.prog_test_run(fd, packet, context, name="hold").retval


@pytest.fixture(params=TABLES, ids=[t[0] for t in TABLES])
def table(request: pytest.FixtureRequest, obj: Object) -> Iterator[Table]:
    made = Table(obj, *request.param)
    made.views.write(IN_FORCE, made.mine, made.told(1 + np.arange(COUNT) % LIMIT))
    yield made
    made.map.close()


@pytest.mark.parametrize("write", [whole, patched], ids=["whole", "patched"])
def test_what_is_in_force_stays_where_it_is(table: Table, write) -> None:
    """In the same memory: another element for the key would leave this one to another key, and a
    packet that found it before would read that one's."""
    before = [ask(table, table.program, number, 1) for number in range(COUNT)]
    assert len(set(before)) > COUNT * 0.9
    for turn in range(4):
        write(table, turn)
        assert [ask(table, table.program, number, 1) for number in range(COUNT)] == before


@pytest.mark.parametrize("write", [whole, patched], ids=["whole", "patched"])
def test_a_reader_keeps_what_it_found(table: Table, write: Callable[[Table, int], None]) -> None:
    done, errors = threading.Event(), []

    def writer() -> None:
        try:
            for turn in range(40):
                write(table, turn)
        except BaseException as error:
            errors.append(error)
        done.set()

    thread = threading.Thread(target=writer)
    thread.start()
    wrong, asked = [], 0
    while not done.is_set() or asked < 100:
        number = asked * 7 % COUNT
        found = ask(table, table.program, number)
        if found != 1 + number % LIMIT:
            wrong.append((number, found))
        asked += 1
    thread.join()
    assert not errors
    assert wrong == []

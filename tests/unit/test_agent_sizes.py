"""Tables as large as a share of the machine's memory."""

from __future__ import annotations

import pytest

from lockgate.agent.sizes import SHARE, Sizes, table_bytes
from lockgate.bpf.btf import Schema
from lockgate.paths import bpf_object

GB = 1 << 30
LEAST, MOST = 1 << 14, 1 << 21


@pytest.fixture(scope="module")
def schema() -> Schema:
    return Schema.from_object(str(bpf_object()))


@pytest.mark.parametrize(
    ("entries", "key", "value", "wanted"),
    [
        (1024, 40, 40, 1024 * (48 + 40 + 40) + 1024 * 16),
        (1025, 40, 40, 1025 * (48 + 40 + 40) + 2048 * 16),
        (1000, 33, 1, 1000 * (48 + 40 + 8) + 1024 * 16),
    ],
    ids=["a power of two", "twice the buckets for one more", "keys and values are rounded up"],
)
def test_an_lru_hash_as_the_kernel_lays_it_out(entries, key, value, wanted):
    assert table_bytes(entries, key, value) == wanted


@pytest.mark.parametrize("memory", [n * GB for n in (2, 4, 8, 16, 32)])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_they_take_the_share_and_no_more(schema, memory, nodes):
    sizes = Sizes.from_memory(schema, SHARE / nodes, memory)
    assert 0.95 * memory * SHARE < nodes * sizes.bytes(schema) <= memory * SHARE
    assert sizes.half_open * 8 == sizes.nat * 4 == sizes.sockets * 4 == sizes.connections


@pytest.mark.parametrize(
    ("share", "memory", "connections"),
    [(SHARE / 64, 8 * GB, LEAST), (SHARE, 1, LEAST), (SHARE, 1 << 40, MOST)],
    ids=["many nodes", "no memory", "very much memory"],
)
def test_bounds(schema, share, memory, connections):
    assert Sizes.from_memory(schema, share, memory).connections == connections

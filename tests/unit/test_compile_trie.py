"""The CIDR trie says for each address which is the longest block that contains it."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockgate.compile import trie as trie_module
from lockgate.compile.evaluate import cidr_class
from lockgate.compile.tables import CIDR_NEXT
from lockgate.compile.trie import trie
from lockgate.objects.address import parse_address
from tests import blocks as cases


def built(blocks: list[str]) -> np.ndarray:
    return np.frombuffer(trie(cases.leaves(blocks)), np.uint64)


def agree(blocks: list[str], addresses: list) -> None:
    words = built(blocks)
    found = {a: cidr_class(words, parse_address(str(a))) for a in addresses}
    assert found == cases.longest(blocks, addresses)


@pytest.mark.parametrize("blocks", cases.CASES.values(), ids=cases.CASES)
def test_at_the_edges(blocks: list[str]) -> None:
    agree(blocks, cases.edges(blocks))


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0, max_value=2**32))
def test_at_the_edges_of_random_blocks(seed: int) -> None:
    rng = Random(seed)
    blocks = cases.random_blocks(rng, rng.randrange(1, 40))
    inside = [
        ip_network(block).network_address + rng.randrange(ip_network(block).num_addresses)
        for block in blocks
    ]
    agree(blocks, cases.edges(blocks) + [a for a in inside if not cases.is_mapped(a)])


def test_without_blocks_of_a_family_its_first_slot_is_the_answer() -> None:
    assert built([]).tolist() == [0]
    slots = built(["10.0.0.0/8"]).view("<u4")
    assert slots[0] & CIDR_NEXT and slots[1] == 0


@pytest.mark.parametrize(
    ("name", "blocks", "kilobytes"),
    [
        ("one address", ["198.51.100.7/32", "2001:db8::7/128"], 0.1),
        ("few, far apart", [f"{n * 25}.{n}.{n}.0/24" for n in range(10)], 300),
        ("600 neighbours", cases.CASES["many"], 300),
        ("a thousand IPv6 hosts", [f"2001:db8:{n * 64:x}::{n:x}/128" for n in range(1000)], 300),
    ],
)
def test_its_size_follows_the_blocks(name: str, blocks: list[str], kilobytes: float) -> None:
    assert built(blocks).nbytes <= kilobytes * 1000


def test_blocks_that_do_not_fit_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trie_module, "CIDR_WORD", 0xFF)
    with pytest.raises(OverflowError, match="CIDR blocks"):
        built(cases.CASES["many"])


def test_an_address_that_is_mapped_is_of_ipv4() -> None:
    words = built(["0.0.0.0/0", "::/0"])
    assert cidr_class(words, parse_address("192.0.2.1")) == 1
    assert cidr_class(words, parse_address(str(ip_address("2001:db8::1")))) == 2

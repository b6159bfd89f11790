"""The tables of slots: who owns a slot, and who has to move when owners change."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockgate.compile import balance
from lockgate.compile.balance import (
    Owner,
    Table,
    flow_hash,
    number_bits,
    numbers_of,
    patch,
    slot_bits,
    table,
    table_words,
    tables,
)
from lockgate.compile.tables import OWNERS
from lockgate.objects.address import parse_address


def owners(count: int, **more) -> list[Owner]:
    return [
        Owner(parse_address(f"10.0.{n // 200}.{n % 200 + 1}"), 8080, **more) for n in range(count)
    ]


def numbers(of: list[Owner], wanted: int = 14) -> np.ndarray:
    """Of each rank the owners' numbers."""
    return numbers_of(table(of, wanted), slot_bits(len(of), wanted), number_bits(len(of)))


def by_name(of: list[Owner]) -> list[list[tuple[bytes, int]]]:
    """Of each slot the owners' addresses and ports, in order."""
    names = [one[:2] for one in of]
    rows = numbers(of).T.tolist()
    return [[names[n] for n in row if n < len(of)] for row in rows]


def reference(of: list[Owner], slots: int) -> list[list[tuple[bytes, int]]]:
    """The rule, a slot at a time, as docs/services.md has it."""
    found = []
    low, high = (half[0] for half in balance._seeds([of]))
    weights = balance._weights([of])[0]
    for slot in range(slots):
        hashes = balance._hashes(low, high, np.array([slot], np.uint32))
        scores = balance._scores(hashes, weights, np.arange(len(of), dtype=np.uint64)).tolist()
        order = sorted(range(len(of)), key=lambda n: -scores[n])
        first = next((n for n in order if not of[n].ends), None)
        if first is not None:
            order.remove(first)
            order.insert(0, first)
        found.append([of[n][:2] for n in order[:OWNERS]])
    return found


def some(rng: Random, most: int) -> list[Owner]:
    addresses = rng.sample(range(1, 250), rng.randint(1, most))
    weights = rng.choice([(100,), (100,), (1, 50, 100)])
    share = rng.choice([0.0, 0.0, 0.3, 1.0])
    return sorted(
        Owner(
            parse_address(f"10.0.0.{n}"),
            rng.choice((80, 8080)),
            rng.random() < share,
            rng.choice(weights),
        )
        for n in addresses
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_table_follows_the_rule(seed: int) -> None:
    of = some(Random(seed), 12)
    assert by_name(of)[:256] == reference(of, 256 if len(of) > 1 else 1)


def test_many_tables_are_what_each_is_alone() -> None:
    rng = Random(5)
    many = [(some(rng, 20), rng.choice((10, 14, 16))) for _ in range(60)] + [([], 14)]
    for (of, bits), words in zip(many, tables(many), strict=True):
        assert np.array_equal(words, table(of, bits))
        assert len(words) == table_words(slot_bits(len(of), bits), number_bits(len(of)))


def test_a_table_is_the_same_on_every_machine() -> None:
    """What other nodes have computed already must not change with a version."""
    of = [*owners(3), Owner(parse_address("fd00::1"), 53, True, 7)]
    assert [f"{word:016x}" for word in table(of)[:4].tolist()] == FOUR
    assert [f"{word:016x}" for word in table(owners(20))[:4].tolist()] == TWENTY
    assert flow_hash(
        parse_address("198.51.100.7"), parse_address("203.0.113.1"), 40000, 443, 6
    ) == (HASH)


FOUR = ["e4c9d272c9d8d2d8", "e4e4c9c9c6e4d8e4", "c94ed2e4c6e1c94e", "e4e472d8c9e4b4e1"]
TWENTY = ["0a0805020f0b060d", "12010e0b0f001005", "0f0e120d1304080a", "0d06000908071001"]
HASH = 0xD65E1ECF


@pytest.mark.parametrize("count", [3, 16, 100])
def test_of_other_flows_none_moves_when_a_backend_goes_or_comes(count: int) -> None:
    all_of_them = owners(count)
    for gone in (0, count // 2, count - 1):
        less = all_of_them[:gone] + all_of_them[gone + 1 :]
        for before, after in zip(by_name(all_of_them), by_name(less), strict=True):
            if before[0] != all_of_them[gone][:2]:
                assert before[0] == after[0]  # one that goes moves nobody else
            else:
                assert after[0] == before[1]  # its own go to whom its second owner was
            if after[0] != before[0]:
                continue
            assert [one for one in before if one != all_of_them[gone][:2]] == after[
                : len([one for one in before if one != all_of_them[gone][:2]])
            ]


@pytest.mark.parametrize("count", [3, 16, 100])
def test_who_comes_pushes_the_one_before_to_second_place(count: int) -> None:
    after = owners(count)
    new = after[count // 3]
    before = [one for one in after if one != new]
    moved = 0
    for old, now in zip(by_name(before), by_name(after), strict=True):
        if now[0] == new[:2]:
            moved += 1
            assert now[1:] == old[: OWNERS - 1]
        else:
            assert now[0] == old[0]
    assert moved / (1 << slot_bits(count)) < 1.6 / count


@pytest.mark.parametrize("count", [2, 5, 100])
def test_one_that_drains_steps_back_behind_the_first_that_does_not(count: int) -> None:
    before = owners(count)
    ending = before[1]
    after = [one._replace(ends=True) if one == ending else one for one in before]
    for old, now in zip(by_name(before), by_name(after), strict=True):
        if old[0] == ending[:2]:
            assert now[:2] == [old[1], old[0]]
            assert now[2:] == old[2:]
        else:
            assert now == old


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_one_that_ends_is_first_only_where_all_end(seed: int) -> None:
    of = some(Random(seed), 30)
    ending = {one[:2] for one in of if one.ends}
    for names in by_name(of):
        assert names[0] not in ending or len(ending) == len(of)
        assert len(names) == len(set(names)) == min(OWNERS, len(of))


def test_shares_follow_the_weights() -> None:
    """Within four standard deviations of what independent slots would have."""
    of = [one._replace(weight=(1, 10, 50, 100)[n % 4]) for n, one in enumerate(owners(40))]
    total = sum(one.weight for one in of)
    first = numbers(of)[0]
    firsts = np.bincount(first, minlength=len(of))
    for one, share in zip(of, (firsts / len(first)).tolist(), strict=True):
        wanted = one.weight / total
        assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / len(first))


def test_equal_weights_of_any_size_are_no_weights() -> None:
    assert np.array_equal(table(owners(9)), table(owners(9, weight=7)))


def test_a_weight_that_changes_moves_only_to_or_from_its_owner() -> None:
    before = owners(9)
    after = [before[0]._replace(weight=40), *before[1:]]
    for old, now in zip(by_name(before), by_name(after), strict=True):
        if old[0] != now[0]:
            assert old[0] == before[0][:2]


def test_the_logarithm_is_close_and_tells_all_hashes_apart() -> None:
    rng = np.random.default_rng(1)
    hashes = np.unique(
        np.concatenate(
            (np.arange(5000), 2**32 - 1 - np.arange(5000), rng.integers(0, 2**32, 20000))
        ).astype(np.uint64)
    )
    found = balance._logarithm(hashes)
    assert (np.diff(found.astype(np.int64)) < 0).all()
    exact = -np.log2((hashes.astype(np.float64) + 1) / 2**32)
    assert np.abs(found / 2**40 - exact).max() < 3e-6


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32))
def test_a_patched_table_is_what_one_from_nothing_is(seed: int) -> None:
    rng = Random(seed)
    of = some(rng, rng.choice((3, 16, 60)))
    words = table(of)
    for _ in range(4):
        after = [one for one in of if rng.random() > 0.05] or of[:1]
        after = [one._replace(ends=not one.ends) if rng.random() < 0.05 else one for one in after]
        after = [
            one._replace(weight=rng.choice((30, 100))) if rng.random() < 0.05 else one
            for one in after
        ]
        known = {one[:2] for one in after}
        after += [one for one in some(rng, 2) if one[:2] not in known]
        after.sort()
        patched = patch(Table(of, slot_bits(len(of)), words), after)
        assert np.array_equal(patched, table(after))
        of, words = after, patched


@pytest.mark.parametrize(
    ("count", "bits", "words"),
    [
        *((0, 2, 1), (1, 2, 1), (2, 2, 2048), (4, 2, 2048), (5, 4, 4096), (16, 4, 4096)),
        *((17, 8, 8192), (256, 8, 8192), (257, 16, 16384)),
    ],
)
def test_numbers_are_as_long_as_the_count_of_owners_needs(
    count: int, bits: int, words: int
) -> None:
    assert number_bits(count) == bits
    assert len(table(owners(count))) == words
    none = {(1 << bits) - 1} if count < OWNERS else set()
    assert set(numbers(owners(count)).flatten().tolist()) == {*range(count)} | none


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257])
def test_as_many_slots_however_many_owners(count: int) -> None:
    """A flow has the same slot before and after any change of owners: whoever had it is second
    at worst when one came, first when another went."""
    less, more = by_name(owners(count)), by_name(owners(count + 1))
    if count == 1:
        less *= len(more)
    assert len(less) == len(more)
    for few, many in zip(less, more, strict=True):
        assert few[0] in many[:2]
        if many[0] in (one[:2] for one in owners(count)):
            assert few[0] == many[0]


def test_a_service_may_want_more_slots_or_fewer() -> None:
    for wanted in (10, 12, 16):
        assert slot_bits(1, wanted) == 0
        assert slot_bits(2, wanted) == wanted
        first = numbers(owners(40), wanted)[0]
        assert len(first) == 1 << wanted
        assert len(set(first.tolist())) == 40


def test_hash_depends_on_every_part_of_the_tuple() -> None:
    client, frontend = parse_address("198.51.100.7"), parse_address("2001:db8::1")
    found = {
        flow_hash(client, frontend, 1, 2, 6),
        flow_hash(frontend, client, 1, 2, 6),
        flow_hash(client, frontend, 2, 1, 6),
        flow_hash(client, frontend, 1, 2, 17),
    }
    assert len(found) == 4


@pytest.mark.parametrize("what", ["ports of a client", "its last ports", "clients"])
def test_flows_spread_as_evenly_over_slots_as_random_ones_would(what: str) -> None:
    """Also those of one client, a proxy or a NAT, whose ports count up."""
    frontend = parse_address("203.0.113.1")
    flows = {
        "ports of a client": [("198.51.100.7", port) for port in range(65536)],
        "its last ports": [("198.51.100.7", port) for port in range(49152, 65536)],
        "clients": [(f"10.1.{n >> 8}.{n & 255}", 40000) for n in range(65536)],
    }[what]
    hashes = [flow_hash(parse_address(ip), frontend, port, 80, 6) for ip, port in flows]
    for bits in (10, 14, 16):
        found = np.bincount(np.array(hashes) & ((1 << bits) - 1), minlength=1 << bits)
        mean = len(flows) / (1 << bits)
        spread = ((found - mean) ** 2).sum() / mean / (1 << bits)  # of random ones: 1
        assert 0.85 < spread < 1.15

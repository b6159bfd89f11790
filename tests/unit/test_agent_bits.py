"""Bits by hash: what was added is always found, and what went is forgotten in the end."""

from __future__ import annotations

import numpy as np
import pytest

from lockgate.agent.bits import Bits, address_hash, frontend_hash

WORDS = 1 << 10


def keys(count: int, size: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size), np.uint8)


def has(words: np.ndarray, found: np.ndarray, of: np.ndarray) -> np.ndarray:
    places = found(of) >> np.uint64(48)
    return words[(places >> np.uint64(6)).astype(int)] >> (places & np.uint64(63)) & np.uint64(1)


@pytest.mark.parametrize(("hash_", "size"), [(address_hash, 16), (frontend_hash, 20)])
def test_what_is_in_is_never_denied(hash_, size):
    words = np.zeros(WORDS, np.uint64)
    bits = Bits(words, hash_)
    mine, others = keys(1000, size), keys(1000, size, 2)
    bits.add(mine[:500])
    bits.add(mine)
    assert has(words, hash_, mine).all()
    assert has(words, hash_, others).mean() < 0.05


def test_they_are_made_anew_when_many_went():
    words = np.zeros(WORDS, np.uint64)
    bits = Bits(words, address_hash)
    gone, mine = keys(20_000, 16), keys(100, 16, 2)
    bits.add(gone)
    assert bits.full
    bits.renew(mine)
    assert not bits.full
    assert has(words, address_hash, mine).all()
    assert int(np.bitwise_count(words).sum()) <= 100 if hasattr(np, "bitwise_count") else True
    assert has(words, address_hash, gone).mean() < 0.05


def test_many_that_stay_are_not_made_anew_again_and_again():
    words = np.zeros(WORDS, np.uint64)
    bits = Bits(words, address_hash)
    mine = keys(30_000, 16)
    bits.add(mine)
    bits.renew(mine)
    bits.add(keys(5000, 16, 3))
    assert not bits.full


def test_nothing_is_added():
    words = np.zeros(WORDS, np.uint64)
    bits = Bits(words, frontend_hash)
    bits.add(keys(0, 20))
    bits.renew(keys(0, 20))
    assert not words.any() and not bits.full

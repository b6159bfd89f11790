"""The time that programs go by is that of the sweep, whether they count ticks or ask the clock."""

from __future__ import annotations

import time

import pytest

from lockgate.bpf import clock
from lockgate.bpf.maps import ArrayMap
from tests.bytecode.goldens import A, at_pod, base, from_pod, ip, syn
from tests.bytecode.world import REDIRECT, World

#: Of bpf/bucket.h, and what one connection takes of it: ns.
BURST, EVERY = 250_000_000, 1_000_000


@pytest.mark.parametrize("way", ["ticks", "clock"])
def test_entries_and_buckets_are_of_the_time_they_were_made_at(way):
    ticks = clock.constants()["config_hz"]
    assert ticks > 0
    constants = {"config_hz": ticks if way == "ticks" else 0, "config_connection_ns": EVERY}
    world = World(constants=constants, name=way)
    try:
        with world.inside():
            world.publish(base())
            before = time.clock_gettime(time.CLOCK_MONOTONIC)
            frame = bytes(from_pod(A) / ip(4, "a", "b") / syn())
            assert world.run("from_pod", frame, at_pod(A)).verdict == REDIRECT
            ((_, fields),) = world.tracked()
            with ArrayMap.of(world.object, "budgets", world.dtype("budget")) as budgets:
                paid = int(budgets[A]["connections"]) - EVERY + BURST
    finally:
        world.close()
    after = time.clock_gettime(time.CLOCK_MONOTONIC)
    assert before - 2 < fields["seen"] <= after
    assert before - 2 < paid / 1e9 <= after


@pytest.mark.parametrize("uptime", [0, 299.9, 300.1, 5 * 86400, 300 * 86400])
def test_a_count_that_lost_ticks_is_not_gone_by(monkeypatch, uptime):
    """Also around the moments when its lower 32 bits are full."""
    hz, behind = 250, 0
    monkeypatch.setattr(time, "clock_getres", lambda _: 1 / hz)
    monkeypatch.setattr(time, "clock_gettime", lambda _: uptime)
    monkeypatch.setattr(clock, "_count", lambda: (uptime - behind - 300) * hz % (1 << 32) // 1)
    for behind, wanted in ((0, hz), (0.3, hz), (1.5, 0), (60, 0), (-3, 0)):
        assert clock.constants() == {"config_hz": wanted}, behind

"""Bytes in all, and a second over the last minute."""

from __future__ import annotations

import pytest

from lockgate.kube.meter import Meter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("what", "came", "at", "rate"),
    [
        ("nothing", [], 30, 0),
        ("at once", [(0, 500)], 0, 500),
        ("since the beginning", [(0, 500), (5, 500)], 10, 100),
        ("over a minute", [(0, 600), (30, 600)], 50, 24),
        ("what is older is not counted", [(0, 6000), (100, 600)], 130, 10),
        ("silence", [(0, 6000)], 200, 0),
    ],
)
def test_bytes_a_second(what: str, came: list[tuple[int, int]], at: int, rate: float) -> None:
    clock = Clock()
    meter = Meter(clock)
    for when, count in came:
        clock.now = 1000.0 + when
        meter.add(count)
    clock.now = 1000.0 + at
    assert meter.per_second() == pytest.approx(rate, rel=0.1), what
    assert meter.total == sum(count for _, count in came)

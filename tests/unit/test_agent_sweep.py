"""Which entries are expired: by state and protocol."""

from __future__ import annotations

import numpy as np
import pytest

from lockgate.agent import sweep

KEY = np.dtype([("proto", "u1")])
VALUE = np.dtype([("seen", "<u4"), ("state", "u1"), ("flags", "u1")])
FINS = 16 | 32
NOW = 100_000


AGES = {"half_open": 60, "established": 8000, "closing": 600, "closed": 10, "datagram": 180}


@pytest.mark.parametrize(
    ("state", "flags", "proto", "age"),
    [
        (sweep.NEW, 0, 6, 60),
        (sweep.NEW, 0, 17, 60),
        (sweep.ESTABLISHED, 0, 6, 8000),
        (sweep.ESTABLISHED, 0, 132, 8000),
        (sweep.ESTABLISHED, 0, 17, 180),
        (sweep.ESTABLISHED, 0, 1, 180),
        (sweep.ESTABLISHED, 0, 58, 180),
        (sweep.CLOSING, 0, 6, 600),
        (sweep.CLOSED, 0, 6, 10),
        (sweep.CLOSED, FINS, 6, 10),
        (sweep.CLOSED, FINS, 132, 10),
        (sweep.CLOSED, 0, 132, 60),
        (sweep.CLOSED, 16, 132, 60),
        (sweep.CLOSED, 32, 132, 60),
    ],
)
def test_an_entry_expires_just_after_the_age_of_its_state(
    state: int, flags: int, proto: int, age: int
) -> None:
    keys = np.array([(proto,)] * 3, KEY)
    values = np.array([(seen, state, flags) for seen in (NOW - age, NOW - age - 1, NOW + 1)], VALUE)
    assert sweep.expired_connections(keys, values, NOW, AGES).tolist() == [False, True, False]

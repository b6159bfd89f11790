"""Which entries are expired: by state and protocol."""

from __future__ import annotations

import numpy as np
import pytest

from lockgate.agent import sweep

KEY = np.dtype([("proto", "u1")])
VALUE = np.dtype([("seen", "<u4"), ("state", "u1")])
NOW = 100_000


AGES = {"half_open": 60, "established": 8000, "closing": 600, "closed": 10, "datagram": 180}


@pytest.mark.parametrize(
    ("state", "proto", "age"),
    [
        (sweep.NEW, 6, 60),
        (sweep.NEW, 17, 60),
        (sweep.ESTABLISHED, 6, 8000),
        (sweep.ESTABLISHED, 132, 8000),
        (sweep.ESTABLISHED, 17, 180),
        (sweep.ESTABLISHED, 1, 180),
        (sweep.ESTABLISHED, 58, 180),
        (sweep.CLOSING, 6, 600),
        (sweep.CLOSED, 6, 10),
    ],
)
def test_an_entry_expires_just_after_the_age_of_its_state(state: int, proto: int, age: int) -> None:
    keys = np.array([(proto,)] * 3, KEY)
    values = np.array([(NOW - age, state), (NOW - age - 1, state), (NOW + 1, state)], VALUE)
    assert sweep.expired_connections(keys, values, NOW, AGES).tolist() == [False, True, False]

"""Tables as the kernel's records: what a backend is while it ends."""

from __future__ import annotations

import numpy as np

from lockgate.agent.encode import Encoder
from lockgate.bpf.btf import Schema
from lockgate.compile.tables import (
    LIVE_INSIDE,
    LIVE_KEEPS,
    LIVE_LOCAL,
    LIVE_OUTSIDE,
    BackendKey,
    Delta,
    Tables,
)
from lockgate.objects.address import parse_address
from lockgate.paths import bpf_object

SCHEMA = Schema.from_object(bpf_object())


def backend(last: int) -> BackendKey:
    return parse_address(f"10.0.0.{last}"), 5, 8080, 6


def test_backends_that_end_are_told_apart() -> None:
    encoder = Encoder(SCHEMA, 16)
    tables = Tables(np.zeros(1, np.uint64))
    tables.backends = {backend(1): LIVE_INSIDE | LIVE_OUTSIDE, backend(2): LIVE_KEEPS}
    keys, values = encoder.encode(tables).backends
    assert [key[15] for key in keys.tolist()] == [1, 2] and values.tolist() == [[5], [8]]


def test_a_patch_tells_what_ends_in_both_views() -> None:
    """Of what is in force 1 took, 2 ended, 3 took; now 1 ends, 2 is gone, 3 stays, 4 comes; the
    other view is behind by 3, which it does not have."""
    encoder = Encoder(SCHEMA, 16)
    tables = Tables(np.zeros(1, np.uint64))
    tables.backends = {backend(1): LIVE_KEEPS, backend(3): LIVE_LOCAL, backend(4): LIVE_OUTSIDE}
    delta = Delta(1, backends={backend(1): LIVE_OUTSIDE, backend(2): LIVE_KEEPS, backend(4): None})
    assert delta
    behind = Delta(0, backends={backend(3): None})
    patch = encoder.patches(tables, delta, behind)[2]
    found = {
        key[15]: (wanted[0], other[0])
        for key, wanted, other in zip(
            patch.keys.tolist(), patch.wanted.tolist(), patch.others.tolist(), strict=True
        )
    }
    assert found == {1: (8, 4), 2: (0, 8), 3: (2, 2), 4: (4, 0)}

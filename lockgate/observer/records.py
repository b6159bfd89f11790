"""From the ring's records to events.

A connection within the node has two verdicts, which one record tells (`struct event` in
bpf/types.h): it saves the data plane half of what telling costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["events_of"]

_ALLOW, _EGRESS = 1, 2  # enum verdict, enum direction
_CELL_REASON = 0x3FFF_FFFF  # macros leave no BTF

Records = npt.NDArray[Any]


def events_of(records: Records, heads: Records | None = None) -> tuple[Records, Records | None]:
    """One event for each verdict or drop, in order: where a record (`struct event`) tells two
    verdicts, that of egress first. `heads`: a row for each record, repeated likewise."""
    both = records["egress_cell"] != 0
    if not both.any():
        return records, heads
    times = 1 + both
    events = np.repeat(records, times)
    # The record of ingress is the last of each pair, so that of egress is the one before.
    at = np.cumsum(times)[both] - 2
    cell = events["egress_cell"][at]
    events["verdict"][at], events["direction"][at] = _ALLOW, _EGRESS
    events["cause"][at] = 0
    events["class"][at] = events["egress_class"][at]
    events["reason"][at] = cell & _CELL_REASON
    events["pending"][at] = events["egress_pending"][at]
    return events, None if heads is None else np.repeat(heads, times, axis=0)

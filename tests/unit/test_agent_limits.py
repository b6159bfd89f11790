"""Limits as they are written in the settings, and as the programs take them."""

from __future__ import annotations

import msgspec
import pytest

from lockgate.agent.limits import Limits


@pytest.mark.parametrize(
    ("settings", "half_open", "wanted"),
    [
        pytest.param("{}", 65536, (1_000_000, 50_000, 20_000, 125_000), id="what nobody set"),
        pytest.param(
            "{}", 262144, (1_000_000, 15_258, 20_000, 125_000), id="a large table allows more"
        ),
        pytest.param(
            '{"answers": 0, "connections": 0, "events": 0, "fragments": 0}',
            65536,
            (0, 0, 0, 0),
            id="no limits",
        ),
        pytest.param(
            '{"connections": 100}', 1 << 20, (1_000_000, 10_000_000, 20_000, 125_000), id="set"
        ),
    ],
)
def test_limits_in_nanoseconds(settings, half_open, wanted):
    constants = msgspec.json.decode(settings, type=Limits).constants(half_open)
    names = ("config_answer_ns", "config_connection_ns", "config_event_ns", "config_fragment_ns")
    assert tuple(constants[name] for name in names) == wanted
    assert len(constants) == len(names)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ('{"connections": -1}', "$.connections"),
        ('{"events": 2000000000}', "$.events"),
        ('{"packets": 1}', "packets"),
    ],
)
def test_what_is_no_limit_is_told_by_its_field(settings, told):
    with pytest.raises(msgspec.ValidationError, match=told.replace("$", r"\$")):
        msgspec.json.decode(settings, type=Limits)

"""The agent's settings: what is refused, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lockgate.agent.config import read
from lockgate.agent.flows import Flows
from lockgate.agent.limits import CAPTURE_MAX
from lockgate.agent.sizes import flow_tags
from lockgate.bpf.btf import Schema
from lockgate.paths import bpf_object

LEAST = {"node": "n", "control": "/run/control.sock"}


def write(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "agent.json"
    path.write_text(json.dumps(LEAST | settings))
    return path


@pytest.mark.parametrize("bytes_", [0, 54, CAPTURE_MAX])
def test_so_many_bytes_of_a_packet_can_be_kept(tmp_path: Path, bytes_: int) -> None:
    assert read(write(tmp_path, {"capture": bytes_})).capture == bytes_


def test_as_many_as_a_record_has_room_for() -> None:
    head = Schema.from_object(str(bpf_object())).dtype("event_raw")["head"]
    assert head.itemsize == CAPTURE_MAX


def test_what_flows_come_to_in_the_kernel(tmp_path: Path) -> None:
    usual = read(write(tmp_path, {})).flows.constants(1 << 20)
    assert usual == {
        "config_flows": 1,
        "config_flow_ns": 20_000,
        "config_outer4": [198, 18, 0, 0],
        "config_outer6": [1, *[0] * 15],
    }
    flows = {"remember": False, "learn": 0, "outer6": "fd00:ab::/96"}
    other = read(write(tmp_path, {"flows": flows})).flows.constants(1 << 20)
    assert (other["config_flows"], other["config_flow_ns"]) == (0, 0)
    assert other["config_outer6"][:4] == [0xFD, 0, 0, 0xAB]


def test_a_flood_takes_four_seconds_at_least_to_fill_the_table_of_flows() -> None:
    ways = Schema.from_object(str(bpf_object())).dtype("flow_set")["way"].shape[0]
    for sets in (1 << 11, 1 << 15):  # of the smallest table, of 8 GB
        every = Flows().constants(sets)["config_flow_ns"]
        assert sets * ways * every >= 3.99e9


def test_there_are_tags_for_all_flows() -> None:
    """A byte each, eight in a word."""
    ways = Schema.from_object(str(bpf_object())).dtype("flow_set")["way"].shape[0]
    for sets in (1, 4, 5, 1 << 15):
        assert 0 <= 8 * flow_tags(sets) - ways * sets < 8


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"capture": -1}, "field capture: expected 0 to 128 bytes, got -1"),
        ({"capture": 129}, "field capture: expected 0 to 128 bytes, got 129"),
        ({"capture": "all"}, r"Expected `int`, got `str` - at `\$.capture`"),
        ({"memoryShare": 0}, "field memoryShare: expected more than 0 and at most 0.5, got 0"),
        ({"memoryShare": 0.6}, "field memoryShare: expected more than 0 and at most 0.5, got 0.6"),
        ({"vxlanPort": 0}, "field vxlanPort: expected 1 to 65535, got 0"),
        ({"kubernetes": {}}, "expected one of control and kubernetes"),
        ({"xdp": "fast"}, r"Invalid enum value 'fast' - at `\$.xdp`"),
        ({"flows": {"learn": -1}}, r"Expected `int` >= 0 - at `\$.flows.learn`"),
        (
            {"flows": {"outer4": "198.18.0.0/24"}},
            "field flows: outer4: expected a block of IPv4 with /16, got 198.18.0.0/24",
        ),
        (
            {"flows": {"outer6": "198.18.0.0/16"}},
            "field flows: outer6: expected a block of IPv6 with /96, got 198.18.0.0/16",
        ),
        (
            {"flows": {"outer4": "198.18.1.0/16"}},
            "field flows: outer4: 198.18.1.0/16 has host bits",
        ),
        ({"web": "9781"}, "field web"),
        ({"node": ""}, "field node: expected the node's name"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_told_by_file_and_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], told: str
) -> None:
    monkeypatch.delenv("NODE_NAME", raising=False)
    path = write(tmp_path, settings)
    with pytest.raises(ValueError, match=f"^{path}.*{told}"):
        read(path)

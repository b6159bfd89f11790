"""What records of the nodes say of a connection that was tried."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockgate.cli.verdicts import Attempted, Recording

ASKED = Attempted("UDP", "10.0.1.2", 40000, frozenset({("10.96.0.1", 53), ("10.0.2.2", 5353)}))
POLICY = {"kind": "NetworkPolicy", "namespace": "shop", "name": "web", "rules": []}


def record(verdict: str, node: str = "node-1", to: str = "10.0.2.2:5353", **more: Any) -> Any:
    address, _, port = to.rpartition(":")
    return {
        "verdict": verdict,
        "node": node,
        "direction": "egress",
        "cause": "policy" if verdict == "deny" else None,
        "policies": [],
        "protocol": "UDP",
        "source": {"ip": "10.0.1.2", "port": 40000},
        "destination": {"ip": address, "port": int(port)},
    } | more


@pytest.mark.parametrize(
    ("records", "denial", "allowing"),
    [
        pytest.param([], None, [], id="nobody saw it"),
        pytest.param(
            [record("deny", policies=[POLICY])],
            "denied by shop/web (egress, node-1)",
            [],
            id="denied by a policy",
        ),
        pytest.param(
            [record("allow"), record("deny", "node-2", direction="ingress", policies=[POLICY])],
            "denied by shop/web (ingress, node-2)",
            ["node-1"],
            id="let go by one node and denied by the other",
        ),
        pytest.param(
            [record("allow", "node-2"), record("allow"), record("allow")],
            None,
            ["node-1", "node-2"],
            id="allowed all the way",
        ),
        pytest.param(
            [record("deny", cause="no-route", direction=None)],
            "dropped as no-route (node-1)",
            [],
            id="dropped for another cause",
        ),
        pytest.param(
            [record("deny", to="10.96.0.1:53")], "denied (egress, node-1)", [], id="as it was asked"
        ),
        pytest.param([record("deny", to="10.0.2.2:53")], None, [], id="another port"),
        pytest.param([record("deny", to="10.0.9.9:5353")], None, [], id="another destination"),
        pytest.param([record("deny", protocol="TCP")], None, [], id="another protocol"),
        pytest.param(
            [record("deny", source={"ip": "10.0.1.2", "port": 40001})],
            None,
            [],
            id="another attempt of the same pod",
        ),
        pytest.param(
            [record("deny", source={"ip": "10.0.1.2"})], None, [], id="a ping, which has no ports"
        ),
    ],
)
def test_what_records_say(records, denial, allowing):
    recording = Recording(records, complete=True)
    assert recording.denial(ASKED) == denial
    assert recording.allowing(ASKED) == allowing
    assert recording.denial(replace(ASKED, source_ip="10.0.1.9")) is None

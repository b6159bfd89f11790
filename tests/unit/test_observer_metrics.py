"""What an observer counts, and what Prometheus is told of it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

from lockgate.bpf.btf import Schema
from lockgate.observer import tally as tally_module
from lockgate.observer.config import Config
from lockgate.observer.flows import FlowLog
from lockgate.observer.journal import Journal
from lockgate.observer.metrics import Metrics
from lockgate.observer.server import Observer
from lockgate.observer.tally import Kind, PolicyVerdict, Tally
from lockgate.paths import bpf_object
from tests.unit.test_observer import EVENT, LINES, NAMES, event, write

ROOT = Path(__file__).resolve().parents[2]
DROP = {"type": 2, "verdict": 0, "direction": 0, "reason": 0}


@pytest.fixture
def tally(tmp_path: Path) -> Tally:
    write(tmp_path / "journal", LINES)
    journal = Journal(tmp_path / "journal")
    journal.refresh()
    return Tally(journal, 1)


def counted(tally: Tally, times: int, **fields: Any) -> None:
    tally.add(np.concatenate([event(**fields)] * times))


@pytest.mark.parametrize("times", [1, 3, 70_000], ids=["one", "few", "many"])
def test_each_event_is_counted_once_in_batches_of_any_size(tally: Tally, times: int) -> None:
    batch = [event(), event(proto=17, verdict=0, cause=1, reason=2), event(**DROP, cause=4)]
    tally.add(np.tile(np.concatenate(batch), times))
    assert tally.events == {
        Kind(6, 1, 0, True): times,
        Kind(17, 1, 1, False): times,
        Kind(6, 2, 4, False): times,
    }
    pay = "NetworkPolicy", "pay", "db"
    assert tally.verdicts == {
        PolicyVerdict(*pay, "allow", "ingress"): times,
        PolicyVerdict(*pay, "deny", "ingress"): times,
    }, "a drop for another cause is no verdict"


def test_a_verdict_without_a_policy_keeps_its_direction(tally: Tally) -> None:
    counted(tally, 2, reason=0, direction=2)
    counted(tally, 1, reason=0, direction=1)
    counted(tally, 1, reason=77, direction=1)
    assert tally.verdicts == {
        PolicyVerdict("", "", "", "allow", "egress"): 2,
        PolicyVerdict("", "", "", "allow", "ingress"): 2,
    }


def test_of_too_many_policies_the_oldest_are_left_out(
    tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally_module, "_MOST", 2)
    for direction, reason in ((1, 0), (2, 0), (1, 1)):
        counted(tally, 1, reason=reason, direction=direction)
    assert [(one.name, one.direction) for one in tally.verdicts] == [
        ("", "egress"),
        ("db", "ingress"),
    ]


def test_hubbles_names_and_labels_are_kept(tally: Tally, tmp_path: Path) -> None:
    counted(tally, 3)
    counted(tally, 2, verdict=0, cause=1, reason=2)
    counted(tally, 1, proto=58, **DROP, cause=4)
    journal = tally._journal
    counts = {"events": 9, "lost": 4, "cut": 5, "pending": 128}
    observer = SimpleNamespace(
        log=FlowLog(EVENT, 128, NAMES, journal, "n1", capacity=8),
        tally=tally,
        journal=journal,
        source=SimpleNamespace(counts=lambda: counts, ready=True),
    )
    text = Metrics(observer).text().decode()  # type: ignore[arg-type]
    lines = text.splitlines()
    flows = 'hubble_flows_processed_total{protocol="%s",subtype="",type="%s",verdict="%s"} %s'
    policy = (
        'lockgate_policy_verdicts_total{direction="ingress",kind="NetworkPolicy",'
        'namespace="pay",policy="db",verdict="%s"} %s'
    )
    for line in (
        flows % ("TCP", "PolicyVerdict", "FORWARDED", "3.0"),
        flows % ("TCP", "PolicyVerdict", "DROPPED", "2.0"),
        flows % ("ICMPv6", "Drop", "DROPPED", "1.0"),
        f'hubble_drop_total{{protocol="TCP",reason="{NAMES.causes[1]}"}} 2.0',
        f'hubble_drop_total{{protocol="ICMPv6",reason="{NAMES.causes[4]}"}} 1.0',
        'hubble_lost_events_total{source="ring"} 4.0',
        'hubble_lost_events_total{source="limit"} 5.0',
        policy % ("allow", "3.0"),
        policy % ("deny", "2.0"),
        "lockgate_events_total 9.0",
        "lockgate_events_waiting_bytes 128.0",
        "lockgate_observer_ready 1.0",
    ):
        assert line in lines
    page = (ROOT / "docs" / "metrics.md").read_text().partition("\n## Observer\n")[2]
    rows = [line for line in page.partition("\n## ")[0].splitlines() if line.startswith("|")]
    documented = set(re.findall(r"(?:lockgate|hubble)_\w+", "".join(r.split("|")[1] for r in rows)))
    assert documented == set(re.findall(r"^# TYPE ((?:lockgate|hubble)_\w+)", text, re.M))


async def test_the_page_is_there_before_the_rings_are(tmp_path: Path) -> None:
    config = Config(
        node="one",
        bpffs=str(tmp_path),
        journal=str(tmp_path / "journal"),
        socket=str(tmp_path / "observer.sock"),
    )
    observer = Observer(config, Schema.from_object(bpf_object()))
    async with TestClient(TestServer(observer.probes())) as client:
        page = await client.get("/metrics")
        text = await page.text()
        assert page.status == 200 and page.headers["Content-Type"].startswith("text/plain")
        assert "lockgate_observer_ready 0.0" in text and "process_cpu_seconds_total" in text
        assert (await client.get("/readyz")).status == 503

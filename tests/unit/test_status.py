"""What `lockgate status` calls wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lockgate import __version__
from lockgate.cli.main import cli
from lockgate.cli.status import api_cost, problems, process_state, xdp_lines

UP = {"up": True, "restarts": 0, "error": ""}


def node(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "error": "",
        "agent": dict(UP),
        "observer": dict(UP),
        "agentStatus": {
            "version": __version__,
            "node": name,
            "revision": 7,
            "applied": 7,
            "connected": True,
            "errors": [],
            "features": [{"name": "tcx links", "ok": True, "advice": ""}],
            "memory": 70_000_000,
            "drops": {"policy": 9, "multicast": 4},
        },
        "observerStatus": {
            "version": __version__,
            "node": name,
            "ready": True,
            "events": 100_000,
            "lost": 1,
            "journalDamaged": 0,
            "memory": 60_000_000,
        },
    }


def well() -> dict[str, Any]:
    return {
        "revision": 7,
        "nodes": [node("a"), node("b")],
        "errors": [],
        "reasons": [],
        "notReady": [],
        "waitingFor": {},
    }


def test_all_is_well() -> None:
    assert problems(well()) == []


def test_on_a_real_cluster_each_agent_counts_for_itself() -> None:
    found = well()
    del found["revision"]
    found["nodes"][0]["agentStatus"].update(revision=900, applied=900)
    assert problems(found) == []


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a node without us": (lambda n: n.update(error="no pod of Lockgate runs here"), "no pod of"),
    "an agent that ended": (
        lambda n: n.update(agent={"up": False, "error": "CrashLoopBackOff: exit 1"}),
        "agent is down: CrashLoopBackOff: exit 1",
    ),
    "an agent that hangs": (
        lambda n: n.update(agentStatus={"error": "no answer"}),
        "agent does not answer: no answer",
    ),
    "an observer that hangs": (
        lambda n: n.update(observerStatus={"error": "no answer"}),
        "observer does not answer: no answer",
    ),
    "another version": (
        lambda n: n["agentStatus"].update(version="0.0.1"),
        f"agent is version 0.0.1, this command {__version__}",
    ),
    "a revision behind": (
        lambda n: n["agentStatus"].update(applied=4),
        "3 changes are not in force yet",
    ),
    "nothing in force": (
        lambda n: n["agentStatus"].update(applied=0),
        "nothing is in force yet",
    ),
    "an API server that is away": (
        lambda n: n["agentStatus"].update(connected=False, errors=["API server away since 12:00"]),
        "API server away since 12:00",
    ),
    "a feature that lacks": (
        lambda n: n["agentStatus"].update(
            features=[{"name": "tcx links", "ok": False, "advice": "they came with Linux 6.6"}]
        ),
        "the kernel lacks tcx links: they came with Linux 6.6",
    ),
    "drops that are nobody's wish": (
        lambda n: n["agentStatus"].update(drops={"nat-exhausted": 1}),
        "1 packet dropped, nat-exhausted",
    ),
    "lost records": (
        lambda n: n["observerStatus"].update(lost=1000),
        "1000 of 101000 flow records were lost",
    ),
    "a damaged journal": (
        lambda n: n["observerStatus"].update(journalDamaged=2),
        "2 lines of the journal damaged",
    ),
    "an observer without rings": (
        lambda n: n["observerStatus"].update(ready=False),
        "observer does not read events yet",
    ),
    "much memory": (
        lambda n: n["agentStatus"].update(memory=2 << 30),
        "agent has 2147 MB of memory",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_named_with_its_node(fault: tuple[Any, str]) -> None:
    change, text = fault
    found = copy.deepcopy(well())
    change(found["nodes"][1])
    told = problems(found)
    assert [one["node"] for one in told] == ["b"]
    assert text in told[0]["text"]


def test_the_cluster_itself_may_be_wrong() -> None:
    found = well() | {
        "errors": ["a.yaml: no"],
        "reasons": ["node a: 1 behind"],
        "notReady": ["x/y"],
    }
    assert [(one["node"], one["text"]) for one in problems(found)] == [
        ("", "a.yaml: no"),
        ("", "node a: 1 behind"),
        ("", "not ready: x/y"),
    ]
    assert [one["text"] for one in problems(well() | {"nodes": []})] == ["there are no nodes"]


@pytest.mark.parametrize(
    ("child", "told", "wanted"),
    [
        ({"up": True, "restarts": 0}, {"node": "a", "error": "waits for its rings"}, "up"),
        ({"up": True, "restarts": 2}, {"node": "a"}, "up, 2 restarts"),
        ({"up": True, "restarts": 1}, {"error": "x", "starting": True}, "starting, 1 restart"),
        ({"up": True}, {"error": "nothing came within 10 s"}, "no answer"),
        ({"up": False, "restarts": 1}, {"error": "x", "starting": True}, "down"),
        ({}, {"error": "x"}, "down"),
    ],
)
def test_a_process_is_up_once_it_answers(child, told, wanted):
    assert process_state(child, told) == wanted


def following(name: str, **rates: float) -> dict[str, Any]:
    kinds = {kind: {"bytesPerSecond": rate} for kind, rate in rates.items()}
    return {"name": name, "agentStatus": {"api": {"kinds": kinds}}}


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ([{"name": "a", "agentStatus": {"api": {}}}], ""),
        ([{"name": "a", "agentStatus": {"error": "no answer"}}], ""),
        ([following("a", pods=12.4, nodes=3)], "the API server sends agents 15 B/s"),
        (
            [following("a", pods=1500), following("b", pods=2e6, nodes=400)],
            "the API server sends agents 2.0 MB/s, 2.0 MB/s of it to b",
        ),
    ],
)
def test_what_agents_cost_the_api_server(nodes: list[dict[str, Any]], told: str) -> None:
    assert api_cost(nodes).partition(" (")[0] == told


NATIVE = {"card": "eth0", "mode": "native", "why": ""}
UNUSED = {"card": "eth0", "mode": "none", "why": "nothing needs it"}
TAKEN = {"card": "eth0", "mode": "none", "why": "another program is there: spy (id 7)"}


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ([[UNUSED], [UNUSED]], []),
        ([[NATIVE], [NATIVE]], ["XDP on all nodes: eth0 native"]),
        (
            [[NATIVE], [TAKEN], [NATIVE], [UNUSED], []],
            [
                "XDP on n0, n2: eth0 native",
                "XDP on n1: eth0 none (another program is there: spy (id 7))",
            ],
        ),
    ],
)
def test_how_xdp_runs_is_told_where_something_needs_it(told, wanted):
    nodes = [{"name": f"n{i}", "agentStatus": {"xdp": one}} for i, one in enumerate(told)]
    assert xdp_lines(nodes) == wanted


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: far
clusters: [{name: far, cluster: {server: "https://127.0.0.1:9"}}]
contexts: [{name: far, context: {cluster: far, user: me}}]
users:
- name: me
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1
      interactiveMode: Never
      command: COMMAND
      installHint: get it from the cloud
"""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("command", ["status", "doctor", "bugreport"])
@pytest.mark.parametrize(
    ("plugin", "why"),
    [("/bin/false", "failed with exit code 1"), ("no-such-plugin", "is not in PATH")],
)
def test_without_a_credential_the_plugin_is_named_and_not_the_cluster(
    command: str, plugin: str, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "config"
    path.write_text(KUBECONFIG.replace("COMMAND", plugin))
    done = CliRunner().invoke(cli, [command, "--kubeconfig", str(path)])
    assert done.exit_code == 2
    assert f"user 'me': the plugin {plugin} {why}" in done.stderr
    assert "does not answer" not in done.stderr
    assert ("get it from the cloud" in done.stderr) is (plugin == "no-such-plugin")

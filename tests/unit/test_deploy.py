"""deploy/lockgate.yaml asks for no more than the code uses, and sets what it reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import lockgate
from lockgate.agent import config as agent
from lockgate.agent.writeback import RBAC, REASONS
from lockgate.observer import config as observer

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = {
    item["kind"]: item
    for item in yaml.safe_load_all((ROOT / "deploy/lockgate.yaml").read_text())
    if item
}
POD = OBJECTS["DaemonSet"]["spec"]["template"]["spec"]
CONTAINERS = {container["name"]: container for container in POD["containers"]}


def test_the_role_allows_what_is_read_and_written_and_nothing_else() -> None:
    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in OBJECTS["ClusterRole"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert allowed == RBAC


def test_every_fault_has_a_reason_that_the_docs_explain() -> None:
    code = "".join(path.read_text() for path in (ROOT / "lockgate/agent").glob("*.py"))
    assert set(re.findall(r'errors\["(\w+)"\] = ', code)) <= REASONS.keys()
    page = (ROOT / "docs/operate.md").read_text().partition("## Events")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` ", page, re.M)) == set(REASONS.values())


@pytest.mark.parametrize("module", [agent, observer], ids=["agent", "observer"])
def test_the_processes_read_the_settings_of_the_config_map(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{module.__name__.split('.')[1]}.json"
    path = tmp_path / name
    path.write_text(OBJECTS["ConfigMap"]["data"][name])
    monkeypatch.setenv("NODE_NAME", "worker-1")
    config = module.read(path)
    assert config.node == "worker-1"
    assert config.pins == Path("/host/sys/fs/bpf/lockgate/default/worker-1")


@pytest.mark.parametrize("node", ["worker-1", "ip-10-0-0-1.eu-central-1.compute.internal"])
def test_both_processes_meet_in_the_same_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    monkeypatch.setenv("NODE_NAME", node)
    read = {}
    for module in (agent, observer):
        name = f"{module.__name__.split('.')[1]}.json"
        (tmp_path / name).write_text(OBJECTS["ConfigMap"]["data"][name])
        read[name] = module.read(tmp_path / name)
    a, o = read["agent.json"], read["observer.json"]
    assert a.pins == o.pins
    assert "." not in a.pins.name, "a bpffs takes no dots"
    assert Path(a.state_dir, "journal.jsonl") == Path(o.journal)
    assert a.socket.parent == Path(o.socket).parent == Path("/run/lockgate")


@pytest.mark.parametrize("name", ["agent", "observer"])
def test_no_container_is_privileged_or_writes_to_its_image(name: str) -> None:
    context = CONTAINERS[name]["securityContext"]
    assert "privileged" not in context
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"]["drop"] == ["ALL"]
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_observer_has_less_than_the_agent() -> None:
    assert CONTAINERS["observer"]["securityContext"]["capabilities"]["add"] == ["BPF"]
    mounts = {mount["name"] for mount in CONTAINERS["observer"]["volumeMounts"]}
    assert mounts == {"config", "run", "state", "bpf"}


def test_versions_are_one() -> None:
    chart = yaml.safe_load((ROOT / "deploy/chart/Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == lockgate.__version__
    for container in CONTAINERS.values():
        assert container["image"] == f"localhost/lockgate:{lockgate.__version__}"


def test_probes_ask_the_addresses_that_the_processes_listen_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_NAME", "worker-1")
    for module in (agent, observer):
        name = module.__name__.split(".")[1]
        path = tmp_path / f"{name}.json"
        path.write_text(OBJECTS["ConfigMap"]["data"][path.name])
        host, port = module.listen(module.read(path).web)
        for probe in ("livenessProbe", "readinessProbe"):
            asked = CONTAINERS[name][probe]["httpGet"]
            assert (asked["host"], asked["port"]) == (host, port)

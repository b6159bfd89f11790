"""`lockgate bugreport`: it has what is needed, also of a broken cluster, and nothing secret."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lockgate.access.sockets import call
from tests.system.harness import Cluster, unique_name

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

SECRET = "hunter2-of-the-test"
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "a",
        "annotations": {"vendor.example/token": SECRET, "lockgate.dev/enforcement": "audit"},
    },
    "spec": {
        "containers": [
            {
                "name": "main",
                "image": "none",
                "env": [{"name": "PASSWORD", "value": SECRET}],
                "command": ["sleep", "1000", "--", SECRET],
            }
        ]
    },
}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("bug")
    (folder / "pod.yaml").write_text(yaml.safe_dump({**POD, "spec": _plain(POD["spec"])}))
    with Cluster(folder, unique_name("tb"), nodes=1) as cluster:
        yield cluster


def _plain(spec: object) -> object:
    """`sleep` takes numbers only: the secret is a comment of the shell's."""
    text = json.loads(json.dumps(spec))
    text["containers"][0]["command"] = ["sh", "-c", f"exec sleep 1000 # {SECRET}"]
    return text


def pack(cluster: Cluster, path: Path) -> dict[str, bytes]:
    told = json.loads(cluster.lockgate("bugreport", str(path), "--json").stdout)
    with tarfile.open(path) as archive:
        found = {}
        for member in archive.getmembers():
            content = archive.extractfile(member)
            assert content is not None
            found[member.name.partition("/")[2]] = content.read()
    assert [part["name"] for part in told["contents"]] == list(found)
    return found


def test_it_has_what_a_maintainer_needs(one: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "report.tar.gz"
    found = pack(one, path)
    assert set(found) == {
        "versions.json",
        "status.json",
        "doctor.json",
        "objects.json",
        "nodes/node-1/agent.log",
        "nodes/node-1/observer.log",
        "nodes/node-1/report.json",
        "nodes/node-1/denied.json",
    }
    report = json.loads(found["nodes/node-1/report.json"])
    assert {"peers", "connections", "events"} <= {one["name"] for one in report["maps"]}
    assert report["tables"]["peers"]["entries"] == len(report["tables"]["peers"]["dump"]) > 0
    assert any('"k":"endpoint"' in line.replace(" ", "") for line in report["journal"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_has_no_secret(one: Cluster, tmp_path: Path) -> None:
    found = pack(one, tmp_path / "report.tar.gz")
    assert [name for name, content in found.items() if SECRET.encode() in content] == []
    pod = json.loads(found["objects.json"])["pods"][0]
    assert pod["metadata"]["annotations"] == {"lockgate.dev/enforcement": "audit"}


def test_what_does_not_answer_is_said_so(one: Cluster, tmp_path: Path) -> None:
    agent = one.state.agent("node-1")
    hidden = agent.with_suffix(".away")
    agent.rename(hidden)
    try:
        found = pack(one, tmp_path / "report.tar.gz")
    finally:
        hidden.rename(agent)
    assert b"No such file" in found["nodes/node-1/report.json.failed"]
    assert "nodes/node-1/agent.log" in found
    assert call(agent, "GET", "/v1/status")["node"] == "node-1"

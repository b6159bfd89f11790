"""What cleans the nodes of a cluster, made of the DaemonSet that is installed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from lockgate.cli.uninstall import cleaners
from tests.unit.test_deploy import ROOT


def daemonset() -> dict[str, Any]:
    items = yaml.safe_load_all((ROOT / "deploy/lockgate.yaml").read_text())
    (found,) = (one for one in items if one and one["kind"] == "DaemonSet")
    return dict(found)


@pytest.mark.parametrize("force", [False, True])
def test_each_node_gets_a_pod_with_what_the_agent_has(force: bool) -> None:
    installed = daemonset()
    assert "affinity" in installed["spec"]["template"]["spec"]
    (agent,) = (
        one for one in installed["spec"]["template"]["spec"]["containers"] if one["name"] == "agent"
    )
    items = json.loads(cleaners(installed, ["a", "b.example"], force))["items"]
    assert [one["spec"]["nodeName"] for one in items] == ["a", "b.example"]
    assert len({one["metadata"]["name"] for one in items}) == 2
    for pod in items:
        assert "app.kubernetes.io/name" in pod["metadata"]["labels"]
        assert pod["metadata"]["labels"] != installed["spec"]["selector"]["matchLabels"]
        spec = pod["spec"]
        assert spec["restartPolicy"] == "Never" and spec["hostNetwork"]
        assert not spec.keys() & {"affinity", "nodeSelector"}, "also where agents may not run"
        (one,) = spec["containers"]
        assert one["command"][:2] == ["lockgate", "uninstall"]
        assert ("--force" in one["command"]) == force
        assert not one.keys() & {"livenessProbe", "readinessProbe"}
        for same in ("image", "env", "securityContext", "volumeMounts"):
            assert one[same] == agent[same]
    assert installed == daemonset(), "what was given is as it was"

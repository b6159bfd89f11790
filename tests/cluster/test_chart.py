"""deploy/lockgate.yaml is what the chart makes with its own values; values do what they say."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import yaml

from cluster.helm import helm
from tests.system.harness import ROOT


def rendered(*settings: str, namespace: str = "kube-system") -> dict[str, Any]:
    """The chart's objects by kind."""
    command = [helm(), "template", "lockgate", ROOT / "deploy/chart"]
    command += ["--namespace", namespace, "--kube-version", "1.30"]
    for setting in settings:
        command += ["--set-json", setting]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {item["kind"]: item for item in yaml.safe_load_all(text) if item}


def test_the_manifest_is_made_from_the_chart() -> None:
    manifest = yaml.safe_load_all((ROOT / "deploy/lockgate.yaml").read_text())
    assert {item["kind"]: item for item in manifest if item} == rendered(), "run `make manifests`"


@pytest.mark.parametrize(
    ("setting", "file", "field", "value"),
    [
        ('apiServer="https://10.0.0.1:6443"', "agent", "kubernetes", "https://10.0.0.1:6443"),
        ("mtu=1400", "agent", "mtu", 1400),
        ('cluster="blue"', "agent", "cluster", "blue"),
        ('cluster="blue"', "observer", "cluster", "blue"),
        ('listen="0.0.0.0"', "agent", "web", "0.0.0.0:9781"),
        ('listen="0.0.0.0"', "observer", "web", "0.0.0.0:9782"),
        (
            'limits={"connections": 7}',
            "agent",
            "limits",
            {"answers": 1000, "connections": 7, "events": 50000, "fragments": 8000},
        ),
        ("capture=64", "agent", "capture", 64),
        ("memoryShare=0.02", "agent", "memoryShare", 0.02),
        ('agent={"sweepSeconds": 5}', "agent", "sweepSeconds", 5),
        ('observer={"web": ""}', "observer", "web", ""),
    ],
)
def test_a_value_becomes_a_setting(setting: str, file: str, field: str, value: Any) -> None:
    config = json.loads(rendered(setting)["ConfigMap"]["data"][f"{file}.json"])
    found = config[field]
    assert (found["apiServer"] if field == "kubernetes" else found) == value


def test_a_pod_monitor_scrapes_both_containers_by_their_ports() -> None:
    assert "PodMonitor" not in rendered()
    objects = rendered('podMonitor={"enabled": true, "labels": {"release": "p"}}', 'listen="[::]"')
    monitor = objects["PodMonitor"]
    assert monitor["metadata"]["labels"]["release"] == "p"
    asked = {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]}
    pod = objects["DaemonSet"]["spec"]["template"]
    ports = {port["name"]: port for one in pod["spec"]["containers"] for port in one["ports"]}
    assert asked == set(ports) == {"agent", "observer"}
    assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    config = objects["ConfigMap"]["data"]
    for name, port in ports.items():
        assert json.loads(config[f"{name}.json"])["web"] == f"[::]:{port['containerPort']}"


def test_a_pod_monitor_that_nobody_lets_in_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        rendered('podMonitor={"enabled": true}')
    assert "set listen to 0.0.0.0" in refused.value.stderr


def test_a_namespace_where_commands_would_not_look_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        rendered(namespace="default")
    assert "install Lockgate with --namespace kube-system" in refused.value.stderr


def test_changed_settings_replace_the_pods() -> None:
    before, after = (
        objects["DaemonSet"]["spec"]["template"]["metadata"]["annotations"]
        for objects in (rendered(), rendered("mtu=1400"))
    )
    assert before != after


def test_image_folders_and_resources_are_the_values() -> None:
    pod = rendered(
        'image={"repository": "registry.example/lockgate", "tag": "9"}',
        'cni={"bin": "/usr/libexec/cni"}',
        'resources={"agent": {"limits": {"memory": "1Gi"}}}',
    )["DaemonSet"]["spec"]["template"]["spec"]
    agent, observer = pod["containers"]
    assert agent["image"] == observer["image"] == "registry.example/lockgate:9"
    assert agent["resources"]["limits"] == {"memory": "1Gi"}
    paths = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in pod["volumes"]}
    assert (paths["cni-bin"], paths["cni-conf"]) == ("/usr/libexec/cni", "/etc/cni/net.d")

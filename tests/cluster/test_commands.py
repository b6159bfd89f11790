"""Commands that try, explain and pack, as on a laptop: with a kubeconfig, on the shop."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import Cluster, processes
from lockgate.access.kubernetes import KubernetesAccess
from lockgate.cli.paths import KINDS
from lockgate.cli.screen import show
from lockgate.kube.client import Settings
from lockgate.standalone.underlay import OUTSIDE4, OUTSIDE6
from tests.cluster import matrix
from tests.system.harness import ROOT

NODES = ["node-1", "node-2"]

# What must not leave the cluster, each by the way it would go.
SECRETS = {
    "a Secret": "hunter2-of-the-secret",
    "a ConfigMap": "hunter2-of-the-configmap",
    "an environment": "hunter2-of-the-environment",
    "a command": "hunter2-of-the-command",
    "an annotation": "hunter2-of-the-annotation",
}
KEEPER = [
    {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "keeper", "namespace": "visitors"},
        "stringData": {"password": SECRETS["a Secret"]},
    },
    {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "keeper", "namespace": "visitors"},
        "data": {"password": SECRETS["a ConfigMap"]},
    },
    {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "keeper",
            "namespace": "visitors",
            "annotations": {"vendor.example/token": SECRETS["an annotation"]},
        },
        "spec": {
            "nodeName": "node-1",
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "a",
                    "image": "localhost/agnhost:1",
                    "args": ["netexec", f"--http-override={SECRETS['a command']}"],
                    "envFrom": [
                        {"secretRef": {"name": "keeper"}},
                        {"configMapRef": {"name": "keeper"}},
                    ],
                    "env": [{"name": "PASSWORD", "value": SECRETS["an environment"]}],
                }
            ],
        },
    },
]


def lockgate(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """A command from outside the cluster."""
    command = [sys.executable, "-m", "lockgate.cli.main", *words]
    command += ["--kubeconfig", str(cluster.kubeconfig)]
    return subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, timeout=120, check=False
    )


def test_the_screen_is_that_of_make_run(real: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(kubeconfig=str(real.kubeconfig))
    with closing(KubernetesAccess(settings, "the test's")) as access:
        good = show(access, f" --kubeconfig {real.kubeconfig}")
    text = capsys.readouterr().out
    assert good, text
    for words in (
        *NODES,
        "monitoring   prometheus",
        "payments     vault-0",
        "Services and their backends",
        "Who may talk to whom",
        "Every one is as the specification says.",
        "The last denied connections",
        "isolated by",
        f"lockgate explain --kubeconfig {real.kubeconfig}",
        "kubectl exec -n ",
    ):
        assert words in text, words


def test_probe_tries_the_pods_of_a_namespace_and_says_who_denied(real: Cluster) -> None:
    done = lockgate(real, "probe", "-n", "visitors", "--family", "6", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {(one["family"], one["difference"]) for one in found} == {("IPv6", None)}
    assert all(one["from"].startswith("visitors/") or "visitors/" in one["to"] for one in found)
    denied = [one for one in found if one["measured"] == "deny"]
    assert denied and all(one["denial"].startswith("denied by ") for one in denied)
    assert sum(one["measured"] == "allow" and one["result"] == "ok" for one in found) > 10


def test_doctor_finds_every_way_open(real: Cluster) -> None:
    outside = [word for ip in (OUTSIDE4, f"[{OUTSIDE6}]") for word in ("--outside", f"{ip}:9")]
    done = lockgate(real, "doctor", "--json", *outside)
    found = json.loads(done.stdout)
    assert [one for one in found if one["severity"] == "error"] == []
    assert done.returncode == 0, done.stderr
    tried = Counter((one["node"], one["text"]) for one in found if one["check"] == "path")
    # The API server, as the nodes see it, is an address of IPv4.
    assert tried == Counter(
        (node, f"{kind} (IPv{family}): open")
        for node in NODES
        for kind in KINDS
        for family in (4, 6)
        if (kind, family) != ("pod → API server", 6)
    )
    assert not any(one["check"] == "untried" for one in found)


def test_the_nodes_programs_and_the_specification_explain_alike(
    real: Cluster, tmp_path: Path
) -> None:
    questions = [  # every third: of either family
        {
            "from": "/".join(one.source.key),
            "to": one.address,
            "port": one.port,
            "protocol": one.protocol,
        }
        for one in matrix.plan(matrix.objects(real))[::3]
    ]
    assert len(questions) > 800
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in questions))
    kernel, spec = (explained(real, file, engine) for engine in ("kernel", "spec"))
    assert len(kernel) == len(spec) == len(questions)
    assert [pair for pair in zip(kernel, spec, strict=True) if pair[0] != pair[1]] == []
    verdicts = Counter(one["verdict"] for one in kernel)
    assert verdicts["allow"] > 200 and verdicts["deny"] > 200


def explained(cluster: Cluster, file: Path, engine: str) -> list[dict[str, Any]]:
    done = lockgate(cluster, "explain", "--engine", engine, "--batch", str(file))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def keeper(real: Cluster) -> Iterator[None]:
    """A running pod with all of SECRETS."""
    real.apply(yaml.safe_dump_all(KEEPER))
    wait = ("wait", "--for=condition=Ready", "pod/keeper", "--timeout=60s")
    real.kubectl("-n", "visitors", *wait, timeout=70)
    yield
    real.kubectl("-n", "visitors", "delete", "pod/keeper", "secret/keeper", "configmap/keeper")


def token(cluster: Cluster, node: str) -> str:
    """What the agent of a node shows the API server; its observer has none."""
    for pid in processes.pids(cluster.state.cgroup(node) / "kubepods"):
        process = Path(f"/proc/{pid}")
        if b"\0lockgate.agent\0" in (process / "cmdline").read_bytes():
            path = process / "root/var/run/secrets/kubernetes.io/serviceaccount/token"
            return path.read_text()
    raise AssertionError(f"no agent runs on {node}")


@pytest.mark.usefixtures("keeper")
def test_a_bugreport_has_both_nodes_and_no_secret(real: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "report.tar.gz"
    done = lockgate(real, "bugreport", str(path), "--json")
    assert done.returncode == 0, done.stderr
    with tarfile.open(path) as archive:
        found = {
            member.name.partition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive.getmembers()
        }
    assert set(found) == {
        *("versions.json", "status.json", "doctor.json", "objects.json"),
        *(
            f"nodes/{node}/{name}"
            for node in NODES
            for name in ("agent.log", "observer.log", "report.json", "denied.json")
        ),
    }
    assert b'"keeper"' in found["objects.json"]
    for node in NODES:
        assert json.loads(found[f"nodes/{node}/report.json"])["tables"]["peers"]["entries"] > 20
        assert b"the CNI plugin is installed" in found[f"nodes/{node}/agent.log"]
    user = yaml.safe_load(real.kubeconfig.read_text())["users"][0]["user"]
    secrets = {
        **SECRETS,
        **{f"the token of {node}'s agent": token(real, node) for node in NODES},
        "the user's key": user["client-key-data"],
    }
    for what, secret in secrets.items():
        forms = secret.encode(), base64.b64encode(secret.encode())
        held = [name for name, content in found.items() if any(form in content for form in forms)]
        assert held == [], what

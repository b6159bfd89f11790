"""What a user with a kubeconfig has: the node APIs through `pods/exec`, and the commands."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import Cluster, processes
from cluster.commands import until
from lockgate.access import Refused, Unreachable
from lockgate.access.exec import PROTOCOLS, exec_stream
from lockgate.access.kubernetes import KubernetesAccess
from lockgate.kube.client import Client, Settings
from tests.system.harness import ROOT

NODES = ["node-1", "node-2"]


@pytest.fixture(scope="module")
def access(real: Cluster) -> Iterator[KubernetesAccess]:
    one = KubernetesAccess(Settings(kubeconfig=str(kubeconfig(real))), "the test's")
    yield one
    one.close()


def kubeconfig(cluster: Cluster) -> Path:
    return cluster.state.root / "kubeconfig"


def command(cluster: Cluster, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig(cluster))}
    environment.pop("LOCKGATE_CLUSTER", None)
    return subprocess.run(
        list(words), text=True, capture_output=True, env=environment, timeout=60, **options
    )


def ask(cluster: Cluster, *words: str) -> Any:
    config = ["--kubeconfig", str(kubeconfig(cluster)), "--json"]
    done = command(cluster, sys.executable, "-m", "lockgate.cli.main", *words, *config)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def agent_pod(cluster: Cluster) -> tuple[str, str]:
    items = cluster.json(
        "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=lockgate"
    )
    return "kube-system", items["items"][0]["metadata"]["name"]


# ---- Over WebSocket -----------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_exec_speaks_both_protocols(real: Cluster, protocol: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("lockgate.access.exec.PROTOCOLS", (protocol,))
    client = Client(Settings(kubeconfig=str(kubeconfig(real))))
    try:
        words = ["lockgate-node-call", "agent", "GET", "/v1/status", "0"]
        pieces = exec_stream(client, agent_pod(real), "agent", words, timeout=20)
        assert json.loads(b"".join([piece async for piece in pieces]))["node"] in NODES
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["lockgate-node-call", "agent", "GET", "/v1/nothing", "0"], Refused, "404"),
        (["lockgate-node-call", "agent", "POST", "/v1/probe", "0"], Refused, "can't be read"),
        (["no-such-program"], Unreachable, "no-such-program"),
    ],
    ids=["no such call", "no body", "no such program"],
)
async def test_why_exec_failed(
    real: Cluster, words: list[str], error: type[Exception], text: str
) -> None:
    client = Client(Settings(kubeconfig=str(kubeconfig(real))))
    try:
        with pytest.raises(error, match=text):
            async for _ in exec_stream(client, agent_pod(real), "agent", words, timeout=20):
                pass
    finally:
        await client.close()


@pytest.mark.parametrize("count", [1, 20_000])
def test_bodies_of_any_size_arrive_whole(access: KubernetesAccess, count: int) -> None:
    packets = {"packets": [{"at": "from_net", "packet": "AAAA" * 16, "ifindex": 1}] * count}
    answers = access.call("node-1", "agent", "POST", "/v1/dryrun", packets, timeout=60)["answers"]
    assert len(answers) == count


def test_who_stops_following_leaves_nothing_behind(real: Cluster, access: KubernetesAccess) -> None:
    cgroup = real.state.cgroup("node-1")

    def following() -> bool:
        commands = [Path(f"/proc/{pid}/cmdline") for pid in processes.pids(cgroup)]
        return any(b"follow=1" in path.read_bytes() for path in commands if path.exists())

    script = (
        "from lockgate.access.kubernetes import KubernetesAccess\n"
        "from lockgate.kube.client import Settings\n"
        f"one = KubernetesAccess(Settings(kubeconfig={str(kubeconfig(real))!r}), '')\n"
        "list(one.stream('node-1', 'observer', '/v1/flows?follow=1'))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as follower:
        until("somebody follows", following, 30)
        follower.kill()
    assert until("nobody follows", lambda: not following(), 30)


# ---- Commands -----------------------------------------------------------------------


def test_status_tells_of_both_nodes(real: Cluster) -> None:
    found = ask(real, "status")
    assert [node["name"] for node in found["nodes"]] == NODES
    for node in found["nodes"]:
        assert node["agent"]["up"] and node["observer"]["up"]
        assert node["agentStatus"]["node"] == node["observerStatus"]["node"] == node["name"]


def test_get_shows_what_the_api_server_has(real: Cluster) -> None:
    assert [row["name"] for row in ask(real, "get", "nodes")] == NODES
    services = ask(real, "get", "services")
    assert [(row["namespace"], row["name"]) for row in services][:1] == [("default", "kubernetes")]
    assert len(ask(real, "get", "pods", "-n", "kube-system")) >= 2


def test_kubectl_finds_it_as_a_plugin(real: Cluster) -> None:
    kubectl = Path(real.kubectl_command("version")[0])
    folder = Path(sys.executable).parent
    words = [str(kubectl), "lockgate", "get", "nodes", "--json"]
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": "/nowhere"}
    done = subprocess.run(
        words,
        text=True,
        capture_output=True,
        env={**environment, "KUBECONFIG": str(kubeconfig(real))},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)] == NODES


def test_who_may_not_is_told_what_is_missing(real: Cluster, tmp_path: Path) -> None:
    token = real.kubectl("create", "token", "default").strip()
    config = yaml.safe_load(kubeconfig(real).read_text())
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "lockgate.cli.main", "status", "--kubeconfig", str(path)]
    done = command(real, *words)
    assert done.returncode == 2
    assert 'User "system:serviceaccount:default:default" cannot list resource' in done.stderr


@pytest.fixture(scope="module")
def user(real: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kubeconfig of somebody who has the roles that docs/operate.md shows, and no more."""
    text = (ROOT / "docs/operate.md").read_text()
    real.apply(text.partition("```yaml\n")[2].partition("```")[0])
    real.kubectl("create", "serviceaccount", "somebody")
    name, whom = "lockgate-user", "--serviceaccount=default:somebody"
    real.kubectl("create", "clusterrolebinding", name, f"--clusterrole={name}", whom)
    real.kubectl("-n", "kube-system", "create", "rolebinding", name, f"--role={name}", whom)
    token = real.kubectl("create", "token", "somebody").strip()
    config = yaml.safe_load(kubeconfig(real).read_text())
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    path = tmp_path_factory.mktemp("user") / "config"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("get", "policies"),
        ("explain", "visitors/customer", "svc/shop/web", "80"),
        ("probe", "-n", "visitors"),
        ("flows", "--limit", "1"),
        ("doctor",),
        ("bugreport", "report.tar.gz"),
        ("uninstall", "--manifest"),
    ],
    ids=lambda words: words[0],
)
def test_the_documented_roles_are_enough(
    real: Cluster, user: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    words = (sys.executable, "-m", "lockgate.cli.main", *words, "--kubeconfig", str(user))
    done = command(real, *words, cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout and "forbidden" not in done.stdout + done.stderr


def faults(cluster: Cluster, text: str) -> list[str]:
    found = ask(cluster, "status")["problems"]
    return [one["text"] for one in found if text in one["text"]]


def test_a_node_that_does_not_answer_is_named(real: Cluster) -> None:
    real.stop("kubelet", "node-2")
    try:
        found = ask(real, "status")
    finally:
        real.start("kubelet", "node-2")
        until("the kubelet is back", lambda: not faults(real, "does not answer"), 30)
    told = [one["text"] for one in found["problems"] if one["node"] == "node-2"]
    assert any("its kubelet does not answer the API server" in text for text in told)


def test_calls_of_many_threads_go_side_by_side(access: KubernetesAccess) -> None:
    async def many() -> list[Any]:
        asked = [
            asyncio.to_thread(access.call, node, role, "GET", "/v1/status")
            for node in NODES
            for role in ("agent", "observer")
            for _ in range(4)
        ]
        return await asyncio.gather(*asked)

    assert {answer["node"] for answer in asyncio.run(many())} == set(NODES)


CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: ciliumnetworkpolicies.cilium.io}
spec:
  group: cilium.io
  names: {kind: CiliumNetworkPolicy, plural: ciliumnetworkpolicies, singular: ciliumnetworkpolicy}
  scope: Namespaced
  versions:
  - name: v2
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"""
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: a, namespace: default}
spec: {endpointSelector: {}}
"""


def test_policies_that_nobody_enforces_are_found(real: Cluster) -> None:
    def found() -> list[str]:
        return [one["text"] for one in ask(real, "doctor") if one["check"] == "policies"]

    real.apply(CRD)
    crd = "crd/ciliumnetworkpolicies.cilium.io"
    real.kubectl("wait", "--for=condition=Established", crd, "--timeout=30s")
    assert found() == ["no policy of another system is left alone"]
    real.apply(POLICY)
    expected = ["1 ciliumnetworkpolicies.cilium.io: nobody enforces them any more"]
    assert until("it is found", lambda: found() == expected, 20)
    real.kubectl("delete", crd)

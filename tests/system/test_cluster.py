"""A cluster as its user sees it: manifests in, pods and endpoints out; the watched folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import HashMap, PerCpuArray
from lockgate.bpf.pins import pin_names
from lockgate.cli.common import call
from lockgate.paths import bpf_object
from tests.system.harness import Cluster, family_of, unique_name, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

SELECTED = {"selector": {"matchLabels": {"app": "x"}}}


def document(kind: str, name: str, spec: dict[str, Any] | None = None, **meta: Any) -> str:
    """A manifest in namespace `lab`, unless `meta` says otherwise."""
    version = {
        "Deployment": "apps/v1",
        "StatefulSet": "apps/v1",
        "DaemonSet": "apps/v1",
        "ReplicaSet": "apps/v1",
        "Job": "batch/v1",
        "NetworkPolicy": "networking.k8s.io/v1",
        "Ingress": "networking.k8s.io/v1",
        "Gadget": "example.org/v1",
    }.get(kind, "v1")
    cluster_wide = kind in ("Namespace", "Node")
    metadata = {"name": name, **({} if cluster_wide else {"namespace": "lab"}), **meta}
    body = {"apiVersion": version, "kind": kind, "metadata": metadata}
    return yaml.safe_dump(body if spec is None else {**body, "spec": spec})


def workload(kind: str, name: str, container: dict[str, Any], **spec: Any) -> str:
    template_spec: dict[str, Any] = {"containers": [{"name": "main", **container}]}
    if kind == "Job":
        template_spec["restartPolicy"] = "Never"
    selector = {} if kind == "Job" else {"selector": {"matchLabels": {"app": name}}}
    template = {"metadata": {"labels": {"app": name}}, "spec": template_spec}
    return document(kind, name, {**selector, "template": template, **spec})


def answering(*ports: tuple[int, str]) -> dict[str, Any]:
    return {"ports": [{"containerPort": number, "protocol": name} for number, name in ports]}


def shell(script: str) -> dict[str, Any]:
    return {"command": ["/bin/sh", "-c", script]}


def pod(name: str, spec: dict[str, Any], **labels: str) -> str:
    return document("Pod", name, spec, labels=labels)


def waiting_server(name: str, flag: Path, probe: dict[str, Any]) -> str:
    """An HTTP server that begins to listen when `flag` becomes a folder."""
    script = (
        "import http.server, os, sys, time\n"
        f"while not os.path.isdir({str(flag)!r}): time.sleep(0.02)\n"
        f"os.chdir({str(flag)!r})\n"
        "http.server.test(http.server.SimpleHTTPRequestHandler, port=8080, bind='0.0.0.0')\n"
    )
    container = {
        "name": "main",
        "command": ["/usr/bin/env", "python3", "-c", script],
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {**probe, "periodSeconds": 1, "failureThreshold": 1},
    }
    return pod(name, {"containers": [container]}, app="probed")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flags")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, flags: Path) -> Iterator[Cluster]:
    """Three nodes and one workload of each kind, in YAML and JSON, here and in a subfolder."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "deep").mkdir()
    first = [
        document("Namespace", "lab", labels={"stage": "test"}),
        document("ConfigMap", "settings"),
        document("Secret", "key"),
        document("Ingress", "door", {}),
        document("Gadget", "thing", {}),
        workload("Deployment", "web", answering((80, "TCP"), (53, "UDP")), replicas=3),
        workload("ReplicaSet", "copy", answering((80, "TCP")), replicas=2),
    ]
    (folder / "00-first.yaml").write_text("---\n".join(first))
    second = [
        workload("StatefulSet", "db", answering((5432, "TCP")), replicas=2, serviceName="db"),
        workload("DaemonSet", "agent", answering((9100, "TCP"))),
        workload("Job", "once", shell("exit 0"), completions=2),
    ]
    (folder / "deep" / "10-second.yml").write_text("---\n".join(second))
    ports = [{"name": "http", "port": 8000, "targetPort": 80}]
    service = {"selector": {"app": "web"}, "ports": ports, "ipFamilyPolicy": "PreferDualStack"}
    spec = yaml.safe_load(document("Service", "web", service))
    (folder / "20-service.json").write_text(json.dumps(spec))
    greeting = flags / "greeting"
    init = {
        "initContainers": [{"name": "before", **shell(f"echo prepared > {greeting}")}],
        "containers": [{"name": "main", **shell(f"cat {greeting} > {greeting}.seen; sleep 1000")}],
    }
    (folder / "30-init.yaml").write_text(pod("prepared", init))
    cluster = Cluster(folder, unique_name("ta"), nodes=3)
    with cluster:
        yield cluster


def names(cluster: Cluster, kind: str = "pods", namespace: str = "lab") -> list[str]:
    return [
        item["metadata"]["name"]
        for item in cluster.objects(kind)
        if item["metadata"].get("namespace", namespace) == namespace
    ]


def ready_addresses(cluster: Cluster, service: str, family: int = 4) -> list[str]:
    return sorted(
        address
        for item in cluster.objects("endpoints")
        if item["metadata"]["labels"]["kubernetes.io/service-name"] == service
        and (item.get("addressType") == "IPv6") == (family == 6)
        for endpoint in item["endpoints"]
        if endpoint["conditions"].get("ready")
        for address in endpoint["addresses"]
    )


def refused(cluster: Cluster, *arguments: str) -> list[str]:
    """Why a command fails, by what it says; warnings stand before that."""
    done = cluster.lockgate(*arguments, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    return [line for line in lines if not line.startswith("warning: ")]


# ---- What becomes of manifests ---------------------------------------------------


def test_pods_of_every_kind_have_stable_names(lab: Cluster) -> None:
    nodes = ["node-1", "node-2", "node-3"]
    expected = ["copy-0", "copy-1", "db-0", "db-1", "once-0", "once-1", "prepared"]
    expected += ["web-0", "web-1", "web-2"]
    assert names(lab) == sorted([*expected, *(f"agent-{node}" for node in nodes)])
    assert names(lab, "nodes") == nodes


def test_pods_of_a_workload_are_spread_over_the_nodes(lab: Cluster) -> None:
    found = {p["metadata"]["name"]: p["spec"]["nodeName"] for p in lab.objects("pods")}
    assert {found[f"web-{n}"] for n in range(3)} == {"node-1", "node-2", "node-3"}
    assert found["agent-node-2"] == "node-2"


def test_kinds_without_meaning_here_are_named_others_are_silent(lab: Cluster) -> None:
    warnings = lab.status()["warnings"]
    assert len(warnings) == 2
    assert any("Ingress" in text and "00-first.yaml" in text for text in warnings)
    assert any("Gadget" in text and "00-first.yaml" in text for text in warnings)


def test_a_job_succeeds_and_its_pods_stay(lab: Cluster) -> None:
    def phases() -> set[str]:
        pods = lab.objects("pods")
        return {p["status"]["phase"] for p in pods if p["metadata"]["name"].startswith("once-")}

    until(lambda: phases() == {"Succeeded"}, "both of the Job's pods succeeded")


def test_init_containers_are_over_before_the_others_begin(lab: Cluster, flags: Path) -> None:
    seen = flags / "greeting.seen"
    assert until(lambda: seen.exists() and seen.read_text(), "the file") == "prepared\n"


def test_a_pod_has_namespaces_and_a_cgroup_of_its_own(lab: Cluster) -> None:
    pods = [lab.pod("lab/web-0"), lab.pod("lab/db-0")]
    for kind in ("net", "mnt", "uts", "pid"):
        inside = {os.readlink(f"/proc/{one.pid}/ns/{kind}") for one in pods}
        assert len(inside) == 2, kind
        assert os.readlink(f"/proc/self/ns/{kind}") not in inside, kind
    for one in pods:
        assert str(one.pid) in (one.cgroup / "cgroup.procs").read_text().split()
    assert lab.lockgate("exec", "lab/db-0", "--", "hostname").stdout == "db-0\n"
    seen = lab.lockgate("exec", "lab/db-0", "--", "sh", "-c", "cat /proc/1/comm; ls /proc")
    # A few processes of its own, and never the host's.
    assert sum(word.isdigit() for word in seen.stdout.split()) < 10


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("kind", "port"), [("tcp", 80), ("udp", 53)])
def test_declared_ports_answer_with_the_pods_name(
    lab: Cluster, kind: str, port: int, family: int
) -> None:
    import socket

    target = lab.pod("lab/web-1").ip(family)
    types = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
    with lab.pod("lab/db-0").socket(family_of(target), types[kind]) as sock:
        sock.connect((target, port))
        sock.send(b"?\n")
        assert sock.recv(100).strip() == b"web-1"


def test_endpoints_of_both_families_follow_the_pods(lab: Cluster) -> None:
    pods = [lab.pod(f"lab/web-{n}") for n in range(3)]
    for family in (4, 6):
        assert ready_addresses(lab, "web", family) == sorted(p.ip(family) for p in pods)


# ---- The watched folder ------------------------------------------------------------


def test_scaling_up_and_down_keeps_the_pods_that_stay(lab: Cluster) -> None:
    before = lab.pod("lab/web-0")
    change = workload("Deployment", "extra", answering((80, "TCP")), replicas=3)
    lab.save("50-extra.yaml", change)
    assert [n for n in names(lab) if n.startswith("extra")] == ["extra-0", "extra-1", "extra-2"]
    kept = lab.pod("lab/extra-0").pid
    gone = lab.pod("lab/extra-2")
    lab.save("50-extra.yaml", change.replace("replicas: 3", "replicas: 1"))
    assert [n for n in names(lab) if n.startswith("extra")] == ["extra-0"]
    assert lab.pod("lab/extra-0").pid == kept
    assert not Path(f"/proc/{gone.pid}").exists()
    assert not gone.cgroup.exists()
    lab.save("50-extra.yaml")
    assert not [n for n in names(lab) if n.startswith("extra")]
    assert lab.pod("lab/web-0").pid == before.pid


def test_a_changed_pod_spec_is_another_pod_a_changed_label_is_not(lab: Cluster) -> None:
    lab.save("50-one.yaml", pod("one", {"containers": [{"name": "c", **answering((1, "TCP"))}]}))
    before = lab.pod("lab/one")
    uid = next(p["metadata"]["uid"] for p in lab.objects("pods") if p["metadata"]["name"] == "one")
    labelled = {"containers": [{"name": "c", **answering((1, "TCP"))}]}
    lab.save("50-one.yaml", pod("one", labelled, colour="blue"))
    assert lab.pod("lab/one").pid == before.pid
    found = next(p for p in lab.objects("pods") if p["metadata"]["name"] == "one")
    assert found["metadata"]["labels"] == {"colour": "blue"}
    assert found["metadata"]["uid"] == uid
    other = {"containers": [{"name": "c", **answering((2, "TCP"))}]}
    lab.save("50-one.yaml", pod("one", other, colour="blue"))
    assert lab.pod("lab/one").pid != before.pid
    lab.save("50-one.yaml")
    assert "one" not in names(lab)


def to_web(name: str, *rules: dict[str, Any], **more: Any) -> str:
    spec = {"podSelector": {"matchLabels": {"app": "web"}}, "ingress": list(rules), **more}
    return document("NetworkPolicy", name, spec)


FRIENDS = to_web("friends", {"from": [{"podSelector": {"matchLabels": {"friend": "yes"}}}]})
OF_STAGE = to_web("stage", {"from": [{"namespaceSelector": {"matchLabels": {"stage": "test"}}}]})

# point and what is saved, policies, label of the pods db, what the kernel then says of db-0 → web-0
SAVED = [
    ("32 a policy that denies", [FRIENDS], "", "deny"),
    ("32 a label of a pod that is admitted by it", [FRIENDS], "friend: 'yes'", "allow"),
    ("32 a policy that admits the namespace beside it", [FRIENDS, OF_STAGE], "", "allow"),
    ("32 a policy that does not speak of the pod", [FRIENDS.replace("web", "other")], "", "allow"),
]


@pytest.mark.parametrize(
    ("policies", "label", "wanted"), [row[1:] for row in SAVED], ids=[row[0] for row in SAVED]
)
def test_what_is_saved_decides_when_wait_returns(
    lab: Cluster, policies: list[str], label: str, wanted: str
) -> None:
    """Point 32 of docs/policy.md. What is saved away decides no more, either."""

    def verdict() -> str:
        done = lab.lockgate("explain", "lab/db-0", "lab/web-0", "80", "--json", check=False)
        answer = json.loads(done.stdout)
        return str((answer[0] if isinstance(answer, list) else answer)["verdict"])

    assert verdict() == "allow"
    path = lab.folder / "deep" / "10-second.yml"
    text = path.read_text()
    try:
        if label:
            own = "labels:\n        app: db\n"
            assert own in text
            path.write_text(text.replace(own, f"{own}        {label}\n"))
        lab.save("60-policy.yaml", *policies)
        assert verdict() == wanted
    finally:
        path.write_text(text)
        lab.save("60-policy.yaml")
    assert verdict() == "allow"


def test_a_changed_service_port_is_served_at_once(lab: Cluster) -> None:
    path = lab.folder / "20-service.json"
    text = path.read_text()

    def verdict(port: int) -> str:
        return lab.lockgate("explain", "lab/db-0", "svc/lab/web", str(port), check=False).stdout

    assert "\nallow" in verdict(8000)
    path.write_text(text.replace("8000", "8001"))
    lab.wait()
    assert "no such port" in verdict(8000)
    assert "\nallow" in verdict(8001)
    path.write_text(text)
    lab.wait()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: [", ["90-broken.yaml"]),
        (
            "---\n"
            + document("ConfigMap", "fine")
            + "---\n"
            + document("NetworkPolicy", "p", {"podSelector": {}, "ingress": [{"form": []}]}),
            ["90-broken.yaml", "document 2", "lab/p", "ingress[0]", "form"],
        ),
        (
            document("Service", "s", {"ports": [{"port": "many"}]}),
            ["90-broken.yaml", "lab/s", "ports[0].port"],
        ),
        (
            document("Service", "web", {"ports": [{"port": 80}]}),
            ["90-broken.yaml", "20-service.json", "lab/web"],
        ),
    ],
    ids=["syntax", "unknown field in the second document", "wrong type", "defined twice"],
)
def test_a_broken_file_is_one_error_and_changes_nothing(
    lab: Cluster, text: str, words: list[str]
) -> None:
    before = {kind: lab.objects(kind) for kind in ("pods", "services", "policies", "endpoints")}
    lab.save("90-broken.yaml", text, wait=False)
    try:
        lines = refused(lab, "wait")
        assert len(lines) == 1, lines
        for word in words:
            assert word in lines[0], lines[0]
        assert lab.status()["errors"] == [lines[0].removeprefix("lockgate: ")]
        assert before == {kind: lab.objects(kind) for kind in before}
        assert lab.lockgate("status", check=False).returncode == 1
    finally:
        lab.save("90-broken.yaml")
    assert "In force" in lab.lockgate("wait").stdout
    assert lab.status()["errors"] == []


def test_a_repaired_file_is_taken_with_what_was_saved_meanwhile(lab: Cluster) -> None:
    lab.save("90-broken.yaml", "kind: [", wait=False)
    refused(lab, "wait")
    late = workload("Deployment", "late", answering((80, "TCP")))
    lab.save("91-late.yaml", late, wait=False)
    refused(lab, "wait")
    assert "late-0" not in names(lab)
    lab.save("90-broken.yaml", document("ConfigMap", "repaired"))
    assert "late-0" in names(lab)
    lab.save("90-broken.yaml")
    lab.save("91-late.yaml")


def test_wait_names_a_pod_that_no_node_takes(lab: Cluster) -> None:
    spec = {"nodeName": "nowhere", "containers": [{"name": "c", **answering((80, "TCP"))}]}
    lab.save("92-lost.yaml", pod("lost", spec), wait=False)
    [line] = refused(lab, "wait")
    assert "lab/lost" in line
    assert "nowhere" in line
    lab.save("92-lost.yaml")


def test_status_names_a_command_that_is_not_there(lab: Cluster) -> None:
    spec = {"containers": [{"name": "c", "command": ["/no/such/thing"]}]}
    lab.save("93-typo.yaml", pod("typo", spec), wait=False)
    until(lambda: "lab/typo" in lab.status()["waitingFor"], "the pod is complained about")
    done = lab.lockgate("status", check=False)
    assert done.returncode == 1
    assert "not ready: lab/typo: container c: command /no/such/thing was not found" in done.stdout
    lab.save("93-typo.yaml")


@pytest.mark.parametrize(
    "probe",
    [{"tcpSocket": {"port": 8080}}, {"httpGet": {"path": "/", "port": "http"}}],
    ids=["tcpSocket", "httpGet"],
)
def test_readiness_decides_endpoints(
    lab: Cluster, flags: Path, probe: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    flag = flags / re.sub(r"\W", "", request.node.name)
    ports = [{"port": 80, "targetPort": "http"}]
    service = document("Service", "probed", {"selector": {"app": "probed"}, "ports": ports})
    lab.save("40-probed.yaml", service, waiting_server("probed", flag, probe))
    address = lab.pod("lab/probed").ip()
    assert ready_addresses(lab, "probed") == []
    assert "lab/probed" in lab.status()["notReady"]
    until(lambda: "lab/probed" in lab.status()["waitingFor"], "the first probe")
    text = lab.lockgate("status", check=False).stdout
    assert "lab/probed: container main: readiness probe: port 8080: " in text
    flag.mkdir()
    until(lambda: ready_addresses(lab, "probed") == [address], "it became ready")
    if "httpGet" in probe:
        flag.rmdir()  # "/" is not found any more, but something listens
        until(lambda: ready_addresses(lab, "probed") == [], "it became unready")
    lab.save("40-probed.yaml")


def traces(cluster: Cluster, schema: Schema) -> dict[str, Any]:
    """What questions must not move: counters, connections and events of every node."""
    found: dict[str, Any] = {}
    for node in cluster.node_names:
        pins, names = cluster.state.pins() / node, pin_names(schema)
        with PerCpuArray.open(str(pins / names["counters"]), np.dtype("<u8")) as counters:
            found[f"{node} counters"] = counters.values().sum(axis=1).tolist()
        for name, key, value in (
            ("connections", "ct_key", "ct"),
            ("half_open", "ct_key", "ct"),
            ("crowd", "ct_key", "ct"),
            ("nat", "tuple", "nat"),
            ("fragments", "frag_key", "frag"),
        ):
            types = schema.dtype(key), schema.dtype(value)
            with HashMap.open(str(pins / names[name]), *types) as entries:
                found[f"{node} {name}"] = sorted(bytes(key) for key in entries.keys())  # noqa: SIM118
        answer = call(cluster.state.observer(node), "GET", "/v1/status")
        found[f"{node} events"] = answer["events"]
    return found


def test_questions_to_the_kernel_leave_nothing_behind(lab: Cluster, tmp_path: Path) -> None:
    rule = {"from": [{"podSelector": {"matchLabels": {"friend": "yes"}}}]}
    spec = {"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [rule]}
    lab.save("60-policy.yaml", document("NetworkPolicy", "friends", spec))
    ends = [f"lab/{name}" for name in names(lab) if not name.startswith("once")]
    questions = [
        {"from": source, "to": target, "port": port, "protocol": protocol, "family": family}
        for source in [*ends, "203.0.113.7", "2001:db8::7"]
        for target in [*ends, "svc/lab/web", "203.0.113.9", "2001:db8::9"]
        for port, protocol in ((80, "TCP"), (8000, "TCP"), (53, "UDP"), (80, "SCTP"))
        for family in (4, 6)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    schema = Schema.from_object(bpf_object())

    def untouched() -> bool:
        # A pod's own kernel may speak in between (router solicitations): then again.
        before = traces(lab, schema)
        done = lab.lockgate("explain", "--batch", str(file), check=False)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert {answer["verdict"] for answer in answers} >= {"allow", "deny"}
        return before == traces(lab, schema)

    until(untouched, "a batch that moved nothing")
    lab.save("60-policy.yaml")


# ---- Other ways to say it ------------------------------------------------------------


def test_nodes_from_manifests_in_a_single_file(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    texts = [
        document("Node", "alpha", {"podCIDRs": ["10.50.1.0/24", "fd50:1::/64"]}, labels={"d": "a"}),
        document("Node", "beta.example.com"),
        pod(
            "a",
            {"nodeSelector": {"d": "a"}, "containers": [{"name": "c", **answering((80, "TCP"))}]},
        ),
        pod(
            "b",
            {
                "nodeName": "beta.example.com",
                "containers": [{"name": "c", **answering((80, "TCP"))}],
            },
        ),
    ]
    file.write_text("---\n".join(texts))
    (tmp_path / "beside.yaml").write_text("not: read")
    cluster = Cluster(file, unique_name("tb"), nodes=5)
    with cluster:
        assert names(cluster, "nodes") == ["alpha", "beta.example.com"]
        first, second = cluster.pod("lab/a"), cluster.pod("lab/b")
        assert (first.node, second.node) == ("alpha", "beta.example.com")
        assert first.ip(4).startswith("10.50.1.")
        assert first.ip(6).startswith("fd50:1::")
        done = cluster.lockgate("exec", "lab/b", "--", "python3", "-c", ASK, first.ip(4), "80")
        assert done.stdout.strip() == "a"
        done = cluster.lockgate("explain", "lab/a", "lab/b", "80")
        assert done.stdout.splitlines()[2].startswith("allow")
        texts[2] = texts[2].replace("containerPort: 80", "containerPort: 81")
        file.write_text("---\n".join(texts))
        cluster.wait()
        done = cluster.lockgate(
            "exec", "lab/b", "--", "python3", "-c", ASK, cluster.pod("lab/a").ip(6), "81"
        )
        assert done.stdout.strip() == "a"


ASK = (
    "import socket,sys; s=socket.create_connection((sys.argv[1],int(sys.argv[2])),5);"
    "s.send(b'?\\n'); print(s.recv(99).decode())"
)

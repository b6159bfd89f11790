"""How a cluster ends, what is left of it, and what is said when it cannot begin."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lockgate.cli.common import call
from lockgate.standalone.state import State, bpffs, cgroup2
from tests.system.harness import ROOT, Cluster, manifest, unique_name, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LOCKGATE = [sys.executable, "-m", "lockgate.cli.main"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def manifests(folder: Path, pods: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    texts = ['{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "end"}}']
    ports = [{"containerPort": 80}]
    for number in range(pods):
        spec = {"containers": [{"name": "main", "ports": ports}]}
        texts.append(manifest("Pod", "end", f"p-{number}", spec, app="p"))
    (folder / "end.yaml").write_text("\n---\n".join(texts))
    return folder


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(manifests(tmp_path / "manifests"), unique_name("te")) as cluster:
        yield cluster


def run(
    *arguments: str, code: int, prefix: tuple[str, ...] = (), timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*prefix, *LOCKGATE, *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        env=ENVIRONMENT,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a command that did not begin."""
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("lockgate: ")
    return line


def traces(name: str) -> list[str]:
    """Everything on this machine that belongs to a cluster. Dead processes that their parent has
    not looked at are none of it: they are init's business."""
    state = State(name)
    places = [state.root, cgroup2() / "lockgate" / name, bpffs() / "lockgate" / name]
    found = [str(path) for path in places if path.exists()]
    found += [str(path) for path in Path("/run/netns").glob(f"lg-{name}-*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = process.joinpath("cmdline").read_bytes()
            groups = process.joinpath("cgroup").read_text()
            dead = process.joinpath("stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            continue
        if not dead and (f"/lockgate/{name}/".encode() in words or f"/lockgate/{name}/" in groups):
            found.append(f"process {process.name}: {words.decode(errors='replace')}")
    return found


def links_in(netns: str) -> set[str]:
    done = subprocess.run(
        ["ip", "-n", netns, "-j", "link"], capture_output=True, text=True, check=True
    )
    return {link["ifname"] for link in json.loads(done.stdout)}


# ---- down ------------------------------------------------------------------------


def test_down_leaves_nothing_and_may_be_called_again(tmp_path: Path) -> None:
    cluster = Cluster(manifests(tmp_path / "m"), unique_name("te")).up()
    assert len(traces(cluster.name)) > 6
    done = cluster.lockgate("down")
    assert "network namespace" in done.stdout
    assert traces(cluster.name) == []
    assert cluster.lockgate("down").stdout == (
        f"There is no trace of a cluster '{cluster.name}'.\n"
    )


def test_down_after_everything_was_killed(cluster: Cluster) -> None:
    status = cluster.status()
    children = [node[role]["pid"] for node in status["nodes"] for role in ("agent", "observer")]
    os.kill(status["pid"], signal.SIGKILL)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{children[-1]}").exists(), "the last one is gone")
    assert traces(cluster.name)
    # The others say so, and do not hang.
    assert "no cluster" in run("status", "--cluster", cluster.name, code=2).stderr
    assert "no cluster" in run("wait", "--cluster", cluster.name, code=2).stderr
    cluster.lockgate("down")
    assert traces(cluster.name) == []


def test_up_clears_what_a_crashed_cluster_left(cluster: Cluster) -> None:
    os.kill(cluster.status()["pid"], signal.SIGKILL)
    done = cluster.lockgate("up", str(cluster.folder), "--detach")
    assert "Removed what an earlier run had left" in done.stderr
    assert cluster.status()["pods"]["ready"] == 2


def test_up_of_a_running_cluster_is_refused(cluster: Cluster) -> None:
    before = cluster.status()["pid"]
    done = run("up", str(cluster.folder), "--cluster", cluster.name, code=2)
    assert "is running already: end it with `lockgate down`" in sentence(done)
    assert cluster.status()["pid"] == before


def test_of_several_that_begin_at_once_one_runs_and_the_others_are_refused(tmp_path: Path) -> None:
    name, folder = unique_name("ti"), manifests(tmp_path / "m")
    command = [*LOCKGATE, "up", str(folder), "--cluster", name]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    begun = [
        # In the foreground: what ends such a one takes its cluster away.
        subprocess.Popen([*command, *extra], cwd=ROOT, env=ENVIRONMENT, **pipes)
        for extra in (["--detach"], ["--detach"], ["--once"], ["--once"])
    ]
    try:
        done = [(*process.communicate(timeout=100), process.returncode) for process in begun]
        refused = [errors for _, errors, code in done if code == 2]
        assert len(refused) == 3 and [code for *_, code in done if code != 2] == [0]
        for errors in refused:
            assert "is run by another `lockgate up` already" in errors or "is running" in errors
            assert "Traceback" not in errors
        detached = any(code == 0 for *_, code in done[:2])
        assert bool(traces(name)) == detached
    finally:
        for process in begun:
            process.kill()
            process.wait()
        run("down", "--cluster", name, code=0)


def test_two_clusters_do_not_disturb_one_another(tmp_path: Path, cluster: Cluster) -> None:
    # The other one's name begins with the first one's.
    other = Cluster(manifests(tmp_path / "other"), f"{cluster.name}-b")
    with other:
        assert cluster.pod("end/p-0").ip() == other.pod("end/p-0").ip()
        deny = {"podSelector": {}, "policyTypes": ["Ingress"]}
        other.save("deny.yaml", manifest("NetworkPolicy", "end", "none", deny))
        asked = ["explain", "end/p-0", "end/p-1", "80"]
        assert cluster.lockgate(*asked).returncode == 0
        assert other.lockgate(*asked, check=False).returncode == 1
        assert cluster.lockgate("probe").returncode == 0
        assert other.lockgate("probe").returncode == 0
        cluster.lockgate("down")
        assert [t for t in traces(cluster.name) if other.name not in t] == []
        assert other.lockgate("probe").returncode == 0
        assert other.status()["pods"]["ready"] == 2
    assert traces(other.name) == []


def test_an_agent_that_is_killed_comes_back_and_keeps_every_pod(cluster: Cluster) -> None:
    pods = {one["metadata"]["name"]: one["status"]["podIPs"] for one in cluster.objects("pods")}
    epoch = cluster.agent_status("node-1")["epoch"]
    [pid] = [n["agent"]["pid"] for n in cluster.status()["nodes"] if n["name"] == "node-1"]
    os.kill(pid, signal.SIGSTOP)
    assert agent_in_status(cluster, "node-1") == "no answer"
    os.kill(pid, signal.SIGKILL)

    def back() -> bool:
        try:
            return bool(cluster.agent_status("node-1")["epoch"] >= epoch)
        except OSError:
            return False

    until(back, "the agent answers again")
    cluster.wait()
    assert pods == {
        one["metadata"]["name"]: one["status"]["podIPs"] for one in cluster.objects("pods")
    }
    assert cluster.lockgate("probe").returncode == 0
    assert agent_in_status(cluster, "node-1") == "up, 1 restart"


def agent_in_status(cluster: Cluster, node: str) -> str:
    """What the table says of the node's agent."""
    lines = cluster.lockgate("status", check=False).stdout.splitlines()
    [line] = [line for line in lines if line.startswith(f"{node} ")]
    return line.removeprefix(node).strip().split("  ")[0]


def test_the_status_of_a_supervisor_that_hangs_is_one_sentence(cluster: Cluster) -> None:
    pid = json.loads((State(cluster.name).root / "cluster.json").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        done = cluster.lockgate("status", check=False, timeout=25)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 2
    assert "does not answer: nothing came within 5 s" in done.stderr


# ---- Damage ------------------------------------------------------------------------


def kill_agent_after(cluster: Cluster, node: str, damage: Path, text: bytes) -> None:
    [pid] = [n["agent"]["pid"] for n in cluster.status()["nodes"] if n["name"] == node]
    os.kill(pid, signal.SIGSTOP)
    damage.write_bytes(text)
    os.kill(pid, signal.SIGKILL)


def test_a_damaged_ipam_file_is_rebuilt_from_the_links_and_kept(cluster: Cluster) -> None:
    def leases() -> list[tuple[str, list[str], int]]:
        found = cluster.agent_status("node-1")["endpoints"]
        return sorted((one["uid"], one["ips"], one["slot"]) for one in found)

    before = leases()
    path = cluster.state.node("node-1") / "ipam.json"
    broken = b'{"not": "ours"\n'
    kill_agent_after(cluster, "node-1", path, broken)

    def complaint() -> str:
        try:
            errors = cluster.agent_status("node-1")["errors"]
        except OSError:
            return ""
        return next((text for text in errors if "ipam.json" in text), "")

    text = until(complaint, "an error that names the file", deadline=20)
    (aside,) = path.parent.glob("ipam.json.damaged-*")
    assert f"{path} was damaged" in text and str(aside) in text
    assert aside.read_bytes() == broken
    assert before and leases() == before
    cluster.wait()
    assert "Every one is as the specification says." in cluster.lockgate("probe").stdout


def test_a_damaged_journal_is_written_anew_with_other_ids(cluster: Cluster) -> None:
    path = cluster.state.node("node-1") / "journal.jsonl"

    def endpoint_ids() -> set[int]:
        lines = path.read_bytes().splitlines()
        return {json.loads(line)["id"] for line in lines if b'"k":"endpoint"' in line}

    before = endpoint_ids()
    kill_agent_after(cluster, "node-1", path, b'{"k": "endpoint", "id"\n\0\0\0\n{"k":')
    until(lambda: path.read_bytes().count(b'"uid"') >= 2, "both pods are in it", deadline=20)
    assert min(endpoint_ids()) > max(before)
    cluster.wait()
    assert cluster.lockgate("probe").returncode == 0
    found = cluster.lockgate("flows", "--json", "--pod", "end/p-0").stdout.splitlines()
    ends = [json.loads(line)["source"] for line in found]
    assert {"p-0", "p-1"} >= {end["pod"] for end in ends if "pod" in end} >= {"p-0"}


def test_damaged_pins_are_replaced_or_named(cluster: Cluster) -> None:
    pins = cluster.state.pins() / "node-1"
    [pid] = [n["agent"]["pid"] for n in cluster.status()["nodes"] if n["name"] == "node-1"]
    os.kill(pid, signal.SIGSTOP)
    [path] = pins.glob("peers-*")
    path.unlink()
    os.kill(pid, signal.SIGKILL)

    def settled() -> str:
        done = cluster.lockgate("wait", "--timeout", "1", check=False)
        if done.returncode == 0:
            return "recovered"
        return done.stderr if "peers" in done.stderr else ""

    found = until(settled, "a recovery, or an error that names the pin", deadline=20)
    if found == "recovered":
        assert cluster.lockgate("probe").returncode == 0
    cluster.lockgate("down")
    assert traces(cluster.name) == []


# ---- What cannot begin ---------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", ["up examples/shop", "down", "status", "get pods", "probe", "explain a/b c/d 80"]
)
def test_without_root_is_one_sentence(arguments: str) -> None:
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
    probe = subprocess.run([*as_nobody, sys.executable, "-c", "import lockgate"], cwd=ROOT)
    if probe.returncode:
        pytest.skip("nobody may not read this interpreter or this tree")
    done = run(*arguments.split(), code=2, prefix=as_nobody)
    assert "needs root" in sentence(done)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("up", "Missing argument 'DIR'"),
        ("up /no/such/folder", "/no/such/folder"),
        ("up {folder} --nodes 0", "0 is not in the range"),
        ("up {folder} --cluster Bad_Name", "1 to 20 lower case letters"),
        ("up {empty}", "no manifests (*.yaml, *.yml or *.json)"),
        ("up {broken}", "end.yaml"),
        ("up {outside}", "Node outside, field metadata.name: expected another name"),
        ("up {long}", "field metadata.name: expected at most"),
        ("get things", "'things' is not one of"),
        ("nonsense", "No such command 'nonsense'"),
        ("exec end/p-0", "Missing argument"),
        ("status --cluster nobody", "no cluster 'nobody' is running"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: str, words: str) -> None:
    broken = manifests(tmp_path / "broken")
    (broken / "end.yaml").write_text("kind: [")
    (tmp_path / "empty").mkdir()
    for file, node in (("outside", "outside"), ("long", "n" * 80)):
        (tmp_path / file).write_text(f"apiVersion: v1\nkind: Node\nmetadata: {{name: {node}}}\n")
    places = {
        "outside": str(tmp_path / "outside"),
        "long": str(tmp_path / "long"),
        "folder": str(manifests(tmp_path / "good")),
        "empty": str(tmp_path / "empty"),
        "broken": str(broken),
    }
    done = run(*arguments.format(**places).split(), code=2)
    assert words in done.stderr
    assert len(done.stderr.splitlines()) <= 4


# ---- up --once -------------------------------------------------------------------------


def test_once_shows_checks_and_cleans_up(tmp_path: Path) -> None:
    name = unique_name("to")
    done = run("up", "examples/shop", "--once", "--cluster", name, code=0, timeout=120)
    text = done.stdout
    for words in (
        "node-1",
        "monitoring  prometheus",
        "payments    gateway",
        "Who may talk to whom",
        "Every one is as the specification says.",
        "isolated by",
        f"lockgate explain --cluster {name}",
    ):
        assert words in text, words
    assert [line for line in text.splitlines() if len(line) > 100] == []
    assert "\x1b" not in text + done.stderr
    assert "Everything that the cluster made is removed." in done.stderr
    assert traces(name) == []


def test_once_fails_when_the_matrix_differs(tmp_path: Path) -> None:
    name = unique_name("to")
    folder = manifests(tmp_path / "m")
    # A pod that filters by itself is not what the policies say.
    rule = "table inet t { chain i { type filter hook input priority 0; tcp dport 80 drop; }; }"
    filtering = {"name": "filter", "command": ["/bin/sh", "-c", f"nft '{rule}'; sleep 1000"]}
    spec = {"containers": [{"name": "main", "ports": [{"containerPort": 80}]}, filtering]}
    (folder / "odd.yaml").write_text(manifest("Pod", "end", "odd", spec))
    done = run("up", str(folder), "--once", "--json", "--cluster", name, code=1)
    found = json.loads(done.stdout)
    assert {check["to"] for check in found["probe"] if check["difference"]} == {"end/odd"}
    assert len(found["pods"]) == 3
    assert traces(name) == []


def test_ctrl_c_takes_the_cluster_down(tmp_path: Path) -> None:
    name = unique_name("ti")
    process = subprocess.Popen(
        [*LOCKGATE, "up", str(manifests(tmp_path / "m")), "--cluster", name],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        for line in process.stdout:
            if "runs until Ctrl-C" in line:
                break
        answer = call(State(name).control, "GET", "/v1/status")
        assert answer["pods"]["ready"] == 2
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert traces(name) == []
    finally:
        process.kill()
        process.wait()
        run("down", "--cluster", name, code=0)


def test_who_watches_a_cluster_is_told_what_becomes_of_each_save(tmp_path: Path) -> None:
    name, folder = unique_name("ti"), manifests(tmp_path / "m")
    process = subprocess.Popen(
        [*LOCKGATE, "up", str(folder), "--cluster", name],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    lines = iter(process.stdout.readline, "")
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        assert any("What you save is told here" in line for line in lines)
        saved = folder / "saved.yaml"
        for port, told in (
            (0, "error: saved.yaml, document 1 (NetworkPolicy end/one), field spec.ingress[0]"),
            (80, "in force on all nodes: revision "),
        ):
            spec = {"podSelector": {}, "ingress": [{"ports": [{"port": port}]}]}
            saved.write_text(manifest("NetworkPolicy", "end", "one", spec))
            assert told in next(lines)
        (folder / "odd.json").write_text(manifest("Ingress", "end", "odd", {}))
        warning = "warning: odd.json, document 1: ignored v1 Ingress end/odd"
        assert warning in next(lines)
        assert "in force on all nodes: revision " in next(lines)
        assert warning in run("wait", "--cluster", name, code=0).stderr
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGINT)
        process.wait(60)
        process.stdout.close()
        run("down", "--cluster", name, code=0)

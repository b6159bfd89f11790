"""Nodes that are saved into, and out of, the folder of a cluster that runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lockgate.agent.sizes import SHARE, Sizes
from lockgate.bpf import syscall
from lockgate.bpf.btf import Schema
from lockgate.bpf.pins import node_folder, pin_names
from lockgate.paths import bpf_object
from lockgate.standalone.state import bpffs
from tests.system.harness import Cluster, Pod, unique_name, until
from tests.system.load import Server, Stream, Way
from tests.system.test_cluster import answering, document, names, pod, workload
from tests.system.test_cluster_end import links_in, traces

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

TWO = [document("Node", "a"), document("Node", "b.example.com")]
C = document("Node", "c.example.com", labels={"disk": "c"})


WEB = workload("Deployment", "web", answering((80, "TCP")), replicas=3)


def pinned(name: str, where: dict[str, Any]) -> str:
    spec = {**where, "containers": [{"name": "main", **answering((80, "TCP"))}]}
    return pod(name, spec)


def made(folder: Path, letters: str, routing: str) -> Cluster:
    """Two nodes, a pod and a DaemonSet's pod on each."""
    folder.mkdir(exist_ok=True)
    (folder / "nodes.yaml").write_text("---\n".join(TWO))
    texts = [
        document("Namespace", "lab"),
        pinned("on-a", {"nodeName": "a"}),
        pinned("on-b", {"nodeName": "b.example.com"}),
        workload("DaemonSet", "every", answering((9100, "TCP"))),
    ]
    (folder / "pods.yaml").write_text("---\n".join(texts))
    return Cluster(folder, unique_name(letters), routing=routing)


@pytest.fixture(params=["auto", "vxlan"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    with made(tmp_path / "manifests", "tn", request.param) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with made(tmp_path_factory.mktemp("lab"), "to", "auto") as cluster:
        yield cluster


def says(client: Pod, server: Pod, family: int, port: int = 80) -> str:
    """What the server's pod answers with: its name."""
    server_ip = server.ip(family)
    with client.socket(10 if family == 6 else 2) as sock:
        sock.connect((server_ip, port))
        sock.sendall(b"?\n")
        return str(sock.recv(99).decode().strip())


def lives(cluster: Cluster) -> list[Any]:
    """Processes of old nodes and their pods: which they are, and how often they were restarted."""
    status = cluster.status()
    found: list[Any] = [
        (node["name"], role, node[role]["pid"], node[role]["restarts"])
        for node in status["nodes"]
        if not node["name"].startswith("c")
        for role in ("agent", "observer")
    ]
    for name in ("on-a", "on-b", "every-a", "every-b.example.com"):
        one = cluster.pod(f"lab/{name}")
        found.append((name, one.pid, one.ips))
    return found


def remains(cluster: Cluster, node: str, number: int) -> list[str]:
    state = cluster.state
    places = [
        state.node(node),
        state.cgroup(node),
        node_folder(bpffs(), cluster.name, node),
        state.netns_path(node),
    ]
    found = [str(path) for path in places if path.exists()]
    for hub in (state.underlay_netns, state.outside_netns):
        found += [link for link in links_in(hub) if link == f"n{number}"]
    for other in ("a", "b.example.com"):
        for family in ("-4", "-6"):
            routes = cluster.node(other).run("ip", family, "route").stdout
            found += [
                r for r in routes.splitlines() if f"244.{number}." in r or f":{number}::" in r
            ]
    return found


def test_nodes_come_and_go_and_old_ones_do_not_notice(cluster: Cluster) -> None:
    on_a, on_b = cluster.pod("lab/on-a"), cluster.pod("lab/on-b")
    before = lives(cluster)
    server = Server(on_b.netns)
    stream = Stream("between old nodes", Way(on_a.socket, on_b.ip(4)))
    stream.start()
    try:
        for number in (3, 4):
            # First in the file: the others stay who they are.
            there = pinned("there", {"nodeSelector": {"disk": "c"}})
            cluster.save("more.yaml", C, there)
            assert len(names(cluster, "nodes")) == 3
            assert lives(cluster) == before
            new = cluster.pod("lab/there")
            assert (new.node, new.ip(4).rpartition(".")[0]) == ("c.example.com", f"10.244.{number}")
            every = cluster.pod("lab/every-c.example.com")
            for family in (4, 6):
                for old in (on_a, on_b):
                    assert says(old, new, family) == "there"
                    assert says(new, old, family) == old.name.partition("/")[2]
                    assert says(old, every, family, 9100) == "every-c.example.com"
            cluster.save("web.yaml", WEB)
            webs = [cluster.pod(f"lab/web-{n}").node for n in range(3)]
            assert sorted(webs) == ["a", "b.example.com", "c.example.com"]
            count = stream.counts["bytes"]
            until(lambda count=count: stream.counts["bytes"] > count, "bytes beside the new node")

            cluster.save("more.yaml")
            assert names(cluster, "nodes") == ["a", "b.example.com"]
            assert "every-c.example.com" not in names(cluster)
            webs = [cluster.pod(f"lab/web-{n}").node for n in range(3)]
            assert set(webs) == {"a", "b.example.com"}
            index = webs.index("b.example.com")
            assert says(on_a, cluster.pod(f"lab/web-{index}"), 4) == f"web-{index}"
            cluster.save("web.yaml")
            until(lambda number=number: not remains(cluster, "c.example.com", number), "no trace")
            assert lives(cluster) == before
            count = stream.counts["bytes"]
            until(lambda count=count: stream.counts["bytes"] > count, "bytes after it went")
    finally:
        wrong = stream.end()
        server.close()
    assert not wrong
    cluster.down()
    assert traces(cluster.name) == []


def connections(cluster: Cluster, node: str) -> int:
    """Elements of a node's table."""
    pins = node_folder(bpffs(), cluster.name, node)
    fd = syscall.obj_get(str(pins / pin_names(Schema.from_object(bpf_object()))["connections"]))
    try:
        return syscall.map_info(fd).max_entries
    finally:
        os.close(fd)


def test_nodes_share_the_memory_for_tables_and_keep_theirs_when_others_come(lab: Cluster) -> None:
    schema = Schema.from_object(bpf_object())
    half, third = (Sizes.from_memory(schema, SHARE / n).connections for n in (2, 3))
    old = ("a", "b.example.com")
    assert [connections(lab, node) for node in old] == [half, half]
    lab.save("more.yaml", C)
    assert connections(lab, "c.example.com") == third
    [pid] = [n["agent"]["pid"] for n in lab.status()["nodes"] if n["name"] == "a"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: lab.status()["nodes"][0]["agent"]["pid"] not in (pid, None), "another agent")
    lab.save("more.yaml")
    assert [connections(lab, node) for node in old] == [half, half]


def test_other_pod_cidrs_are_refused_and_nothing_of_that_save_is_applied(lab: Cluster) -> None:
    before = lives(lab)
    other = document("Node", "a", {"podCIDRs": ["10.77.0.0/24"]})
    lab.save("nodes.yaml", other, TWO[1], wait=False)
    lab.save("more.yaml", C, wait=False)
    done = lab.lockgate("wait", check=False)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "Node" in line]
    assert "Node a, field spec.podCIDRs: a node that runs keeps 10.244.1.0/24" in line
    assert names(lab, "nodes") == ["a", "b.example.com"]
    lab.save("more.yaml", wait=False)
    lab.save("nodes.yaml", *TWO)
    assert lives(lab) == before


def test_a_node_with_the_pod_cidrs_of_one_that_goes_comes_after_it(lab: Cluster) -> None:
    before = lives(lab)
    cidrs = {"podCIDRs": ["10.77.0.0/24", "fd77::/64"]}
    for name in ("c1", "c2", "c1"):
        lab.save("more.yaml", document("Node", name, cidrs))
        assert names(lab, "nodes") == ["a", "b.example.com", name]
        every = lab.pod(f"lab/every-{name}")
        assert every.ip(4).startswith("10.77.0.")
        for family in (4, 6):
            assert says(lab.pod("lab/on-a"), every, family, 9100) == f"every-{name}"
    lab.save("more.yaml")
    assert lives(lab) == before


def test_a_node_goes_even_while_its_agent_is_not_there(lab: Cluster) -> None:
    before = lives(lab)
    lab.save("more.yaml", C)
    [node] = [n for n in lab.status()["nodes"] if n["name"] == "c.example.com"]
    os.kill(node["agent"]["pid"], signal.SIGKILL)
    lab.save("more.yaml")
    assert names(lab, "nodes") == ["a", "b.example.com"]
    assert not lab.state.node("c.example.com").exists()
    assert lives(lab) == before


def test_a_node_that_is_saved_away_while_it_is_built_leaves_nothing(lab: Cluster) -> None:
    before = lives(lab)
    for _ in range(2):
        lab.save("more.yaml", C, wait=False)
        until(lambda: lab.state.netns_path("c.example.com").exists(), "the namespace")
        lab.save("more.yaml")
        assert names(lab, "nodes") == ["a", "b.example.com"]
        assert not lab.state.netns_path("c.example.com").exists()
    assert lives(lab) == before

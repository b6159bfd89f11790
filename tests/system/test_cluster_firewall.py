"""The firewall under real traffic from outside: objects, commands, rates, lifetimes, restarts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.system.harness import ROOT, Cluster, manifest, unique_name, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

NODE = "node-1"
#: Of the first node, and of the world: lockgate/standalone/underlay.py.
HERE = {4: "172.31.0.11", 6: "fd00:172:31::11"}
THERE = {4: "172.31.0.1", 6: "fd00:172:31::1"}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
PORT, OTHER_PORT = 8053, 8054


@pytest.fixture(scope="module", params=["auto", "generic"], ids=["native", "generic"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("firewall")
    pod = manifest("Pod", "default", "client", {"containers": [{"name": "c", "image": "i"}]})
    (folder / "pods.yaml").write_text(pod)
    with Cluster(folder, unique_name("fw"), nodes=1, options=("--xdp", request.param)) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_left(cluster: Cluster) -> Iterator[None]:
    yield
    if (cluster.folder / "firewall.yaml").exists():
        cluster.save("firewall.yaml")
    command(cluster, "del", "--all", code=None)


def command(cluster: Cluster, *arguments: str, code: int | None = 0) -> Any:
    """`lockgate firewall …` as a user runs it; its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "lockgate.cli.main", "firewall", *arguments, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LOCKGATE_CLUSTER": cluster.name},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout) if done.stdout.strip() else done.stderr


def firewall(*rules: dict[str, Any], default: str = "Allow", name: str = "edge") -> dict[str, Any]:
    return {
        "apiVersion": "lockgate.dev/v1alpha1",
        "kind": "Firewall",
        "metadata": {"name": name},
        "spec": {"default": default, "rules": list(rules)},
    }


class Echo:
    """A UDP server of the node, and a client of the world."""

    def __init__(self, cluster: Cluster, family: int = 4, port: int = PORT) -> None:
        self.server = cluster.node(NODE).socket(FAMILIES[family], socket.SOCK_DGRAM)
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.server.bind((HERE[family], port))
        self.client = cluster.outside().socket(FAMILIES[family], socket.SOCK_DGRAM)
        self.target = HERE[family], port

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.client.close()

    def arrives(self, patience: float = 0.5) -> bool:
        """Does a datagram?"""
        self.client.sendto(b"hello", self.target)
        self.server.settimeout(patience)
        try:
            return self.server.recv(100) == b"hello"
        except TimeoutError:
            return False


@pytest.mark.parametrize("family", [4, 6])
def test_denied_on_the_fly_told_counted_and_deleted(cluster: Cluster, family: int) -> None:
    block = f"{THERE[family]}/{32 if family == 4 else 128}"
    with Echo(cluster, family) as echo:
        assert echo.arrives(5)
        assert command(cluster, "add", "deny", block)[NODE] == {"added": 1, "known": 0}
        assert not any(echo.arrives(0.1) for _ in range(3))
        told = until(
            lambda: [
                one
                for one in cluster.flows(cause="firewall")
                if one["source"]["ip"] == THERE[family] and one["destination"].get("port") == PORT
            ],
            "the flow record",
        )[-1]
        assert told["place"] == "xdp" and told["type"] == "drop" and told["verdict"] == "deny"
        assert told["policy"] == {"kind": "Firewall", "namespace": "", "name": ""}
        assert told["rule"] == "command"
        entry = command(cluster, "list")["top"][0]
        assert (entry["cidr"], entry["packets"]) == (block, 3)
        assert cluster.agent_status(NODE)["drops"]["firewall"] >= 3
        assert command(cluster, "del", block)[NODE]["deleted"] == 1
        assert echo.arrives(5)
    status = cluster.agent_status(NODE)
    assert status["firewall"] is None
    assert not [one for one in status["xdp"] if one["mode"] != "none"], "nothing is left attached"


def test_the_most_specific_rule_of_an_object_decides(cluster: Cluster) -> None:
    rules = (
        {"action": "Deny", "from": ["172.31.0.0/24"]},
        {
            "action": "Allow",
            "from": [f"{THERE[4]}/32"],
            "ports": [{"protocol": "UDP", "port": PORT}],
        },
    )
    cluster.save("firewall.yaml", firewall(*rules))
    with Echo(cluster) as open_, Echo(cluster, port=OTHER_PORT) as closed:
        assert open_.arrives(5)
        assert not closed.arrives()
    told = until(lambda: cluster.flows(cause="firewall", port=OTHER_PORT), "the flow record")[-1]
    assert told["policy"]["name"] == "edge" and told["rule"] == "rules[0]"


def test_a_default_of_drop_leaves_the_node_what_it_asked_for(cluster: Cluster) -> None:
    allow = {
        "action": "Allow",
        "from": ["0.0.0.0/0", "::/0"],
        "ports": [{"protocol": "UDP", "port": PORT}],
    }
    cluster.save("firewall.yaml", firewall(allow, default="Drop"))
    for family in (4, 6):
        with Echo(cluster, family) as open_, Echo(cluster, family, OTHER_PORT) as closed:
            assert open_.arrives(5)
            assert not closed.arrives()
        # The pod by masquerade, the node by a socket of its own; both began it.
        for place in (cluster.pod("default/client"), cluster.node(NODE)):
            with cluster.outside().socket(FAMILIES[family]) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind((THERE[family], 9099))
                server.listen()
                with place.socket(FAMILIES[family]) as client:
                    client.connect((THERE[family], 9099))
                    peer, _ = server.accept()
                    with peer:
                        peer.sendall(b"answer")
                        assert client.recv(100) == b"answer"
        with cluster.outside().socket(FAMILIES[family]) as client:
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.connect((HERE[family], 22))
    assert cluster.status()["phase"] == "running", "the agent still answers"


def test_a_rate_is_kept_and_a_lifetime_ends(cluster: Cluster) -> None:
    with Echo(cluster) as echo:
        command(cluster, "add", "allow", THERE[4], "--rate", "100")
        for _ in range(500):
            echo.client.sendto(b"hello", echo.target)
        got = 0
        echo.server.settimeout(0.3)
        try:
            while echo.server.recv(100):
                got += 1
        except TimeoutError:
            pass
        assert 25 <= got <= 150
        assert cluster.agent_status(NODE)["drops"]["firewall-rate"] >= 350
        command(cluster, "del", "--all")
        command(cluster, "add", "deny", THERE[4], "--for", "2s")
        assert not echo.arrives(0.2)
        begun = time.monotonic()
        until(echo.arrives, "the end of the entry")
        assert time.monotonic() - begun < 5
    until(lambda: cluster.agent_status(NODE)["firewall"] is None, "the end of the firewall")


def test_an_agent_that_starts_again_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    # In tables that are larger than what is in them then.
    path = tmp_path / "list.txt"
    path.write_text("\n".join(f"45.{n >> 8}.{n & 255}.7" for n in range(20_000)))
    command(cluster, "add", "deny", "--file", str(path))
    cluster.save("firewall.yaml", firewall({"action": "Deny", "from": ["172.31.0.0/24"]}))
    command(cluster, "add", "deny", f"{THERE[4]}/32", "--for", "1h")
    command(cluster, "del", "--file", str(path))
    room = cluster.agent_status(NODE)["firewall"]["room"]
    assert room > 40_000
    with Echo(cluster) as echo:
        assert not echo.arrives(0.2)
        before = command(cluster, "list")
        pid = _agent(cluster)
        os.kill(pid, signal.SIGKILL)
        assert not echo.arrives(0.2), "without an agent"
        until(lambda: _agent(cluster) not in (0, pid), "another agent")
        cluster.wait()
        after = command(cluster, "list")
        assert not echo.arrives(0.2)
    assert after["entries"] == before["entries"]
    assert cluster.agent_status(NODE)["firewall"]["room"] == room

    def hits(found: Any) -> dict[str, int]:
        return {one["cidr"]: one["packets"] for one in found["top"] if one["source"] == "command"}

    assert hits(after)[f"{THERE[4]}/32"] == hits(before)[f"{THERE[4]}/32"] + 1
    ends = [one["expires"] for one in after["top"] if one["source"] == "command"]
    assert 3500 < ends[0] - time.time() < 3600


def _agent(cluster: Cluster) -> int:
    node = next(one for one in cluster.status()["nodes"] if one["name"] == NODE)
    return int(node["agent"].get("pid") or 0)


def test_a_long_list_from_a_file_takes_room_and_gives_it_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "list.txt"
    lines = [f"45.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(100_000)]
    path.write_text("# a list\n" + "\n".join(lines) + f"\n{THERE[4]}/32 # and one more\n")
    command(cluster, "add", "deny", "203.0.113.0/24")
    small = cluster.agent_status(NODE)["firewall"]["room"]
    with Echo(cluster) as echo:
        assert command(cluster, "add", "deny", "--file", str(path))[NODE]["added"] == 100_001
        assert not echo.arrives(0.2)
        assert cluster.agent_status(NODE)["firewall"]["room"] > small
        assert command(cluster, "list", "--top", "1")["top"][0]["cidr"] == f"{THERE[4]}/32"
        gone = command(cluster, "del", "--file", str(path))
        assert gone[NODE]["deleted"] == 100_001
        assert echo.arrives(5)


def test_what_is_denied_stays_so_while_the_tables_become_larger(
    cluster: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "list.txt"
    path.write_text("\n".join(f"45.77.{n >> 8}.{n & 255}" for n in range(40_000)))
    command(cluster, "add", "deny", f"{THERE[4]}/32")
    command(cluster, "add", "deny", "172.31.0.0/28", "--port", "tcp")
    small = cluster.agent_status(NODE)["firewall"]["room"]
    with Echo(cluster) as echo, ThreadPoolExecutor(1) as worker:
        growing = worker.submit(command, cluster, "add", "deny", "--file", str(path))
        sent = 0
        while not growing.done():
            echo.client.sendto(b"hello", echo.target)
            sent += 1
            time.sleep(0.0002)
        growing.result()
        assert not echo.arrives(0.2)
    assert cluster.agent_status(NODE)["firewall"]["room"] > small
    by_commands = command(cluster, "list", "--top", "2")["top"]
    counted = {one["cidr"]: one["packets"] for one in by_commands}
    assert counted[f"{THERE[4]}/32"] == sent + 1, "counters go along"


def test_what_is_wrong_is_named(cluster: Cluster) -> None:
    good = firewall({"action": "Deny", "from": [f"{THERE[4]}/32"]})
    cluster.save("firewall.yaml", good)
    bad = firewall({"action": "Deny", "from": ["172.31.0.0/33"]})
    cluster.save("firewall.yaml", bad, wait=False)
    text = "Firewall edge), field spec.rules[0].from[0]: expected a CIDR block"
    until(lambda: any(text in one for one in cluster.status()["errors"]), "the error")
    with Echo(cluster) as echo:
        assert not echo.arrives(0.2), "what was right before stays in force"
    assert "expected an address or a CIDR block, got 'nonsense'" in command(
        cluster, "add", "deny", "nonsense", code=2
    )
    cluster.save("firewall.yaml", good)
    told = command(cluster, "del", f"{THERE[4]}/32", "192.0.2.1", code=1)[NODE]
    assert told["deleted"] == 0
    assert told["ofObjects"] == [f"{THERE[4]}/32"] and told["unknown"] == ["192.0.2.1/32"]

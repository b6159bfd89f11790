"""`lockgate service` on a running cluster: what it tells is what packets find."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lockgate.access.standalone import StandaloneAccess
from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import HashMap, MappedArray
from lockgate.bpf.pins import pin_names
from lockgate.cli.explain import kernel_of
from lockgate.cli.service import firewall_of, views_of
from lockgate.explain.names import Names
from lockgate.explain.trace import Trace, Tracer, asked
from lockgate.explain.trace_spec import by_the_specification
from lockgate.objects.address import parse_address
from lockgate.objects.model import Cluster as Objects
from lockgate.paths import bpf_object
from tests.system.harness import Cluster, family_of, manifest, need_root, unique_name, until
from tests.system.test_cluster_firewall import command

pytestmark = pytest.mark.skipif(need_root(), reason="needs root")

LB = {4: "203.0.113.10", 6: "2001:db8:113::10"}
ONLY_HERE, SNATTED = "203.0.113.11", "203.0.113.12"
PORTS = [{"containerPort": 8080, "hostPort": 8888}]
HOST_PORT = manifest(
    "Pod", "shop", "hp", {"nodeName": "node-2", "containers": [{"name": "main", "ports": PORTS}]}
)
NODES = ("node-1", "node-2", "node-3")
GATEWAY = {4: "172.31.0.11", 6: "fd00:172:31::11"}


def service(name: str, port: int, *addresses: str, forwarding: str = "", **spec: Any) -> str:
    ports = [{"name": "http", "port": 80, "targetPort": 8080, "nodePort": port}]
    given = {
        "type": "NodePort",
        "ipFamilyPolicy": "PreferDualStack",
        "selector": {"app": "web"},
        "externalIPs": list(addresses),
        "ports": ports,
    }
    document = json.loads(manifest("Service", "shop", name, given | spec))
    if forwarding:
        document["metadata"]["annotations"] = {"lockgate.dev/forwarding": forwarding}
    return json.dumps(document)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("shop")
    pods = [
        manifest(
            "Pod",
            "shop",
            f"web-{number}",
            {
                "nodeName": node,
                "containers": [{"name": "main", "ports": [{"containerPort": 8080}]}],
            },
            app="web",
        )
        for number, node in enumerate(("node-1", "node-1", "node-2", "node-3"))
    ]
    documents = [
        '{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}',
        *pods,
        HOST_PORT,
        service("web", 30080, *LB.values()),
        service("local", 30081, ONLY_HERE, externalTrafficPolicy="Local"),
        service("snat", 30082, SNATTED, forwarding="snat"),
        service("empty", 30083, "203.0.113.13", selector={"app": "nobody"}),
    ]
    (folder / "shop.yaml").write_text("\n---\n".join(documents))
    with Cluster(folder, unique_name("ts"), nodes=3) as cluster:
        outside = cluster.outside()
        outside.run("ip", "route", "add", "203.0.113.0/24", "via", GATEWAY[4])
        outside.run("ip", "route", "add", "2001:db8:113::/64", "via", GATEWAY[6])
        yield cluster


def ask(cluster: Cluster, *command: str, code: int = 0) -> Any:
    done = cluster.lockgate("service", *command, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout) if "--json" in command else done.stdout


class Asker:
    """The command's own work, many times in one process."""

    def __init__(self, cluster: Cluster) -> None:
        self.access = StandaloneAccess(cluster.state)
        self.objects: Objects = self.access.objects()
        schema = Schema.from_object(bpf_object())
        self.tracer = Tracer(
            self.objects,
            lambda node: kernel_of(self.access, node, schema),
            lambda node, questions: views_of(self.access, node, questions),
            lambda node, packet: firewall_of(self.access, node, packet),
            schema,
        )

    def close(self) -> None:
        self.tracer.close()
        self.access.close()

    def trace(self, client: str, frontend: str, via: str = "") -> Trace:
        one = asked(Names(self.objects), client, frontend)
        found = self.tracer.trace(one, via)
        permitted = by_the_specification(self.objects, one, via)
        if found.reaches:
            ends = {f"{b.address}:{b.port}" for b in permitted.allowed if not b.ends}
            ends |= {f"[{b.address}]:{b.port}" for b in permitted.allowed if not b.ends}
            assert found.backend in ends
        assert permitted.reaches == found.reaches
        return found


@pytest.fixture(scope="module")
def asker(shop: Cluster) -> Iterator[Asker]:
    with closing(Asker(shop)) as asker:
        yield asker


def text(ip: str, port: int) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def connect(cluster: Cluster, address: str, port: int = 80) -> tuple[str, str]:
    """A connection from outside: its own end, and the name of the pod that answers."""
    with cluster.outside().socket(family_of(address), socket.SOCK_STREAM) as near:
        near.connect((address, port))
        own = near.getsockname()
        near.sendall(b"who are you?\n")
        return text(own[0], own[1]), near.recv(1000).split()[0].decode()


@pytest.mark.parametrize("address", [*LB.values(), SNATTED, ONLY_HERE])
def test_the_trace_leads_to_the_pod_that_answers(shop: Cluster, asker: Asker, address: str) -> None:
    answered = set()
    for _ in range(12):
        client, name = connect(shop, address)
        found = asker.trace(client, text(address, 80), "node-1")
        assert found.steps[-1].name == f"shop/{name}"
        first = found.steps[0]
        owner = first.owners[0]
        assert found.backend == text(owner["address"], owner["port"])
        answered.add(name)
    assert len(answered) > 1, "one slot says nothing of the others"


@pytest.mark.parametrize("family", LB)
def test_every_node_comes_to_the_same(asker: Asker, family: int) -> None:
    client = {4: "198.51.100.7", 6: "2001:db8::7"}[family]
    for sport in range(40000, 40010):
        found = {
            node: asker.trace(text(client, sport), text(LB[family], 80), node) for node in NODES
        }
        assert len({one.backend for one in found.values()}) == 1
        for node, one in found.items():
            first = one.steps[0]
            assert first.node == node
            if first.mode == "dsr":
                assert first.went is not None and first.went.outer is not None
                source = first.went.outer[0]
                assert source[-2:] == (one.hash & 0xFFFF).to_bytes(2, "big")
                assert len(one.steps) == 2 and one.steps[1].to == "pod"
            else:
                assert first.to == "pod" and len(one.steps) == 1


@pytest.mark.parametrize("port", [30080, 30082])
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("family", LB)
def test_a_node_port_leads_to_every_backend(
    shop: Cluster, asker: Asker, family: int, node: str, port: int
) -> None:
    client = {4: "198.51.100.7", 6: "2001:db8::7"}[family]
    address = shop.node_ip(node, family)
    found = [asker.trace(text(client, sport), text(address, port)) for sport in range(40000, 40024)]
    assert {one.steps[0].node for one in found} == {node}
    assert len({one.backend for one in found}) == 4


def test_a_trace_leaves_nothing(shop: Cluster, asker: Asker) -> None:
    schema = Schema.from_object(bpf_object())
    names = pin_names(schema)
    pins = Path("/sys/fs/bpf/lockgate", shop.name)

    asker_ip = parse_address("198.51.100.77")

    def remembered() -> list[str]:
        found = []
        for node in NODES:
            path = pins / node / names["flows"]
            with MappedArray.open(str(path), schema.dtype("flow_set")) as flows:
                if asker_ip in flows.view.tobytes():
                    found.append(f"{node} flows")
            for name, key, value in (
                ("nat", "tuple", "nat"),
                ("half_open", "ct_key", "ct"),
                ("connections", "ct_key", "ct"),
            ):
                path = pins / node / names[name]
                with HashMap.open(str(path), schema.dtype(key), schema.dtype(value)) as map_:
                    keys, _ = map_.items()
                    if any(asker_ip in one.tobytes() for one in keys):
                        found.append(f"{node} {name}")
        return found

    for address in (LB[4], SNATTED, ONLY_HERE):
        for node in NODES:
            for sport in range(41000, 41005):
                asker.trace(text("198.51.100.77", sport), f"{address}:80", node)
    assert remembered() == []
    assert not [one for one in shop.flows() if "198.51.100.77" in json.dumps(one)]


def test_as_a_command(shop: Cluster) -> None:
    found = ask(shop, "trace", "198.51.100.7:40001", f"{LB[4]}:80", "--via", "node-2", "--json")
    assert found["service"] == {"namespace": "shop", "name": "web"}
    assert found["verdict"] == "allow" and found["steps"][0]["node"] == "node-2"
    assert found["steps"][0]["slot"]["of"] == 16384 and len(found["steps"][0]["owners"]) == 4
    told = ask(shop, "trace", "198.51.100.7:40001", f"{LB[4]}:80", "--via", "node-2")
    assert f"slot {found['steps'][0]['slot']['number']} of 16384" in told
    assert max(map(len, told.splitlines())) <= 100
    told = ask(shop, "trace", "198.51.100.7", "203.0.113.13:80", code=1)
    assert "the service has no ready backend" in told
    told = ask(shop, "trace", "198.51.100.7", "203.0.113.99:80", code=1)
    assert "left to the stack of node-1: no frontend of a service" in told
    done = shop.lockgate("service", "trace", "198.51.100.7", "shop/nobody", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lockgate: shop/nobody: expected an address, or NAMESPACE/NAME")
    told = ask(shop, "trace", "198.51.100.7", f"{ONLY_HERE}:80", "--engine", "spec", "--json")
    assert [one["verdict"] for one in told["backends"]] == ["allow", "allow"]


@pytest.mark.parametrize(
    ("client", "frontend", "steps"),
    [
        ("198.51.100.7", "172.31.0.13:30080", ["node-3"]),
        ("shop/web-0", "172.31.0.12:30081", ["node-1", "node-2"]),
        ("198.51.100.7", "172.31.0.12:8888", ["node-2"]),
    ],
    ids=["a node by its outside address", "of another, by a pod", "a hostPort"],
)
def test_a_trace_begins_and_goes_on_where_the_address_is(
    shop: Cluster, client: str, frontend: str, steps: list[str]
) -> None:
    found = ask(shop, "trace", client, frontend, "--json")
    assert [step["node"] for step in found["steps"]][: len(steps)] == steps
    assert found["verdict"] == "allow" and found["steps"][-1]["to"] == "pod"


@pytest.mark.parametrize(
    ("client", "told"),
    [
        ("127.0.0.1", "127.0.0.1: no client outside has that address"),
        ("172.30.0.12", "172.30.0.12 is node node-2 itself"),
    ],
)
def test_who_is_no_client_is_told(shop: Cluster, client: str, told: str) -> None:
    done = shop.lockgate("service", "trace", client, f"{LB[4]}:80", check=False)
    assert (done.returncode, done.stdout) == (2, "") and told in done.stderr


def test_a_trace_says_what_the_firewall_says(shop: Cluster) -> None:
    trace = "trace", "198.51.100.7", f"{LB[4]}:80", "--via", "node-3"
    rules: list[dict[str, Any]] = [
        {"action": "Deny", "from": ["198.51.100.0/24"]},
        {"action": "Allow", "from": ["198.51.100.7/32"], "ports": [{"protocol": "TCP"}]},
    ]
    whole = {"apiVersion": "lockgate.dev/v1alpha1", "kind": "Firewall", "metadata": {"name": "e"}}
    shop.save("firewall.yaml", {**whole, "spec": {"rules": rules[:1]}})
    found = ask(shop, *trace, "--json", code=1)
    assert (found["verdict"], found["cause"], len(found["steps"])) == ("deny", "firewall", 1)
    assert found["steps"][0]["firewall"]["prefix"] == "198.51.100.0/24"
    assert "firewall: 198.51.100.0/24 is denied by e rules[0]" in ask(shop, *trace, code=1)
    shop.save("firewall.yaml", {**whole, "spec": {"rules": rules}})
    assert "firewall: 198.51.100.7/32 is allowed by e rules[1]" in ask(shop, *trace)
    listed = command(shop, "list")
    assert not any(one["packets"] for one in listed["top"] if one["source"] == "object")
    shop.save("firewall.yaml")
    assert "firewall" not in ask(shop, *trace)


def test_list_and_show(shop: Cluster) -> None:
    rows = {row["name"]: row for row in ask(shop, "list", "-n", "shop", "--json")}
    assert list(rows) == ["empty", "local", "snat", "web"]
    assert rows["web"]["endpoints"]["IPv4"] == {"ready": 4, "ending": 0}
    assert (rows["snat"]["forwarding"], rows["web"]["forwarding"]) == ("snat", "dsr")
    assert rows["local"]["externalTrafficPolicy"] == "Local"
    assert max(map(len, ask(shop, "list").splitlines())) <= 100
    shown = ask(shop, "show", "shop/local", "--json")
    outside = next(one for one in shown["inForce"] if one["clients"] == "outside")
    counts = {node: len(view["owners"]) for node, view in outside["nodes"].items()}
    assert counts == {"node-1": 2, "node-2": 1, "node-3": 1}
    for view in outside["nodes"].values():
        assert sum(owner["slots"] for owner in view["owners"]) == view["slots"]
    told = ask(shop, "show", "shop/web")
    assert max(map(len, told.splitlines())) <= 100
    assert told.count("dsr, 16384 slots") == 2, "once for all nodes, by family"
    done = shop.lockgate("service", "show", "shop/nobody", check=False)
    assert (done.returncode, done.stdout) == (2, "")


def test_explain_and_flows_know_services_for_clients_outside(shop: Cluster) -> None:
    outside = "198.51.100.7"
    deny = {"podSelector": {"matchLabels": {"app": "web"}}, "ingress": []}
    document = json.loads(manifest("NetworkPolicy", "shop", "closed", deny))
    for engine in ("kernel", "spec"):
        done = shop.lockgate("explain", outside, LB[4], "80", "--json", "--engine", engine)
        assert json.loads(done.stdout)[0]["verdict"] == "allow"
    client, name = connect(shop, LB[4])

    def recorded() -> list[Any]:
        return [
            one
            for one in shop.flows()
            if f"{one['source']['ip']}:{one['source']['port']}" == client
            and one["direction"] == "ingress"
        ]

    found = until(recorded, "a record of the connection")
    assert found[0]["destination"]["pod"] == name
    assert found[0]["service"] == {"namespace": "shop", "name": "web", "port": 80}
    shop.save("closed.yaml", document)
    try:
        for engine in ("kernel", "spec"):
            done = shop.lockgate(
                "explain", outside, LB[4], "80", "--json", "--engine", engine, check=False
            )
            answer = json.loads(done.stdout)[0]
            assert (answer["verdict"], answer["policy"]["name"]) == ("deny", "closed")
        told = ask(shop, "trace", outside, f"{LB[4]}:80", code=1)
        assert "isolated by shop/closed" in told
    finally:
        shop.save("closed.yaml")


def test_doctor_tries_what_clients_outside_ask_at(shop: Cluster) -> None:
    done = shop.lockgate("doctor", "--json", check=False)
    texts = {one["text"] for one in json.loads(done.stdout) if one["check"] == "path"}
    for family in LB:
        for kind in ("external IP", "node port", "node port, other node"):
            for who in ("pod", "node"):
                assert f"{who} → {kind} (IPv{family}): open" in texts

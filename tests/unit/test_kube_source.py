"""The API server as a source of objects: lists, watches and what goes wrong with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lockgate.kube import stream
from lockgate.kube.client import Client, Settings
from lockgate.kube.kinds import KINDS, Parts
from lockgate.kube.lists import Splitter
from lockgate.kube.source import ApiSource
from lockgate.objects.model import LEAVING, Cluster
from tests.apiserver import ApiServer

DEADLINE = 10.0


def pod(name: str, ip: str = "", **status: Any) -> dict[str, Any]:
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "shop",
            "uid": f"uid-{name}",
            "labels": {"app": name},
            "annotations": {"odd": '},{"metadata":{"name":"no object"}}'},
            "managedFields": [{"manager": "someone"}],
        },
        "spec": {
            "nodeName": "one",
            "containers": [{"name": "main", "env": [{"name": "A", "valueFrom": {"x": 1}}]}],
        },
        "status": {"phase": "Running", "podIPs": [{"ip": ip}] if ip else [], **status},
    }


def policy(name: str, operator: str = "In") -> dict[str, Any]:
    expression = {"key": "app", "operator": operator, "values": ["a"]}
    return {
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"podSelector": {"matchExpressions": [expression]}, "policyTypes": ["Ingress"]},
    }


NODE = {"kind": "Node", "metadata": {"name": "one"}, "spec": {"podCIDRs": ["10.1.0.0/24"]}}
NAMESPACE = {"kind": "Namespace", "metadata": {"name": "shop"}}


class Reader:
    """Applies what a source tells, as the agent does."""

    def __init__(self, source: ApiSource) -> None:
        self.source = source
        self.cluster: Cluster | None = None
        self.errors: list[str] = []
        self.transactions: list[stream.Transaction] = []

    async def run(self) -> None:
        async for transaction in self.source.transactions():
            self.transactions.append(transaction)
            self.errors = transaction.errors
            self.cluster, _ = stream.apply(self.cluster or Cluster(), transaction)

    def pods(self) -> list[str]:
        return [] if self.cluster is None else sorted(name for _, name in self.cluster.pods)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def reading(
    url: str, saved: Path | None = None, in_force: bool = False
) -> AsyncIterator[Reader]:
    client = Client(Settings(api_server=url))
    source = ApiSource(client, saved, snapshot_after=0.3, in_force=lambda: in_force, spread=0.1)
    reader = Reader(source)
    task = asyncio.create_task(reader.run())
    try:
        yield reader
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await source.close()


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    made = ApiServer()
    made.put(NODE, NAMESPACE, pod("a", "10.1.0.2"), pod("b", "10.1.0.3"), policy("p"))
    yield made
    await made.stop()


async def test_the_first_transaction_has_everything(server: ApiServer) -> None:
    held = server.hold["NetworkPolicy"] = asyncio.Event()
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) - 1)
        assert reader.cluster is None, "a view without policies must not be told"
        held.set()
        await until(lambda: reader.cluster)
        assert reader.cluster is not None
        first = reader.transactions[0]
        assert first.complete and len(first.changes) == 5
        assert reader.cluster.pods["shop", "a"].ips == ["10.1.0.2"]
        assert reader.cluster.nodes["one"].spec.pod_cidrs == ["10.1.0.0/24"]
        assert list(reader.cluster.policies) == [("shop", "p")]


async def test_a_server_may_be_without_service_cidrs(server: ApiServer) -> None:
    server.absent.add("ServiceCIDR")
    async with reading(await server.start()) as reader:
        await until(lambda: reader.cluster)
        assert reader.pods() == ["a", "b"]
        assert reader.source.connected and reader.source.problem() == ""


async def test_other_kinds_must_be_there(server: ApiServer) -> None:
    server.absent.add("NetworkPolicy")
    async with reading(await server.start()) as reader:
        await until(lambda: "could not find" in reader.source.problem())
        assert reader.cluster is None


async def test_changes_come_and_those_of_fields_not_used_do_not(server: ApiServer) -> None:
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        server.put(pod("a", "10.1.0.2", conditions=[{"type": "Ready", "status": "True"}]))
        server.put(pod("c", "10.1.0.4"))
        server.delete("Pod", "shop", "b")
        await until(lambda: reader.pods() == ["a", "c"])
        told = [c.object.metadata.name for t in reader.transactions[1:] for c in t.changes]
        assert "a" not in told
        assert reader.source.status()["kinds"]["pods"]["same"] == 1


async def test_of_a_nodes_taints_only_that_of_the_autoscaler_is_news(server: ApiServer) -> None:
    def node(*taints: str) -> dict[str, Any]:
        spec = {"taints": [{"key": key, "effect": "NoSchedule"} for key in taints]}
        return {"kind": "Node", "metadata": {"name": "one", "uid": "n"}, "spec": spec}

    server.put(node())
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        server.put(node("node.kubernetes.io/unreachable"))
        await until(lambda: reader.source.status()["kinds"]["nodes"]["same"] == 1)
        server.put(node("node.kubernetes.io/unreachable", LEAVING))
        await until(lambda: reader.cluster.nodes["one"].spec.taints)
        assert [one.key for one in reader.cluster.nodes["one"].spec.taints] == [LEAVING]


OF_A_FILE = "0123456789abcdef0123456789abcdef"
OF_ANOTHER = "8b3c7f0a-6f0e-4d38-9a5e-2f4b8a9d7c11"  # as the API server makes them
OWNER = {"apiVersion": "v1", "kind": "Node", "name": "one", "uid": "n", "controller": True}
MIRRORS: dict[str, tuple[str, list[dict[str, Any]], bool]] = {
    "a static pod": (OF_A_FILE, [OWNER], True),
    "none": ("", [], False),
    "none, of a node": ("", [OWNER], False),
    "the uid of a pod of the API server's": (OF_ANOTHER, [OWNER], False),
    "that without its dashes": (OF_ANOTHER.replace("-", "") + "0", [OWNER], False),
    "a hash and a line's end": (f"{OF_A_FILE}\n", [OWNER], False),
    "a hash, of nobody": (OF_A_FILE, [], False),
    "a hash, of another node": (OF_A_FILE, [{**OWNER, "name": "two"}], False),
    "a hash, of something with the node's name": (OF_A_FILE, [{**OWNER, "kind": "Job"}], False),
    "a hash, of a node that does not control it": (
        OF_A_FILE,
        [{**OWNER, "controller": False}],
        False,
    ),
}


def mirror(annotation: str, owners: list[dict[str, Any]]) -> dict[str, Any]:
    """Pod "a" of node "one"."""
    item = pod("a")
    item["metadata"]["annotations"] = {"kubernetes.io/config.mirror": annotation}
    item["metadata"]["ownerReferences"] = owners
    return item


@pytest.mark.parametrize(("annotation", "owners", "counts"), MIRRORS.values(), ids=MIRRORS.keys())
def test_what_mirrors_a_static_pod_has_the_pods_uid_and_nothing_else_has(
    annotation: str, owners: list[dict[str, Any]], counts: bool
) -> None:
    (kind,) = (one for one in KINDS if one.name == "Pod")
    wire = msgspec.json.decode(json.dumps(mirror(annotation, owners)), type=kind.struct)
    assert kind.keep(wire, Parts()).metadata.uid == (annotation if counts else "uid-a")


OTHERS = ["service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name"]


@pytest.mark.parametrize("label", OTHERS)
async def test_what_nobody_here_translates_is_not_asked_for(server: ApiServer, label: str) -> None:
    def named(kind: str, name: str, **labels: str) -> dict[str, Any]:
        meta = {"name": name, "namespace": "shop", "labels": labels}
        return {"kind": kind, "metadata": meta, "addressType": "IPv4", "endpoints": []}

    for kind in ("Service", "EndpointSlice"):
        server.put(named(kind, "ours"), named(kind, "theirs", **{label: ""}))
    async with reading(await server.start()) as reader:
        await until(lambda: reader.cluster is not None and server.watching() == len(KINDS))
        assert reader.cluster is not None
        assert list(reader.cluster.services) == [("shop", "ours")]
        assert list(reader.cluster.slices) == [("shop", "ours")]
        server.put(named("Service", "ours", **{label: ""}))
        await until(lambda: reader.cluster is not None and not reader.cluster.services)


async def test_a_watch_that_ends_goes_on_where_it_was(server: ApiServer) -> None:
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        server.bookmark("Pod")
        server.put(pod("c", "10.1.0.4"), tell=False)  # while nobody watches
        server.end_watches()
        await until(lambda: "c" in reader.pods())
        lists = [q for kind, q, _ in server.requests if kind == "Pod" and "watch" not in q]
        assert len(lists) == 1 and lists[0]["resourceVersion"] == "0"


async def test_gone_lists_again_and_tells_only_differences(server: ApiServer) -> None:
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        kept = reader.cluster and reader.cluster.pods["shop", "a"]
        server.put(pod("c", "10.1.0.4"), tell=False)
        server.delete("Pod", "shop", "b", tell=False)
        server.compact()
        server.end_watches()
        await until(lambda: reader.pods() == ["a", "c"])
        assert not any(t.complete for t in reader.transactions[1:])
        assert reader.cluster and reader.cluster.pods["shop", "a"] is kept


async def test_gone_as_an_event_of_a_watch(server: ApiServer) -> None:
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        server.put(pod("c", "10.1.0.4"), tell=False)
        server.compact()
        gone = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}
        server.send("Pod", json.dumps(gone).encode() + b"\n")
        await until(lambda: "c" in reader.pods())


async def test_torn_lines_are_joined_and_a_torn_end_is_dropped(server: ApiServer) -> None:
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        item = pod("c", "10.1.0.4")
        item["metadata"]["resourceVersion"] = "90"
        line = json.dumps({"type": "ADDED", "object": item}).encode() + b"\n"
        for at in range(0, len(line), 50):
            server.send("Pod", line[at : at + 50])
        await until(lambda: "c" in reader.pods())
        server.put(pod("d", "10.1.0.5"), tell=False)
        server.send("Pod", b'{"type":"ADDED","object":{"metadata":{"name":"torn"')
        server.version = 90
        server.put(pod("e", "10.1.0.6"), tell=False)
        server.end_watches()
        await until(lambda: "e" in reader.pods())
        assert "torn" not in reader.pods()


async def test_an_object_with_nonsense_is_named_and_the_rest_goes_on(server: ApiServer) -> None:
    server.put(policy("odd", "Sometimes"))
    async with reading(await server.start()) as reader:
        await until(lambda: reader.cluster)
        assert reader.cluster and list(reader.cluster.policies) == [("shop", "p")]
        assert len(reader.errors) == 1
        assert "NetworkPolicy shop/odd" in reader.errors[0] and "skipped" in reader.errors[0]
        await until(lambda: server.watching() == len(KINDS))
        server.put(policy("p", "Never"))
        await until(lambda: len(reader.errors) == 2)
        assert ("shop", "p") in reader.cluster.policies, "what it was before stays"
        server.put(policy("odd"))
        await until(lambda: reader.cluster and ("shop", "odd") in reader.cluster.policies)
        server.delete("NetworkPolicy", "shop", "p")
        await until(lambda: reader.errors == [])
        assert ("shop", "p") not in reader.cluster.policies


async def test_objects_that_cant_be_read_are_forgotten_when_they_go(server: ApiServer) -> None:
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        for number in range(3):
            item = with_protocol(f"odd{number}", "DCCP")
            item["spec"]["policyTypes"] = ["Sideways"]  # not even isolates
            server.put(item)
            await until(lambda: reader.errors)
            assert reader.source.uid("NetworkPolicy", "shop", f"odd{number}") == f"uid-odd{number}"
            if number == 1:  # put right, and then gone
                server.put(with_protocol("odd1", "TCP"))
                await until(lambda: not reader.errors)
            server.delete("NetworkPolicy", "shop", f"odd{number}")
            await until(lambda: not reader.errors)
        assert [one._odd for one in reader.source._reflectors] == [{}] * len(KINDS)


@pytest.mark.parametrize("told", ["by the watch", "by a list"])
async def test_a_static_pod_that_cant_be_read_any_more_is_as_it_was(
    server: ApiServer, told: str
) -> None:
    item = mirror(OF_A_FILE, [OWNER])
    odd = json.loads(json.dumps(item))
    odd["spec"]["containers"][0]["ports"] = [{"containerPort": 80, "protocol": "Pigeon"}]
    server.put(item)
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        assert reader.cluster
        before = reader.cluster.pods["shop", "a"]
        server.put(odd, tell=told == "by the watch")
        if told == "by a list":
            server.compact()
            server.end_watches()
        await until(lambda: reader.errors)
        assert "Pod shop/a can't be read (as it was before)" in reader.errors[0]
        assert reader.cluster.pods["shop", "a"] is before
        assert reader.source.uid("Pod", "shop", "a") == OF_A_FILE


def slice_of(endpoints: list[dict[str, Any]] | None) -> dict[str, Any]:
    """As the API server has it: of none it says null, not []."""
    return {
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": "shop"},
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": None if endpoints is None else [{"name": "http", "port": 80, "protocol": "TCP"}],
    }


async def test_null_is_a_field_that_is_not_there(server: ApiServer) -> None:
    server.put(slice_of([{"addresses": ["10.1.0.2"], "conditions": {"ready": True}}]))
    async with reading(await server.start()) as reader:
        await until(lambda: reader.cluster and reader.cluster.slices)
        await until(lambda: server.watching() == len(KINDS))
        assert reader.cluster
        server.put(slice_of(None))
        await until(lambda: not reader.cluster.slices["shop", "web-1"].endpoints)
        assert reader.errors == []


def with_protocol(name: str, protocol: str, app: str = "a", **spec: Any) -> dict[str, Any]:
    """A policy that selects the pods of an app; rules with another protocol can't be read."""
    ports = [{"protocol": protocol, "port": 80}]
    return {
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "shop", "uid": f"uid-{name}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": app}},
            "ingress": [{"ports": ports}],
            **spec,
        },
    }


ISOLATES = [
    (
        "as the API server fills it in",
        {"policyTypes": ["Ingress", "Egress"]},
        ["Ingress", "Egress"],
    ),
    ("without policyTypes", {}, ["Ingress"]),
    ("without policyTypes, with egress", {"egress": [{}]}, ["Ingress", "Egress"]),
    ("with a type of tomorrow", {"policyTypes": ["Egress", "Sideways"]}, ["Egress"]),
]


@pytest.mark.parametrize(("spec", "types"), [i[1:] for i in ISOLATES], ids=[i[0] for i in ISOLATES])
async def test_a_policy_whose_rules_cant_be_read_isolates(
    server: ApiServer, spec: dict[str, Any], types: list[str]
) -> None:
    server.put(with_protocol("odd", "DCCP", **spec))
    async with reading(await server.start()) as reader:
        await until(lambda: reader.cluster)
        assert reader.cluster
        found = reader.cluster.policies["shop", "odd"]
        assert found.unreadable and found.spec.policy_types == types
        assert found.spec.pod_selector.match_labels == {"app": "a"}
        assert not found.spec.ingress and not found.spec.egress
        assert "NetworkPolicy shop/odd" in reader.errors[0] and "isolates" in reader.errors[0]
        # Another selector: it still can't be read, and selects others.
        await until(lambda: server.watching() == len(KINDS))
        server.put(with_protocol("odd", "DCCP", "b", **spec))
        await until(lambda: policy_of(reader).spec.pod_selector.match_labels == {"app": "b"})
        assert policy_of(reader).unreadable
        server.put(with_protocol("odd", "UDP", policyTypes=types))
        await until(lambda: not policy_of(reader).unreadable)
        assert reader.errors == [] and policy_of(reader).spec.ingress
        # What it was before stays, for as long as it is that object.
        server.put(with_protocol("odd", "DCCP", "c", **spec))
        await until(lambda: reader.errors)
        assert "as it was before" in reader.errors[0]
        assert not policy_of(reader).unreadable and policy_of(reader).spec.ingress
        server.delete("NetworkPolicy", "shop", "odd")
        await until(lambda: ("shop", "odd") not in reader.cluster.policies)
        assert reader.errors == []


def policy_of(reader: Reader) -> Any:
    assert reader.cluster
    return reader.cluster.policies["shop", "odd"]


KNOWN = [
    ("the same object", "uid-odd", False, False),
    ("another of that name", "uid-new", False, True),
    ("changes came after the snapshot", "uid-odd", True, True),
]


@pytest.mark.parametrize(
    ("uid", "behind", "unreadable"), [k[1:] for k in KNOWN], ids=[k[0] for k in KNOWN]
)
async def test_a_new_agent_goes_on_with_what_the_one_before_could_read(
    server: ApiServer, tmp_path: Path, uid: str, behind: bool, unreadable: bool
) -> None:
    saved = tmp_path / "snapshot"
    server.put(with_protocol("odd", "UDP"))
    url = await server.start()
    async with reading(url, saved) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        server.put(with_protocol("odd", "DCCP"))
        await until(lambda: reader.errors)
        assert not policy_of(reader).unreadable
    assert saved.exists() and not saved.with_suffix(".behind").exists()
    if behind:
        saved.with_suffix(".behind").touch()
    other = with_protocol("odd", "DCCP")
    other["metadata"]["uid"] = uid
    server.put(other)
    async with reading(url, saved) as reader:
        await until(lambda: reader.cluster)
        assert policy_of(reader).unreadable == unreadable


async def test_lists_in_pages(server: ApiServer) -> None:
    server.paged = True
    server.put(*(pod(f"n{n}", f"10.2.{n // 250}.{n % 250}") for n in range(2500)))
    async with reading(await server.start()) as reader:
        await until(lambda: reader.cluster)
        assert len(reader.pods()) == 2502


async def test_a_selector_the_server_does_not_know(server: ApiServer) -> None:
    live = "status.phase!=Succeeded,status.phase!=Failed"
    server.unknown_selectors = {f"{live},spec.hostNetwork=false"}
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        watches = [q for kind, q, _ in server.requests if kind == "Pod" and "watch" in q]
        assert watches[0]["fieldSelector"] == live


async def test_a_server_that_goes_and_comes_back(server: ApiServer) -> None:
    async with reading(await server.start()) as reader:
        await until(lambda: server.watching() == len(KINDS) and reader.cluster)
        assert reader.source.connected and reader.source.problem() == ""
        await server.stop()
        await until(lambda: not reader.source.connected)
        assert "API server away since" in reader.source.problem()
        server.put(pod("c", "10.1.0.4"))
        count = len(reader.transactions)
        await server.start()
        await until(lambda: "c" in reader.pods())
        await until(lambda: reader.source.connected)
        later = [c for t in reader.transactions[count:] for c in t.changes]
        assert [c.object.metadata.name for c in later] == ["c"], "no flap"


async def test_a_snapshot_serves_without_a_server(server: ApiServer, tmp_path: Path) -> None:
    saved = tmp_path / "snapshot"
    url = await server.start()
    async with reading(url, saved) as reader:
        await until(lambda: reader.cluster)
        before = reader.cluster
    assert saved.exists()
    await server.stop()
    async with reading(url, saved) as reader:
        await until(lambda: reader.cluster)
        assert reader.cluster == before
        assert "working with a snapshot of" in reader.source.problem()
        server.put(pod("c", "10.1.0.4"))
        server.delete("Pod", "shop", "a")
        held = server.hold["Service"] = asyncio.Event()
        await server.start()
        await until(lambda: server.watching() == len(KINDS) - 1)
        assert reader.pods() == ["a", "b"], "nothing goes before every list is complete"
        held.set()
        await until(lambda: reader.pods() == ["b", "c"])
        assert [t.complete for t in reader.transactions] == [True, False]
        assert reader.source.problem() == ""


async def test_a_snapshot_that_is_behind_does_not_take_the_place_of_what_is_in_force(
    server: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = tmp_path / "snapshot"
    url = await server.start()
    async with reading(url, saved) as reader:
        await until(lambda: reader.cluster)
    assert not saved.with_suffix(".behind").exists()
    async with reading(url, saved) as reader:
        await until(lambda: reader.cluster)
        assert saved.with_suffix(".behind").exists(), "until it is written the next time"
        saved.with_suffix(".killed").touch()
    saved.with_suffix(".killed").rename(saved.with_suffix(".behind"))
    await server.stop()
    async with reading(url, saved, in_force=True) as reader:
        await until(lambda: "later state than the snapshot" in caplog.text)
        assert reader.cluster is None
        await server.start()
        await until(lambda: reader.pods() == ["a", "b"])
        assert [t.complete for t in reader.transactions] == [True]
    saved.with_suffix(".behind").touch()
    await server.stop()
    async with reading(url, saved) as reader:
        await until(lambda: reader.cluster)
        assert "working with a snapshot of" in reader.source.problem(), "better than nothing"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x05\x00\x00\x00abc"])
async def test_a_damaged_snapshot_is_none(
    server: ApiServer, tmp_path: Path, content: bytes
) -> None:
    saved = tmp_path / "snapshot"
    saved.write_bytes(content)
    url = await server.start()
    await server.stop()
    async with reading(url, saved) as reader:
        await until(lambda: reader.source.problem().count("Cannot connect"))
        await server.start()
        await until(lambda: reader.pods() == ["a", "b"])
        assert len(reader.transactions) == 1


LISTS = {
    "as the API server writes it": '{"metadata":{"resourceVersion":"7"},"items":[%s]}',
    "metadata last": '{"items":[%s],"metadata":{"resourceVersion":"7"}}',
}


@pytest.mark.parametrize("form", LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("size", [1, 7, 100000])
def test_lists_are_cut_into_their_objects(form: str, size: int) -> None:
    inner = '{"metadata":{"name":"%s"},"spec":{"templates":[{"a":1},{"metadata":{"x":"},{"}}]}}'
    pieces = [inner % name for name in "abc"]
    text = (form % ",".join(pieces)).encode()
    splitter = Splitter()
    found = [p for at in range(0, len(text), size) for p in splitter.feed(text[at : at + size])]
    last, meta = splitter.finish()
    assert [p.decode() for p in found + last] == pieces
    assert meta.resource_version == "7"


def test_an_empty_list() -> None:
    splitter = Splitter()
    assert list(splitter.feed(b'{"metadata":{"resourceVersion":"7"},"items":null}')) == []
    assert splitter.finish()[0] == []

"""CNI by the real plugin, as a container runtime runs it, and an agent on a node of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lockgate.agent.cni_messages import VERSIONS
from lockgate.net import dumps, namespaces
from lockgate.net.pods import seals
from lockgate.paths import cni_plugin
from tests.system.agents import Bed, Node, make_bed, pod, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
LATEST = VERSIONS[-1]


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    async with make_bed(tmp_path, "one") as made:
        yield made


class Runtime:
    """What a container runtime does with the plugin of one node."""

    def __init__(self, bed: Bed, node: str = "one") -> None:
        self.bed, self.node = bed, bed.nodes[node]

    def netns(self, container: str) -> Path:
        return namespaces.path_of(f"lg-{self.bed.cluster}-{container}")

    async def plugin(
        self, command: str, config: dict[str, Any] | str, **variables: str
    ) -> tuple[int, dict[str, Any]]:
        """(exit code, what it printed)."""
        process = await asyncio.create_subprocess_exec(
            str(cni_plugin()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                "LOCKGATE_CNI_SOCKET": str(self.node.state / "cni.sock"),
                "CNI_COMMAND": command,
                **variables,
            },
        )
        text = config if isinstance(config, str) else json.dumps(config)
        out, _ = await process.communicate(text.encode())
        assert process.returncode is not None
        return process.returncode, json.loads(out) if out else {}

    async def of(
        self,
        command: str,
        uid: str,
        container: str = "",
        version: str = LATEST,
        more: dict[str, Any] | None = None,
        **variables: str,
    ) -> tuple[int, dict[str, Any]]:
        """A command of a pod's sandbox, by default the one that has the pod's uid as id."""
        container = container or uid
        config = {"cniVersion": version, "name": "lockgate", "type": "lockgate-cni", **(more or {})}
        given = {
            "CNI_CONTAINERID": container,
            "CNI_NETNS": str(self.netns(container)),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/opt/cni/bin",
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={uid};"
            f"K8S_POD_INFRA_CONTAINER_ID={container};K8S_POD_UID={uid}",
            **variables,
        }
        return await self.plugin(command, config, **given)

    async def add(self, uid: str, container: str = "", **more: Any) -> dict[str, Any]:
        namespaces.create(self.netns(container or uid).name)
        code, answer = await self.of("ADD", uid, container, **more)
        assert code == 0, (answer, (self.node.state / "agent.log").read_text())
        return answer

    def wired(self) -> set[str]:
        """Sandboxes that have a link on the node."""
        found: set[str] = set()

        def look() -> None:
            found.update(one.sandbox for one in seals().values() if one is not None)

        inside(self.node.netns, look)
        return found

    async def clean(self) -> None:
        """Wait until no link is left."""

        def is_clean() -> bool:
            left: list[int] = []
            inside(self.node.netns, lambda: left.extend(seals()))
            return not left

        await until(is_clean)


def inside(netns: str, work: Callable[[], None]) -> None:
    """From the calling thread, and back."""
    with namespaces.inside(namespaces.path_of(netns)):
        work()


def ips(answer: dict[str, Any]) -> list[str]:
    return [one["address"].partition("/")[0] for one in answer["ips"]]


@pytest.fixture
def runtime(bed: Bed) -> Runtime:
    return Runtime(bed)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Runtime]:
    """For tests that leave nothing behind. Damage stays until CHECK has seen it."""
    folder = tmp_path_factory.mktemp("shared")
    async with make_bed(folder, "one", guardSeconds=3600) as made:
        made.supervisor.put(pod("a", "one"), pod("far", "two"))
        yield Runtime(made)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_pods_life_in_every_version(runtime: Runtime, version: str) -> None:
    runtime.bed.supervisor.put(pod("a", "one"))
    answer = await runtime.add("a", version=version)
    assert answer["cniVersion"] == version
    assert [("version" in one, one["interface"]) for one in answer["ips"]] == [
        (version < "1.0.0", 1)
    ] * 2
    host, own = answer["interfaces"]
    assert (host["name"], own["name"]) == ("lg0", "eth0")
    assert own["sandbox"] == str(runtime.netns("a")) and "sandbox" not in host
    assert ("mtu" in own) == (version >= "1.1.0")
    assert [one["dst"] for one in answer["routes"]] == ["0.0.0.0/0", "::/0"]

    def look() -> None:
        (eth0,) = [one for one in dumps.interfaces() if one.name == "eth0"]
        assert set(dumps.addresses(eth0.index)) == {one["address"] for one in answer["ips"]}
        assert set(dumps.default_gateways(eth0.index)) == {one["gateway"] for one in answer["ips"]}

    inside(runtime.netns("a").name, look)
    assert await runtime.add("a", version=version) == answer, "ADD is idempotent"
    checked = await runtime.of("CHECK", "a", version=version, more={"prevResult": answer})
    assert checked == (0, {})
    deleted = {"version": version, "more": {"prevResult": answer}}
    assert await runtime.of("DEL", "a", **deleted) == (0, {})
    assert runtime.wired() == set()
    assert await runtime.of("DEL", "a", **deleted) == (0, {}), "DEL is idempotent"


CONFIG = {"cniVersion": LATEST, "name": "lockgate", "type": "lockgate-cni"}
PREVIOUS = {"cniVersion": LATEST, "interfaces": [{"name": "eth0"}], "ips": []}


@pytest.mark.parametrize(
    ("code", "text", "command", "config", "variables"),
    [
        (1, "'0.3.1' is not supported", "ADD", {**CONFIG, "cniVersion": "0.3.1"}, {}),
        (1, "'0.1.0' is not supported", "ADD", {"name": "lockgate"}, {}),
        (1, "'2.0.0' is not supported", "DEL", {**CONFIG, "cniVersion": "2.0.0"}, {}),
        (4, "CNI_COMMAND: expected one of", "FETCH", CONFIG, {}),
        (4, "1.0.0 has no GC", "GC", {**CONFIG, "cniVersion": "1.0.0"}, {}),
        (4, "CNI_CONTAINERID: expected", "ADD", CONFIG, {"CNI_CONTAINERID": "../a"}),
        (4, "CNI_CONTAINERID: expected", "DEL", CONFIG, {"CNI_CONTAINERID": ""}),
        (4, "CNI_CONTAINERID: expected at most", "ADD", CONFIG, {"CNI_CONTAINERID": "a" * 300}),
        (4, "CNI_IFNAME: expected", "ADD", CONFIG, {"CNI_IFNAME": "a/b"}),
        (4, "CNI_IFNAME: expected", "ADD", CONFIG, {"CNI_IFNAME": "lo"}),
        (4, "CNI_IFNAME: expected", "ADD", CONFIG, {"CNI_IFNAME": "sixteen-letters-"}),
        (4, "CNI_NETNS: expected", "ADD", CONFIG, {"CNI_NETNS": ""}),
        (4, "CNI_ARGS: expected K8S_POD_UID", "ADD", CONFIG, {"CNI_ARGS": "IgnoreUnknown=1"}),
        (6, "is no JSON", "ADD", "{", {}),
        (6, "is no JSON object", "ADD", "[]", {}),
        (7, "must be the first plugin", "ADD", {**CONFIG, "prevResult": PREVIOUS}, {}),
        (7, "CHECK needs what ADD answered", "CHECK", CONFIG, {}),
        (7, "expected a list", "GC", {**CONFIG, "cni.dev/valid-attachments": [{}]}, {}),
        (8, "/nowhere can't be opened", "ADD", CONFIG, {"CNI_NETNS": "/nowhere"}),
        (8, "/etc/passwd is no network namespace", "ADD", CONFIG, {"CNI_NETNS": "/etc/passwd"}),
        (8, "is no network namespace", "ADD", CONFIG, {"CNI_NETNS": "/proc/self/ns/ipc"}),
        (8, "is the node's own", "ADD", CONFIG, {"CNI_NETNS": "NODE"}),
        (101, "spec.nodeName is 'two', not one", "ADD", CONFIG, {"CNI_ARGS": "K8S_POD_UID=far"}),
        (3, "has no lease", "CHECK", {**CONFIG, "prevResult": PREVIOUS}, {}),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_errors_have_their_codes_and_change_nothing(
    shared: Runtime,
    code: int,
    text: str,
    command: str,
    config: dict[str, Any] | str,
    variables: dict[str, str],
) -> None:
    given = {
        "CNI_CONTAINERID": "a",
        "CNI_IFNAME": "eth0",
        "CNI_NETNS": str(namespaces.create(shared.netns("a").name)),
        "CNI_ARGS": "K8S_POD_UID=a",
        **variables,
    }
    if given["CNI_NETNS"] == "NODE":
        given["CNI_NETNS"] = str(namespaces.path_of(shared.node.netns))
    status, answer = await shared.plugin(command, config, **given)
    assert (status, answer["code"]) == (1, code), answer
    assert text in answer["msg"]
    assert shared.wired() == set()


async def test_version_and_readiness_are_told_with_and_without_an_agent(runtime: Runtime) -> None:
    told = {"cniVersion": LATEST, "supportedVersions": list(VERSIONS)}
    assert await runtime.plugin("VERSION", {"cniVersion": LATEST}) == (0, told)
    assert await runtime.plugin("STATUS", CONFIG) == (0, {})
    await runtime.node.kill()
    assert await runtime.plugin("VERSION", {"cniVersion": LATEST}) == (0, told)
    status, answer = await runtime.plugin("STATUS", CONFIG)
    assert (status, answer["code"]) == (1, 50)
    for command in ("ADD", "DEL", "CHECK", "GC"):
        status, answer = await runtime.of(command, "a")
        assert (status, answer["code"]) == (1, 11), "try again later"
        assert "agent does not answer" in answer["msg"]


async def test_a_node_without_a_pod_cidr_is_not_available(runtime: Runtime) -> None:
    supervisor = runtime.bed.supervisor
    node = supervisor.objects["Node", "", "one"]
    revision = supervisor.put({**node, "spec": {}}, pod("a", "one"), verb="MODIFIED")
    await supervisor.wait(revision, "one")
    status, answer = await runtime.plugin("STATUS", CONFIG)
    assert (status, answer["code"]) == (1, 50) and "podCIDRs" in answer["msg"]
    namespaces.create(runtime.netns("a").name)
    status, answer = await runtime.of("ADD", "a")
    assert (status, answer["code"]) == (1, 11), "try again: it comes when the node is known"


async def test_del_works_with_everything_gone(runtime: Runtime) -> None:
    runtime.bed.supervisor.put(pod("a", "one"), pod("b", "one"))
    for uid in ("a", "b"):
        await runtime.add(uid)
    # The namespace, and with it the link; the Pod object; what the agent knows.
    namespaces.delete(runtime.netns("a").name)
    runtime.bed.supervisor.put(pod("a", "one"), pod("b", "one"), verb="DELETED")
    assert await runtime.of("DEL", "a") == (0, {})
    assert await runtime.of("DEL", "b", CNI_NETNS="", CNI_ARGS="") == (0, {})
    assert await runtime.of("DEL", "never-there") == (0, {})
    assert runtime.wired() == set()
    await runtime.node.kill()
    for name in ("ipam.json", "journal.jsonl"):
        (runtime.node.state / name).unlink()
    await runtime.node.start()
    assert await runtime.of("DEL", "a") == (0, {})


async def test_a_del_of_an_older_sandbox_leaves_the_newer_alone(runtime: Runtime) -> None:
    runtime.bed.supervisor.put(pod("a", "one"))
    old = await runtime.add("a", "sandbox-1")
    new = await runtime.add("a", "sandbox-2")
    assert ips(new) == ips(old)
    assert runtime.wired() == {"sandbox-2/eth0"}
    assert await runtime.of("DEL", "a", "sandbox-1") == (0, {})
    assert await runtime.of("CHECK", "a", "sandbox-2", more={"prevResult": new}) == (0, {})
    assert await runtime.of("DEL", "a", "sandbox-2", CNI_IFNAME="net1") == (0, {})
    assert runtime.wired() == {"sandbox-2/eth0"}
    assert await runtime.of("DEL", "a", "sandbox-2") == (0, {})
    assert runtime.wired() == set()


async def test_gc_takes_what_is_not_valid_any_more(runtime: Runtime) -> None:
    names = ["a", "b", "c"]
    runtime.bed.supervisor.put(*[pod(uid, "one") for uid in [*names, "d"]])
    for uid in names:
        await runtime.add(uid)
    await runtime.node.add("d")  # nobody's sandbox: not GC's to take
    valid = [
        {"containerID": "b", "ifname": "eth0"},
        {"containerID": "c", "ifname": "net1"},
        {"containerID": "unknown", "ifname": "eth0"},
    ]
    config = {**CONFIG, "cni.dev/valid-attachments": valid}
    assert await runtime.plugin("GC", config) == (0, {})
    assert runtime.wired() == {"b/eth0", ""}
    assert await runtime.plugin("GC", CONFIG) == (0, {})
    assert runtime.wired() == {"b/eth0", ""}, "none are told of, none are taken"
    assert await runtime.plugin("GC", {**CONFIG, "cni.dev/valid-attachments": None}) == (0, {})
    assert runtime.wired() == {""}


#: What CHECK says → what does the damage, on the node or in the pod.
DAMAGES = {
    "lg{slot} is gone": ("node", "ip link del lg{slot}"),
    "lg{slot} is down": ("node", "ip link set lg{slot} down"),
    "no route to {v4}": ("node", "ip route del {v4}/32"),
    "neighbour entry for {v4}": ("node", "ip neigh del {v4} dev lg{slot}"),
    "lost the address {v4}": ("pod", "ip -4 addr flush dev eth0"),
    "no default route for {v6}": ("pod", "ip -6 route del default"),
    "eth0 is down": ("pod", "ip link set eth0 down"),
    "no eth0 that is the other end": ("pod", "ip link set eth0 down name eth9"),
    "program from_pod is not the first on": ("node", "tc filter del dev lg{slot} ingress"),
    "program to_pod is not the first on": ("node", "tc filter del dev lg{slot} egress"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.asyncio(loop_scope="module")
async def test_check_names_what_is_damaged(shared: Runtime, damage: str) -> None:
    answer = await shared.add("a")
    facts = {"slot": answer["interfaces"][0]["name"][2:]}
    facts["v4"], facts["v6"] = ips(answer)
    where, what = DAMAGES[damage]
    place = shared.netns("a") if where == "pod" else namespaces.path_of(shared.node.netns)
    command = ["nsenter", f"--net={place}", *what.format(**facts).split()]
    subprocess.run(command, check=True)
    status, found = await shared.of("CHECK", "a", more={"prevResult": answer})
    assert (status, found.get("code")) == (1, 103)
    assert damage.format(**facts) in f"{found['msg']}; {found.get('details', '')}"
    assert (await shared.of("DEL", "a"))[0] == 0
    namespaces.delete(shared.netns("a").name)


async def test_check_of_addresses_that_were_never_given(runtime: Runtime) -> None:
    runtime.bed.supervisor.put(pod("a", "one"))
    answer = await runtime.add("a")
    other = {**answer, "ips": [{"address": "10.77.1.99/32"}]}
    status, found = await runtime.of("CHECK", "a", more={"prevResult": other})
    assert (status, found["code"]) == (1, 103) and ips(answer)[0] in found["msg"]


async def test_an_interface_of_another_name(runtime: Runtime) -> None:
    runtime.bed.supervisor.put(pod("a", "one"))
    namespaces.create(runtime.netns("a").name)
    status, answer = await runtime.of("ADD", "a", CNI_IFNAME="net1")
    assert status == 0 and answer["interfaces"][1]["name"] == "net1"
    checked = await runtime.of("CHECK", "a", more={"prevResult": answer}, CNI_IFNAME="net1")
    assert checked == (0, {})


async def test_a_pod_is_found_by_its_name(runtime: Runtime) -> None:
    runtime.bed.supervisor.put(pod("a", "one"))
    namespaces.create(runtime.netns("a").name)
    args = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=a"
    assert (await runtime.of("ADD", "a", CNI_ARGS=args))[0] == 0
    leases = (await runtime.node.call("GET", "/v1/status"))[1]["endpoints"]
    assert {one["uid"] for one in leases} == {"a"}


async def test_of_two_objects_with_a_uid_the_one_that_the_runtime_names_has_it(
    runtime: Runtime,
) -> None:
    forged, true = pod("a-forged", "one"), pod("db", "one")
    for item in (forged, true):
        item["metadata"]["uid"] = "claimed"
    runtime.bed.supervisor.put(forged)
    namespaces.create(runtime.netns("db").name)
    args = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db;K8S_POD_UID=claimed"
    waiting = asyncio.create_task(runtime.of("ADD", "db", CNI_ARGS=args))
    assert not (await asyncio.wait([waiting], timeout=0.3))[0], "not db's object"
    runtime.bed.supervisor.put(true)
    status, answer = await waiting
    assert status == 0, answer
    told = (await runtime.node.call("GET", "/v1/status"))[1]
    assert [one["uid"] for one in told["endpoints"]] == ["claimed"]
    assert [text for text in told["errors"] if text.startswith("Pod shop/a-forged: ")]
    assert not [text for text in told["errors"] if text.startswith("Pod shop/db: ")]
    assert (await runtime.of("DEL", "db"))[0] == 0


async def test_an_add_waits_for_its_object_and_a_del_ends_the_wait(runtime: Runtime) -> None:
    namespaces.create(runtime.netns("a").name)
    waiting = asyncio.create_task(runtime.of("ADD", "a"))
    assert not (await asyncio.wait([waiting], timeout=0.3))[0]
    runtime.bed.supervisor.put(pod("a", "one"))
    assert (await waiting)[0] == 0
    namespaces.create(runtime.netns("b").name)
    gone = asyncio.create_task(runtime.of("ADD", "b"))
    # Again and again: the ADD may not have come yet.
    while not (await asyncio.wait([gone], timeout=0.05))[0]:
        assert await runtime.of("DEL", "b") == (0, {})
    status, answer = gone.result()
    assert (status, answer["code"]) == (1, 101) and "deleted meanwhile" in answer["msg"]


def shoot(source: socket.socket, target: tuple[str, int], over: threading.Event) -> int:
    """Send until it is over, and until something could be sent; how many."""
    sent = 0
    while not over.is_set() or not sent:
        with contextlib.suppress(OSError):
            source.sendto(b"early", target)
            sent += 1
    return sent


async def test_the_first_packet_of_a_forbidden_pod_never_leaves(runtime: Runtime) -> None:
    """The pod sends from before ADD on, as fast as it can: to a neighbour, never allowed."""
    bed = runtime.bed
    deny = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "no-egress", "namespace": "shop"},
        "spec": {"podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Egress"]},
    }
    bed.supervisor.put(pod("sink", "one"), deny)
    target = ips(await runtime.add("sink"))[0]
    with namespaces.inside(runtime.netns("sink")):
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sink.bind(("", 9000))
        sink.setblocking(False)
    for number in range(20):
        uid = f"a{number}"
        bed.supervisor.put(pod(uid, "one", app="a"))
        namespaces.create(runtime.netns(uid).name)
        with namespaces.inside(runtime.netns(uid)):
            source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        over = threading.Event()
        shooting = asyncio.create_task(asyncio.to_thread(shoot, source, (target, 9000), over))
        status, answer = await runtime.of("ADD", uid)
        over.set()
        assert await shooting and status == 0, answer
        source.close()
    with pytest.raises(BlockingIOError):
        sink.recv(16)
    # And the sink does hear who may speak to it, from the first packet on.
    sink.settimeout(5)
    for number in range(20):
        uid = f"friend-{number}"
        bed.supervisor.put(pod(uid, "one"))
        namespaces.create(runtime.netns(uid).name)
        with namespaces.inside(runtime.netns(uid)):
            friend = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await runtime.add(uid)
        with friend:
            friend.sendto(uid.encode(), (target, 9000))
            assert await asyncio.to_thread(sink.recv, 16) == uid.encode()
    sink.close()


async def test_fifty_at_once_have_addresses_of_their_own(runtime: Runtime) -> None:
    uids = [f"p{number}" for number in range(50)]
    runtime.bed.supervisor.put(*[pod(uid, "one") for uid in uids])
    answers = await asyncio.gather(*[runtime.add(uid) for uid in uids])
    addresses = [ip for answer in answers for ip in ips(answer)]
    assert len(set(addresses)) == 100
    for uid, answer in zip(uids, answers, strict=True):
        assert await runtime.of("CHECK", uid, more={"prevResult": answer}) == (0, {})
    done = await asyncio.gather(*[runtime.of("DEL", uid) for uid in uids])
    assert done == [(0, {})] * 50
    assert runtime.wired() == set()
    await runtime.clean()


async def ended(
    runtime: Runtime, task: asyncio.Task[Any], milliseconds: float, number: int
) -> None:
    """End the agent, by a signal, some time after a command began."""
    await asyncio.wait([task], timeout=milliseconds / 1000)
    await runtime.node.kill(number)
    await task


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
async def test_an_end_in_the_middle_is_made_good_by_trying_again(
    runtime: Runtime, number: int
) -> None:
    uids = [f"p{number}" for number in range(4)]
    runtime.bed.supervisor.put(*[pod(uid, "one") for uid in uids])
    for uid in uids:
        namespaces.create(runtime.netns(uid).name)
    for delay in (0, 2, 5, 8, 11, 14, 18, 25):
        for command in ("ADD", "DEL"):
            many = asyncio.gather(*[runtime.of(command, uid) for uid in uids])
            await ended(runtime, asyncio.ensure_future(many), delay, number)
            for status, answer in many.result():
                assert status == 0 or answer["code"] == 11, answer
            await runtime.node.start()
            again = await asyncio.gather(*[runtime.of(command, uid) for uid in uids])
            assert [status for status, _ in again] == [0] * 4, again
            if command == "ADD":
                assert runtime.wired() == {f"{uid}/eth0" for uid in uids}
                assert len({ip for _, answer in again for ip in ips(answer)}) == 8
                for uid, (_, answer) in zip(uids, again, strict=True):
                    checked = await runtime.of("CHECK", uid, more={"prevResult": answer})
                    assert checked == (0, {})
            else:
                assert runtime.wired() == set()
                await runtime.clean()


async def _checked(runtime: Runtime, uid: str, answer: dict[str, Any]) -> bool:
    status, found = await runtime.of("CHECK", uid, more={"prevResult": answer})
    return status == 0 or found["code"] != 11


@pytest.mark.parametrize("lost", ["gone", "damaged", "older"])
async def test_leases_come_back_from_the_kernel(runtime: Runtime, lost: str) -> None:
    bed, path = runtime.bed, runtime.node.state / "ipam.json"
    bed.supervisor.put(*[pod(uid, "one") for uid in ("a", "b", "c")])
    first = await runtime.add("a")
    early = path.read_bytes()
    answers = {"a": first, "b": await runtime.add("b")}
    await runtime.node.kill()
    if lost == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\0" * 64 if lost == "damaged" else early)
    await runtime.node.start()
    # Until the objects have been read, CHECK says "try again" (11).
    await until(lambda: _checked(runtime, "a", first))
    for uid, answer in answers.items():
        assert await runtime.of("CHECK", uid, more={"prevResult": answer}) == (0, {})
        assert await runtime.add(uid) == answer
    new = await runtime.add("c")
    assert not set(ips(new)) & {ip for answer in answers.values() for ip in ips(answer)}
    told = (await runtime.node.call("GET", "/v1/status"))[1]["errors"]
    assert any("was damaged" in text for text in told) == (lost == "damaged")
    for uid in ("a", "b", "c"):
        assert await runtime.of("DEL", uid) == (0, {})
    assert runtime.wired() == set()


async def test_an_address_that_was_given_back_is_not_used_at_once(runtime: Runtime) -> None:
    seen: set[str] = set()
    for number in range(5):
        runtime.bed.supervisor.put(pod(f"p{number}", "one"))
        found = set(ips(await runtime.add(f"p{number}")))
        assert not found & seen
        seen |= found
        assert await runtime.of("DEL", f"p{number}") == (0, {})


async def test_a_plugin_that_hangs_or_lies_disturbs_nobody(runtime: Runtime) -> None:
    path = str(runtime.node.state / "cni.sock")
    silent = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for wire, data in zip(silent, [b"", b"CNI_COMMAND=ADD", b"\0", b"\xff\0\0{}"] * 5, strict=True):
        wire.connect(path)
        wire.send(data)
    runtime.bed.supervisor.put(pod("a", "one"))
    await runtime.add("a")
    for wire in silent:
        wire.close()
    before = await until_steady(runtime.node)
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as wire:
            wire.connect(path)
            socket.send_fds(wire, [b"\0"], [0, 1, 2])
    assert await until_steady(runtime.node) <= before


async def until_steady(node: Node) -> int:
    """Open files of an agent, once they do not change any more."""
    assert node.process is not None
    folder = Path(f"/proc/{node.process.pid}/fd")
    last = [-1]

    def steady() -> bool:
        count = len(list(folder.iterdir()))
        last.append(count)
        return len(last) > 5 and len(set(last[-5:])) == 1

    await until(steady)
    return last[-1]

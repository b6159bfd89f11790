"""Objects from a real API server and etcd, with no more rights than an agent has."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cluster.binaries import Binaries
from cluster.certificates import Authority
from lockgate.agent.writeback import RBAC
from lockgate.kube import stream
from lockgate.kube.client import AWAY, ApiError, Client, Settings
from lockgate.kube.events import Events, Regarding
from lockgate.kube.source import ApiSource
from lockgate.objects.model import Cluster

DEADLINE = 60.0
ACCOUNT = "/api/v1/namespaces/kube-system/serviceaccounts"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE):
        while True:
            value = condition()
            if asyncio.iscoroutine(value) or isinstance(value, Awaitable):
                value = await value
            if value:
                return
            await asyncio.sleep(0.02)


class Api:
    """etcd and kube-apiserver on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self._etcd_port, self._peer_port = free_port(), free_port(), free_port()
        self._binaries = Binaries.get()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        authority = self._authority = Authority(folder / "pki")
        authority.create()
        self.url = f"https://127.0.0.1:{self.port}"
        names = ["DNS:kubernetes.default.svc", "IP:127.0.0.1"]
        self._certificate, self._key = authority.sign("server", "server", "", names)
        admin = authority.sign("admin", "admin", "system:masters")
        authority.kubeconfig(folder / "admin.conf", self.url, *admin)
        self.admin = Client(Settings(kubeconfig=str(folder / "admin.conf")))

    def start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{p}" for p in (self._etcd_port, self._peer_port))
        self._start(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            "--unsafe-no-fsync=true",
            "--log-level=warn",
        )

    async def start(self) -> None:
        authority = self._authority
        self._start(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--secure-port={self.port}",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount",
            f"--client-ca-file={authority.certificate}",
            f"--tls-cert-file={self._certificate}",
            f"--tls-private-key-file={self._key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={authority.service_account_public}",
            f"--service-account-signing-key-file={authority.service_account_key}",
        )

        async def ready() -> bool:
            with suppress(*AWAY, ApiError):
                await self.admin.call("GET", "/readyz")
                return True
            return False

        await until(ready)

    def _start(self, program: str, *arguments: str) -> None:
        with open(self.folder / f"{program}.log", "ab") as log:
            self._processes[program] = subprocess.Popen(
                [str(self._binaries.path(program)), *arguments], stdout=log, stderr=log
            )

    def stop(self, program: str) -> None:
        process = self._processes.pop(program, None)
        if process is not None:
            process.kill()
            process.wait()

    async def create(self, path: str, item: dict[str, Any]) -> Any:
        return json.loads(await self.admin.call("POST", path, body=item))

    async def patch(self, path: str, change: dict[str, Any]) -> None:
        kind = "application/merge-patch+json"
        await self.admin.call("PATCH", path, body=change, content_type=kind)

    async def delete(self, path: str) -> None:
        await self.admin.call("DELETE", path, params={"gracePeriodSeconds": "0"})

    async def compact(self) -> None:
        """Have etcd forget all but the present."""
        etcd = f"http://127.0.0.1:{self._etcd_port}/v3"
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{etcd}/maintenance/status", json={}) as response:
                revision = (await response.json())["header"]["revision"]
            body = {"revision": revision, "physical": True}
            async with session.post(f"{etcd}/kv/compaction", json=body) as response:
                assert response.status == 200, await response.text()

    async def account(self) -> Settings:
        """A service account with the rights of the table that deploy/ is checked against."""
        meta = {"name": "lockgate", "namespace": "kube-system"}
        await self.create(ACCOUNT, {"metadata": meta})
        rules = [
            {"apiGroups": [group], "resources": [resource], "verbs": sorted(verbs)}
            for (group, resource), verbs in RBAC.items()
        ]
        base = "/apis/rbac.authorization.k8s.io/v1"
        await self.create(f"{base}/clusterroles", {"metadata": {"name": "lg"}, "rules": rules})
        subject = {"kind": "ServiceAccount", **meta}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "lg"}
        await self.create(
            f"{base}/clusterrolebindings",
            {"metadata": {"name": "lg"}, "roleRef": role, "subjects": [subject]},
        )
        answer = await self.create(f"{ACCOUNT}/lockgate/token", {"spec": {}})
        token = self.folder / "token"
        token.write_text(answer["status"]["token"])
        ca = str(self._authority.certificate)
        return Settings(api_server=self.url, token_file=str(token), ca_file=ca)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    made = Api(tmp_path)
    try:
        made.start_etcd()
        await made.start()
        await made.create("/api/v1/namespaces", {"metadata": {"name": "shop"}})
        yield made
    finally:
        await made.admin.close()
        made.stop("kube-apiserver")
        made.stop("etcd")


class Reader:
    def __init__(self, source: ApiSource) -> None:
        self.source = source
        self.cluster: Cluster | None = None
        self.transactions: list[stream.Transaction] = []

    async def run(self) -> None:
        async for transaction in self.source.transactions():
            self.transactions.append(transaction)
            self.cluster, _ = stream.apply(self.cluster or Cluster(), transaction)

    def pods(self) -> dict[str, list[str]]:
        pods = {} if self.cluster is None else self.cluster.pods
        return {name: pod.ips for (_, name), pod in pods.items()}

    def names(self, since: int) -> list[tuple[str, str]]:
        """What was told after the first `since` transactions, Pods only."""
        return [
            (change.verb, change.object.metadata.name)
            for transaction in self.transactions[since:]
            for change in transaction.changes
            if change.object.kind == "Pod"
        ]


@asynccontextmanager
async def reading(settings: Settings, saved: Path | None = None) -> AsyncIterator[Reader]:
    source = ApiSource(Client(settings), saved)
    reader = Reader(source)
    task = asyncio.create_task(reader.run())
    try:
        await until(lambda: reader.cluster)
        await until(lambda: source.connected)
        yield reader
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await source.close()


PODS = "/api/v1/namespaces/shop/pods"


async def make_pod(api: Api, name: str, ip: str, **spec: Any) -> None:
    containers = [{"name": "main", "image": "x", "ports": [{"containerPort": 80}]}]
    item = {
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"nodeName": "one", "containers": containers, **spec},
    }
    await api.create(PODS, item)
    await api.patch(
        f"{PODS}/{name}/status", {"status": {"phase": "Running", "podIPs": [{"ip": ip}]}}
    )


async def test_everything_comes_and_changes_do(api: Api) -> None:
    settings = await api.account()
    await make_pod(api, "a", "10.1.0.2")
    await make_pod(api, "over", "10.1.0.3")
    await api.patch(f"{PODS}/over/status", {"status": {"phase": "Succeeded"}})
    await make_pod(api, "host", "172.16.0.1", hostNetwork=True)
    await api.create("/api/v1/nodes", {"metadata": {"name": "one"}})
    await api.create(
        "/api/v1/namespaces/shop/services",
        {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}},
    )
    rule = {"from": [{"podSelector": {"matchLabels": {"app": "a"}}}]}
    await api.create(
        "/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies",
        {"metadata": {"name": "p"}, "spec": {"podSelector": {}, "ingress": [rule]}},
    )
    async with reading(settings) as reader:
        cluster = reader.cluster
        assert cluster is not None and reader.transactions[0].complete
        assert reader.pods() == {"a": ["10.1.0.2"]}, "those with an address of ours only"
        assert list(cluster.nodes) == ["one"] and "shop" in cluster.namespaces
        assert cluster.services["shop", "web"].cluster_ips[0].startswith("10.96.")
        assert cluster.policies["shop", "p"].spec.policy_types == ["Ingress"]
        await make_pod(api, "b", "10.1.0.4")
        await until(lambda: reader.pods() == {"a": ["10.1.0.2"], "b": ["10.1.0.4"]})
        # A finished pod leaves, though its object stays.
        await api.patch(f"{PODS}/a/status", {"status": {"phase": "Failed"}})
        await until(lambda: list(reader.pods()) == ["b"])
        await api.delete(f"{PODS}/b")
        await until(lambda: reader.pods() == {})
        kinds = reader.source.status()["kinds"]
        assert kinds["pods"]["bytes"] > 0 and kinds["pods"]["lists"] == 1


async def test_a_restarted_api_server_is_caught_up_with(api: Api) -> None:
    settings = await api.account()
    await make_pod(api, "a", "10.1.0.2")
    await make_pod(api, "b", "10.1.0.3")
    async with reading(settings) as reader:
        assert len(reader.pods()) == 2
        before = len(reader.transactions)
        api.stop("kube-apiserver")
        await until(lambda: not reader.source.connected)
        assert len(reader.pods()) == 2 and "API server away since" in reader.source.problem()
        await api.start()
        await make_pod(api, "c", "10.1.0.4")
        await api.delete(f"{PODS}/b")
        await until(lambda: sorted(reader.pods()) == ["a", "c"])
        await until(lambda: reader.source.connected)
        told = reader.names(before)
        assert ("DELETED", "b") in told and all(name != "a" for _, name in told), "no flap"
        assert reader.pods()["c"] == ["10.1.0.4"]


async def test_a_compacted_etcd_means_a_new_list(api: Api) -> None:
    settings = await api.account()
    await make_pod(api, "a", "10.1.0.2")
    async with reading(settings) as reader:
        before = len(reader.transactions)
        reflector = next(r for r in reader.source._reflectors if r.kind.name == "Pod")
        # A version from before all that etcd still knows, and a server with an empty memory.
        reflector._version = "1"
        api.stop("kube-apiserver")
        await until(lambda: not reader.source.connected)
        reflector._version = "1"
        await api.compact()
        await api.start()
        await until(lambda: reflector.counts.lists == 2)
        await until(lambda: reader.source.connected)
        assert reader.names(before) == [] and list(reader.pods()) == ["a"]


async def test_what_is_written_is_allowed(api: Api) -> None:
    settings = await api.account()
    await api.create("/api/v1/nodes", {"metadata": {"name": "one"}})
    client = Client(settings)
    condition = {"type": "NetworkUnavailable", "status": "False", "reason": "LockgateIsUp"}
    await client.call(
        "PATCH",
        "/api/v1/nodes/one/status",
        body={"status": {"conditions": [condition]}},
        content_type="application/strategic-merge-patch+json",
    )
    events = Events(client, "lockgate.dev/agent", "one", spread=0)
    task = asyncio.create_task(events.run())
    events.tell(Regarding("Pod", "shop", "web"), "NoAddress", "the pool is exhausted", "Adding")
    events.tell(Regarding("Node", "", "one", "one"), "ChangesNotInForce", "why", "Enforcing")
    await until(lambda: events.sent == 2)
    listed = json.loads(await api.admin.call("GET", "/apis/events.k8s.io/v1/events"))
    assert {"NoAddress", "ChangesNotInForce"} <= {item["reason"] for item in listed["items"]}
    with pytest.raises(ApiError, match="403"):
        await client.call("GET", "/api/v1/secrets")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await client.close()


async def test_the_account_finds_the_server_by_itself(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    settings = await api.account()  # the administrator's connection stays, as a kubelet's does
    settings.api_server = ""
    client = Client(settings)
    await client.call("GET", "/api/v1/nodes")
    assert client.server == api.url
    await client.close()

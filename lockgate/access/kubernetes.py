"""A real cluster, by a kubeconfig: objects from the API server, nodes through `pods/exec`.

The agents and observers are the pods of the DaemonSet; what is asked of them runs as
`lockgate-node-call` in their containers (lockgate/node_call.py), so no port is open for it and
RBAC says who may ask (docs/operate.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import msgspec

from lockgate import __version__
from lockgate.access import Place, Refused, Result, Role, Target, Unreachable
from lockgate.access.exec import exec_stream
from lockgate.access.standalone import agent_probe
from lockgate.kube.client import AWAY, ApiError, Client, Settings
from lockgate.kube.exec_plugin import CredentialError
from lockgate.kube.kinds import KINDS, Kind, uid_on_node
from lockgate.kube.wire import plain, read
from lockgate.objects import model
from lockgate.objects.model import Cluster

__all__ = ["NAMESPACE", "SELECTOR", "AgentPod", "KubernetesAccess", "choose_pod"]

NAMESPACE = "kube-system"
SELECTOR = "app.kubernetes.io/name=lockgate"
_AT_ONCE = 32  # calls into nodes
_NOT_YET = "lockgate.dev/not-yet"  # docs/migrate.md
_LAST_WORDS = 0.1  # seconds for what was begun beside something that failed
#: Of the groups *.k8s.io, which are Kubernetes' own, those whose kinds somebody has to install.
_ADDED = ("policy.networking.k8s.io",)
_WHOLE = {"Pod": model.Pod}  # with what people want to see of them
T = TypeVar("T")


class _ContainerState(msgspec.Struct):
    name: str = ""
    ready: bool = False
    restart_count: int = msgspec.field(name="restartCount", default=0)
    image: str = ""
    state: dict[str, Any] = {}


class _PodStatus(msgspec.Struct):
    phase: str = ""
    container_statuses: list[_ContainerState] = msgspec.field(
        name="containerStatuses", default_factory=list
    )


class _Meta(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    creation: str = msgspec.field(name="creationTimestamp", default="")
    deletion: str | None = msgspec.field(name="deletionTimestamp", default=None)


class _PodSpec(msgspec.Struct):
    node: str = msgspec.field(name="nodeName", default="")


class AgentPod(msgspec.Struct):
    """A pod of the DaemonSet."""

    metadata: _Meta
    spec: _PodSpec = msgspec.field(default_factory=_PodSpec)
    status: _PodStatus = msgspec.field(default_factory=_PodStatus)

    def container(self, role: str) -> _ContainerState:
        found = (one for one in self.status.container_statuses if one.name == role)
        return next(found, _ContainerState())


class _List(msgspec.Struct):
    items: list[msgspec.Raw] | None = None


def choose_pod(pods: Sequence[AgentPod]) -> dict[str, AgentPod]:
    """Each node's pod: while one is replaced there are two; the one that goes comes last."""

    def rank(pod: AgentPod) -> tuple[bool, bool, str]:
        meta = pod.metadata
        return meta.deletion is None, pod.status.phase == "Running", meta.creation

    return {pod.spec.node: pod for pod in sorted(pods, key=rank) if pod.spec.node}


class KubernetesAccess:
    """See `lockgate.access.Access`. Requests run in a thread of their own."""

    standalone = False

    def __init__(self, settings: Settings, title: str) -> None:
        """ValueError names what is wrong with the kubeconfig."""
        self.title = title
        self.skipped: list[str] = []
        self._client = Client(settings)
        self._pods: dict[str, AgentPod] | None = None
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        """What failed beside something else that failed comes to its end before the loop does."""
        await self._client.close()
        # A command that a plugin runs is not killed in the middle unless it takes its time.
        for patience in (_LAST_WORDS, 10 * _LAST_WORDS):
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:
                _, late = await asyncio.wait(others, timeout=patience)
                for task in late:
                    task.cancel()

    # ---- Objects -------------------------------------------------------------------

    def objects(self) -> Cluster:
        async def all_kinds() -> list[list[Any]]:
            return await asyncio.gather(*(self._list(kind) for kind in KINDS))

        tables = self._run(all_kinds())
        cluster = Cluster()
        for kind, items in zip(KINDS, tables, strict=True):
            setattr(
                cluster,
                kind.table,
                {kind.key(one.metadata.namespace, one.metadata.name): one for one in items},
            )
        return cluster

    async def _list(self, kind: Kind) -> list[Any]:
        absent = b"{}" if kind.optional else None
        body = await self._get(kind.path, absent=absent, resourceVersion="0")
        decoder = msgspec.json.Decoder(_WHOLE.get(kind.name, kind.struct))
        found = []
        for raw in map(bytes, msgspec.json.decode(body, type=_List).items or ()):
            try:
                item = read(raw, decoder)
                if isinstance(item, model.Pod):
                    uid = uid_on_node(item.metadata, item.spec.node_name)
                    meta = msgspec.structs.replace(item.metadata, uid=uid)
                    item = msgspec.structs.replace(item, metadata=meta)
                found.append(item)
            except msgspec.MsgspecError as error:
                self.skipped.append(f"{kind.title_of(raw)} can't be read: {error}")
                if kind.rest is not None:
                    with contextlib.suppress(msgspec.MsgspecError):
                        found.append(kind.rest(plain(raw)))
        return found

    # ---- Nodes -------------------------------------------------------------------

    def nodes(self) -> list[str]:
        """Those with a pod of ours, now."""
        return sorted(self._run(self._agents_now(again=True)))

    def daemonset(self) -> dict[str, Any]:
        """That of ours, as the API server has it."""
        path = f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/lockgate"
        found: dict[str, Any] = msgspec.json.decode(self._run(self._get(path)))
        return found

    def call(
        self, node: str, role: Role, method: str, url: str, body: Any = None, timeout: float = 30
    ) -> Any:
        async def whole() -> bytes:
            parts = []
            async with self._gate, asyncio.timeout(timeout):
                async with contextlib.aclosing(
                    self._asked(node, role, method, url, body, timeout)
                ) as pieces:
                    async for piece in pieces:
                        parts.append(piece)
            return b"".join(parts)

        text = self._run(whole())
        try:
            return msgspec.json.decode(text) if text else None
        except msgspec.DecodeError as error:
            raise Refused(f"the {role} of node {node} did not answer in JSON: {error}") from error

    def stream(
        self, node: str, role: Role, url: str, timeout: float | None = None
    ) -> Iterator[Any]:
        arrived: queue.Queue[bytes | BaseException | None] = queue.Queue(1000)
        over = threading.Event()

        async def read() -> None:
            loop = asyncio.get_running_loop()
            pieces = self._asked(node, role, "GET", url, None, timeout)
            end: BaseException | None = None
            try:
                async with contextlib.aclosing(pieces):
                    async for piece in pieces:
                        await loop.run_in_executor(None, arrived.put, piece)
                        if over.is_set():
                            return
            except Exception as error:
                end = error
            finally:
                if not over.is_set():
                    await loop.run_in_executor(None, arrived.put, end)

        reading = asyncio.run_coroutine_threadsafe(read(), self._loop)
        rest = b""
        try:
            while isinstance(piece := arrived.get(), bytes):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield msgspec.json.decode(line)
            if piece is not None:
                raise piece
        finally:
            over.set()
            reading.cancel()
            with contextlib.suppress(queue.Empty):
                while True:
                    arrived.get_nowait()

    async def _asked(
        self, node: str, role: Role, method: str, url: str, body: Any, timeout: float | None
    ) -> AsyncGenerator[bytes, None]:
        pod = (await self._agents_now()).get(node)
        if pod is None:
            raise Unreachable(f"node {node} has no pod of Lockgate")
        sent = b"" if body is None else msgspec.json.encode(body)
        command = ["lockgate-node-call", role, method, url, str(len(sent))]
        where = (pod.metadata.namespace, pod.metadata.name)
        async with contextlib.aclosing(
            exec_stream(self._client, where, role, command, sent, timeout=timeout)
        ) as pieces:
            try:
                async for piece in pieces:
                    yield piece
            except (ApiError, Unreachable) as error:
                self._pods = None  # perhaps another pod has taken its place
                sentence = f"node {node}: {error}"
                if isinstance(error, ApiError) and error.status >= 500:
                    sentence = f"node {node}: its kubelet does not answer the API server"
                raise Unreachable(sentence) from error

    async def _agents_now(self, *, again: bool = False) -> dict[str, AgentPod]:
        if self._pods is None or again:
            path = f"/api/v1/namespaces/{NAMESPACE}/pods"
            body = await self._get(path, labelSelector=SELECTOR)
            items = msgspec.json.decode(body, type=_List).items or ()
            self._pods = choose_pod([msgspec.json.decode(raw, type=AgentPod) for raw in items])
        return self._pods

    # ---- The whole -----------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        cluster = self.objects()
        agents = self._run(self._agents_now(again=True))
        pods = list(cluster.pods.values())
        nodes = []
        for name in sorted({*cluster.nodes, *agents}):
            pod = agents.get(name)
            told: dict[str, Any] = {"name": name, "applied": 0, "error": ""}
            if pod is None:
                node = cluster.nodes.get(name)
                waits = node is not None and _NOT_YET in node.metadata.labels
                error = "no pod of Lockgate runs here"
                told |= {"error": error + f": it has the label {_NOT_YET}" * waits, "missing": True}
            for role in ("agent", "observer"):
                state = pod.container(role) if pod else _ContainerState()
                told[role] = {
                    "up": "running" in state.state,
                    "ready": state.ready,
                    "restarts": state.restart_count,
                    "image": state.image,
                    "error": _reason(state),
                }
            nodes.append(told)
        return {
            "cluster": self.title,
            "folder": self._client.server,
            "phase": "running",
            "version": __version__,
            "nodes": nodes,
            "pods": {
                "total": len(pods),
                "ready": sum(pod.ready or pod.status.phase == "Succeeded" for pod in pods),
                "running": sum(pod.status.phase == "Running" for pod in pods),
                "failed": sum(pod.status.phase == "Failed" for pod in pods),
            },
            # What keeps other people's pods from being ready is theirs to know.
            "notReady": [],
            "waitingFor": {},
            "reasons": [],
            "errors": [] if agents else [f"namespace {NAMESPACE} has no pod with {SELECTOR}"],
            "warnings": list(self.skipped),
        }

    def probe(self, place: Place, targets: Sequence[Target]) -> Iterator[tuple[int, Result]]:
        where: dict[str, str] = {}
        if place.pod is not None:
            where = {"uid": place.pod.metadata.uid}
        yield from agent_probe(self, place.node, where, targets)

    def logs(self, node: str, role: Role, lines: int) -> str:
        pod = self._run(self._agents_now()).get(node)
        if pod is None:
            raise Unreachable(f"node {node} has no pod of Lockgate")
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod.metadata.name}/log"
        parts = []
        if pod.container(role).restart_count:
            with contextlib.suppress(Refused):
                text = self._run(
                    self._get(path, container=role, tailLines=str(lines), previous="true")
                )
                parts.append(text.decode(errors="replace") + "--- restarted ---\n")
        text = self._run(self._get(path, container=role, tailLines=str(lines)))
        return "".join([*parts, text.decode(errors="replace")])

    def resources(self) -> list[str]:
        return sorted(self._run(self._discover()))

    async def _discover(self) -> dict[str, str]:
        """Kind, as "plural.group" → its path; of groups that are not Kubernetes' own. One that
        several versions have is of the version that the server prefers."""
        groups = msgspec.json.decode(await self._get("/apis"))["groups"]
        found: dict[str, str] = {}
        for group in groups:
            name = group["name"]
            if "." not in name or (name.endswith(".k8s.io") and name not in _ADDED):
                continue
            preferred = group["preferredVersion"]["groupVersion"]
            others = [one["groupVersion"] for one in group["versions"]]
            for version in dict.fromkeys((preferred, *others)):
                try:
                    body = await self._get(f"/apis/{version}")
                except Refused:
                    continue  # an extension server that is away
                for one in msgspec.json.decode(body)["resources"]:
                    if "/" not in one["name"] and "list" in one["verbs"]:
                        path = f"/apis/{version}/{one['name']}"
                        found.setdefault(f"{one['name']}.{name}", path)
        return found

    def count(self, resource: str) -> int:
        async def counted() -> int:
            path = (await self._discover())[resource]
            body = await self._get(path, resourceVersion="0")
            return len(msgspec.json.decode(body, type=_List).items or ())

        return self._run(counted())

    # ---- Inside --------------------------------------------------------------------

    async def _get(self, path: str, *, absent: bytes | None = None, **params: str) -> bytes:
        """`absent`, if given, stands for what the server does not know (404)."""
        try:
            return await self._client.call("GET", path, params=params)
        except CredentialError as error:
            raise Refused(str(error)) from error
        except ApiError as error:
            if error.status == 404 and absent is not None:
                return absent
            raise Refused(f"the API server says: {error}") from error
        except AWAY as error:
            raise Unreachable(f"the API server does not answer: {error or 'no answer'}") from error

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except TimeoutError as error:
            raise Unreachable("no answer in time") from error
        except KeyboardInterrupt:
            future.cancel()
            raise


def _reason(state: _ContainerState) -> str:
    """Why a container does not run, as the kubelet has it."""
    for kind in ("waiting", "terminated"):
        if kind in state.state:
            told = state.state[kind] or {}
            return ": ".join(filter(None, (told.get("reason", kind), told.get("message", ""))))
    return ""

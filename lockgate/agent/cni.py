"""The CNI server: what the plugin (cni/lockgate-cni.c) sends is answered here.

The runtime waits for each answer, so ADD's comes when the pod is wired and its policy is in the
kernel, not earlier and not later. A lease is of a pod's uid and a sandbox (container id and
interface): a DEL of an older sandbox leaves the newer one alone, and one of a sandbox that
nobody knows any more succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockgate.agent import cni_messages as messages
from lockgate.agent import install
from lockgate.agent.check import damages
from lockgate.agent.cni_messages import CniError, Code, Request
from lockgate.agent.endpoints import Attachment
from lockgate.agent.ipam import PoolExhausted
from lockgate.agent.requests import EndpointError
from lockgate.agent.ways import pod_cidrs
from lockgate.paths import cni_plugin

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["CniServer"]

log = logging.getLogger(__name__)
_REQUEST_MAX = 16 << 20
_NS_GET_NSTYPE, _CLONE_NEWNET = 0xB703, 0x40000000
#: The status of an EndpointError → the code that says it.
_CODES = {400: Code.INVALID_NETNS, 409: Code.NOT_OURS, 503: Code.TRY_AGAIN, 504: Code.TRY_AGAIN}
Answer = dict[str, Any] | None


class CniServer:
    """Listens at `path` from `start` to `close`."""

    def __init__(self, agent: Agent, path: Path) -> None:
        self._agent, self._path = agent, path
        self._tasks: set[asyncio.Task[None]] = set()
        self._commands: dict[str, Callable[[Request, int | None], Awaitable[Answer]]] = {
            "ADD": self._add,
            "DEL": self._delete,
            "CHECK": self._check,
            "GC": self._collect,
            "STATUS": self._status,
            "VERSION": self._version,
        }

    def start(self) -> None:
        """OSError if the socket can't be made."""
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self._socket.listen(1024)
        self._socket.setblocking(False)
        self._keep(self._accept())
        self._keep(self._install())

    async def close(self) -> None:
        """Plugins that wait for an answer hear that they are to try again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                wire, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                # Too many files: those that are open will be closed.
                log.warning("cni.sock: %s", error)
                await asyncio.sleep(0.1)
                continue
            wire.setblocking(False)
            self._keep(self._serve(wire))

    async def _serve(self, wire: socket.socket) -> None:
        netns: int | None = None
        with wire, contextlib.suppress(ConnectionError):
            try:
                data, netns = await _receive(wire)
                status, answer = await self._answer(data, netns)
            finally:
                if netns is not None:
                    os.close(netns)
            text = "" if answer is None else json.dumps(answer, separators=(",", ":"))
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(wire, b"%d%s\n" % (status, text.encode()))

    async def _answer(self, data: bytes, netns: int | None) -> tuple[int, Answer]:
        """(exit code, what goes to stdout)."""
        version, title = "1.0.0", "request"
        try:
            request = Request.read(data)
            version = request.version
            title = f"{request.command} {request.namespace}/{request.pod} {request.sandbox}"
            return 0, await self._commands[request.command](request, netns)
        except CniError as error:
            problem = error
        except EndpointError as error:
            problem = CniError(_CODES.get(error.status, Code.KERNEL), str(error))
        except PoolExhausted as error:
            problem = CniError(Code.TRY_AGAIN if error.early else Code.EXHAUSTED, str(error))
        except OSError as error:
            problem = CniError(Code.KERNEL, error.strerror or str(error))
        except Exception as error:
            log.exception("CNI %s", title)
            problem = CniError(Code.KERNEL, f"{type(error).__name__}: {error}")
        log.info("CNI %s: error %d: %s", title, problem.code, problem)
        return 1, problem.object(version)

    # ---- Commands ------------------------------------------------------------------

    async def _add(self, request: Request, netns: int | None) -> Answer:
        path = _checked(request, netns)
        key = request.namespace, request.pod
        who = Attachment(request.uid, path, request.sandbox, key)
        uid = (await self._agent.requests.add(who))["uid"]
        lease = self._agent.ipam.leases.get(uid)
        if lease is None or lease.sandbox != request.sandbox:
            raise CniError(Code.NOT_OURS, f"pod {uid} was deleted meanwhile")
        return messages.result(request, self._agent.endpoints.link(lease))

    async def _delete(self, request: Request, netns: int | None) -> Answer:
        await self._agent.requests.delete(request.sandbox)
        return None

    async def _check(self, request: Request, netns: int | None) -> Answer:
        path = _checked(request, netns)
        agent = self._agent
        lease = agent.ipam.of_sandbox(request.sandbox)
        if lease is None:
            raise CniError(Code.UNKNOWN_CONTAINER, f"{request.sandbox} has no lease")
        link = agent.endpoints.link(lease)
        found = messages.lost_addresses(request.config["prevResult"], lease.ips)
        async with agent.turn:
            try:
                endpoint = agent.journal.endpoint(agent.endpoints.pod(lease.uid))
            except KeyError:
                # An agent that has just started may not have read the objects yet.
                code = Code.CHECK_FAILED if agent.applied else Code.TRY_AGAIN
                raise CniError(code, f"there is no Pod object {lease.uid}") from None
            found += await agent.work(damages, agent.dp, lease, link, endpoint, path)
        if found:
            raise CniError(Code.CHECK_FAILED, found[0], "; ".join(found[1:]))
        return None

    async def _collect(self, request: Request, netns: int | None) -> Answer:
        valid = messages.attachments(request.config)
        count = 0 if valid is None else await self._agent.requests.collect(valid)
        if count:
            log.info("CNI GC: %d sandboxes were not there any more", count)
        return None

    async def _status(self, request: Request, netns: int | None) -> Answer:
        self._ready()
        return None

    def _ready(self) -> None:
        """CniError, why an ADD could not be served now."""
        agent = self._agent
        code = Code.NOT_AVAILABLE if agent.publisher.epoch else Code.LIMITED_CONNECTIVITY
        if agent.cluster is None:
            raise CniError(code, "the cluster's objects have not been read yet")
        me = agent.cluster.nodes.get(agent.config.node)
        if me is None or not pod_cidrs(me):
            raise CniError(code, f"Node {agent.config.node} has no spec.podCIDRs yet")
        if agent.errors.get("publish"):
            raise CniError(code, f"the state can't be put in force: {agent.errors['publish'][0]}")
        try:
            agent.ipam.set_pools(pod_cidrs(me))
            agent.ipam.room()
        except PoolExhausted as error:
            raise CniError(code, str(error)) from None

    async def _install(self) -> None:
        """Plugin and configuration, as soon as an ADD could be served."""
        config, errors = self._agent.config, self._agent.errors
        bin_dir, conf_dir = config.cni_bin_dir, config.cni_conf_dir
        if bin_dir is None and conf_dir is None:
            return
        while True:
            try:
                self._ready()
                await asyncio.to_thread(
                    install.install, cni_plugin(), bin_dir, conf_dir, config.cni_chain
                )
                break
            except CniError:
                await asyncio.sleep(0.2)
            except OSError as error:
                log.error("the CNI plugin can't be installed: %s", error)
                errors["cni"] = [f"the CNI plugin can't be installed: {error}"]
                await asyncio.sleep(5)
        rivals = install.rivals(conf_dir) if conf_dir is not None else []
        errors["cni"] = [
            f"CNI configuration {conf_dir}/{name} comes before {install.CONFLIST}: the runtime "
            "takes that one, and pods do not come to Lockgate"
            for name in rivals
        ]
        log.info("the CNI plugin is installed")

    async def _version(self, request: Request, netns: int | None) -> Answer:
        return messages.versions(request.version)


def _checked(request: Request, netns: int | None) -> str:
    """A path of the passed namespace, good as long as its descriptor is open. The runtime's own
    path means nothing here: the agent may have other mounts."""
    if netns is None:
        raise CniError(Code.INVALID_NETNS, f"CNI_NETNS: {request.netns} can't be opened")
    try:
        kind = fcntl.ioctl(netns, _NS_GET_NSTYPE)
    except OSError:
        kind = 0
    if kind != _CLONE_NEWNET:
        raise CniError(Code.INVALID_NETNS, f"CNI_NETNS: {request.netns} is no network namespace")
    if os.path.sameopenfile(netns, _own_netns()):
        raise CniError(Code.INVALID_NETNS, f"CNI_NETNS: {request.netns} is the node's own")
    return f"/proc/self/fd/{netns}"


def _own_netns() -> int:
    global _own
    if _own < 0:
        _own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    return _own


_own = -1


async def _receive(wire: socket.socket) -> tuple[bytes, int | None]:
    """All that comes until the other side shuts down, and the descriptor that came along."""
    loop = asyncio.get_running_loop()
    parts: list[bytes] = []
    descriptors: list[int] = []
    size = 0
    try:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(wire, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await _readable(loop, wire)
                continue
            descriptors += fds
            if not data:
                break
            parts.append(data)
            size += len(data)
            if size > _REQUEST_MAX:
                raise ConnectionError("the request has no end")
    except BaseException:
        for fd in descriptors:
            os.close(fd)
        raise
    for fd in descriptors[1:]:
        os.close(fd)
    return b"".join(parts), descriptors[0] if descriptors else None


async def _readable(loop: asyncio.AbstractEventLoop, wire: socket.socket) -> None:
    ready = loop.create_future()
    loop.add_reader(wire, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(wire)

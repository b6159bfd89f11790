"""A standalone cluster of this machine, by its sockets. Needs root."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from lockgate.access import Place, Refused, Result, Role, Target, Unreachable
from lockgate.access.sockets import call, connect, stream
from lockgate.objects.model import (
    Cluster,
    EndpointSlice,
    Firewall,
    Namespace,
    NetworkPolicy,
    Node,
    Pod,
    Service,
)
from lockgate.standalone.state import State

__all__ = ["StandaloneAccess"]

_TYPES: dict[str, Any] = {
    "namespaces": list[Namespace],
    "nodes": list[Node],
    "pods": list[Pod],
    "services": list[Service],
    "endpoints": list[EndpointSlice],
    "policies": list[NetworkPolicy],
    "firewalls": list[Firewall],
}


_PATIENCE = 5  # seconds for a status


class StandaloneAccess:
    """See `lockgate.access.Access`."""

    standalone = True

    def __init__(self, state: State) -> None:
        self.state = state
        self.title = f"cluster {state.cluster!r}"

    def objects(self) -> Cluster:
        found: dict[str, list[Any]] = {}
        connection = connect(self.state.control)
        try:
            for kind, type_ in _TYPES.items():
                connection.request("GET", f"/v1/objects/{kind}")
                response = connection.getresponse()
                text = response.read()
                if response.status >= 400:
                    raise Refused(f"{kind}: {text.decode()}")
                found[kind] = msgspec.json.decode(text, type=type_)
        except msgspec.MsgspecError as error:
            raise Refused(str(error)) from error
        finally:
            connection.close()

        def by_name(kind: str) -> dict[tuple[str, str], Any]:
            return {(one.metadata.namespace, one.metadata.name): one for one in found[kind]}

        return Cluster(
            namespaces={one.metadata.name: one for one in found["namespaces"]},
            nodes={one.metadata.name: one for one in found["nodes"]},
            pods=by_name("pods"),
            services=by_name("services"),
            slices=by_name("endpoints"),
            policies=by_name("policies"),
            firewalls={one.metadata.name: one for one in found["firewalls"]},
        )

    def nodes(self) -> list[str]:
        folder = self.state.root / "nodes"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def call(
        self, node: str, role: Role, method: str, url: str, body: Any = None, timeout: float = 30
    ) -> Any:
        return call(self._socket(node, role), method, url, body, timeout=timeout)

    def stream(
        self, node: str, role: Role, url: str, timeout: float | None = None
    ) -> Iterator[Any]:
        return stream(self._socket(node, role), url, timeout=timeout)

    def _socket(self, node: str, role: Role) -> Path:
        return self.state.agent(node) if role == "agent" else self.state.observer(node)

    def status(self) -> dict[str, Any]:
        try:
            found = call(self.state.control, "GET", "/v1/status", timeout=_PATIENCE)
        except TimeoutError:
            raise Unreachable(f"nothing came within {_PATIENCE} s") from None
        assert isinstance(found, dict)
        return found

    def probe(self, place: Place, targets: Sequence[Target]) -> Iterator[tuple[int, Result]]:
        """From within the pod's namespace and cgroup; from a node by its agent."""
        if place.pod is None:
            yield from agent_probe(self, place.node, {}, targets)
            return
        name = "/".join(place.pod.key)
        where = call(self.state.control, "GET", f"/v1/exec?pod={quote(name)}")
        if any(target.payload for target in targets):
            yield from agent_probe(self, place.node, {"netns": where["netns"]}, targets)
            return
        yield from enumerate(asyncio.run(_probe(where, targets)))

    def logs(self, node: str, role: Role, lines: int) -> str:
        path = self.state.node(node) / f"{role}.log"
        text = path.read_text(errors="replace").splitlines()
        return "\n".join(text[-lines:]) + "\n"

    def resources(self) -> list[str]:
        return []

    def count(self, resource: str) -> int:
        raise Refused(f"a standalone cluster has no {resource}")

    def close(self) -> None:
        pass


async def _probe(where: dict[str, Any], targets: Sequence[Target]) -> list[Result]:
    from lockgate.standalone import runtime

    try:
        found = await runtime.probe(
            [runtime.Target(t.protocol, t.address, t.port, t.timeout) for t in targets],
            netns=Path(where["netns"]),
            cgroup=Path(where["cgroup"]),
            concurrency=128,
        )
    except runtime.RuntimeFailure as error:
        raise Refused(str(error)) from error
    return [Result(one.result, one.detail, one.port) for one in found]


def agent_probe(
    access: Any, node: str, where: dict[str, str], targets: Sequence[Target]
) -> Iterator[tuple[int, Result]]:
    """By the node's agent: POST /v1/probe (lockgate/agent/probe.py)."""
    body = {"from": where, "targets": msgspec.to_builtins(list(targets))}
    patience = 30 + max((target.timeout for target in targets), default=0)
    answer = access.call(node, "agent", "POST", "/v1/probe", body, timeout=patience)
    yield from enumerate(msgspec.json.decode(json.dumps(answer["results"]), type=list[Result]))

"""What the supervisor asks of its nodes' agents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp

from lockgate.standalone.state import State

__all__ = ["AgentRefused", "Agents"]


class AgentRefused(Exception):
    """What an agent says against it, as a sentence that names the node."""


class Agents:
    """HTTP on agent.sock of each node; who asks waits for an agent that is away."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def call(
        self, node: str, method: str, path: str, body: Any, over: Callable[[], str]
    ) -> Any:
        """The answer's JSON. `over`: why nobody need wait any more, if so. AgentRefused."""
        session = self._sessions.get(node)
        if session is None:
            session = self._sessions[node] = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(self._state.agent(node))),
                timeout=aiohttp.ClientTimeout(total=60),
            )
        while True:
            try:
                async with session.request(method, f"http://agent{path}", json=body) as response:
                    text = await response.text()
                    if response.status < 400:
                        return json.loads(text) if text else None
                    raise AgentRefused(f"agent of {node}: {_sentence(text)}")
            except (aiohttp.ClientConnectionError, FileNotFoundError):
                if why := over():
                    raise AgentRefused(f"agent of {node}: {why}") from None
                await asyncio.sleep(0.02)

    async def forget(self, node: str) -> None:
        if session := self._sessions.pop(node, None):
            await session.close()

    async def close(self) -> None:
        for node in list(self._sessions):
            await self.forget(node)


def _sentence(text: str) -> str:
    try:
        answer = json.loads(text)
    except ValueError:
        return text.strip() or "no reason given"
    return str(answer.get("error", text)) if isinstance(answer, dict) else text

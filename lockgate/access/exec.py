"""Commands in containers: `pods/exec` over WebSocket, as kubectl does it.

Subprotocol v5.channel.k8s.io (KEP-4006), or v4 of older servers: each binary message begins
with the number of its channel. The two differ in how standard input ends; ours ends with the
connection, so they are alike here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import aiohttp
import msgspec

from lockgate.access import Refused, Unreachable
from lockgate.access.sockets import sentence
from lockgate.kube.client import AWAY, Client
from lockgate.kube.exec_plugin import CredentialError

__all__ = ["exec_stream"]

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_STDIN, _STDOUT, _STDERR, _ERROR = 0, 1, 2, 3
_PIECE = 1 << 16
_MOST = 64 << 20  # of one message; kubelets send 32 KiB


class _Cause(msgspec.Struct):
    reason: str = ""
    message: str = ""


class _Details(msgspec.Struct):
    causes: list[_Cause] = []


class _Status(msgspec.Struct):
    """meta/v1 Status: how the command ended."""

    status: str = ""
    message: str = ""
    reason: str = ""
    details: _Details | None = None

    @property
    def code(self) -> int | None:
        """The exit code; None when the command was not run."""
        if self.status == "Success":
            return 0
        causes = self.details.causes if self.details else []
        text = next((one.message for one in causes if one.reason == "ExitCode"), "")
        return int(text) if self.reason == "NonZeroExitCode" and text.isdigit() else None


async def exec_stream(
    client: Client,
    pod: tuple[str, str],
    container: str,
    command: Sequence[str],
    stdin: bytes = b"",
    *,
    timeout: float | None = None,
) -> AsyncGenerator[bytes, None]:
    """What the command writes to standard output, as it comes. Closing the generator ends the
    command's standard input. Refused with what it wrote to standard error when it ends with 1;
    Unreachable when it could not be run, or nobody answers for `timeout` seconds."""
    namespace, name = pod
    where = f"pod {namespace}/{name}, container {container}"
    params: list[tuple[str, str]] = [("container", container)]
    params += [("stdin", "true"), ("stdout", "true"), ("stderr", "true")]
    params += [("command", word) for word in command]
    errors = bytearray()
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/exec"
    try:
        async with client.websocket(path, params, PROTOCOLS, max_size=_MOST) as wire:
            for at in range(0, len(stdin), _PIECE):
                await wire.send_bytes(bytes([_STDIN]) + stdin[at : at + _PIECE])
            while True:
                message = await wire.receive(timeout)
                if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
                    if message.type is aiohttp.WSMsgType.BINARY:
                        continue
                    raise Unreachable(f"{where}: the connection ended: {_why(message)}")
                channel, data = message.data[0], message.data[1:]
                if channel == _STDOUT and data:
                    yield data
                elif channel == _STDERR:
                    errors += data
                elif channel == _ERROR:
                    _conclude(msgspec.json.decode(data, type=_Status), bytes(errors), where)
                    return
    except CredentialError as error:
        raise Refused(str(error)) from error
    except TimeoutError as error:
        raise Unreachable(f"{where}: no answer") from error
    except AWAY as error:
        if isinstance(error, Unreachable):
            raise
        raise Unreachable(f"{where}: {error}") from error


def _conclude(status: _Status, errors: bytes, where: str) -> None:
    code = status.code
    if code == 0:
        return
    text = sentence(errors)
    if code == 1:
        raise Refused(text or status.message)
    raise Unreachable(text if code == 2 and text else f"{where}: {status.message or text}")


def _why(message: Any) -> str:
    return str(message.data or message.extra or message.type.name.lower())

"""HTTP to the API server: its address, TLS, credentials.

In a cluster: the service account's token and CA, and an address that is found (discover.py).
Elsewhere: a kubeconfig. The server is always checked, and a token is sent only to a server that
was; plain HTTP goes to loopback only (`kubectl proxy`), without a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import aiohttp
import msgspec

from lockgate.kube import discover, kubeconfig
from lockgate.kube.exec_plugin import Credential
from lockgate.kube.tls import as_kubectl

__all__ = ["AWAY", "ApiError", "Client", "Settings"]

_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
#: What a server that can't be reached, or stops in the middle of an answer, raises.
AWAY = (OSError, aiohttp.ClientError, TimeoutError)
#: How often a server is asked again that is too busy, and how long it is waited for (seconds).
_TRIES, _LONGEST_PAUSE = 5, 5.0


class Settings(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """How to reach the API server. With `kubeconfig` the others mean nothing."""

    api_server: str = ""  # https://HOST:PORT; "" = found
    token_file: str = f"{_ACCOUNT}/token"
    ca_file: str = f"{_ACCOUNT}/ca.crt"
    kubeconfig: str | tuple[str, ...] = ""  # a file, or several to merge
    context: str = ""  # of the kubeconfig; "" = its current one


class _Status(msgspec.Struct):
    """meta/v1 Status, the body of an error."""

    message: str = ""
    reason: str = ""
    code: int = 0


class ApiError(Exception):
    """The server's refusal: HTTP status, reason and message of the Status object; `pause` is the
    header Retry-After, seconds, or None."""

    def __init__(self, status: int, reason: str, message: str, pause: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}" if reason else f"{status} {message}")
        self.status, self.reason, self.pause = status, reason, pause


class _Who(NamedTuple):
    """What a request proves, and what it asks of the server."""

    context: ssl.SSLContext | None
    headers: dict[str, str]
    credential: Credential | None  # where a plugin made it


class Client:
    """One API server. `server` is its URL, "" until it is known."""

    def __init__(self, settings: Settings, state: Path | None = None) -> None:
        """`state` is a folder in which the address that worked last is remembered. ValueError
        names what is wrong with the settings."""
        self._settings = settings
        self._memory = None if state is None else state / "apiserver"
        self._session: aiohttp.ClientSession | None = None
        self._locating = asyncio.Lock()
        self._ca: tuple[object, ssl.SSLContext] | None = None
        self._config: kubeconfig.Kubeconfig | None = None
        self.server = ""
        self._server_name: str | None = None
        self._proxy: str | None = None
        if settings.kubeconfig:
            given = settings.kubeconfig
            files = (given,) if isinstance(given, str) else given
            self._config = kubeconfig.read([Path(file) for file in files], settings.context)
            self.server = _checked(self._config.server, " and ".join(files))
            self._server_name = self._config.server_name or None
            self._proxy = self._config.proxy or None
        elif settings.api_server:
            _checked(settings.api_server, "kubernetes.apiServer")

    # ---- Requests --------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        timeout: aiohttp.ClientTimeout | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request; the body of the answer comes as it was sent, compressed if it says so.
        ApiError when the server refuses, one of AWAY when it can't be reached (CredentialError
        when a plugin does not say who we are)."""
        server = await self._locate()
        session = self._opened()
        sent = {"Accept": "application/json", "Accept-Encoding": "identity", **(headers or {})}
        data = None
        if body is not None:
            data, sent["Content-Type"] = msgspec.json.encode(body), content_type
        refused: Credential | None = None
        while True:
            who = await self._who(server, refused)
            try:
                async with session.request(
                    method,
                    server + path,
                    params=params,
                    data=data,
                    headers={**who.headers, **sent},
                    ssl=who.context if who.context is not None else True,
                    server_hostname=self._server_name if who.context is not None else None,
                    proxy=self._proxy,
                    timeout=timeout or aiohttp.ClientTimeout(total=30, sock_connect=5),
                    allow_redirects=False,
                ) as response:
                    _keep_alive(response)
                    if response.status == 401 and who.credential and not refused:
                        refused = who.credential
                        continue
                    if response.status >= 300:
                        raise await _refusal(response)
                    yield response
                    return
            except aiohttp.ClientConnectionError:
                self._lost(server)
                raise

    async def call(self, method: str, path: str, **options: Any) -> bytes:
        """A request whose answer is small: its body. What the server is too busy for it did not
        do (429: overload, or a kind that was made just now): it is asked again, when it says."""
        for left in reversed(range(_TRIES)):
            try:
                async with self.request(method, path, **options) as response:
                    return await response.read()
            except ApiError as error:
                if error.status != 429 or error.pause is None or not left:
                    raise
                await asyncio.sleep(min(error.pause, _LONGEST_PAUSE))
        raise AssertionError("unreachable")

    @contextlib.asynccontextmanager
    async def websocket(
        self,
        path: str,
        params: Sequence[tuple[str, str]],
        protocols: Sequence[str],
        *,
        max_size: int = 4 << 20,
    ) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """An open WebSocket. Raises as `request` does."""
        server = await self._locate()
        refused: Credential | None = None
        while True:
            who = await self._who(server, refused)
            try:
                async with self._opened().ws_connect(
                    f"{server}{path}?{urlencode(params)}",
                    protocols=protocols,
                    headers=who.headers,
                    ssl=who.context if who.context is not None else True,
                    server_hostname=self._server_name if who.context is not None else None,
                    proxy=self._proxy,
                    max_msg_size=max_size,
                    heartbeat=30,
                ) as wire:
                    yield wire
                    return
            except aiohttp.WSServerHandshakeError as error:
                if error.status == 401 and who.credential and not refused:
                    refused = who.credential
                    continue
                if error.status in (401, 403, 404):
                    # Only a plain request shows what the server has to say.
                    await self.call("GET", path, params=dict(params))
                raise ApiError(error.status, "", f"{path}: the WebSocket was refused") from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                auto_decompress=False,
                read_bufsize=1 << 18,
            )
        return self._session

    async def close(self) -> None:
        """May be called again."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ---- Where and who -----------------------------------------------------------------

    async def _locate(self) -> str:
        if self.server:
            return self.server
        async with self._locating:
            if not self.server:
                self.server, self._server_name = await self._find()
        return self.server

    async def _find(self) -> tuple[str, str | None]:
        given = self._settings.api_server.rstrip("/")
        if given.startswith("http:"):
            return given, None
        context = self._context("https://")
        assert context is not None
        if given:
            # An address that people gave may be a proxy's, with a certificate for its own name.
            end = _end(given)
            named = await discover.is_server(end, context)
            return given, discover.SERVER_NAME if named else None
        last, service = ([_end(text)] if text else [] for text in (self._remembered(), _service()))
        ends = list(
            dict.fromkeys([*last, *await asyncio.to_thread(discover.remote_ends), *service])
        )
        end_found = await discover.find(ends, context)
        if end_found is None:
            raise ConnectionError(
                f"no API server was found among the {len(ends)} ends of this node's"
                " connections; the setting kubernetes.apiServer names it"
            )
        self._remember(discover.url(end_found))
        return discover.url(end_found), discover.SERVER_NAME

    def _lost(self, server: str) -> None:
        """The server could not be reached: another may stand in for it."""
        if self._config is None and self.server == server:
            self.server = ""

    def _remembered(self) -> str:
        try:
            text = self._memory.read_text().strip() if self._memory is not None else ""
            return _checked(text, str(self._memory)) if text else ""
        except (OSError, ValueError):
            return ""

    def _remember(self, server: str) -> None:
        if self._memory is None or self._remembered() == server:
            return
        beside = self._memory.with_suffix(".new")
        with contextlib.suppress(OSError):
            beside.write_text(server + "\n")
            os.replace(beside, self._memory)

    def _context(self, server: str) -> ssl.SSLContext | None:
        """TLS with the CA as its file has it now; None for plain HTTP."""
        if not server.startswith("https:"):
            return None
        if self._config is not None:
            return self._config.context
        path = self._settings.ca_file
        found = os.stat(path)
        stamp = found.st_mtime_ns, found.st_ino, found.st_size
        if self._ca is None or self._ca[0] != stamp:
            self._ca = stamp, as_kubectl(ssl.create_default_context(cafile=path))
        return self._ca[1]

    async def _who(self, server: str, refused: Credential | None) -> _Who:
        """`refused` is what the server did not take: a plugin is asked again."""
        plugin = self._config.plugin if self._config is not None else None
        if plugin is None or not server.startswith("https:"):
            return _Who(self._context(server), self._credentials(server), None)
        made = await plugin.credential(refused)
        headers = {"Authorization": f"Bearer {made.token}"} if made.token else {}
        return _Who(made.context, headers, made)

    def _credentials(self, server: str) -> dict[str, str]:
        """Read for each request: the kubelet replaces a token before it expires."""
        if not server.startswith("https:"):
            return {}
        if self._config is None:
            token = Path(self._settings.token_file).read_text().strip()
        elif self._config.token_file:
            token = Path(self._config.token_file).read_text().strip()
        else:
            token = self._config.token
        return {"Authorization": f"Bearer {token}"} if token else {}


def _checked(server: str, where: str) -> str:
    parts = urlsplit(server)
    if parts.scheme == "https" and parts.hostname:
        return server.rstrip("/")
    if parts.scheme == "http" and parts.hostname and _is_loopback(parts.hostname):
        return server.rstrip("/")
    raise ValueError(f"{where}: expected https://HOST:PORT, got {server!r}")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _end(server: str) -> tuple[str, int]:
    parts = urlsplit(server)
    return parts.hostname or "", parts.port or 443


def _service() -> str:
    """The service's address from the environment: it works where something serves it already."""
    host, port = (
        os.environ.get("KUBERNETES_SERVICE_HOST"),
        os.environ.get("KUBERNETES_SERVICE_PORT"),
    )
    return discover.url((host, int(port))) if host and port and port.isdigit() else ""


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """Notice within half a minute that nobody is there any more: a watch sends nothing itself."""
    connection = response.connection
    transport = connection.transport if connection is not None else None
    raw = transport.get_extra_info("socket") if transport is not None else None
    if raw is None:
        return
    with contextlib.suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    body = await response.content.read(1 << 16)
    try:
        status = msgspec.json.decode(body, type=_Status)
    except msgspec.MsgspecError:
        status = _Status(body[:200].decode(errors="replace"))
    pause = response.headers.get("Retry-After", "")
    return ApiError(
        response.status, status.reason, status.message, float(pause) if pause.isdecimal() else None
    )

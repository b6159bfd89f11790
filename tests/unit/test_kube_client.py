"""Who is asked, what it must prove, and what it is told: TLS, tokens, kubeconfig, discovery."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lockgate.kube import discover, kubeconfig
from lockgate.kube.client import AWAY, ApiError, Client, Settings
from lockgate.kube.proxy import proxy_of
from tests.apiserver import ApiServer
from tests.certificates import Certificates

NODES = "/api/v1/nodes"


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("others"), "others")


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    made = ApiServer()
    yield made
    await made.stop()


def settings(ours: Certificates, folder: Path, server: str = "", token: str = "secret") -> Settings:
    (folder / "token").write_text(token + "\n")
    return Settings(api_server=server, ca_file=str(ours.ca), token_file=str(folder / "token"))


def tokens(server: ApiServer) -> list[str | None]:
    return [headers.get("Authorization") for _, _, headers in server.requests]


async def test_a_token_is_read_again_when_it_was_rotated(
    ours: Certificates, server: ApiServer, tmp_path: Path
) -> None:
    url = await server.start(ssl=ours.server(discover.SERVER_NAME))
    client = Client(settings(ours, tmp_path, url))
    await client.call("GET", NODES)
    (tmp_path / "token").write_text("newer")
    await client.call("GET", NODES)
    await client.close()
    assert tokens(server) == ["Bearer secret", "Bearer newer"]


async def test_a_proxy_with_a_certificate_for_its_own_name(
    ours: Certificates, server: ApiServer, tmp_path: Path
) -> None:
    url = await server.start(ssl=ours.server("127.0.0.1"))
    client = Client(settings(ours, tmp_path, url))
    await client.call("GET", NODES)
    await client.close()


@pytest.mark.parametrize("whose, name", [("others", discover.SERVER_NAME), ("ours", "kubelet")])
async def test_a_server_that_proves_nothing_gets_no_token(
    whose: str,
    name: str,
    server: ApiServer,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    ours: Certificates,
) -> None:
    url = await server.start(ssl=request.getfixturevalue(whose).server(name))
    client = Client(settings(ours, tmp_path, url))
    with pytest.raises(AWAY):
        await client.call("GET", NODES)
    await client.close()
    assert server.requests == []


@pytest.mark.parametrize("url", ["http://10.0.0.1:8080", "10.0.0.1:6443", "ftp://x"])
def test_addresses_that_would_be_open_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"kubernetes\.apiServer: expected https://"):
        Client(Settings(api_server=url))


async def test_a_refusal_says_why(ours: Certificates, server: ApiServer, tmp_path: Path) -> None:
    client = Client(Settings(api_server=await server.start()))
    server.refuse = 403
    with pytest.raises(ApiError, match="403 Refused") as caught:
        await client.call("GET", NODES)
    assert caught.value.status == 403
    await client.close()
    assert tokens(server) == []


@pytest.mark.parametrize(("times", "answers"), [(4, True), (5, False)])
async def test_a_busy_server_is_asked_again_but_not_for_ever(
    server: ApiServer, times: int, answers: bool
) -> None:
    client = Client(Settings(api_server=await server.start()))
    server.busy = times
    if answers:
        assert await client.call("GET", NODES)
    else:
        with pytest.raises(ApiError, match="429 TooManyRequests"):
            await client.call("GET", NODES)
    await client.close()


async def test_the_server_is_found_among_the_nodes_connections(
    ours: Certificates,
    others: Certificates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    foreign, right = ApiServer(), ApiServer()
    await foreign.start(ssl=others.server(discover.SERVER_NAME))
    await right.start(ssl=ours.server(discover.SERVER_NAME))
    # What the kubelet would hold: connections that stay.
    held = [socket.create_connection(("127.0.0.1", one.port)) for one in (foreign, right)]
    state = tmp_path / "state"
    state.mkdir()
    ends = [("127.0.0.1", foreign.port), ("127.0.0.1", right.port)]
    assert set(ends) <= set(discover.remote_ends())
    monkeypatch.setattr(discover, "remote_ends", lambda: ends)
    client = Client(settings(ours, tmp_path), state)
    await client.call("GET", NODES)
    await client.close()
    assert foreign.requests == [] and len(right.requests) == 1
    assert (state / "apiserver").read_text() == f"https://127.0.0.1:{right.port}\n"
    # Next time it is known already.
    monkeypatch.setattr(discover, "remote_ends", list)
    client = Client(settings(ours, tmp_path), state)
    await client.call("GET", NODES)
    await client.close()
    for one in held:
        one.close()
    await foreign.stop()
    await right.stop()


async def test_no_server_is_found(
    ours: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(discover, "remote_ends", list)
    client = Client(settings(ours, tmp_path))
    with pytest.raises(ConnectionError, match=r"kubernetes\.apiServer"):
        await client.call("GET", NODES)
    await client.close()


def test_remote_ends_of_both_families(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st\n"
    (tmp_path / "tcp").write_text(
        f"{head}   0: 0100007F:1F90 00000000:0000 0A 0\n"
        "   1: 0A4DA8C0:9C40 014DA8C0:1F90 01 0\n"
        "   2: 0A4DA8C0:9C42 014DA8C0:192B 01 0\n"
    )
    mapped = "0000000000000000FFFF0000" + "024DA8C0"
    local = "000080FE" + "0" * 23 + "1"
    (tmp_path / "tcp6").write_text(
        f"{head}   0: {mapped}:9C40 {mapped}:01BB 01 0\n"
        f"   1: {mapped}:9C40 0000DDFD0000000000000000{'01000000'}:192B 01 0\n"
        f"   2: {mapped}:9C40 {local}:192B 01 0\n"
    )
    assert discover.remote_ends(tmp_path) == [
        ("192.168.77.1", 6443),
        ("fddd::1", 6443),
        ("192.168.77.2", 443),
        ("192.168.77.1", 8080),
    ]


# ---- kubeconfig ------------------------------------------------------------------------


def config(path: Path, cluster: dict[str, Any], user: dict[str, Any]) -> Path:
    text = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "n"}}],
        "clusters": [{"name": "k", "cluster": cluster}],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(json.dumps(text))
    return path


async def test_a_client_certificate_of_a_kubeconfig(
    ours: Certificates, server: ApiServer, tmp_path: Path
) -> None:
    context = ours.server("127.0.0.1")
    context.load_verify_locations(ours.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    url = await server.start(ssl=context)
    certificate, key = ours.issue("admin")
    path = config(
        tmp_path / "config",
        {"server": url, "certificate-authority": str(ours.ca)},
        {
            "client-certificate-data": base64.b64encode(certificate.read_bytes()).decode(),
            "client-key-data": base64.b64encode(key.read_bytes()).decode(),
        },
    )
    client = Client(Settings(kubeconfig=str(path)))
    await client.call("GET", NODES)
    await client.close()


async def test_a_token_file_of_a_kubeconfig(
    ours: Certificates, server: ApiServer, tmp_path: Path
) -> None:
    url = await server.start(ssl=ours.server("api.example"))
    (tmp_path / "token").write_text("mine\n")
    cluster = {
        "server": url,
        "tls-server-name": "api.example",
        "certificate-authority-data": base64.b64encode(ours.ca.read_bytes()).decode(),
    }
    client = Client(
        Settings(kubeconfig=str(config(tmp_path / "config", cluster, {"tokenFile": "token"})))
    )
    await client.call("GET", NODES)
    await client.close()
    assert tokens(server) == ["Bearer mine"]


REFUSED = {
    "insecure": (
        {"server": "https://x", "insecure-skip-tls-verify": True},
        {},
        "insecure-skip-tls-verify",
    ),
    "a password": ({"server": "https://x"}, {"username": "x"}, r"users\.user\.username"),
    "no address": ({}, {}, "field server"),
    "no such file": ({"server": "https://x", "certificate-authority": "nowhere"}, {}, "nowhere"),
    "no base64": ({"server": "https://x", "certificate-authority-data": "%"}, {}, "certificates"),
}


@pytest.mark.parametrize("cluster, user, text", REFUSED.values(), ids=REFUSED.keys())
def test_kubeconfigs_that_are_refused(
    tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        kubeconfig.read([config(tmp_path / "config", cluster, user)])


def part(path: Path, current: str, **tables: dict[str, dict[str, Any]]) -> Path:
    """A kubeconfig of a few entries: tables of name → value."""
    text: dict[str, Any] = {"current-context": current}
    for table, entries in tables.items():
        text[table] = [{"name": name, table[:-1]: value} for name, value in entries.items()]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(text))
    return path


def test_several_files_are_one_and_the_first_entry_of_a_name_counts(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    first = part(
        tmp_path / "one/config",
        "",
        clusters={"k": {"server": "https://first", "tls-server-name": ""}},
        users={"u": {"token": "first"}},
    )
    second = part(
        tmp_path / "two/config",
        "c",
        contexts={"c": {"cluster": "k", "user": "u"}, "d": {"cluster": "l", "user": "v"}},
        clusters={
            "k": {"server": "https://second", "tls-server-name": "second"},
            "l": {"server": "https://only"},
        },
        users={"u": {"token": "second", "tokenFile": "x"}, "v": {"tokenFile": "token"}},
    )
    third = part(tmp_path / "three", "d", contexts={"d": {"cluster": "k", "user": "u"}})
    files = [first, second, third]
    found = kubeconfig.read(files)
    # Whole entries: nothing of the second file's is mixed in.
    assert (found.server, found.server_name) == ("https://first", "")
    assert (found.token, found.token_file) == ("first", "")
    other = kubeconfig.read(files, "d")
    assert other.server == "https://only"
    assert other.token_file == str(tmp_path / "two/token")
    with pytest.raises(ValueError, match=r"config and .*, field contexts: .* named 'x'"):
        kubeconfig.read(files, "x")


# ---- Proxies ---------------------------------------------------------------------------

PROXY = "http://proxy.example:3128"
SERVER = "https://api.example:6443"
PROXIES: dict[str, tuple[str, str, dict[str, str], str]] = {
    "none": (SERVER, "", {}, ""),
    "the kubeconfig's": (SERVER, PROXY, {"HTTPS_PROXY": "http://other:1"}, PROXY),
    "the kubeconfig's, whatever is excluded": (SERVER, PROXY, {"NO_PROXY": "*"}, PROXY),
    "the environment's": (SERVER, "", {"HTTPS_PROXY": PROXY}, PROXY),
    "the environment's in small letters": (SERVER, "", {"https_proxy": PROXY}, PROXY),
    "without a scheme": (SERVER, "", {"HTTPS_PROXY": "proxy.example:3128"}, PROXY),
    "of plain HTTP": (SERVER, "", {"HTTP_PROXY": PROXY}, ""),
    "to loopback": ("https://127.0.0.1:6443", "", {"HTTPS_PROXY": PROXY}, ""),
    **{
        f"{server} without {excluded}": (
            f"https://{server}",
            "",
            {"HTTPS_PROXY": PROXY, "NO_PROXY": f"x, {excluded}"},
            "" if direct else PROXY,
        )
        for server, excluded, direct in (
            ("api.example", "*", True),
            ("api.example", "api.example", True),
            ("api.example", "example", True),
            ("api.example", ".example", True),
            ("api.example", "*.example", True),
            ("api.example", "*.EXAMPLE:443", True),
            ("api.example", "pi.example", False),
            ("api.example", ".api.example", False),
            ("api.example", "*.api.example", False),
            ("api.example", "*example", False),
            ("api.example", ":443", False),
            ("api.example", ".", False),
            ("api.example:6443", "api.example:6443", True),
            ("api.example:6443", "api.example:443", False),
            ("api.example:6443", "api.example:", True),
            ("10.0.0.7", "10.0.0.7", True),
            ("10.0.0.7", "10.0.0.0/24", True),
            ("10.0.1.7", "10.0.0.0/24", False),
            ("10.0.0.7:6443", "10.0.0.7:6443", True),
            ("[fd00::7]:6443", "fd00::/64", True),
            ("[fd00::7]:6443", "fd00::7", True),
            ("[fd00::7]:6443", "[fd00::7]:6443", True),
            ("[fd00::7]:6443", "FD00:0::7", True),
            ("[fd00:0::7]", "[fd00::0:7]:443", True),
            ("[fd00::7]:6443", "[fd00:0::7]:443", False),
            ("[fd00::7]:6443", "[fd00::7]", False),
            ("[fd00::7]:6443", "fd00::8", False),
            ("[::ffff:10.0.0.7]", "10.0.0.7", True),
            ("[::ffff:10.0.0.7]", "10.0.0.0/24", True),
            ("10.0.0.7", ".7", False),
            ("[fd00::7]:6443", "10.0.0.0/8", False),
        )
    },
}


@pytest.mark.parametrize("case", PROXIES.values(), ids=PROXIES.keys())
def test_the_proxy_is_the_one_that_kubectl_takes(
    case: tuple[str, str, dict[str, str], str],
) -> None:
    server, given, environment, expected = case
    assert proxy_of(server, given, environment) == expected


@pytest.mark.parametrize("url", ["socks5://me:secret@x:1080", "https://me:secret@x:443"])
def test_proxies_that_are_not_spoken_are_refused_by_name(tmp_path: Path, url: str) -> None:
    cluster = {"server": SERVER, "proxy-url": url}
    with pytest.raises(ValueError, match=r"field proxy-url: expected a proxy http://") as caught:
        kubeconfig.read([config(tmp_path / "config", cluster, {})])
    assert "secret" not in str(caught.value)


@pytest.fixture
async def proxy(server: ApiServer) -> AsyncIterator[Tunnels]:
    one = Tunnels(server)
    listener = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    yield one
    listener.close()


class Tunnels:
    """A proxy that takes CONNECT and leads to the server, whatever it is called."""

    def __init__(self, server: ApiServer) -> None:
        self.url = ""
        self.asked: list[str] = []
        self._server = server

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head.split(b"\r\n")[0].decode())
        there, back = await asyncio.open_connection("127.0.0.1", self._server.port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

        async def copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    to.write(data)
                    await to.drain()
            to.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))


async def test_requests_and_websockets_go_by_the_proxy(
    ours: Certificates, server: ApiServer, proxy: Tunnels, tmp_path: Path
) -> None:
    await server.start(ssl=ours.server("api.example"))
    cluster = {
        "server": SERVER,  # a name that nobody here knows
        "certificate-authority": str(ours.ca),
        "proxy-url": proxy.url,
    }
    client = Client(Settings(kubeconfig=str(config(tmp_path / "config", cluster, {}))))
    await client.call("GET", NODES)
    path = "/api/v1/namespaces/a/pods/b/exec"
    async with client.websocket(path, [("command", "true")], ["v5.channel.k8s.io"]) as wire:
        await wire.send_bytes(b"said")
        assert (await wire.receive(5)).data == b"said"
    await client.close()
    assert set(proxy.asked) == {"CONNECT api.example:6443 HTTP/1.1"}

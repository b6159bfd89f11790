"""Users whose credentials a command makes, with a real command and a server with TLS."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lockgate.kube import kubeconfig
from lockgate.kube.client import ApiError, Client, Settings
from lockgate.kube.exec_plugin import CredentialError
from tests.apiserver import ApiServer
from tests.certificates import Certificates

NODES = "/api/v1/nodes"
GROUP = "client.authentication.k8s.io"
PAST, FUTURE = "2020-01-01T00:00:00Z", "2999-01-01T00:00:00Z"

# Keeps what it was told, and answers with a file that lies beside it.
SCRIPT = """#!/bin/sh
cd "$(dirname "$0")" || exit
printf '%s\\n' "$KUBERNETES_EXEC_INFO" >>told
printf '%s|' "$@" "$EXTRA" >arguments
test -e ask && read -r typed && printf %s "$typed" >typed
test -e status && exit "$(cat status)"
cat answer
"""


class Script:
    """The plugin, as a file, and a kubeconfig of a user who has it."""

    def __init__(self, folder: Path, ca: Path, url: str = "https://127.0.0.1:1") -> None:
        self.folder = folder
        self.cluster: dict[str, Any] = {"server": url, "certificate-authority": str(ca)}
        self.exec: dict[str, Any] = {
            "command": "./plugin",
            "apiVersion": f"{GROUP}/v1",
            "interactiveMode": "IfAvailable",
            "args": None,
            "env": None,
        }
        self.user: dict[str, Any] = {"exec": self.exec}
        (folder / "plugin").write_text(SCRIPT)
        (folder / "plugin").chmod(0o755)
        self.answer(token="first")

    def answer(self, **status: str) -> None:
        version = self.exec["apiVersion"]
        self.write({"kind": "ExecCredential", "apiVersion": version, "status": status})

    def write(self, answer: Any) -> None:
        (self.folder / "answer").write_text(json.dumps(answer))

    @property
    def config(self) -> Path:
        path = self.folder / "config"
        text = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "maria"}}],
            "clusters": [{"name": "k", "cluster": self.cluster}],
            "users": [{"name": "maria", "user": self.user}],
        }
        path.write_text(json.dumps(text))
        return path

    def client(self) -> Client:
        return Client(Settings(kubeconfig=str(self.config)))

    def told(self) -> list[dict[str, Any]]:
        """KUBERNETES_EXEC_INFO of each run."""
        path = self.folder / "told"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture
async def server(ours: Certificates) -> AsyncIterator[ApiServer]:
    made = ApiServer()
    context = ours.server("127.0.0.1")
    context.load_verify_locations(ours.ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    await made.start(ssl=context)
    yield made
    await made.stop()


@pytest.fixture
async def script(tmp_path: Path, ours: Certificates, server: ApiServer) -> Script:
    return Script(tmp_path, ours.ca, f"https://127.0.0.1:{server.port}")


def tokens(server: ApiServer) -> list[str | None]:
    return [headers.get("Authorization") for _, _, headers in server.requests]


async def test_a_token_serves_all_requests_until_it_is_refused(
    script: Script, server: ApiServer
) -> None:
    client = script.client()
    await asyncio.gather(*(client.call("GET", NODES) for _ in range(5)))
    assert tokens(server) == ["Bearer first"] * 5 and len(script.told()) == 1
    server.accept = "second"
    script.answer(token="second", expirationTimestamp=FUTURE)
    await asyncio.gather(*(client.call("GET", NODES) for _ in range(5)))
    await client.close()
    assert tokens(server)[5:] == ["Bearer second"] * 5 and len(script.told()) == 2


async def test_a_failure_is_told_to_all_who_waited_for_it_and_tried_again_by_the_next(
    script: Script, server: ApiServer
) -> None:
    (script.folder / "status").write_text("3")
    client = script.client()
    calls = (client.call("GET", NODES) for _ in range(5))
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert {str(one).rpartition(" ")[2] for one in found} == {"3"} and len(script.told()) == 1
    (script.folder / "status").unlink()
    await client.call("GET", NODES)
    await client.close()
    assert tokens(server) == ["Bearer first"] and len(script.told()) == 2


async def test_a_credential_that_is_refused_again_is_not_asked_for_a_third_time(
    script: Script, server: ApiServer
) -> None:
    server.accept = "another"
    client = script.client()
    with pytest.raises(ApiError, match="401 Unauthorized"):
        await client.call("GET", NODES)
    await client.close()
    assert len(script.told()) == 2


@pytest.mark.parametrize("expires, runs", [(PAST, 3), (FUTURE, 1)])
async def test_a_credential_lasts_until_it_expires(expires: str, runs: int, script: Script) -> None:
    script.answer(token="first", expirationTimestamp=expires)
    client = script.client()
    for _ in range(3):
        await client.call("GET", NODES)
    await client.close()
    assert len(script.told()) == runs


async def test_a_websocket_with_a_token_that_was_renewed(script: Script, server: ApiServer) -> None:
    client = script.client()
    await client.call("GET", NODES)
    server.accept = "second"
    script.answer(token="second")
    path = "/api/v1/namespaces/n/pods/p/exec"
    async with client.websocket(path, [("command", "x")], ["v5.channel.k8s.io"]) as wire:
        await wire.send_bytes(b"hello")
        assert (await wire.receive()).data == b"hello"
    await client.close()
    assert len(script.told()) == 2


async def test_client_certificates_are_exchanged_when_they_expire(
    script: Script, server: ApiServer, ours: Certificates
) -> None:
    client = script.client()
    for name in ("anna", "berta"):
        certificate, key = ours.issue(name)
        script.answer(
            clientCertificateData=certificate.read_text(),
            clientKeyData=key.read_text(),
            expirationTimestamp=PAST,
        )
        await client.call("GET", NODES)
    await client.close()
    assert server.clients == ["anna", "berta"] and tokens(server) == [None, None]


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
async def test_what_the_command_is_told(
    version: str, script: Script, ours: Certificates, server: ApiServer
) -> None:
    script.exec |= {
        "apiVersion": f"{GROUP}/{version}",
        "provideClusterInfo": True,
        "args": ["get-token", "a b"],
        "env": [{"name": "EXTRA", "value": "more"}],
    }
    if version == "v1beta1":
        del script.exec["interactiveMode"]
    extension = {"name": f"{GROUP}/exec", "extension": {"audience": "x"}}
    script.cluster |= {"tls-server-name": "127.0.0.1", "extensions": [extension]}
    script.answer(token="first")
    client = script.client()
    await client.call("GET", NODES)
    await client.close()
    assert (script.folder / "arguments").read_text() == "get-token|a b|more|"
    assert script.told() == [
        {
            "kind": "ExecCredential",
            "apiVersion": f"{GROUP}/{version}",
            "spec": {
                "interactive": False,
                "cluster": {
                    "server": f"https://127.0.0.1:{server.port}",
                    "tls-server-name": "127.0.0.1",
                    "certificate-authority-data": base64.b64encode(ours.ca.read_bytes()).decode(),
                    "config": {"audience": "x"},
                },
            },
        }
    ]


async def test_the_cluster_is_not_told_unasked(script: Script) -> None:
    client = script.client()
    await client.call("GET", NODES)
    await client.close()
    assert "cluster" not in script.told()[0]["spec"]


@pytest.mark.parametrize("mode, asks", [("Always", True), ("IfAvailable", True), ("Never", False)])
async def test_a_command_may_ask_at_a_terminal(mode: str, asks: bool, script: Script) -> None:
    script.exec["interactiveMode"] = mode
    (script.folder / "ask").touch()
    ours, its = os.openpty()
    kept = os.dup(0)
    os.dup2(its, 0)
    try:
        os.write(ours, b"password\n")
        client = script.client()
        await client.call("GET", NODES)
        await client.close()
    finally:
        os.dup2(kept, 0)
        for fd in (kept, ours, its):
            os.close(fd)
    assert script.told()[0]["spec"]["interactive"] is asks
    typed = script.folder / "typed"
    assert (typed.read_text() if typed.exists() else "") == ("password" if asks else "")


async def test_a_token_in_the_file_needs_no_command(script: Script, server: ApiServer) -> None:
    script.user["token"] = "written"
    client = script.client()
    await client.call("GET", NODES)
    await client.close()
    assert tokens(server) == ["Bearer written"] and script.told() == []


def answered(**fields: Any) -> dict[str, Any]:
    return {"kind": "ExecCredential", "apiVersion": f"{GROUP}/v1", **fields}


BAD_ANSWERS = {
    "no JSON": ("%", "answered no ExecCredential"),
    "another kind": (answered(kind="Status"), "kind 'Status'"),
    "another version": (answered(apiVersion=f"{GROUP}/v1beta1"), "expected '.*/v1'"),
    "nothing": (answered(status={}), "answered no credential"),
    "no status": (answered(), "answered no credential"),
    "half a pair": (answered(status={"clientKeyData": "x"}), "expected both"),
    "no certificate": (
        answered(status={"clientCertificateData": "x", "clientKeyData": "y"}),
        "a certificate that can't be used",
    ),
    "two lines": (answered(status={"token": "a\nb: c"}), "no HTTP header"),
    "no time": (answered(status={"token": "a", "expirationTimestamp": "soon"}), "no ExecCred"),
}


@pytest.mark.parametrize("answer, text", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
async def test_answers_that_are_no_credential(
    answer: Any, text: str, script: Script, server: ApiServer
) -> None:
    script.write(answer)
    client = script.client()
    with pytest.raises(CredentialError, match=f"config, user 'maria': .*/plugin .*{text}"):
        await client.call("GET", NODES)
    await client.close()
    assert server.requests == []


FAILING: dict[str, tuple[dict[str, Any], str]] = {
    "not in PATH": (
        {"command": "lockgate-no-such-plugin", "installHint": "Install it\nfrom there"},
        "lockgate-no-such-plugin is not in PATH\n\nInstall it\nfrom there",
    ),
    "not there": ({"command": "./nowhere", "installHint": "H"}, "is not an executable file\n\nH"),
    "no terminal": ({"interactiveMode": "Always"}, "standard input is no terminal"),
    "it fails": ({"args": []}, "/plugin failed with exit code 3"),
}


@pytest.mark.parametrize("change, text", FAILING.values(), ids=FAILING.keys())
async def test_commands_that_fail(change: dict[str, Any], text: str, script: Script) -> None:
    script.exec |= change
    (script.folder / "status").write_text("3")
    client = script.client()
    nothing = os.open(os.devnull, os.O_RDONLY)
    kept = os.dup(0)
    os.dup2(nothing, 0)
    try:
        with pytest.raises(CredentialError) as caught:
            await client.call("GET", NODES)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(nothing)
    await client.close()
    assert text in str(caught.value)
    assert f"{script.config}, user 'maria': the plugin" in str(caught.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no command": ({"command": ""}, "exec.command"),
    "a version that kubectl dropped": ({"apiVersion": f"{GROUP}/v1alpha1"}, "exec.apiVersion"),
    "no mode, in v1": ({"interactiveMode": None}, "exec.interactiveMode: expected Never, "),
    "an unknown mode": ({"interactiveMode": "Maybe"}, "exec.interactiveMode"),
    "a number as argument": ({"args": [1]}, r"exec.args\[0\]"),
    "a variable without a name": ({"env": [{"value": "x"}]}, r"exec.env\[0\]"),
}


@pytest.mark.parametrize("change, text", REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_are_refused(
    change: dict[str, Any], text: str, tmp_path: Path, ours: Certificates
) -> None:
    script = Script(tmp_path, ours.ca)
    script.exec |= change
    with pytest.raises(ValueError, match=f"config, user 'maria', field .*{text}"):
        kubeconfig.read([script.config])

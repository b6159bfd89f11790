"""What CNI says: requests, results by version, errors. Pure.

The words are those of the CNI specification (SPEC.md, versions 0.4.0, 1.0.0, 1.1.0). Versions
0.3.x are refused: they have no CHECK, and no runtime needs them any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import ip_address
from typing import Any

from lockgate.net.links import GATEWAY4, GATEWAY6
from lockgate.net.pods import PodLink, Seal

__all__ = ["VERSIONS", "CniError", "Code", "Request", "attachments", "result", "versions"]

VERSIONS = ("0.4.0", "1.0.0", "1.1.0")
_COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")
_OF_A_CONTAINER = ("ADD", "DEL", "CHECK")
_SINCE = {"GC": "1.1.0", "STATUS": "1.1.0"}
# SPEC.md, Section 2: "must start with an alphanumeric character, …".
_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_IFNAME_MAX = 15


class Code(IntEnum):
    """SPEC.md, Error; from 100 on our own."""

    INCOMPATIBLE_VERSION = 1
    UNKNOWN_CONTAINER = 3
    INVALID_ENVIRONMENT = 4
    DECODING = 6
    INVALID_CONFIG = 7
    INVALID_NETNS = 8
    TRY_AGAIN = 11
    NOT_AVAILABLE = 50
    LIMITED_CONNECTIVITY = 51
    KERNEL = 100  # the kernel refused
    NOT_OURS = 101  # the pod was deleted, or belongs to another node
    EXHAUSTED = 102  # no address or slot is left
    CHECK_FAILED = 103  # CHECK found the pod's wiring damaged


class CniError(Exception):
    """One error object."""

    def __init__(self, code: Code, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code, self.details = code, details

    def object(self, version: str) -> dict[str, Any]:
        answer = {"cniVersion": version, "code": int(self.code), "msg": str(self)}
        return {**answer, "details": self.details} if self.details else answer


@dataclass(frozen=True, slots=True)
class Request:
    """A valid request. `uid` may be "": some runtimes tell a pod's name only."""

    command: str
    version: str
    config: Mapping[str, Any]
    container: str = ""
    ifname: str = ""
    netns: str = ""  # the path as the runtime has it; not to be opened here
    uid: str = ""
    namespace: str = ""
    pod: str = ""

    @property
    def sandbox(self) -> str:
        return f"{self.container}/{self.ifname}"

    @classmethod
    def read(cls, data: bytes) -> Request:
        """From what the plugin sent (cni/lockgate-cni.c). CniError."""
        head, end, stdin = data.partition(b"\0\0")
        if not end:
            # No variable at all: the empty record comes first.
            head, stdin = b"", data[1:]
        try:
            pairs = [one.partition("=") for one in head.decode().split("\0")]
        except UnicodeDecodeError as error:
            raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_*: no UTF-8: {error}") from None
        variables = {name: value for name, _, value in pairs}
        command = variables.get("CNI_COMMAND", "")
        if command not in _COMMANDS:
            raise CniError(
                Code.INVALID_ENVIRONMENT,
                f"CNI_COMMAND: expected one of {', '.join(_COMMANDS)}, got {command!r}",
            )
        config = _config(stdin)
        version = _version(command, config)
        if command not in _OF_A_CONTAINER:
            return cls(command, version, config)
        return cls._of_a_container(command, version, config, variables)

    @classmethod
    def _of_a_container(
        cls, command: str, version: str, config: Mapping[str, Any], variables: Mapping[str, str]
    ) -> Request:
        container = variables.get("CNI_CONTAINERID", "")
        if not _CONTAINER.fullmatch(container):
            raise _bad("CNI_CONTAINERID", "a container id", container)
        ifname = variables.get("CNI_IFNAME", "")
        if not 0 < len(ifname.encode()) <= _IFNAME_MAX or re.search(r"[/:\s]", ifname):
            raise _bad("CNI_IFNAME", "an interface name", ifname)
        if ifname in (".", "..", "lo"):
            raise _bad("CNI_IFNAME", "an interface name that is free", ifname)
        netns = variables.get("CNI_NETNS", "")
        if not netns and command != "DEL":
            raise _bad("CNI_NETNS", "the path of a network namespace", netns)
        items = variables.get("CNI_ARGS", "").split(";")
        args = {name: value for name, _, value in (item.partition("=") for item in items)}
        uid = args.get("K8S_POD_UID", "")
        namespace, pod = args.get("K8S_POD_NAMESPACE", ""), args.get("K8S_POD_NAME", "")
        if command == "ADD" and not uid and not (namespace and pod):
            raise _bad("CNI_ARGS", "K8S_POD_UID, or K8S_POD_NAMESPACE and K8S_POD_NAME", "")
        if not Seal.fits(uid, f"{container}/{ifname}"):
            raise _bad("CNI_CONTAINERID", "at most 100 characters", container)
        if command == "CHECK" and not isinstance(config.get("prevResult"), dict):
            raise CniError(Code.INVALID_CONFIG, "prevResult: CHECK needs what ADD answered")
        if command == "ADD" and config.get("prevResult") is not None:
            raise CniError(
                Code.INVALID_CONFIG,
                "prevResult: lockgate-cni must be the first plugin of the list",
                "Another plugin has given the pod an interface that no policy would judge.",
            )
        return cls(command, version, config, container, ifname, netns, uid, namespace, pod)


def _bad(name: str, expected: str, value: str) -> CniError:
    return CniError(Code.INVALID_ENVIRONMENT, f"{name}: expected {expected}, got {value!r}")


def _config(stdin: bytes) -> Mapping[str, Any]:
    try:
        config = json.loads(stdin)
    except ValueError as error:
        raise CniError(Code.DECODING, f"the configuration on stdin is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise CniError(Code.DECODING, "the configuration on stdin is no JSON object")
    return config


def _version(command: str, config: Mapping[str, Any]) -> str:
    version = config.get("cniVersion", "0.1.0")  # as SPEC.md has it for none
    if command == "VERSION":
        return version if isinstance(version, str) else VERSIONS[-1]
    if version not in VERSIONS:
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            f"cniVersion: {version!r} is not supported",
            f"Supported are {', '.join(VERSIONS)}.",
        )
    if version < _SINCE.get(command, ""):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_COMMAND: {version} has no {command}")
    return str(version)


def versions(version: str) -> dict[str, Any]:
    """What VERSION answers."""
    return {"cniVersion": version, "supportedVersions": list(VERSIONS)}


def result(request: Request, link: PodLink) -> dict[str, Any]:
    """What ADD answers, in the request's version."""
    ours: dict[str, Any] = {"name": link.name, "mac": link.host_mac.hex(":")}
    pods: dict[str, Any] = {
        "name": link.ifname,
        "mac": link.pod_mac.hex(":"),
        "sandbox": request.netns,
    }
    if request.version >= "1.1.0":
        ours["mtu"] = pods["mtu"] = link.mtu
    answer: dict[str, Any] = {
        "cniVersion": request.version,
        "interfaces": [ours, pods],
        "ips": [_ip(ip, request.version) for ip in link.addresses],
        "routes": [
            {"dst": "::/0", "gw": GATEWAY6} if ":" in ip else {"dst": "0.0.0.0/0", "gw": GATEWAY4}
            for ip in link.addresses
        ],
        "dns": request.config.get("dns") or {},
    }
    return answer


def _ip(ip: str, version: str) -> dict[str, Any]:
    six = ":" in ip
    one: dict[str, Any] = {
        "address": f"{ip}/{128 if six else 32}",
        "gateway": GATEWAY6 if six else GATEWAY4,
        "interface": 1,
    }
    # 1.0.0 did away with it.
    return {"version": "6" if six else "4", **one} if version < "1.0.0" else one


def attachments(config: Mapping[str, Any]) -> set[str] | None:
    """The sandboxes that GC is to leave. None: the key is missing, as with libcni 1.3 when the
    runtime names none; it deletes by itself what it knows of then, and no other pod is to go."""
    key = "cni.dev/valid-attachments"
    if key not in config:
        return None
    try:
        return {f"{one['containerID']}/{one['ifname']}" for one in config[key] or []}
    except (KeyError, TypeError) as error:
        raise CniError(
            Code.INVALID_CONFIG, f"{key}: expected a list of {{containerID, ifname}}: {error}"
        ) from None


def lost_addresses(prev: Mapping[str, Any], ips: tuple[str, ...]) -> list[str]:
    """Which of a pod's addresses are not in what ADD answered once, one sentence each."""
    told = set()
    for one in prev.get("ips") or []:
        try:
            told.add(ip_address(str(one["address"]).partition("/")[0]))
        except (KeyError, TypeError, ValueError):
            raise CniError(Code.INVALID_CONFIG, f"prevResult.ips: {one!r}: no address") from None
    return [
        f"prevResult does not have the pod's address {ip}"
        for ip in ips
        if ip_address(ip) not in told
    ]

"""What the system tests share: a cluster from manifests, and sockets anywhere in it.

A *place* is a network namespace together with a cgroup: a pod, a node, the outside. Its
`socket()` is an ordinary Python socket that lives there (and so in reach of the hooks there),
used from the test's own process. Nothing here sleeps for luck: `until` waits for a condition.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lockgate.cli.common import call, stream
from lockgate.standalone.state import State, cgroup2
from lockgate.standalone.underlay import OUTSIDE4, OUTSIDE6

__all__ = [
    "ROOT",
    "Cluster",
    "Place",
    "Pod",
    "connected",
    "family_of",
    "manifest",
    "need_root",
    "unique_name",
    "until",
]

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 10.0
#: Commands that have commands.
GROUPS = ("service",)
T = TypeVar("T")

# Answers "FAMILY TYPE PROTOCOL\n" with a socket, or with an errno. Runs where it was put.
_OPENER = r"""
import os, socket, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as file:
    file.write("0")
fd = os.open(sys.argv[2], os.O_RDONLY)
if hasattr(os, "setns"):
    os.setns(fd, 0x40000000)
else:
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, 0x40000000):
        sys.exit("setns: " + os.strerror(ctypes.get_errno()))
os.close(fd)
wire = socket.socket(fileno=0)
wire.send(b"0")
while (line := wire.recv(64)):
    try:
        made = socket.socket(*map(int, line.split()))
    except OSError as error:
        wire.send(b"%d" % error.errno)
        continue
    socket.send_fds(wire, [b"0"], [made.fileno()])
    made.close()
    wire.send(b"closed")
"""


def need_root() -> bool:
    return os.geteuid() != 0


def unique_name(letter: str = "t") -> str:
    """A cluster's name that no other run uses: `t` and this process."""
    return f"{letter}{os.getpid()}"


def until(condition: Callable[[], T], what: str = "the condition", deadline: float = DEADLINE) -> T:
    """The first true value of `condition`, tried again and again; fails after `deadline` s."""
    end = time.monotonic() + deadline
    pause = 0.002
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline} s: {what} (last: {value!r})")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return value


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Place:
    """A network namespace and a cgroup. `close` ends its helper, not the sockets."""

    def __init__(self, netns: Path, cgroup: Path) -> None:
        self.netns = netns
        self.cgroup = cgroup
        self._wire: socket.socket | None = None
        self._helper: subprocess.Popen[bytes] | None = None

    def socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """A socket of this place; it blocks for DEADLINE seconds at most."""
        if self._wire is None:
            self._wire, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                argv = [sys.executable, "-I", "-S", "-c", _OPENER, str(self.cgroup)]
                self._helper = subprocess.Popen([*argv, str(self.netns)], stdin=theirs)
            assert self._wire.recv(8) == b"0", f"no helper in {self.netns}"
        self._wire.send(b"%d %d %d" % (family, kind, protocol))
        answer, fds, _, _ = socket.recv_fds(self._wire, 16, 1)
        if not fds:
            number = int(answer or b"32")
            raise OSError(number, os.strerror(number))
        self._wire.recv(16)  # the helper's copy is closed: what we close is closed
        made = socket.socket(family, kind, protocol, fileno=fds[0])
        made.settimeout(DEADLINE)
        return made

    def run(
        self, *argv: str, check: bool = True, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command in the namespace (the test's own cgroup, mounts and names)."""
        return subprocess.run(
            ["nsenter", f"--net={self.netns}", "--", *argv],
            text=True,
            input=input,
            capture_output=True,
            check=check,
            timeout=60,
        )

    def sysctl(self, **values: int) -> None:
        """`net__ipv4__ip_forward=0` and the like: `__` stands for a slash."""
        for key, value in values.items():
            path = f"/proc/sys/{key.replace('__', '/')}"
            self.run("sh", "-c", f"echo {value} > {path}")

    def close(self) -> None:
        if self._wire:
            self._wire.close()
            self._wire = None
        if self._helper:
            self._helper.wait(10)
            self._helper = None


class Pod(Place):
    """A running pod. `ips` are its addresses, `ip(4)` and `ip(6)` one of them."""

    def __init__(self, name: str, node: str, ips: Sequence[str], found: Mapping[str, Any]) -> None:
        super().__init__(Path(found["netns"]), Path(found["cgroup"]))
        self.name = name
        self.node = node
        self.ips = list(ips)
        self.pid = int(found["pid"])

    def ip(self, family: int = 4) -> str:
        return next(ip for ip in self.ips if (":" in ip) == (family == 6))


class Cluster:
    """A cluster of its own, from manifests that are saved with `save`; `down` removes it all.
    `options` are more of `lockgate up`."""

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        nodes: int = 2,
        routing: str = "auto",
        options: tuple[str, ...] = (),
    ) -> None:
        self.name = name or unique_name()
        self.folder = folder
        self.nodes = nodes
        self.routing = routing
        self.options = options
        self.state = State(self.name)
        self._places: dict[str, Place] = {}
        self._root_cgroup = cgroup2()

    # ---- its life ---------------------------------------------------------------

    def lockgate(
        self, *arguments: str, check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """The command line of this cluster, as a user would run it."""
        command = (sys.executable, "-m", "lockgate.cli.main")
        words = 2 if arguments[0] in GROUPS else 1
        done = subprocess.run(
            [*command, *arguments[:words], "--cluster", self.name, *arguments[words:]],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        if check and done.returncode:
            raise AssertionError(
                f"lockgate {' '.join(arguments)}: exit code {done.returncode}\n"
                f"{done.stdout}{done.stderr}{self.logs()}"
            )
        return done

    def up(self, timeout: float = 60) -> Cluster:
        arguments = ["up", str(self.folder), "--nodes", str(self.nodes), "--detach"]
        arguments += ["--routing", self.routing, *self.options]
        self.lockgate(*arguments, "--timeout", str(timeout))
        return self

    def down(self) -> None:
        for place in self._places.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                place.close()
        self._places.clear()
        self.lockgate("down")

    def __enter__(self) -> Cluster:
        try:
            return self.up()
        except BaseException:
            self.down()
            raise

    def __exit__(self, *_: object) -> None:
        self.down()

    def logs(self) -> str:
        """The ends of the supervisor's, agents' and observers' logs, for a failure's message."""
        paths = [self.state.log, *sorted(self.state.root.glob("nodes/*/*.log"))]
        return "".join(
            f"\n--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-10:])
            for path in paths
            if path.exists()
        )

    # ---- its objects --------------------------------------------------------------

    def save(self, file: str, *documents: Mapping[str, Any] | str, wait: bool = True) -> None:
        """Writes a manifest file; none = removes it. Waits until it is in force."""
        path = self.folder / file
        if not documents:
            path.unlink()
        else:
            texts = [d if isinstance(d, str) else yaml.safe_dump(dict(d)) for d in documents]
            # Under another name first: the folder is watched.
            draft = path.with_name(f".{file}.new")
            draft.write_text("\n---\n".join(texts))
            draft.rename(path)
        if wait:
            self.wait()

    def wait(self, timeout: float = 30) -> None:
        answer = call(
            self.state.control, "POST", f"/v1/wait?timeout={timeout}", timeout=timeout + 30
        )
        assert answer["ok"], answer["reasons"]

    def status(self) -> dict[str, Any]:
        answer = call(self.state.control, "GET", "/v1/status")
        assert isinstance(answer, dict)
        return answer

    def objects(self, collection: str) -> list[dict[str, Any]]:
        """As in the Kubernetes API; collection: pods, services, endpoints, policies, nodes."""
        answer = call(self.state.control, "GET", f"/v1/objects/{collection}")
        assert isinstance(answer, list)
        return answer

    def service_ip(self, name: str, family: int = 4) -> str:
        """Of a service given as NAMESPACE/NAME."""
        for one in self.objects("services"):
            meta = one["metadata"]
            if f"{meta['namespace']}/{meta['name']}" == name:
                spec = one["spec"]
                ips = spec.get("clusterIPs") or [spec["clusterIP"]]
                return next(str(ip) for ip in ips if (":" in ip) == (family == 6))
        raise AssertionError(f"there is no service {name}")

    def agent_status(self, node: str) -> dict[str, Any]:
        answer = call(self.state.agent(node), "GET", "/v1/status")
        assert isinstance(answer, dict)
        return answer

    def flows(self, node: str | None = None, **filters: Any) -> list[dict[str, Any]]:
        """Flow records of a node or all; filters as in the observer's HTTP API."""
        from urllib.parse import urlencode

        query = urlencode({"limit": 1000, **filters})
        names = [node] if node else self.node_names
        found: list[dict[str, Any]] = []
        for name in names:
            found += stream(self.state.observer(name), f"/v1/flows?{query}", timeout=30)
        return found

    # ---- its places -----------------------------------------------------------------

    @property
    def node_names(self) -> list[str]:
        return sorted(path.name for path in (self.state.root / "nodes").iterdir())

    def pod(self, name: str) -> Pod:
        """The pod NAMESPACE/NAME as it runs now."""
        found = call(self.state.control, "GET", f"/v1/exec?pod={name}")
        known = self._places.get(f"pod {name}")
        if isinstance(known, Pod) and known.pid == found["pid"]:
            return known
        if known:
            known.close()
        namespace, _, short = name.partition("/")
        for one in self.objects("pods"):
            if (one["metadata"]["namespace"], one["metadata"]["name"]) == (namespace, short):
                ips = [entry["ip"] for entry in one["status"].get("podIPs", [])]
                pod = Pod(name, found["node"], ips, found)
                self._places[f"pod {name}"] = pod
                return pod
        raise AssertionError(f"there is no pod {name}")

    def bare(self, pod: Pod) -> Place:
        """A pod's network without its cgroup: no socket hook sees what happens there."""
        return self._place(f"bare {pod.name} {pod.pid}", pod.netns, self._root_cgroup)

    def node(self, name: str) -> Place:
        """A process of the node itself."""
        return self._place(
            f"node {name}", self.state.netns_path(name), self.state.cgroup(name) / "test"
        )

    def node_ip(self, name: str, family: int = 4) -> str:
        for one in self.objects("nodes"):
            if one["metadata"]["name"] == name:
                ips = [a["address"] for a in one["status"]["addresses"]]
                return next(str(ip) for ip in ips if (":" in ip) == (family == 6))
        raise AssertionError(f"there is no node {name}")

    def outside(self) -> Place:
        """The world beyond the nodes; it answers at OUTSIDE4 and OUTSIDE6."""
        path = Path("/run/netns") / self.state.outside_netns
        return self._place("outside", path, self._root_cgroup)

    @staticmethod
    def outside_ip(family: int = 4) -> str:
        return OUTSIDE6 if family == 6 else OUTSIDE4

    def underlay(self) -> Place:
        path = Path("/run/netns") / self.state.underlay_netns
        return self._place("underlay", path, self._root_cgroup)

    def _place(self, key: str, netns: Path, cgroup: Path) -> Place:
        if key not in self._places:
            cgroup.mkdir(parents=True, exist_ok=True)
            self._places[key] = Place(netns, cgroup)
        return self._places[key]


@contextlib.contextmanager
def connected(client: Place, server: Place, address: str, port: int) -> Iterator[tuple[Any, Any]]:
    """A TCP connection from one place to an address that is the other's: both of its ends."""
    family = family_of(address)
    with server.socket(family) as listener, client.socket(family) as near:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen()
        near.connect((address, listener.getsockname()[1]))
        far, _ = listener.accept()
        with far:
            far.settimeout(DEADLINE)
            yield near, far


def manifest(kind: str, namespace: str, name: str, spec: Mapping[str, Any], **labels: str) -> str:
    """One document: the apiVersion follows from the kind."""
    versions = {"NetworkPolicy": "networking.k8s.io/v1", "Deployment": "apps/v1"}
    meta: dict[str, Any] = {"name": name, "labels": labels}
    if namespace:
        meta["namespace"] = namespace
    document = {"apiVersion": versions.get(kind, "v1"), "kind": kind, "metadata": meta}
    return json.dumps({**document, "spec": dict(spec)})

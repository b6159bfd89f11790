"""What `bench.proxy` compares: a node with kube-proxy, or with Lockgate, and its objects.

Each node is a network namespace with two pods, client and server, and an API server of its own
that speaks list and watch. The pods of kube-proxy's nodes are joined to them by veth pairs and
routes, without a bridge, as kindnet and Calico do it: what costs least.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.daytwo import cni
from bench.setups import PREFIX, Namespaces, run
from cluster.binaries import Binaries
from lockgate.bpf import links as bpf_links
from tests.apiserver import ApiServer

__all__ = [
    "BACKEND_PORT",
    "KINDS",
    "PATIENCE",
    "PLACES",
    "PORT",
    "RR",
    "Iptables",
    "Lockgate",
    "Nftables",
    "Node",
    "address",
    "cpu",
    "resident",
    "service",
    "slice_of",
]

ROOT = Path(__file__).resolve().parents[1]
RR = ROOT / "build" / "bench-rr"
NODE = "node-0"
SPACE = "bench"
#: Of the node; of the pods.
NODE_IP, BLOCK = "172.16.0.1", "10.0.0.0/24"
#: Of services; of the server, which answers at so many from there on, so that backends can change.
PORT, BACKEND_PORT, PLACES = 80, 7000, 26
PATIENCE = 300.0
_SERVICES = int(ipaddress.IPv4Address("10.100.0.0"))
_MEMORY = Path("/sys/fs/cgroup/memory")


# ---- Objects -------------------------------------------------------------------------


def address(number: int) -> str:
    """The cluster IP of a service."""
    return str(ipaddress.IPv4Address(_SERVICES + number))


def service(number: int) -> dict[str, Any]:
    """One with a cluster IP, as the API server has it."""
    name, ip = f"s{number:05d}", address(number)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": SPACE,
            "uid": f"5e3a7b52-0000-4000-8000-{number:012}",
            "labels": {"app": name},
            "creationTimestamp": "2025-01-01T00:00:00Z",
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": ip,
            "clusterIPs": [ip],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None",
            "selector": {"app": name},
            "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": 8080}],
        },
        "status": {"loadBalancer": {}},
    }


def slice_of(number: int, ips: list[str], port: int = 8080) -> dict[str, Any]:
    """The endpoints of service `number`."""
    name = f"s{number:05d}"
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-abcde",
            "namespace": SPACE,
            "uid": f"6e3a7b52-0000-4000-8000-{number:012}",
            "labels": {"app": name, "kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [ip],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": f"node-{ip.split('.')[1]}",
                "targetRef": {"kind": "Pod", "namespace": SPACE, "name": f"{name}-{at}"},
            }
            for at, ip in enumerate(ips)
        ],
        "ports": [{"name": "http", "protocol": "TCP", "port": port}],
    }


def _node() -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE},
        "spec": {"podCIDRs": [BLOCK]},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE_IP}]},
    }


def _pod(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": SPACE, "uid": f"{name}-{PREFIX}"},
        "spec": {"nodeName": NODE, "containers": [{"name": "main"}]},
        "status": {"phase": "Pending"},
    }


# ---- Nodes ---------------------------------------------------------------------------


class Node:
    """One node. `client` and `server` are how to run a command in the pods, `host` on the node
    itself; `ip` is the server's address. `processes` by what they are called, the first of which
    was started at `began` (ns)."""

    kind = ""

    def __init__(self, name: str, spaces: Namespaces, stack: ExitStack, folder: Path) -> None:
        self.name, self._spaces, self._stack = name, spaces, stack
        self.folder = folder / name
        self.folder.mkdir()
        self.api = ApiServer()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.began = 0
        self.space = spaces.add(name)
        run("ip", "-n", self.space, "addr", "add", f"{NODE_IP}/32", "dev", "lo")
        # For what netfilter translates on its way out: it wants a way out first.
        run("ip", "-n", self.space, "route", "add", "10.64.0.0/10", "dev", "lo", "src", NODE_IP)
        run(*spaces.enter(self.space), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        self._cgroup = spaces.cgroup("cluster", name)
        self.host = spaces.put(spaces.cgroup("cluster", name, "host", "pod"), self.space)
        self.client: list[str] = []
        self.server: list[str] = []
        self.ip = NODE_IP
        self.api.put(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}}, _node()
        )

    async def start(self) -> None:
        """Start what serves the node; what it knows is in force some time later."""
        raise NotImplementedError

    async def wire(self) -> None:
        """Give it a client and a server, which answers."""
        raise NotImplementedError

    def ends(self, count: int) -> tuple[str, str]:
        """The first and the last of `count` services, where they stand in a row."""
        return address(0), address(count - 1)

    async def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            await asyncio.to_thread(process.wait)
        self.processes.clear()
        await self.api.stop()

    def serve(self, where: list[str]) -> None:
        """The server, on processor 0."""
        command = [*where, "taskset", "-c", "0", str(RR), "server", str(BACKEND_PORT), str(PLACES)]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._stack.callback(child.wait)
        self._stack.callback(child.kill)

    def kernel_memory(self) -> float | None:
        """MB of the kernel's own that are accounted to the processes, tables above all; None
        without version 1 of the memory controller."""
        found = self._memory / "memory.kmem.usage_in_bytes"
        return int(found.read_text()) / 2**20 if found.exists() else None

    @property
    def _memory(self) -> Path:
        return _MEMORY / f"{PREFIX}-{self.name}"

    def _run(self, called: str, command: list[str], **more: Any) -> None:
        """A process in the node's memory cgroup, if there is one."""
        if (_MEMORY / "cgroup.procs").exists():
            if not self._memory.exists():
                self._memory.mkdir()
                self._stack.callback(_remove, self._memory)
            move = 'echo $$ > "$0" && exec "$@"'
            command = ["sh", "-c", move, str(self._memory / "cgroup.procs"), *command]
        with open(self.folder / f"{called}.log", "ab") as log:
            self.began = self.began or time.monotonic_ns()
            process = subprocess.Popen(command, stdout=log, stderr=log, **more)
        self.processes[called] = process

    def check(self) -> None:
        """RuntimeError with the end of its log if a process has ended."""
        for called, process in self.processes.items():
            if process.poll() is not None:
                text = (self.folder / f"{called}.log").read_text()[-2000:]
                raise RuntimeError(f"{self.name}: {called} ended:\n{text}")


def _remove(cgroup: Path) -> None:
    """With what still runs there: nft of a kube-proxy that ended."""
    late = time.monotonic() + 60
    while left := (cgroup / "cgroup.procs").read_text().split():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > late:
            raise TimeoutError(f"{cgroup}: {left} do not end")
        time.sleep(0.05)
    cgroup.rmdir()


class Proxy(Node):
    """kube-proxy in the mode `kind`."""

    async def start(self) -> None:
        url = await self.api.start(netns=Path("/run/netns", self.space))
        kubeconfig = self.folder / "kubeconfig"
        kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "bench", "cluster": {"server": url}}],
                    "users": [{"name": "bench", "user": {}}],
                    "contexts": [
                        {"name": "bench", "context": {"cluster": "bench", "user": "bench"}}
                    ],
                    "current-context": "bench",
                }
            )
        )
        config = self.folder / "config.json"
        config.write_text(json.dumps(self._config(str(kubeconfig))))
        program = str(await asyncio.to_thread(lambda: Binaries.get().path("kube-proxy")))
        command = [*self._spaces.enter(self.space), program, f"--config={config}"]
        self._run("kube-proxy", command, env=self._environment())

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _config(self, kubeconfig: str) -> dict[str, Any]:
        """Its defaults, but for JSON, which is what our API server speaks; nothing is to happen
        for no reason while connections are measured; limits of conntrack are the machine's."""
        json_only = {"contentType": "application/json", "acceptContentTypes": "application/json"}
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": self.kind,
            "hostnameOverride": NODE,
            "clusterCIDR": BLOCK,
            "clientConnection": {"kubeconfig": kubeconfig, **json_only},
            "conntrack": {"maxPerCore": 0, "min": 0},
            "iptables": {"syncPeriod": "1h"},
            "nftables": {"syncPeriod": "1h"},
        }

    async def wire(self) -> None:
        wired = []
        for number, name in enumerate(("client", "server"), 2):
            pod, link, ip = (
                self._spaces.add(f"{self.name}-{name}"),
                f"pod{number}",
                f"10.0.0.{number}",
            )
            self._spaces.join(self.space, link, pod, "eth0")
            self._spaces.address(pod, "eth0", f"{ip}/32")
            gateway = "169.254.1.1"
            mac = json.loads(run("ip", "-j", "-n", self.space, "link", "show", link))[0]["address"]
            inside = json.loads(run("ip", "-j", "-n", pod, "link", "show", "eth0"))[0]["address"]
            for words in (
                f"-n {pod} neigh add {gateway} lladdr {mac} dev eth0 nud permanent",
                f"-n {pod} route add default via {gateway} dev eth0 onlink",
                f"-n {self.space} neigh add {ip} lladdr {inside} dev {link} nud permanent",
                f"-n {self.space} route add {ip}/32 dev {link}",
            ):
                run("ip", *words.split())
            wired.append(self._spaces.pod(pod, self.name))
            self.ip = ip
        self.client, self.server = wired
        self.serve(self.server)


class Nftables(Proxy):
    kind = "nftables"


class Iptables(Proxy):
    """With the kernel's own iptables where the distribution has it: that over nf_tables takes
    minutes for 10,000 services, and is no faster with packets."""

    kind = "iptables"

    def _environment(self) -> dict[str, str]:
        legacy = shutil.which("xtables-legacy-multi")
        if legacy is None:
            return dict(os.environ)
        folder = self.folder / "bin"
        if not folder.exists():
            folder.mkdir()
            for name in ("iptables", "ip6tables"):
                for end in ("", "-restore", "-save"):
                    (folder / f"{name}{end}").symlink_to(legacy)
        return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}

    def ends(self, count: int) -> tuple[str, str]:
        """kube-proxy's rules stand in an order of Go's maps, another with each sync."""
        inside = self._spaces.enter(self.space)
        command = (*inside, "iptables", "-t", "nat", "-S", "KUBE-SERVICES")
        rules = run(*command, env=self._environment())
        found = re.findall(r"-d (\S+)/32 .*--dport", rules)
        if len(found) != count:
            raise RuntimeError(f"{self.name}: {len(found)} of {count} services in KUBE-SERVICES")
        return found[0], found[-1]


class Lockgate(Node):
    """An agent and an observer, without limits of connections and events a second of a pod: a
    client here begins more than a pod of a cluster should."""

    kind = "lockgate"

    async def start(self) -> None:
        url = await self.api.start(netns=Path("/run/netns", self.space))
        self._write(
            "agent",
            {
                "netns": self.space,
                "stateDir": str(self.folder),
                "cgroup": str(self._cgroup),
                "kubernetes": {"apiServer": url},
                "web": "",
                "underlay": "",
                "outside": "",
                "limits": {"connections": 0, "events": 0},
            },
        )
        self._stack.callback(self._unpin)
        self._start("agent")
        await self.until(lambda: (self.folder / "agent.sock").exists())
        self._write(
            "observer",
            {
                "journal": str(self.folder / "journal.jsonl"),
                "socket": str(self.folder / "observer.sock"),
                "control": str(self.folder / "agent.sock"),
            },
        )
        self._start("observer")

    async def until(self, true: Any) -> None:
        """TimeoutError after PATIENCE."""
        late = time.monotonic() + PATIENCE
        while not true():
            self.check()
            if time.monotonic() > late:
                raise TimeoutError(self.name)
            await asyncio.sleep(0.02)

    def _write(self, called: str, config: dict[str, Any]) -> None:
        config |= {"cluster": f"{PREFIX}-{self.name}", "node": NODE}
        (self.folder / f"{called}.json").write_text(json.dumps(config))

    def _start(self, called: str) -> None:
        config = str(self.folder / f"{called}.json")
        command = [sys.executable, "-m", f"lockgate.{called}", "--config", config]
        self._run(called, command, cwd=ROOT)

    def _unpin(self) -> None:
        pins = Path("/sys/fs/bpf/lockgate", f"{PREFIX}-{self.name}")
        for name in bpf_links.links_in(str(pins / NODE / "links")):
            bpf_links.remove(str(pins / NODE / "links" / name))
        shutil.rmtree(pins, ignore_errors=True)

    async def wire(self) -> None:
        wired = []
        for name in ("client", "server"):
            full = self._spaces.add(f"{self.name}-{name}")
            pod = _pod(name)
            self.api.put(pod)
            socket, netns = self.folder / "cni.sock", Path("/run/netns", full)
            await self.until(socket.exists)
            answer = await cni("ADD", socket, netns, SPACE, name, pod["metadata"]["uid"])
            ip = json.loads(answer)["ips"][0]["address"].partition("/")[0]
            self.api.put(
                {**pod, "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}}
            )
            wired.append(self._spaces.pod(full, self.name))
            self.ip = ip
        self.client, self.server = wired
        self.serve(self.server)

    def unhooked(self) -> list[str]:
        """The client outside the cgroup whose sockets ask for services: by packet."""
        cgroup = self._spaces.cgroup("cluster", "unhooked", "pods", self.name)
        return self._spaces.put(cgroup, f"{PREFIX}-{self.name}-client")


KINDS: tuple[type[Node], ...] = (Nftables, Iptables, Lockgate)


# ---- What processes use --------------------------------------------------------------


def cpu(pid: int) -> float:
    """Seconds of processor time of a process, and of its children that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """MB resident of a process and its children at this moment."""
    total = 0
    for one in (pid, *_children(pid)):
        with contextlib.suppress(OSError, IndexError):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found

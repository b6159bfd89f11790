"""What `bench.net` compares: the same two pods, joined in several ways (its docstring tells which).

Everything is made for the run and removed by the exit stacks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from lockgate.bpf.features import cgroup2_mount

LOCKGATE = [sys.executable, "-m", "lockgate.cli.main"]
CNI = Path("/usr/lib/cni")
PREFIX = f"lgb{os.getpid()}"
CLUSTER = f"bench-{os.getpid()}"
SERVICES = 1000
TUNNEL = "two nodes, VXLAN"
IPERF_PORT, RR_PORT = 5201, 7000
RR = Path(__file__).resolve().parent.parent / "build" / "bench-rr"


def run(*command: str, stdin: str = "", env: dict[str, str] | None = None) -> str:
    """Standard output; RuntimeError with what the command said if it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=env)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise RuntimeError(f"{' '.join(command)}: {said}")
    return done.stdout


def cgroup2_root() -> Path:
    mount = cgroup2_mount()
    if mount is None:
        raise RuntimeError("cgroup v2 is not mounted")
    return Path(mount)


@dataclass
class Pair:
    """Two pods: how to run a command in each, the server's address, and how rr is run."""

    setup: str
    where: str
    client: list[str]
    server: list[str]
    address: str
    rr: list[str] = field(default_factory=lambda: [str(RR)])


# ---- Namespaces --------------------------------------------------------------------


class Namespaces:
    """Network namespaces of this run."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def add(self, name: str) -> str:
        full = f"{PREFIX}-{name}"
        run("ip", "netns", "add", full)
        self._stack.callback(subprocess.run, ["ip", "netns", "del", full], capture_output=True)
        run("ip", "-n", full, "link", "set", "lo", "up")
        return full

    def enter(self, full: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{full}"]

    def pod(self, full: str, node: str = "node") -> list[str]:
        """Into the namespace, and a cgroup of its own as deep as pods of Lockgate have one
        (kubelets': 4 or 5): with each level the kernel accounts for more at every switch between
        client and server, less than 1 % of a connection on a quiet machine, 2 to 4 % on a busy
        one."""
        return self.put(self.cgroup("cluster", node, "pods", full), full)

    def put(self, cgroup: Path, full: str) -> list[str]:
        """Into a cgroup and a namespace."""
        move = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", move, str(cgroup / "cgroup.procs"), *self.enter(full)]

    def cgroup(self, *names: str) -> Path:
        """A cgroup of this run."""
        path = cgroup2_root()
        for name in (PREFIX, *names):
            path /= name
            if not path.exists():
                path.mkdir()
                self._stack.callback(path.rmdir)
        return path

    def join(self, one: str, name: str, other: str, peer: str) -> None:
        """A veth pair between two namespaces."""
        run(
            "ip",
            "link",
            "add",
            name,
            "netns",
            one,
            "type",
            "veth",
            "peer",
            "name",
            peer,
            "netns",
            other,
        )
        for space, link in ((one, name), (other, peer)):
            run("ip", "-n", space, "link", "set", link, "up")

    def address(self, space: str, link: str, address: str) -> None:
        run("ip", "-n", space, "addr", "add", address, "dev", link)

    def underlay(self, name: str, nodes: list[str]) -> None:
        """Joins nodes by a bridge in a namespace of its own; addresses 192.168.77.N/24."""
        hub = self.add(f"{name}-hub")
        run("ip", "-n", hub, "link", "add", "br0", "type", "bridge", "stp_state", "0")
        run("ip", "-n", hub, "link", "set", "br0", "up")
        run(
            *self.enter(hub),
            "sh",
            "-c",
            "echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables 2>/dev/null || true",
        )
        for number, node in enumerate(nodes, 1):
            self.join(node, "up0", hub, f"n{number}")
            run("ip", "-n", hub, "link", "set", f"n{number}", "master", "br0")
            self.address(node, "up0", f"192.168.77.{number}/24")
            run(*self.enter(node), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")


def bare(spaces: Namespaces) -> list[Pair]:
    """A veth pair; and pod, node, underlay, node, pod with kernel routes and nothing else."""
    a, b = spaces.add("bare-a"), spaces.add("bare-b")
    spaces.join(a, "eth0", b, "eth0")
    spaces.address(a, "eth0", "10.99.0.1/24")
    spaces.address(b, "eth0", "10.99.0.2/24")
    near = Pair("bare", "one node", spaces.pod(a), spaces.pod(b), "10.99.0.2")
    nodes = [spaces.add("route-1"), spaces.add("route-2")]
    spaces.underlay("route", nodes)
    pods = []
    for number, node in enumerate(nodes, 1):
        pod = spaces.add(f"route-pod{number}")
        spaces.join(node, "pod0", pod, "eth0")
        spaces.address(node, "pod0", f"10.99.{number}.1/24")
        spaces.address(pod, "eth0", f"10.99.{number}.2/24")
        run("ip", "-n", pod, "route", "add", "default", "via", f"10.99.{number}.1")
        other = 3 - number
        run("ip", "-n", node, "route", "add", f"10.99.{other}.0/24", "via", f"192.168.77.{other}")
        pods.append(pod)
    far = Pair("bare", "two nodes", spaces.pod(pods[0]), spaces.pod(pods[1]), "10.99.2.2")
    return [near, far]


def bare_tunnel(spaces: Namespaces) -> list[Pair]:
    """As the second of `bare`, through a kernel's VXLAN."""
    nodes = [spaces.add("tunnel-1"), spaces.add("tunnel-2")]
    spaces.underlay("tunnel", nodes)
    pods = []
    for number, node in enumerate(nodes, 1):
        pod = spaces.add(f"tunnel-pod{number}")
        spaces.join(node, "pod0", pod, "eth0")
        run("ip", "-n", pod, "link", "set", "eth0", "mtu", "1450")
        spaces.address(node, "pod0", f"10.99.{number}.1/24")
        spaces.address(pod, "eth0", f"10.99.{number}.2/24")
        run("ip", "-n", pod, "route", "add", "default", "via", f"10.99.{number}.1")
        pods.append(pod)
    tunnel(nodes, "10.99")
    return [Pair("bare", TUNNEL, spaces.pod(pods[0]), spaces.pod(pods[1]), "10.99.2.2")]


def tunnel(nodes: list[str], block: str) -> None:
    """Joins the two nodes' blocks, BLOCK.N.0/24, as flannel does."""
    for number, node in enumerate(nodes, 1):
        mac = f"02:00:00:00:77:0{number}"
        run(
            *("ip", "-n", node, "link", "add", "flannel.1", "address", mac, "mtu", "1450"),
            *("type", "vxlan", "id", "1", "local", f"192.168.77.{number}"),
            *("dev", "up0", "dstport", "8472", "nolearning"),
        )
        run("ip", "-n", node, "link", "set", "flannel.1", "up")
        run("ip", "-n", node, "addr", "add", f"{block}.{number}.0/32", "dev", "flannel.1")
    for number, node in enumerate(nodes, 1):
        other = 3 - number
        mac, gateway = f"02:00:00:00:77:0{other}", f"{block}.{other}.0"
        run(
            *("ip", "-n", node, "neigh", "add", gateway, "lladdr", mac),
            *("dev", "flannel.1", "nud", "permanent"),
        )
        run(
            *("bridge", "-n", node, "fdb", "append", mac, "dev", "flannel.1"),
            *("dst", f"192.168.77.{other}"),
        )
        run(
            *("ip", "-n", node, "route", "add", f"{block}.{other}.0/24"),
            *("via", gateway, "dev", "flannel.1", "onlink"),
        )


# ---- The distribution's bridge plugin ---------------------------------------------------


def bridge(spaces: Namespaces, stack: ExitStack, mtu: int = 1500) -> list[Pair]:
    """Bridge plugin on two nodes, iptables rules for SERVICES services on each; where the MTU is
    smaller, the nodes are joined by a tunnel."""
    name_of, place = ("cni", "two nodes") if mtu == 1500 else ("flannel", TUNNEL)
    if not (CNI / "bridge").exists():
        raise RuntimeError("containernetworking-plugins is not installed: run `make bench`")
    state = Path(tempfile.mkdtemp(prefix="lockgate-bench-"))
    stack.callback(shutil.rmtree, state, ignore_errors=True)
    nodes = [spaces.add(f"{name_of}-1"), spaces.add(f"{name_of}-2")]
    spaces.underlay(name_of, nodes)
    addresses: dict[str, str] = {}
    for number, node in enumerate(nodes, 1):
        other = 3 - number
        for name in ("client", "near", "far"):
            if (name == "far") != (number == 2):
                continue
            pod = spaces.add(f"{name_of}-{name}")
            addresses[name] = _cni_add(spaces, node, number, pod, name, state, mtu)
        if place != TUNNEL:
            block = f"10.88.{other}.0/24"
            run("ip", "-n", node, "route", "add", block, "via", f"192.168.77.{other}")
        run(
            *spaces.enter(node),
            "iptables-restore",
            "-n",
            stdin=_service_rules(addresses.get("near", "10.88.1.3")),
        )
    client, near, far = (
        spaces.pod(f"{PREFIX}-{name_of}-{name}") for name in ("client", "near", "far")
    )
    pairs = [Pair("bridge", place, client, far, addresses["far"])]
    if place == TUNNEL:
        tunnel(nodes, "10.88")
        return pairs
    return [Pair("bridge", "one node", client, near, addresses["near"]), *pairs]


def _cni_add(
    spaces: Namespaces, node: str, number: int, pod: str, name: str, state: Path, mtu: int
) -> str:
    """CNI ADD as a container runtime calls it; the pod's address."""
    config = {
        "cniVersion": "0.4.0",
        "name": f"bench{number}",
        "type": "bridge",
        "bridge": "cni0",
        "mtu": mtu,
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(state),
            "routes": [{"dst": "0.0.0.0/0"}],
            "ranges": [[{"subnet": f"10.88.{number}.0/24"}]],
        },
    }
    environment = os.environ | {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": f"{PREFIX}{name}",
        "CNI_NETNS": f"/run/netns/{pod}",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(CNI),
    }
    answer = run(
        *spaces.enter(node), str(CNI / "bridge"), stdin=json.dumps(config), env=environment
    )
    return str(json.loads(answer)["ips"][0]["address"]).partition("/")[0]


def _service_rules(backend: str) -> str:
    """Chains as kube-proxy's iptables mode makes them, one endpoint a service."""
    names = [f"{n:04d}" for n in range(SERVICES)]
    lines = ["*nat", ":KUBE-SERVICES - [0:0]"]
    lines += [f":KUBE-SVC-{n} - [0:0]\n:KUBE-SEP-{n} - [0:0]" for n in names]
    lines += ["-A PREROUTING -j KUBE-SERVICES", "-A OUTPUT -j KUBE-SERVICES"]
    for i, n in enumerate(names):
        lines += [
            f"-A KUBE-SERVICES -d 10.96.{i // 250}.{i % 250 + 1}/32"
            f" -p tcp -m tcp --dport 80 -j KUBE-SVC-{n}",
            f"-A KUBE-SVC-{n} -j KUBE-SEP-{n}",
            f"-A KUBE-SEP-{n} -p tcp -m tcp -j DNAT --to-destination {backend}:{RR_PORT}",
        ]
    lines += [
        "COMMIT",
        "*filter",
        ":KUBE-FORWARD - [0:0]",
        "-A FORWARD -j KUBE-FORWARD",
        "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
        "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "COMMIT",
        "",
    ]
    return "\n".join(lines)


# ---- Lockgate ----------------------------------------------------------------------------


def lockgate(stack: ExitStack, routing: str = "auto") -> list[Pair]:
    cluster = f"{CLUSTER}-{routing}"
    folder = Path(tempfile.mkdtemp(prefix="lockgate-bench-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    (folder / "bench.json").write_text(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": _manifests()})
    )
    stack.callback(subprocess.run, [*LOCKGATE, "down", "--cluster", cluster], capture_output=True)
    run(
        *(*LOCKGATE, "up", str(folder), "--nodes", "2", "--detach", "--cluster", cluster),
        *("--routing", routing),
        # A client here begins more connections a second than a pod of a cluster should.
        *("--limit", "connections=0", "--limit", "events=0"),
    )
    pods = json.loads(run(*LOCKGATE, "get", "pods", "--json", "--cluster", cluster))
    address = {pod["name"]: next(ip for ip in pod["ips"] if "." in ip) for pod in pods}

    def enter(name: str) -> list[str]:
        return [*LOCKGATE, "exec", "--cluster", cluster, f"bench/{name}", "--"]

    if routing == "vxlan":
        return [Pair("lockgate", TUNNEL, enter("client"), enter("far"), address["far"])]
    return [
        Pair("lockgate", "one node", enter("client"), enter("near"), address["near"]),
        Pair("lockgate", "two nodes", enter("client"), enter("far"), address["far"]),
    ]


def _manifests() -> list[dict[str, object]]:
    def pod(name: str, node: str, role: str) -> dict[str, object]:
        container = {"name": "main", "command": ["sleep", "infinity"]}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "bench", "labels": {"role": role, "pod": name}},
            "spec": {"nodeName": node, "containers": [container]},
        }

    items: list[dict[str, object]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}},
        pod("client", "node-1", "client"),
        pod("near", "node-1", "server"),
        pod("far", "node-2", "server"),
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "servers", "namespace": "bench"},
            "spec": {
                "podSelector": {"matchLabels": {"role": "server"}},
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"role": "client"}}}]}],
            },
        },
    ]
    for n in range(SERVICES):
        items.append(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": f"s{n:04d}", "namespace": "bench"},
                "spec": {
                    "selector": {"pod": "near"},
                    "ports": [{"port": 80, "targetPort": RR_PORT}],
                },
            }
        )
    return items

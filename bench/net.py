"""Pod to pod, through the whole stack: throughput, request/response, connections.

Three ways to join the same processes, in the same run:

    bare      namespaces joined by a veth pair; across nodes, by kernel routes: the limit
    bridge    the distribution's bridge CNI plugin and host-local, rules for 1,000 services
    lockgate  `lockgate up` on two nodes, the same services, a NetworkPolicy in force

On one processor (both ends pinned to it) all that a packet costs shows; rounds are
interleaved and medians compared. On two processors the spread is wide: see `--two-cpus`.
Everything is made for the run and removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RR = ROOT / "build" / "bench-rr"
LOCKGATE = [sys.executable, "-m", "lockgate.cli.main"]
CNI = Path("/usr/lib/cni")
PREFIX = f"lgb{os.getpid()}"
CLUSTER = f"bench-{os.getpid()}"
SERVICES = 1000
IPERF_PORT, RR_PORT = 5201, 7000


def run(*command: str, stdin: str = "", env: dict[str, str] | None = None) -> str:
    """Standard output; RuntimeError with what the command said if it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=env)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise RuntimeError(f"{' '.join(command)}: {said}")
    return done.stdout


@dataclass
class Pair:
    """Two pods: how to run a command in each, and the server's address."""

    setup: str
    where: str
    client: list[str]
    server: list[str]
    address: str


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
    near = Pair("bare", "one node", spaces.enter(a), spaces.enter(b), "10.99.0.2")
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
    far = Pair("bare", "two nodes", spaces.enter(pods[0]), spaces.enter(pods[1]), "10.99.2.2")
    return [near, far]


# ---- The distribution's bridge plugin ---------------------------------------------------


def bridge(spaces: Namespaces, stack: ExitStack) -> list[Pair]:
    """Bridge plugin on two nodes, iptables rules for SERVICES services on each."""
    if not (CNI / "bridge").exists():
        raise RuntimeError("containernetworking-plugins is not installed: run `make bench`")
    state = Path(tempfile.mkdtemp(prefix="lockgate-bench-"))
    stack.callback(shutil.rmtree, state, ignore_errors=True)
    nodes = [spaces.add("cni-1"), spaces.add("cni-2")]
    spaces.underlay("cni", nodes)
    addresses: dict[str, str] = {}
    for number, node in enumerate(nodes, 1):
        other = 3 - number
        for name in ("client", "near", "far"):
            if (name == "far") != (number == 2):
                continue
            pod = spaces.add(f"cni-{name}")
            addresses[name] = _cni_add(spaces, node, number, pod, name, state)
        run("ip", "-n", node, "route", "add", f"10.88.{other}.0/24", "via", f"192.168.77.{other}")
        run(
            *spaces.enter(node),
            "iptables-restore",
            "-n",
            stdin=_service_rules(addresses.get("near", "10.88.1.3")),
        )
    client = spaces.enter(f"{PREFIX}-cni-client")
    return [
        Pair("bridge", "one node", client, spaces.enter(f"{PREFIX}-cni-near"), addresses["near"]),
        Pair("bridge", "two nodes", client, spaces.enter(f"{PREFIX}-cni-far"), addresses["far"]),
    ]


def _cni_add(spaces: Namespaces, node: str, number: int, pod: str, name: str, state: Path) -> str:
    """CNI ADD as a container runtime calls it; the pod's address."""
    config = {
        "cniVersion": "0.4.0",
        "name": f"bench{number}",
        "type": "bridge",
        "bridge": "cni0",
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


def lockgate(stack: ExitStack) -> list[Pair]:
    folder = Path(tempfile.mkdtemp(prefix="lockgate-bench-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    (folder / "bench.json").write_text(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": _manifests()})
    )
    stack.callback(subprocess.run, [*LOCKGATE, "down", "--cluster", CLUSTER], capture_output=True)
    run(*LOCKGATE, "up", str(folder), "--nodes", "2", "--detach", "--cluster", CLUSTER)
    pods = json.loads(run(*LOCKGATE, "get", "pods", "--json", "--cluster", CLUSTER))
    address = {pod["name"]: next(ip for ip in pod["ips"] if "." in ip) for pod in pods}

    def enter(name: str) -> list[str]:
        return [*LOCKGATE, "exec", "--cluster", CLUSTER, f"bench/{name}", "--"]

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


# ---- Measures -----------------------------------------------------------------------------


def start_servers(pair: Pair, stack: ExitStack) -> None:
    """iperf3 and rr in the server pod, on processor 0."""
    pinned = [*pair.server, "taskset", "-c", "0"]
    for command in (
        [*pinned, "iperf3", "-s", "-p", str(IPERF_PORT)],
        [*pinned, str(RR), "server", str(RR_PORT)],
    ):
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stack.callback(child.wait)
        stack.callback(child.kill)
    deadline = time.monotonic() + 10
    while True:
        try:
            run(*pair.client, str(RR), "rr", pair.address, str(RR_PORT), "0.01")
            run(*pair.client, "iperf3", "-c", pair.address, "-p", str(IPERF_PORT), "-n", "1K")
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def throughput(pair: Pair, cpu: int, seconds: float) -> float:
    """Gbit/s."""
    answer = run(
        *pair.client,
        "taskset",
        "-c",
        str(cpu),
        "iperf3",
        "-c",
        pair.address,
        "-p",
        str(IPERF_PORT),
        "-C",
        "cubic",
        "-t",
        str(max(1, round(seconds))),
        "-J",
    )
    return float(json.loads(answer)["end"]["sum_received"]["bits_per_second"]) / 1e9


def transactions(kind: str) -> Callable[[Pair, int, float], float]:
    def measure(pair: Pair, cpu: int, seconds: float) -> float:
        """Thousand a second."""
        return (
            float(
                run(
                    *pair.client,
                    "taskset",
                    "-c",
                    str(cpu),
                    str(RR),
                    kind,
                    pair.address,
                    str(RR_PORT),
                    str(seconds),
                )
            )
            / 1e3
        )

    return measure


MEASURES: dict[str, Callable[[Pair, int, float], float]] = {
    "Gbit/s": throughput,
    "rr k/s": transactions("rr"),
    "conn k/s": transactions("crr"),
}


def compare(pairs: list[Pair], cpu: int, rounds: int, seconds: float) -> list[dict[str, object]]:
    """Medians of interleaved rounds, and each as a share of bare at the same place."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for number in range(rounds):
        # Each round in the other direction, so that no one is always first.
        for pair in pairs if number % 2 else reversed(pairs):
            for name, measure in MEASURES.items():
                found.setdefault((pair.where, pair.setup, name), []).append(
                    measure(pair, cpu, seconds)
                )
    median = {key: statistics.median(values) for key, values in found.items()}
    rows = []
    for where in ("one node", "two nodes"):
        for pair in pairs:
            if pair.where != where:
                continue
            row: dict[str, object] = {
                "pods on": where,
                "CPUs": 1 if cpu == 0 else 2,
                "setup": pair.setup,
            }
            for name in MEASURES:
                row[name] = median[where, pair.setup, name]
                row["x " + re.sub(r" .*|bit.*", "", name)] = (
                    median[where, pair.setup, name] / median[where, "bare", name]
                )
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.net")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers-only", action="store_true", help="without Lockgate")
    parser.add_argument(
        "--two-cpus", action="store_true", help="the client on a processor of its own, too"
    )
    options = parser.parse_args()
    rounds, seconds = (2, 0.3) if options.quick else (9, 1.0)
    with ExitStack() as stack:
        spaces = Namespaces(stack)
        pairs = bare(spaces) + bridge(spaces, stack)
        if not options.peers_only:
            pairs += lockgate(stack)
        for pair in pairs:
            start_servers(pair, stack)
        rows = compare(pairs, 0, rounds, seconds)
        if options.two_cpus:
            rows += compare(pairs, 1, rounds, seconds)
        nf = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
        bridged = nf.read_text().strip() if nf.exists() else "absent"
    print(
        json.dumps(
            {
                "name": "net",
                "title": "Pod to pod, IPv4 TCP; x: share of bare at the same place",
                "columns": [
                    "pods on",
                    "CPUs",
                    "setup",
                    "Gbit/s",
                    "x G",
                    "rr k/s",
                    "x rr",
                    "conn k/s",
                    "x conn",
                ],
                "rows": rows,
                "notes": [
                    f"cubic; medians of {rounds} interleaved rounds; CPUs = 1: both ends on one",
                    f"bridge and lockgate with {SERVICES:,} services, lockgate with a policy too",
                    f"bare on two nodes: kernel routes; bridge-nf-call-iptables {bridged}",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()

"""A cluster as one object: up, down, and what one does with it in between."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from cluster import cni as cni_module
from cluster import images, network, processes
from cluster.binaries import Binaries
from cluster.certificates import Authority
from cluster.commands import Failed, Word, run, until
from cluster.control_plane import SERVER, ControlPlane
from cluster.down import remove
from cluster.kubelets import Kubelet
from cluster.machines import Machine
from cluster.state import CONTROL, State, node_addresses, valid_name, zone
from lockgate.net import namespaces

__all__ = ["Cluster"]

T = TypeVar("T")
_STOP_GRACE = 2.0
_DNS = Path(__file__).parent / "dns.yaml"


class Cluster:
    """A running cluster. `Cluster.up` starts one, `Cluster(name)` reaches one that runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = State(name)
        try:
            settings = json.loads(self.state.settings.read_text())
        except FileNotFoundError:
            raise Failed(f"no cluster {name!r}: `python -m cluster up --name {name}`") from None
        self.cni: str = settings["cni"]
        self.nodes: list[str] = settings["nodes"]
        self.zones: int = settings["zones"]
        self.binaries = Binaries(Path(settings["binaries"]))
        self.control = ControlPlane(self.state, self.binaries, Authority(self.state.certificates))
        self.kubelets = {node: self._kubelet_of(node) for node in self.nodes}

    @property
    def node_programs(self) -> tuple[str, ...]:
        """What runs on each node."""
        proxy = ("kube-proxy",) if self.cni == "bridge" else ()
        return ("containerd", "kubelet", *proxy)

    @classmethod
    def up(
        cls,
        name: str,
        *,
        nodes: int = 2,
        cni: str = "none",
        zones: int = 0,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Cluster:
        """Start a cluster; what a crash left of one by that name is removed first. Without a CNI
        the nodes are registered but not Ready. With `zones` they are of one each in turn. On any
        failure nothing is left. Raises Failed."""
        _check(name, nodes, cni)
        state = State(name)
        if processes.alive(state.cgroup_root()):
            raise Failed(f"cluster {name!r} is up already: `python -m cluster down --name {name}`")
        cni_module.check_plugins()
        binaries = Binaries.get()
        archive = images.build_all(binaries)
        remove(state)
        state.root.mkdir(mode=0o700, parents=True)
        names = [f"node-{number}" for number in range(1, nodes + 1)]
        settings = {
            "nodes": names,
            "zones": zones,
            "cni": cni,
            "binaries": str(binaries.folder),
        }
        state.settings.write_text(json.dumps(settings))
        cluster = cls(name)
        try:
            cluster._start_all(archive, progress)
        except BaseException:
            cluster.down()
            raise
        return cluster

    def _start_all(self, archive: Path, progress: Callable[[str], None]) -> None:
        progress("networks and certificates")
        numbers = [(node, kubelet.number) for node, kubelet in self.kubelets.items()]
        self.control.configure(network.build(self.state, numbers))
        progress("control plane, containerd")
        self.start("etcd")
        self.start("kube-apiserver")
        self._each(self._boot)
        self._each(lambda kubelet: self._load(kubelet, archive))
        self.wait_api(60)
        for program in ("kube-controller-manager", "kube-scheduler"):
            self.start(program)
        progress("nodes")
        for node in self.nodes:
            self.start("kubelet", node)
        ranges = until("every node's podCIDRs", self.pod_ranges, 180)
        until("the default service account", self._has_service_account, 60)
        self._route(ranges, [CONTROL])
        if self.cni == "bridge":
            self.route_by_nodes(self.nodes)
            for node, networks in ranges.items():
                cni_module.write_bridge(self.node_path(node, "/etc/cni/net.d"), networks)
            for node in self.nodes:
                self.start("kube-proxy", node)
            self.wait_ready(60)
            self.start_dns()

    def _boot(self, kubelet: Kubelet) -> None:
        kubelet.configure(self.control.authority, SERVER)
        kubelet.machine.boot(self.binaries.path("pause"))
        kubelet.start_containerd()

    def _load(self, kubelet: Kubelet, archive: Path) -> None:
        def answers() -> bool:
            return bool(run(*kubelet.machine.command("ctr", "version")))

        until(f"containerd of {kubelet.machine.name}", answers, 20)
        kubelet.load_image(archive)

    def _has_service_account(self) -> bool:
        return bool(self.kubectl("get", "serviceaccount", "default", "-o", "name"))

    def _route(self, ranges: dict[str, list[str]], machines: Sequence[str]) -> None:
        nodes = [
            (node, node_addresses(self.kubelets[node].number), networks)
            for node, networks in ranges.items()
        ]
        network.link_nodes_by_routes(self.state, nodes, machines)

    def join(self) -> str:
        """One more node, with what every node has; its name. Without a CNI it is registered but not
        Ready. Raises Failed."""
        name = f"node-{1 + max(kubelet.number for kubelet in self.kubelets.values())}"
        self.nodes.append(name)
        self._write_settings()
        kubelet = self.kubelets[name] = self._kubelet_of(name)
        network.build(self.state, [(node, each.number) for node, each in self.kubelets.items()])
        self._boot(kubelet)
        self._load(kubelet, images.build_all(self.binaries))
        self.start("kubelet", name)
        ranges = until(f"podCIDRs of {name}", self.pod_ranges, 180)
        self._route(ranges, [CONTROL])
        return name

    def leave(self, node: str) -> None:
        """Take a node away, as when a machine is switched off for good: it with all that is on it,
        and its objects. Raises Failed."""
        kubelet = self._kubelet(node)
        kubelet.machine.remove()
        network.disconnect(self.state, node, kubelet.number)
        self.kubectl("delete", "node", node)
        on_it = ("--field-selector", f"spec.nodeName={node}")
        self.kubectl("delete", "pods", "-A", *on_it, "--force", "--grace-period=0")
        self.nodes.remove(node)
        del self.kubelets[node]
        self._write_settings()

    def route_by_nodes(self, nodes: Sequence[str]) -> None:
        """Routes to the other nodes' pods on `nodes`, as one sets them for the bridge plugin."""
        self._route(until("every node's podCIDRs", self.pod_ranges, 180), nodes)

    def _write_settings(self) -> None:
        settings = json.loads(self.state.settings.read_text()) | {"nodes": self.nodes}
        self.state.settings.write_text(json.dumps(settings))

    def _kubelet_of(self, node: str) -> Kubelet:
        number = int(node.removeprefix("node-"))
        machine = Machine(self.state, node)
        return Kubelet(machine, number, self.binaries, zone(number, self.zones))

    def down(self) -> list[str]:
        """Remove every trace; what was removed, one line each."""
        return remove(self.state)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    # ---- the API -----------------------------------------------------------------

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig file."""
        return self.state.kubeconfig

    def outside_command(self, *command: Word) -> list[Word]:
        """The command line that runs a command on the machine outside, where the API server is at
        the address in `state.outside_kubeconfig`."""
        path = namespaces.path_of(self.state.outside_netns)
        return ["nsenter", f"--net={path}", "--", *command]

    def kubectl(self, *words: Word, input: str | None = None, timeout: float = 60) -> str:
        """What kubectl prints. Raises Failed with what it said."""
        return run(*self.kubectl_command(*words), input=input, timeout=timeout)

    def kubectl_command(self, *words: Word) -> list[Word]:
        """The command line, for those who run it themselves."""
        return [self.binaries.path("kubectl"), f"--kubeconfig={self.kubeconfig}", *words]

    def json(self, *words: Word) -> Any:
        """The object that `kubectl WORDS -o json` prints."""
        return json.loads(self.kubectl(*words, "-o", "json"))

    def apply(self, manifest: str | Path) -> str:
        """Apply a manifest: text, or the path of a file or folder."""
        if isinstance(manifest, Path):
            return self.kubectl("apply", "-f", manifest)
        return self.kubectl("apply", "-f", "-", input=manifest)

    def pod_exec(self, namespace: str, pod: str, *command: Word, timeout: float = 60) -> str:
        """What a command prints in a pod's first container."""
        return self.kubectl("exec", "-n", namespace, pod, "--", *command, timeout=timeout)

    def start_dns(self, deadline: float = 60) -> None:
        """Start CoreDNS and wait for it; it needs a CNI, and services."""
        self.apply(_DNS)
        wait = ("rollout", "status", "deployment/coredns", f"--timeout={deadline:.0f}s")
        self.kubectl("-n", "kube-system", *wait, timeout=deadline + 10)

    def wait_api(self, deadline: float = 60) -> None:
        """Until the API server is ready. Raises Failed, with its last log lines if it ended."""

        def ready() -> bool:
            return self.kubectl("get", "--raw", "/readyz", timeout=5) == "ok"

        try:
            until("the API server", ready, deadline, pause=0.2)
        except Failed as error:
            log = self.state.log_of(CONTROL, "kube-apiserver").read_text().splitlines()
            raise Failed("\n".join([str(error), *log[-5:]])) from None

    def wait_ready(self, deadline: float = 60) -> None:
        """Until every node is Ready."""

        def ready() -> bool:
            return all(
                any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
                for conditions in self._conditions()
            )

        until("Ready on every node", ready, deadline, pause=0.2)

    def _conditions(self) -> Iterable[list[dict[str, str]]]:
        items = {item["metadata"]["name"]: item for item in self.json("get", "nodes")["items"]}
        for node in self.nodes:
            yield items.get(node, {}).get("status", {}).get("conditions", [])

    def pod_ranges(self) -> dict[str, list[str]] | None:
        """podCIDRs of each node; None while one has none."""
        items = self.json("get", "nodes")["items"]
        ranges = {i["metadata"]["name"]: i["spec"].get("podCIDRs", []) for i in items}
        return ranges if all(ranges.get(node) for node in self.nodes) else None

    # ---- the machines --------------------------------------------------------------

    def node_exec(self, node: str, *command: Word, input: str | None = None) -> str:
        """What a command prints in the node's namespaces (its files, network, processes)."""
        return run(*self.node_command(node, *command), input=input)

    def node_command(self, node: str, *command: Word) -> list[Word]:
        """The command line that runs a command there, for those who run it themselves."""
        return self._kubelet(node).machine.command(*command)

    def node_path(self, node: str, path: str) -> Path:
        """A file of the node as this machine reaches it (by /proc, so while the node is up)."""
        return self._kubelet(node).machine.path(path)

    def load_image(self, archive: str | os.PathLike[str], nodes: Sequence[str] = ()) -> None:
        """Import an image archive into containerd, of all nodes unless some are given."""
        wanted = [self._kubelet(node) for node in nodes or self.nodes]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda kubelet: kubelet.load_image(Path(archive).resolve()), wanted))

    def program(self, program: str, node: str = CONTROL) -> Path:
        """The cgroup of a control plane program, or of one of a node's programs."""
        return self.state.program(node, program)

    def start(self, program: str, node: str = CONTROL) -> None:
        """Start a program that does not run."""
        if processes.alive(self.program(program, node)):
            raise Failed(f"{program} of {node} is running")
        if node == CONTROL:
            self.control.start(program)
        else:
            kubelet = self._kubelet(node)
            programs = {
                "containerd": kubelet.start_containerd,
                "kubelet": kubelet.start,
                "kube-proxy": kubelet.start_proxy,
            }
            programs[program]()

    def stop(self, program: str, node: str = CONTROL, grace: float = _STOP_GRACE) -> None:
        """SIGTERM, and SIGKILL after `grace` seconds (0: at once). Pods go on."""
        processes.stop(self.program(program, node), grace)

    def running(self) -> dict[str, list[str]]:
        """Machine -> those of its programs that run."""
        expected: dict[str, tuple[str, ...]] = {CONTROL: ControlPlane.programs}
        expected |= dict.fromkeys(self.nodes, self.node_programs)
        return {
            machine: [name for name in programs if processes.alive(self.program(name, machine))]
            for machine, programs in expected.items()
        }

    def _kubelet(self, node: str) -> Kubelet:
        if node not in self.kubelets:
            raise Failed(f"cluster {self.name!r} has no node {node!r}: {', '.join(self.nodes)}")
        return self.kubelets[node]

    def _each(self, do: Callable[[Kubelet], None]) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(do, self.kubelets.values()))


def _check(name: str, nodes: int, cni: str) -> None:
    if os.geteuid() != 0:
        raise Failed("this needs root (namespaces, eBPF): run it with sudo")
    if not valid_name(name):
        raise Failed(f"--name {name!r}: expected 1 to 20 lower case letters, digits and '-'")
    if not 1 <= nodes <= 9:
        raise Failed(f"--nodes {nodes}: expected 1 to 9")
    if cni not in cni_module.CHOICES:
        raise Failed(f"--cni {cni!r}: expected one of {', '.join(cni_module.CHOICES)}")

"""Clusters that several files of system tests share: made once, always taken down."""

from __future__ import annotations

import platform
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compilers import clang
from tests.system.harness import ROOT, Cluster, manifest, need_root, unique_name

NEAR, FAR = "node-1", "node-2"

# What a shell starts in the background is born deaf to Ctrl-C, and so would be what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _pod(name: str, node: str, *ports: int, namespace: str = "traffic") -> str:
    open_ports = [
        {"containerPort": number, "protocol": protocol}
        for number in ports
        for protocol in ("TCP", "UDP")
    ]
    spec = {"nodeName": node, "containers": [{"name": "main", "ports": open_ports}]}
    return manifest("Pod", namespace, name, spec, app=name)


def _service(name: str, app: str, target: int = 8080, namespace: str = "traffic") -> str:
    ports = [
        {"name": protocol.lower(), "port": 80, "protocol": protocol, "targetPort": target}
        for protocol in ("TCP", "UDP")
    ]
    spec = {"selector": {"app": app}, "ipFamilyPolicy": "PreferDualStack", "ports": ports}
    return manifest("Service", namespace, name, spec)


# Before the pods there is a firewall that forwards nothing; the nodes' stacks forward nothing.
FOREIGN_FIREWALL = (
    "table inet foreign { chain f { type filter hook forward priority 0; policy drop; }; }"
)


@pytest.fixture(scope="session")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that forward nothing themselves. Namespace `traffic` has no policies: pods
    `a` and `b` on node-1 and `c` on node-2, which answer on 8080 by their name; services
    `local` (a backend on node-1: b), `remote` (c), `self` (a), `empty`, and `closed` (port 9 of c,
    where nobody listens)."""
    if need_root():
        pytest.skip("needs root")
    folder = tmp_path_factory.mktemp("traffic")
    documents = [
        '{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "traffic"}}',
        _pod("a", NEAR, 8080),
        _pod("b", NEAR, 8080),
        _pod("c", FAR, 8080),
        _service("local", "b"),
        _service("remote", "c"),
        _service("self", "a"),
        _service("empty", "nobody"),
        _service("closed", "c", target=9),
    ]
    (folder / "traffic.yaml").write_text("\n---\n".join(documents))
    with Cluster(folder, unique_name("tt")) as cluster:
        for node in cluster.node_names:
            place = cluster.node(node)
            place.sysctl(net__ipv4__ip_forward=0, net__ipv6__conf__all__forwarding=0)
            place.run("nft", "-f", "-", input=FOREIGN_FIREWALL)
        yield cluster


# Fields more, at the beginning, in records of every kind: published, remembered, told.
OTHER_LAYOUT = {
    "struct node_state {": "__u32 extra;",
    "struct ct {": "__u64 extra;",  # some of its words are swapped whole
    "struct nat {": "__u32 extra;",
    "struct event {": "__u64 extra;",
}


@pytest.fixture(scope="session")
def other_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The object as another version might be: other layouts of what is pinned."""
    folder = tmp_path_factory.mktemp("other")
    sources = folder / "bpf"
    shutil.copytree(ROOT / "bpf", sources)
    text = (sources / "types.h").read_text()
    for head, field in OTHER_LAYOUT.items():
        assert text.count(f"\n{head}\n") == 1, head
        text = text.replace(f"\n{head}\n", f"\n{head}\n\t{field}\n")
    (sources / "types.h").write_text(text)
    made = folder / "other.bpf.o"
    flags = f"-target bpf -mcpu=v3 -O2 -g -std=gnu11 -I/usr/include/{platform.machine()}-linux-gnu"
    subprocess.run(
        [
            clang(),
            *flags.split(),
            f"-I{sources}",
            "-c",
            str(sources / "lockgate.bpf.c"),
            "-o",
            made,
        ],
        check=True,
    )
    return made

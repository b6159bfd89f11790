"""Where the built kernel objects, the pod runtime and the CNI plugin are.

In a checkout they are in build/ (made by `make build`), in an installed wheel in
lockgate/_bin.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["bpf_object", "cni_plugin", "pod_binary", "xdp_object"]

_PACKAGE = Path(__file__).resolve().parent


def _built(name: str) -> Path:
    places = (_PACKAGE.parent / "build" / name, _PACKAGE / "_bin" / name)
    for path in places:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{places[0]} is missing: run `make build`")


def bpf_object() -> Path:
    """The object file of all kernel programs but XDP's."""
    return _built("lockgate.bpf.o")


def xdp_object() -> Path:
    """The object file of XDP, with the maps of the other."""
    return _built("lockgate-xdp.bpf.o")


def pod_binary() -> Path:
    """The program that is the first process of each pod, and the prober."""
    return _built("lockgate-pod")


def cni_plugin() -> Path:
    """The CNI plugin that container runtimes run."""
    return _built("lockgate-cni")

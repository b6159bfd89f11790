"""Container images without a daemon and without a registry: archives as `docker save` writes them.

A layer holds static programs, or programs of this machine together with the libraries that the
dynamic linker finds for them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import re
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.binaries import Binaries
from cluster.commands import Failed, run

__all__ = ["build_all", "build_answering"]

_POD = Path(__file__).resolve().parent.parent / "build" / "lockgate-pod"

_CONFORMANCE = "registry.k8s.io/e2e-test-images"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Image(NamedTuple):
    """Paths in the image -> files of this machine; and symbolic links."""

    tags: Sequence[str]
    files: Mapping[str, Path]
    links: Mapping[str, str]
    entrypoint: Sequence[str]
    command: Sequence[str] = ()
    user: str = ""


def build_all(binaries: Binaries) -> Path:
    """One archive of all images but those of this tree, kept beside the binaries. Raises Failed."""
    path = binaries.folder / f"images-{_digest(Path(__file__))}.tar"
    if not path.exists():
        _write(path, _images(binaries))
    return path


def build_answering(binaries: Binaries) -> Path:
    """An archive of localhost/lockgate-pod:1: its containers answer on the ports that they are
    told, as containers without a command do in a standalone cluster. Raises Failed."""
    if not _POD.exists():
        raise Failed(f"{_POD} is missing: make build")
    path = binaries.folder / f"answering-{_digest(Path(__file__), _POD)}.tar"
    if not path.exists():
        shell_files, shell_links = _busybox()
        files = {"/lockgate-pod": _POD, **shell_files, **_with_libraries("curl", "/bin/curl")}
        image = Image(("localhost/lockgate-pod:1",), files, shell_links, ["/lockgate-pod"])
        _write(path, [image])
    return path


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


def _images(binaries: Binaries) -> list[Image]:
    pause = Image(
        ("localhost/pause:1", "registry.k8s.io/pause:3.10.2"),
        {"/pause": binaries.path("pause")},
        {},
        ["/pause"],
        user="65535:65535",
    )
    shell_files, shell_links = _busybox()
    busybox = Image(
        ("localhost/busybox:1", f"{_CONFORMANCE}/busybox:1.37.0-1"),
        shell_files,
        shell_links,
        [],
        ["sh"],
    )
    # The conformance tests run these in it with options that busybox's do not have. The shell is
    # not busybox's either: that one prefers busybox's programs to those in PATH.
    tools: dict[str, Path] = {}
    for tool, place in (
        ("dash", "/bin/sh"),
        ("curl", "/bin/curl"),
        ("nc.openbsd", "/bin/nc"),
        ("dig", "/bin/dig"),
        ("ip", "/bin/ip"),
    ):
        tools |= _with_libraries(tool, place)
    agnhost = Image(
        ("localhost/agnhost:1", f"{_CONFORMANCE}/agnhost:2.63.0"),
        {"/agnhost": binaries.path("agnhost"), **shell_files, **tools},
        {name: target for name, target in shell_links.items() if name not in tools},
        ["/agnhost"],
        ["pause"],
    )
    coredns = Image(
        ("localhost/coredns:1",), {"/coredns": binaries.path("coredns")}, {}, ["/coredns"]
    )
    return [pause, busybox, agnhost, coredns]


def _busybox() -> tuple[dict[str, Path], dict[str, str]]:
    program = _program("busybox")
    names = run(program, "--list").split()
    return {"/bin/busybox": program}, {
        f"/bin/{name}": "busybox" for name in names if name != "busybox"
    }


def _with_libraries(name: str, place: str) -> dict[str, Path]:
    """The program, at a place in the image, and the libraries that ldd lists for it
    ("x.so => /path (address)", "/ld.so (address)")."""
    program = _program(name)
    found = re.findall(r"^\s(?:\S+ => )?(/\S+) \(", run("ldd", program), re.M)
    return {place: program} | {path: Path(path) for path in found}


def _program(name: str) -> Path:
    if (path := shutil.which(name)) is None:
        raise Failed(f"{name} is not installed: scripts/setup.sh cluster does that")
    return Path(path).resolve()


def _write(path: Path, images: Sequence[Image]) -> None:
    manifest = []
    unfinished = path.with_suffix(".new")
    with tarfile.open(unfinished, "w") as archive:
        for image in images:
            layer = _layer(image)
            packed = gzip.compress(layer, 1, mtime=0)
            layer_name = f"{hashlib.sha256(packed).hexdigest()}.tar.gz"
            config = json.dumps(_config(image, layer)).encode()
            config_name = f"{hashlib.sha256(config).hexdigest()}.json"
            _add(archive, config_name, config)
            _add(archive, layer_name, packed)
            manifest.append(
                {"Config": config_name, "RepoTags": list(image.tags), "Layers": [layer_name]}
            )
        _add(archive, "manifest.json", json.dumps(manifest).encode())
    unfinished.rename(path)


def _layer(image: Image) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for folder, mode in (("etc", 0o755), ("tmp", 0o1777), ("root", 0o700), ("var", 0o755)):
            _folder(layer, folder, mode)
        _add(
            layer, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"
        )
        _add(layer, "etc/group", b"root:x:0:\nnogroup:x:65534:\n")
        for name, source in image.files.items():
            _add(layer, name.lstrip("/"), source.read_bytes(), 0o755)
        for name, target in image.links.items():
            link = tarfile.TarInfo(name.lstrip("/"))
            link.type, link.linkname = tarfile.SYMTYPE, target
            layer.addfile(link)
    return buffer.getvalue()


def _config(image: Image, layer: bytes) -> dict[str, object]:
    """The image's configuration (OCI image specification, config.md)."""
    machine = platform.machine()
    return {
        "architecture": _ARCHITECTURES.get(machine, machine),
        "os": "linux",
        "config": {
            "Entrypoint": list(image.entrypoint),
            "Cmd": list(image.command),
            "Env": [f"PATH={_PATH}"],
            "User": image.user,
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        "history": [{"created_by": "cluster/images.py"}],
    }


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def _folder(archive: tarfile.TarFile, name: str, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    archive.addfile(entry)

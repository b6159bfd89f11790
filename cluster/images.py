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

__all__ = [
    "Image",
    "agnhost",
    "build_all",
    "build_answering",
    "busybox",
    "digest",
    "pause",
    "program",
    "with_libraries",
    "write",
]

_POD = Path(__file__).resolve().parent.parent / "build" / "lockgate-pod"

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
    """One archive of what every cluster has, kept beside the binaries. Raises Failed."""
    path = binaries.folder / f"images-{digest(Path(__file__))}.tar"
    if not path.exists():
        write(path, _images(binaries))
    return path


def build_answering(binaries: Binaries) -> Path:
    """An archive of localhost/lockgate-pod:1: its containers answer on the ports that they are
    told, as containers without a command do in a standalone cluster. Raises Failed."""
    if not _POD.exists():
        raise Failed(f"{_POD} is missing: make build")
    path = binaries.folder / f"answering-{digest(Path(__file__), _POD)}.tar"
    if not path.exists():
        files = {"/lockgate-pod": _POD, **with_libraries(program("curl"), "/bin/curl")}
        image = busybox(("localhost/lockgate-pod:1",), files)
        write(path, [image._replace(entrypoint=["/lockgate-pod"], command=[])])
    return path


def digest(*paths: Path) -> str:
    """A name for what is made from these files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


def _images(binaries: Binaries) -> list[Image]:
    coredns = {"/coredns": binaries.path("coredns")}
    return [
        pause(binaries, ("localhost/pause:1",)),
        busybox(("localhost/busybox:1",)),
        agnhost(binaries, ("localhost/agnhost:1",)),
        Image(("localhost/coredns:1",), coredns, {}, ["/coredns"]),
    ]


def pause(binaries: Binaries, tags: Sequence[str]) -> Image:
    """What holds a pod's namespaces."""
    files = {"/pause": binaries.path("pause")}
    return Image(tags, files, {}, ["/pause"], user="65535:65535")


def busybox(tags: Sequence[str], more: Mapping[str, Path] = {}) -> Image:
    """A shell and most programs that it needs; those in `more` come instead of busybox's, and
    with any of them a shell that finds them: busybox's prefers its own to those in PATH."""
    files = {"/bin/busybox": program("busybox"), **more}
    if more:
        files |= with_libraries(program("dash"), "/bin/sh")
    names = (f"/bin/{name}" for name in run(files["/bin/busybox"], "--list").split())
    links = {name: "busybox" for name in names if name not in files}
    return Image(tags, files, links, [], ["sh"])


def agnhost(binaries: Binaries, tags: Sequence[str], more: Mapping[str, Path] = {}) -> Image:
    """Kubernetes' program for tests, and what its image has beside it; `more` is put in as well."""
    # Tests run these with options that busybox's do not have.
    tools = {"/agnhost": binaries.path("agnhost"), **more}
    for name, place in (
        ("curl", "/bin/curl"),
        ("nc.openbsd", "/bin/nc"),
        ("dig", "/bin/dig"),
        ("ip", "/bin/ip"),
    ):
        tools |= with_libraries(program(name), place)
    return busybox(tags, tools)._replace(entrypoint=["/agnhost"], command=["pause"])


def with_libraries(path: Path, place: str) -> dict[str, Path]:
    """A program, at a place in the image, and the libraries that ldd lists for it
    ("x.so => /path (address)", "/ld.so (address)")."""
    found = re.findall(r"^\s(?:\S+ => )?(/\S+) \(", run("ldd", path), re.M)
    return {place: path} | {library: Path(library) for library in found}


def program(name: str) -> Path:
    """A program of this machine. Raises Failed."""
    if (path := shutil.which(name)) is None:
        raise Failed(f"{name} is not installed: scripts/setup.sh cluster does that")
    return Path(path).resolve()


def write(path: Path, images: Sequence[Image]) -> None:
    """An archive of the images; it appears whole or not at all."""
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
        _add(layer, "etc/nsswitch.conf", b"hosts: files dns\n")
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

"""The images that the specs ask for, under the names that they ask for: the programs themselves,
from Kubernetes' Go modules and from this machine's distribution, without a registry."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster import images
from cluster.binaries import Binaries
from cluster.commands import Failed, run
from cluster.images import Image

__all__ = ["build"]

_HERE = Path(__file__)
_REGISTRY = "registry.k8s.io/"
_NGINX = _HERE.parent / "nginx.conf"
_WGETRC = _HERE.parent / "wgetrc"

# Fetched and unpacked, never installed: it would start serving on this machine.
_PACKAGES = ("nginx",)


def build(binaries: Binaries) -> Path:
    """An archive of the images, kept beside the binaries. Raises Failed."""
    name = images.digest(_HERE, Path(images.__file__), _NGINX, _WGETRC)
    path = binaries.folder / f"conformance-{name}.tar"
    if not path.exists():
        wanted = run(binaries.conformance(), "--list-images", timeout=60).split()
        with tempfile.TemporaryDirectory() as folder:
            packages = Path(folder)
            _unpack(packages)
            images.write(path, _images(binaries, wanted, packages))
    return path


def _images(binaries: Binaries, wanted: Sequence[str], packages: Path) -> list[Image]:
    def tags(name: str) -> list[str]:
        found = [tag for tag in wanted if tag.startswith(_REGISTRY) and f"/{name}:" in tag]
        if not found:
            raise Failed(f"the conformance tests ask for no image {name!r}: put images.py right")
        return found

    def programs(*names: str) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for name in names:
            files |= images.with_libraries(images.program(name), f"/bin/{name}")
        return files

    # Tests run busybox's wget with -T, with which Debian's crashes.
    wget = {**programs("wget"), "/etc/wgetrc": _WGETRC}
    # As its Dockerfile has it. Tests start the CoreDNS as a name server of their own.
    beside = {"/coredns": binaries.path("coredns"), **wget, **programs("getent")}
    for name in ("localhost.crt", "localhost.key"):
        beside[f"/{name}"] = binaries.source(f"test/images/agnhost/porter/{name}")
    nginx = images.with_libraries(packages / "usr/sbin/nginx", "/nginx")
    regression = "regression-issue-74839"
    return [
        images.pause(binaries, tags("pause")),
        images.busybox(tags("busybox"), wget),
        images.agnhost(binaries, tags("agnhost"), beside),
        # Its purpose: names looked up by glibc.
        images.busybox(tags("glibc-dns-testing"), {**wget, **programs("dig", "getent")}),
        Image(
            tags("nginx"),
            {**nginx, "/nginx.conf": _NGINX},
            {},
            ["/nginx", "-c", "/nginx.conf"],
        ),
        Image(
            tags(regression),
            {f"/{regression}": binaries.path(regression)},
            {},
            [f"/{regression}"],
        ),
    ]


def _unpack(folder: Path) -> None:
    # apt's own user cannot write to a folder of ours, and would say so.
    command = ("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *_PACKAGES)
    archives = folder / "archives"
    archives.mkdir()
    run("env", "-C", archives, *command)
    for archive in sorted(archives.iterdir()):
        run("dpkg-deb", "--extract", archive, folder)

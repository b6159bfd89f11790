"""The base layer: Python, the C library and libbpf of this machine's distribution.

apt says which packages an empty system would need; they are unpacked, not installed, and what
only the package manager or a terminal would use stays out. Packages that went in are listed in
/var/lib/dpkg/status.d, where scanners of images look.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

__all__ = ["Interpreter", "download", "glibc", "unpack"]

_ROOTS = ("base-files", "python3-minimal", "libpython3-stdlib", "libbpf1", "libstdc++6")

# Wanted by the packages above, but not by what runs here.
_LEFT_OUT = re.compile(
    r"dpkg|tar|libacl1|libselinux1|libpcre2.*|libmd0|mawk|original-awk|gawk|libgmp.*|libmpfr.*"
    r"|libsigsegv2"  # the package manager's own
    r"|readline-common|libreadline8.*|libtinfo6|libncursesw6"  # terminals
    r"|libdb5.*"  # dbm
    r"|libtirpc.*|libnsl2|libkrb5.*|libk5crypto3|libgssapi-krb5-2|libkeyutils1|libcom-err2"  # NIS
)

# Parts of the standard library that need those, or a compiler, or a screen.
_MODULES = [
    "curses",
    "dbm",
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "tkinter",
    "turtledemo",
    "venv",
]
_EXTENSIONS = ["_curses", "_curses_panel", "_dbm", "nis", "readline", "_tkinter"]

_FILES = {
    "etc/passwd": "root:x:0:0:root:/:/sbin/nologin\n",
    "etc/group": "root:x:0:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_FOLDERS = [
    "dev",
    "etc",
    "proc",
    "run",
    "sys",
    "tmp",
    "usr/bin",
    "usr/lib",
    "usr/lib64",
    "usr/sbin",
    "var/lib",
]
_NO_USE = [
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/share/apps",
    "usr/share/pixmaps",
    "usr/share/applications",
    "usr/share/menu",
    "usr/share/python3",
    "usr/share/zsh",
    "usr/share/binfmts",
    "usr/share/gcc",
    "usr/share/gdb",
    "usr/share/initramfs-tools",
    "usr/lib/locale",
    "usr/lib/mime",
    "usr/lib/valgrind",
    "boot",
    "home",
    "media",
    "mnt",
    "opt",
    "root",
    "srv",
]


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The image's Python, run on this machine from the unpacked tree, without entering it."""

    root: Path
    version: str  # "3.11"
    glibc: tuple[int, int]

    @property
    def libraries(self) -> str:
        return ":".join(str(path) for path in sorted(self.root.glob("usr/lib/*-linux-gnu")))

    @property
    def loader(self) -> Path:
        return next(iter(sorted(self.root.glob("usr/lib*/**/ld-linux-*.so.*"))))

    def run(self, *arguments: str, path: tuple[Path, ...] = ()) -> None:
        """CalledProcessError if it fails. `path` is its PYTHONPATH."""
        subprocess.run(
            [
                *(self.loader, "--library-path", self.libraries),
                *(self.root / f"usr/bin/python{self.version}", "-S", "-B", "-P", *arguments),
            ],
            env={
                "PYTHONHOME": str(self.root / "usr"),
                "PYTHONPATH": ":".join(map(str, path)),
                "PYTHONHASHSEED": "0",  # constants are written in the same order each time
                "LD_LIBRARY_PATH": self.libraries,
            },
            check=True,
        )

    def compile(self, root: Path, folders: tuple[Path, ...]) -> None:
        """Byte code beside each source, never looked at again: the image is read only, and
        compiling at each start would take seconds. `root` is what becomes / of the image."""
        self.run(
            *("-m", "compileall", "-q", "-f", "-s", str(root), "-p", "/"),
            *("--invalidation-mode", "unchecked-hash", *map(str, folders)),
        )

    def missing_libraries(self, root: Path, extra: str = "") -> list[str]:
        """Shared libraries that some program or library below `root` wants and the image lacks."""
        found = set()
        for path in sorted(root.rglob("*")):
            if path.is_symlink() or not path.is_file() or not _is_dynamic(path):
                continue
            done = subprocess.run(
                [self.loader, "--library-path", self.libraries + extra, "--list", path],
                capture_output=True,
                text=True,
                check=False,
            )
            for line in (done.stdout + done.stderr).splitlines():
                if "not found" in line or "cannot open shared object" in line:
                    found.add(f"{path.relative_to(root)}: {line.strip()}")
        return sorted(found)


def download(folder: Path) -> list[Path]:
    """Fetch what is not in `folder` yet; returns the archives to unpack."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = _resolve()
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing:
        _apt("download", *(f"{n}={v}" for n, v, _ in (_parts(name) for name in missing)), at=folder)
    return [folder / name for name in wanted]


def unpack(packages: list[Path], root: Path) -> Interpreter:
    """Make `root` anew from `packages`."""
    shutil.rmtree(root, ignore_errors=True)
    for name in _FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    for package in packages:
        _unpack(package, root)
    for name in _NO_USE:
        shutil.rmtree(root / name, ignore_errors=True)
    for copyright_ in (root / "usr/share/doc").glob("*/*"):
        # Licences stay: they have to go with what they are for.
        if copyright_.name != "copyright":
            copyright_.unlink() if not copyright_.is_dir() else shutil.rmtree(copyright_)
    for gconv in root.glob("usr/lib/*/gconv"):
        shutil.rmtree(gconv)  # character sets other than Unicode
    for script in root.glob("usr/bin/py3*"):
        script.unlink()  # the package manager's
    for name, text in _FILES.items():
        (root / name).write_text(text)
    library = next(iter(sorted(root.glob("usr/lib/python3.[0-9]*"))))
    version = library.name.removeprefix("python")
    for module in _MODULES:
        shutil.rmtree(library / module, ignore_errors=True)
    for extension in _EXTENSIONS:
        for path in (library / "lib-dynload").glob(f"{extension}.*"):
            path.unlink()
    for name in ("python", "python3"):
        link = root / "usr/bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to(f"python{version}")
    _drop_broken_links(root)
    return Interpreter(root, version, glibc(packages))


def _resolve() -> list[str]:
    """File names of the packages an empty system would need for the roots, without those
    left out."""
    text = _apt(
        *("install", "--print-uris", "-y", "-qq", "--no-install-recommends"),
        *("-o", "Dir::State::status=/dev/null", *_ROOTS),
    )
    names = [line.split()[1] for line in text.splitlines() if line.startswith("'")]
    return sorted(name for name in names if not _LEFT_OUT.fullmatch(_parts(name)[0]))


def _parts(file: str) -> tuple[str, str, str]:
    """name_version_architecture.deb"""
    name, version, architecture = unquote(file).removesuffix(".deb").split("_")
    return name, version, architecture


def _apt(*arguments: str, at: Path | None = None) -> str:
    """What apt-get prints. Lists that are missing or old are renewed once."""
    command = ["apt-get", *arguments]
    # apt's own user can't write to a folder of ours, and would say so.
    command += ["-o", "APT::Sandbox::User=root"]
    done = subprocess.run(command, cwd=at, capture_output=True, text=True, check=False)
    if done.returncode:
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=True)
        done = subprocess.run(command, cwd=at, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"image: apt-get {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _unpack(package: Path, root: Path) -> None:
    tree = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
    subprocess.run(
        ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", root],
        stdin=tree.stdout,
        check=True,
    )
    if tree.wait():
        raise SystemExit(f"image: {package} is damaged: remove it and try again")
    control = subprocess.run(
        ["dpkg-deb", "--field", package], capture_output=True, text=True, check=True
    ).stdout
    status = root / "var/lib/dpkg/status.d"
    status.mkdir(parents=True, exist_ok=True)
    (status / _parts(package.name)[0]).write_text(control)


def _drop_broken_links(root: Path) -> None:
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            target = os.readlink(path)
            at = root / target.lstrip("/") if target.startswith("/") else path.parent / target
            if not at.exists():
                path.unlink()


def glibc(packages: list[Path]) -> tuple[int, int]:
    """The C library's version: it says which wheels fit."""
    version = next(
        version
        for name, version, _ in (_parts(package.name) for package in packages)
        if name == "libc6"
    )
    major, minor = re.split(r"[.\-]", version)[:2]
    return int(major), int(minor)


def _is_dynamic(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(20)
    # An ELF file for a processor with a loader: not the kernel programs (EM_BPF, 247).
    return head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") != 247

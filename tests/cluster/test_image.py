"""The image of `make image`: in a real containerd it runs every program, and holds no more."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.containers import IMAGE, Containerd
from tests.system.harness import ROOT

ARCHIVE = ROOT / "dist/lockgate-image.tar"
EVERY_MODULE = """
import importlib, pkgutil, lockgate
names = [m.name for m in pkgutil.walk_packages(lockgate.__path__, "lockgate.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""
FILES = """
from lockgate import paths
print(paths.bpf_object().stat().st_size > 100_000)
"""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["lockgate", "--version"], "lockgate, version"),
        (["python3", "-m", "lockgate.agent", "--help"], "--config"),
        (["python3", "-m", "lockgate.observer", "--help"], "--config"),
        (["python3", "-c", EVERY_MODULE], ""),
        (["python3", "-c", FILES], "True"),
    ],
    ids=["the command", "the agent", "the observer", "every module", "the kernel programs"],
)
def test_it_runs(daemon: Containerd, command: list[str], said: str) -> None:
    done = daemon.ctr("run", "--rm", "--read-only", IMAGE, f"t{os.getpid()}", *command, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_it_has_both_names_and_is_small(daemon: Containerd) -> None:
    names = daemon.ctr("images", "ls", "-q").stdout.split()
    assert {IMAGE, "localhost/lockgate:latest"} <= set(names)
    assert unpacked() < 150e6


def test_it_has_no_compiler_no_installer_and_no_shell(tmp_path: Path) -> None:
    found = {name for layer in layers(tmp_path) for name in layer.getnames()}
    programs = {name.rpartition("/")[2] for name in found if name.startswith("usr/bin/")}
    assert programs == {"python", "python3", next(p for p in programs if p.startswith("python3."))}
    assert not [name for name in found if "/dist-packages/pip/" in name or "/ensurepip" in name]


def test_layers_bear_no_time_and_no_owner(tmp_path: Path) -> None:
    for layer in layers(tmp_path):
        for member in layer.getmembers():
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
            assert not member.mode & 0o6000, f"{member.name} is setuid"


def layers(folder: Path) -> Iterator[tarfile.TarFile]:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for name in json.loads((folder / "manifest.json").read_text())[0]["Layers"]:
        with tarfile.open(folder / name) as layer:
            yield layer


def unpacked() -> int:
    with tarfile.open(ARCHIVE) as archive:
        manifest = archive.extractfile("manifest.json")
        assert manifest is not None
        total = 0
        for name in json.load(manifest)[0]["Layers"]:
            blob = archive.extractfile(name)
            assert blob is not None
            total += len(gzip.decompress(blob.read()))
    return total

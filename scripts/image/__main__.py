"""Lockgate's container image, without a container daemon: dist/lockgate-image.tar.

    python -m scripts.image          (make image)

Three layers: base (Debian's or Ubuntu's Python, libbpf), dependencies (wheels of
requirements.lock, the run-time part), lockgate (our wheel, kernel programs inside). Layers that
have not changed are taken from build/image. The same inputs give the same bytes;
SOURCE_DATE_EPOCH, else the time of the last commit, is the image's time.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lockgate import __version__
from scripts.image import archive, base, dependencies

_PROJECT = Path(__file__).resolve().parents[2]
_WORK = _PROJECT / "build/image"
_TARGET = _PROJECT / "dist/lockgate-image.tar"
_NAME = "localhost/lockgate"
_LICENCES = "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)"
_PROGRAMS = ("lockgate.agent.main", "lockgate.observer.__main__", "lockgate.cli.main")


def main() -> int:
    wheel = _our_wheel()
    debs = base.download(_WORK / "debs")
    root = _WORK / "base"
    layers = [_layer("base", debs, lambda: _make_base(debs, root))]
    interpreter = _interpreter(debs, root)
    lock = dependencies.runtime_lock(_PROJECT, interpreter.version)
    wheels = dependencies.download(lock, interpreter, _WORK / "wheels")

    def make(name: str, wheels: list[Path], scripts: bool) -> Callable[[], None]:
        def run() -> None:
            tree = _WORK / name
            dependencies.unpack(wheels, tree, interpreter, scripts)
            _complain(interpreter.missing_libraries(tree))

        return run

    layers.append(_layer("dependencies", [*debs, *wheels], make("dependencies", wheels, False)))
    layers.append(_layer("lockgate", [*debs, wheel], make("lockgate", [wheel], True)))
    _try_imports(interpreter)
    _TARGET.parent.mkdir(exist_ok=True)
    archive.write(
        _TARGET,
        layers,
        [f"{_NAME}:{__version__}", f"{_NAME}:latest"],
        architecture={"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
        created=_created(),
        config={
            "Env": ["PATH=/usr/local/bin:/usr/bin", "LANG=C.UTF-8", "PYTHONUNBUFFERED=1"],
            "Cmd": ["lockgate", "--help"],
            "Labels": {
                "org.opencontainers.image.title": "lockgate",
                "org.opencontainers.image.version": __version__,
                "org.opencontainers.image.licenses": _LICENCES,
            },
        },
    )
    sizes = ", ".join(f"{layer.name} {layer.size / 1e6:.0f}" for layer in layers)
    total = sum(layer.size for layer in layers)
    print(
        f"  {_TARGET.relative_to(_PROJECT)}: {_NAME}:{__version__}, "
        f"{total / 1e6:.0f} MB unpacked ({sizes}), {_TARGET.stat().st_size / 1e6:.0f} MB packed"
    )
    return 0


def _our_wheel() -> Path:
    folder = _WORK / "wheel"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=_PROJECT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return next(iter(folder.glob("*.whl")))


def _make_base(debs: list[Path], root: Path) -> None:
    interpreter = base.unpack(debs, root)
    interpreter.compile(root, (root / f"usr/lib/python{interpreter.version}",))
    _complain(interpreter.missing_libraries(root))


def _interpreter(debs: list[Path], root: Path) -> base.Interpreter:
    library = next(iter(sorted(root.glob("usr/lib/python3.[0-9]*"))))
    return base.Interpreter(root, library.name.removeprefix("python"), base.glibc(debs))


def _layer(name: str, inputs: list[Path], make: Callable[[], None]) -> archive.Layer:
    """The layer of tree build/image/NAME; made anew when its inputs or this program changed."""
    key = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        key.update(source.read_bytes())
    for path in inputs:
        key.update(path.name.encode())
        if name == "lockgate":
            key.update(path.read_bytes())
    kept = _WORK / f"{name}.layer"
    if kept.exists() and (_WORK / name).exists():
        digest, layer = pickle.loads(kept.read_bytes())
        if digest == key.digest():
            assert isinstance(layer, archive.Layer)
            return layer
    print(f"  making the image's layer {name}")
    make()
    layer = archive.pack(name, _WORK / name)
    kept.write_bytes(pickle.dumps((key.digest(), layer)))
    return layer


def _try_imports(interpreter: base.Interpreter) -> None:
    """Import the programs with nothing but what is in the layers."""
    folders = tuple(
        dependencies.packages_folder(_WORK / name, interpreter)
        for name in ("dependencies", "lockgate")
    )
    interpreter.run("-c", f"import {', '.join(_PROGRAMS)}", path=folders)


def _complain(missing: list[str]) -> None:
    if missing:
        raise SystemExit("image: shared libraries are missing:\n" + "\n".join(missing))


def _created() -> int:
    if "SOURCE_DATE_EPOCH" in os.environ:
        return int(os.environ["SOURCE_DATE_EPOCH"])
    git = subprocess.run(
        ["git", "log", "-1", "--format=%ct"],
        cwd=_PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    return int(git.stdout) if git.returncode == 0 else 0


if __name__ == "__main__":
    sys.exit(main())

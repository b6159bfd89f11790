"""The layers of Python packages: what Lockgate imports, and Lockgate itself."""

from __future__ import annotations

import configparser
import platform
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.image.base import Interpreter

__all__ = ["download", "packages_folder", "runtime_lock", "unpack"]

# Of no use without a compiler, a type checker or a test run.
_NO_USE = (
    *("**/tests", "**/*.pyi", "**/*.pxd", "**/*.pyx", "**/*.c", "**/*.h", "**/__pycache__"),
    *("numpy/f2py", "numpy/_core/include", "numpy/_core/lib", "numpy/random/lib"),
    *("numpy/random/_examples", "numpy/doc", "numpy/distutils"),
    *("*.dist-info/RECORD", "*.dist-info/WHEEL"),
)

_SCRIPT = """\
#!/usr/bin/python3
import sys

from {module} import {function}

sys.exit({function}())
"""


def runtime_lock(project: Path, python: str) -> list[str]:
    """`name==version` of everything that pyproject.toml's dependencies need at run time, in the
    versions of requirements.lock. `python` is the version that markers are for ("3.11")."""
    lock = {}
    for line in (project / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            lock[canonicalize_name(name)] = version
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    wanted = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
    queue, found = [Requirement(text) for text in wanted], {}
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate(environment)
        if not applies or name in found:
            continue
        if name not in lock:
            raise SystemExit(f"image: requirements.lock has no {name}: run `make lock`")
        found[name] = lock[name]
        queue += [Requirement(text) for text in metadata.requires(name) or []]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def download(lock: list[str], interpreter: Interpreter, folder: Path) -> list[Path]:
    """Wheels for the image's Python and C library, fetched where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = interpreter.glibc
    machine = platform.machine()
    platforms = [f"manylinux_{major}_{n}_{machine}" for n in range(minor, 4, -1)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", interpreter.version, "--dest", str(folder)]
    command += ["--find-links", str(folder)]
    for name in (*platforms, f"manylinux2014_{machine}", f"manylinux1_{machine}"):
        command += ["--platform", name]
    subprocess.run([*command, *lock], check=True)
    wanted = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lock}
    found = {}
    for path in sorted(folder.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        if wanted.get(canonicalize_name(name)) == version:
            found[canonicalize_name(name)] = path
    return [found[name] for name in sorted(found)]


def packages_folder(root: Path, interpreter: Interpreter) -> Path:
    """Where Debian's Python looks for what did not come as a Debian package."""
    return root / f"usr/local/lib/python{interpreter.version}/dist-packages"


def unpack(wheels: list[Path], root: Path, interpreter: Interpreter, scripts: bool = False) -> None:
    """Make `root` anew from `wheels`, compiled; `scripts`: with their commands."""
    shutil.rmtree(root, ignore_errors=True)
    folder = packages_folder(root, interpreter)
    folder.mkdir(parents=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
            for info in archive.infolist():
                # extractall drops permissions: programs in wheels stay programs.
                if info.external_attr >> 16 & 0o111 and not info.is_dir():
                    (folder / info.filename).chmod(0o755)
    for pattern in _NO_USE:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if scripts:
        for entry_points in sorted(folder.glob("*.dist-info/entry_points.txt")):
            _write_scripts(entry_points, root / "usr/local/bin")
    interpreter.compile(root, (folder,))


def _write_scripts(entry_points: Path, folder: Path) -> None:
    parser = configparser.ConfigParser()
    parser.read(entry_points)
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in parser["console_scripts"].items():
        module, _, function = target.partition(":")
        script = folder / name
        script.write_text(_SCRIPT.format(module=module, function=function))
        script.chmod(0o755)

"""Containers with the security context that deploy/lockgate.yaml asks for, in a containerd of
the test's own: what a kubelet makes of it, without a cluster."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lockgate import __version__
from tests.system.harness import ROOT, until

__all__ = ["IMAGE", "Containerd", "container", "containerd"]

IMAGE = f"localhost/lockgate:{__version__}"

# What ctr gives a container that asks for nothing.
_USUAL = (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP "
    "NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE"
)
_CONFIG = """\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{folder}/containerd.sock"
"""


def container(name: str) -> dict[str, Any]:
    """A container of the DaemonSet; the pod's volumes by name are under "volumes"."""
    for item in yaml.safe_load_all((ROOT / "deploy/lockgate.yaml").read_text()):
        if item and item["kind"] == "DaemonSet":
            pod = item["spec"]["template"]["spec"]
            found = next(one for one in pod["containers"] if one["name"] == name)
            return {**found, "volumes": {volume["name"]: volume for volume in pod["volumes"]}}
    raise AssertionError("deploy/lockgate.yaml has no DaemonSet")


class Containerd:
    """A running containerd; everything is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ctr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["ctr", "--address", f"{self.folder}/containerd.sock", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=check, timeout=120)

    def run_command(
        self,
        name: str,
        spec: dict[str, Any],
        mounts: dict[str, Path],
        *,
        netns: Path,
        extra: Sequence[tuple[Path, str]] = (),
        without: str = "",
        instead: Sequence[str] = (),
    ) -> list[str]:
        """The command line that runs `spec` as container `name` in the network namespace `netns`.
        `mounts` says what is mounted for volumes that are not the node's own paths, `extra` is
        mounted besides; the capability `without` is taken away, those of `instead` are given."""
        security = spec["securityContext"]
        wanted = {*security["capabilities"]["add"], *instead} - {without}
        assert security["capabilities"]["drop"] == ["ALL"]
        command = ["ctr", "--address", f"{self.folder}/containerd.sock", "run", "--rm"]
        command += ["--seccomp", "--with-ns", f"network:{netns}"]
        if security["readOnlyRootFilesystem"]:
            command.append("--read-only")
        for capability in sorted(set(_USUAL.split()) - wanted):
            command += ["--cap-drop", f"CAP_{capability}"]
        for capability in sorted(wanted):
            command += ["--cap-add", f"CAP_{capability}"]
        for mount in spec["volumeMounts"]:
            volume = spec["volumes"][mount["name"]]
            source = mounts.get(mount["name"])
            if source is None:
                source = Path(volume["hostPath"]["path"])
            mode = "ro" if mount.get("readOnly") else "rw"
            command += _mount(source, mount["mountPath"], mode)
        for source, target in extra:
            command += _mount(source, target, "rw")
        return [*command, IMAGE, name, *spec["command"]]


@contextlib.contextmanager
def containerd(folder: Path) -> Iterator[Containerd]:
    """With the image of this tree imported."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.toml"
    config.write_text(_CONFIG.format(folder=folder))
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(["containerd", "-c", config], stdout=log, stderr=log)
    try:
        daemon = Containerd(folder)
        until(lambda: not daemon.ctr("version", check=False).returncode, "containerd to answer")
        daemon.ctr("images", "import", str(ROOT / "dist/lockgate-image.tar"))
        yield daemon
    finally:
        process.terminate()
        process.wait(20)
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[1].startswith(f"{folder}/"):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)


def _mount(source: Path, target: str, mode: str) -> list[str]:
    return ["--mount", f"type=bind,src={source},dst={target},options=rbind:{mode}"]

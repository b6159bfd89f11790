"""Named network namespaces beside those of iproute2, in a mount namespace of the test's own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

_PRELUDE = """
import os, subprocess
from lockgate.net import namespaces
name = f"lg-names-{os.getpid()}"
path = namespaces.path_of(name)
def run(*words):
    subprocess.run(words, check=True)
def mounts(where):
    return open("/proc/self/mountinfo").read().count(f" {where} ")
def bare():
    while mounts("/run/netns"):
        run("umount", "--lazy", "/run/netns")
def gone():
    assert not path.exists(), "the name stays"
    assert not mounts(path), "the mount stays"
"""

CASES = {
    "made_where_the_folder_was_no_mount": """
        bare()
        namespaces.create(name)
        assert mounts("/run/netns") == 1
        assert namespaces.delete(name)
        gone()
    """,
    "iproute2_comes_later": """
        bare()
        namespaces.create(name)
        run("ip", "netns", "add", f"{name}-other")
        run("ip", "netns", "delete", f"{name}-other")
        assert mounts("/run/netns") == mounts(path) == 1
        assert namespaces.delete(name)
        gone()
    """,
    "hidden_by_a_later_mount_of_the_folder": """
        namespaces.create(name)
        run("mount", "--bind", "/run/netns", "/run/netns")
        run("mount", "--bind", "/run/netns", "/run/netns")
        assert not os.path.ismount(path)
        assert namespaces.delete(name)
        gone()
    """,
    "deleted_twice": """
        namespaces.create(name)
        assert namespaces.delete(name)
        assert not namespaces.delete(name)
        gone()
    """,
}


@pytest.mark.parametrize("name", CASES)
def test_a_name_goes_without_a_trace(name: str) -> None:
    script = _PRELUDE + textwrap.dedent(CASES[name])
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr

"""The clang that tests compile with: the one that builds the programs."""

from __future__ import annotations

import functools
import shutil

__all__ = ["clang"]

#: As in Makefile and scripts/setup.sh: whichever of them is there is good enough.
VERSIONS = ("clang-19", "clang-18", "clang-17", "clang-16")


@functools.cache
def clang() -> str:
    """Its path. LookupError with what to do if there is none."""
    for name in VERSIONS:
        if path := shutil.which(name):
            return path
    raise LookupError(f"none of {', '.join(VERSIONS)} is here: scripts/setup.sh test installs one")

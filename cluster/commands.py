"""Commands of others, run to their end."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from os import PathLike
from typing import TypeVar

__all__ = ["Failed", "run", "until"]

T = TypeVar("T")
Word = str | PathLike[str]


class Failed(Exception):
    """A command or a wait failed; the message is one sentence and what the command said."""


def run(*command: Word, input: str | None = None, timeout: float | None = 120) -> str:
    """What the command prints. Raises Failed when it cannot run, ends badly or takes too long."""
    name = str(command[0]).rpartition("/")[2]
    try:
        done = subprocess.run(
            command, input=input, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{name} took longer than {timeout:.0f} s: {_line(command)}") from None
    except OSError as error:
        raise Failed(f"{name} cannot run: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise Failed(f"{name} failed ({done.returncode}): {_line(command)}\n{said}")
    return done.stdout


def until(what: str, condition: Callable[[], T | None], deadline: float, pause: float = 0.05) -> T:
    """The first true answer. Failed within it counts as no answer; raises Failed at the deadline
    (in seconds) with the last such sentence."""
    end = time.monotonic() + deadline
    why = ""
    while True:
        try:
            if answer := condition():
                return answer
        except Failed as error:
            why = f": {error}"
        if time.monotonic() >= end:
            raise Failed(f"{what} did not come within {deadline:.0f} s{why}")
        time.sleep(pause)


def _line(command: tuple[Word, ...]) -> str:
    text = " ".join(map(str, command))
    return text if len(text) <= 200 else text[:200] + "…"

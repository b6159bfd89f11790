"""Called as `kubectl lockgate`: kubectl runs kubectl-lockgate."""

from __future__ import annotations

import os
import sys

__all__ = ["called_as_plugin"]


def called_as_plugin() -> bool:
    return os.path.basename(sys.argv[0]).startswith("kubectl-")

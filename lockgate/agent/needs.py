"""What an agent needs from its machine. `lockgate up` asks before it makes anything, each agent
before it touches anything, and scripts/setup.sh last of all."""

from __future__ import annotations

import errno
import os

from lockgate.bpf import features
from lockgate.bpf.features import Feature, MissingFeature, passing_program
from lockgate.net import filters, namespaces

__all__ = ["require"]


def require() -> list[Feature]:
    """All that was found. Raises MissingFeature for the first need that is not met."""
    return [*features.require(), _filters()]


def _filters() -> Feature:
    """Can programs be filters here? Tried on a link of its own."""
    fd = passing_program()
    advice = "the kernel needs CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF"
    try:
        namespaces.in_a_new_one(lambda: filters.put(1, {"ingress": ("probe", fd)}))
    except OSError as error:
        missing = "clsact filters"
        if error.errno == errno.EPERM:
            missing = "permission for clsact filters"
            advice = "run as root, or with CAP_SYS_ADMIN and CAP_NET_ADMIN"
        raise MissingFeature(f"This machine has no {missing} ({error}): {advice}.") from error
    finally:
        os.close(fd)
    return Feature("clsact filters", True, advice)

"""Pods' links where others have links of their own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockgate.net import dumps, namespaces, pods
from lockgate.net.links import IFINDEX_BASE
from lockgate.net.netlink import IFLA_IFNAME, IFLA_LINKINFO, NEWLINK, Batch, attribute, text
from lockgate.net.pods import PodLink, Seal

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LINK = PodLink("one", 5, ("10.1.0.5", "fd00::5"), 1500)
SEAL = Seal("uid", "", LINK.addresses)


@pytest.fixture
def pod() -> Iterator[Path]:
    """A pod's namespace; the test itself is in that of a node."""
    name = f"lg-pods-{os.getpid()}"
    node, made = namespaces.create(f"{name}-node"), namespaces.create(f"{name}-pod")
    try:
        with namespaces.inside(node):
            yield made
    finally:
        namespaces.delete(node.name)
        namespaces.delete(made.name)


def bridge(name: str, index: int) -> None:
    """A link of somebody else."""

    payload = bytes(4) + index.to_bytes(4, "little") + bytes(8)
    payload += attribute(IFLA_IFNAME, text(name))
    payload += attribute(IFLA_LINKINFO, attribute(1, text("bridge")))
    with Batch() as batch:
        batch.add(f"make {name}", NEWLINK, payload, 0x600)
        batch.send()


def names() -> set[str]:
    return {one.name for one in dumps.interfaces()} - {"lo"}


def test_somebody_elses_link_with_our_index_is_named_and_stays(pod: Path) -> None:
    bridge("theirs", LINK.ifindex)
    with pytest.raises(OSError, match=f"theirs has its index, {LINK.ifindex}"):
        pods.wire(LINK, str(pod), SEAL)
    pods.retire([LINK.slot])
    pods.remove([LINK.slot])
    pods.remove([LINK.slot, LINK.slot + 1])
    assert names() == {"theirs"}


def test_what_has_our_name_is_replaced_whatever_its_index(pod: Path) -> None:
    bridge(LINK.name, 7)
    bridge("theirs", LINK.ifindex + 1)
    pods.wire(LINK, str(pod), SEAL)
    assert pods.seals() == {LINK.slot: SEAL}
    assert socket.if_nametoindex(LINK.name) == IFINDEX_BASE + LINK.slot
    # Once more, over both ends.
    pods.wire(LINK, str(pod), SEAL)
    assert not pods.problems(LINK, str(pod))
    pods.remove([LINK.slot, LINK.slot + 1])
    assert names() == {"theirs"}

"""XDP of an agent as a process: by need, over its death, beside others; gone when it leaves."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lockgate.agent.config import read
from lockgate.agent.uninstall import uninstall
from lockgate.bpf import syscall
from lockgate.net import namespaces, xdp
from tests.system.agents import Bed, Node, frontend, make_bed, pod, until, with_ips

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

#: r0 = XDP_PASS; exit
PASS = struct.pack("<BBhi", 0xB7, 0, 0, 2) + struct.pack("<BBhi", 0x95, 0, 0, 0)
XDP = 6  # enum bpf_prog_type
WEB = frontend("web", "203.0.113.80", "10.77.2.9")


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    async with make_bed(tmp_path, "one") as made:
        made.supervisor.put(with_ips(pod("far", "two"), ["10.77.2.9"]))
        yield made


def there(node: Node, card: str = "outside") -> tuple[str, int]:
    """Mode and program at a card, as the kernel has them."""
    with namespaces.inside(namespaces.path_of(node.netns)):
        state = xdp.state(socket.if_nametoindex(card))
    return state.mode, state.program


async def told(node: Node) -> dict[str, tuple[str, str]]:
    """By card, as the agent tells it."""
    _, status = await node.call("GET", "/v1/status")
    return {one["card"]: (one["mode"], one["why"]) for one in status["xdp"]}


async def serve(bed: Bed, *objects: dict[str, Any], verb: str = "ADDED") -> None:
    await bed.supervisor.wait(bed.supervisor.put(*objects, verb=verb), "one")


async def test_it_is_there_while_a_frontend_needs_it(bed: Bed) -> None:
    node = bed.nodes["one"]
    assert there(node) == ("", 0)
    assert await told(node) == dict.fromkeys(("outside", "underlay"), ("none", "nothing needs it"))
    for _ in range(2):
        await serve(bed, *WEB)
        assert there(node)[0] == "generic"
        assert await told(node) == {
            "outside": ("generic", "native, what it sends on would lack checksums"),
            "underlay": ("none", "clients come by another card"),
        }
        await serve(bed, *WEB, verb="DELETED")
        assert there(node) == ("", 0)


async def test_it_works_on_when_the_agent_is_killed_and_is_taken_over(bed: Bed) -> None:
    node = bed.nodes["one"]
    await serve(bed, *WEB)
    mode, first = there(node)
    for _ in range(3):
        await node.kill()
        assert there(node) == (mode, first)
        bed.supervisor.applied.clear()
        await node.start()
        await bed.supervisor.wait(bed.supervisor.revision, "one")
        mode, second = there(node)
        assert mode == "generic" and second != first
        first = second
    await node.kill()
    bed.supervisor.put(*WEB, verb="DELETED")
    await node.start()
    await until(lambda: there(node) == ("", 0))


async def test_a_program_of_others_stays_and_is_told_of(bed: Bed) -> None:
    node = bed.nodes["one"]
    program = syscall.prog_load(XDP, PASS, "guest")
    number = syscall.prog_info(program).id
    with namespaces.inside(namespaces.path_of(node.netns)):
        index = socket.if_nametoindex("outside")
        guest = syscall.link_create(program, index, syscall.AttachType.XDP, flags=1 << 2)
    await serve(bed, *WEB)
    why = f"another program is there: guest (id {number})"
    assert there(node) == ("native", number)
    assert (await told(node))["outside"] == ("none", why)
    _, found = await node.call("GET", "/v1/doctor")
    (finding,) = [one for one in found["findings"] if one["check"] == "xdp"]
    assert finding["severity"] == "warning" and why in finding["text"]
    os.close(guest)
    os.close(program)

    async def ours() -> bool:
        return (await told(node))["outside"][0] == "generic"

    await until(ours)  # it looks every ten seconds
    _, found = await node.call("GET", "/v1/doctor")
    (finding,) = [one for one in found["findings"] if one["check"] == "xdp"]
    assert (finding["severity"], finding["text"]) == ("ok", "XDP runs generic at outside")


async def test_it_is_gone_when_lockgate_leaves_the_node(bed: Bed) -> None:
    node = bed.nodes["one"]
    await serve(bed, *WEB)
    await node.kill()
    config = read(node.state / "config.json")
    with namespaces.inside(namespaces.path_of(node.netns)):
        assert there(node)[0] == "generic"
        uninstall(config, force=True)
    assert there(node) == ("", 0)

"""Generic XDP before from_net, on real frames: what it passes has to come there whole."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.packet import Packet, Raw

from lockgate.bpf import links
from tests.bytecode.balancing import DSR, LB, PORTS, SPORT, frontends, outer
from tests.bytecode.edge import Edge
from tests.bytecode.goldens import FAMILIES, HOP_DMAC, ip, syn, tcp, to_hop, udp, wire
from tests.bytecode.world import OUTSIDE, World, mac_bytes

ALL = socket.htons(3)  # ETH_P_ALL
SOL_PACKET, PACKET_VNET_HDR = 263, 15
NEEDS_CSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum is left to the card
HEADER = struct.Struct("<BBHHHH")  # struct virtio_net_hdr


@pytest.fixture
def cards(world: World) -> Iterator[tuple[socket.socket, socket.socket]]:
    """from_net behind generic XDP at OUTSIDE: the other ends of OUTSIDE and UNDERLAY."""
    folder = Path(f"/sys/fs/bpf/lockgate-generic-{os.getpid()}")
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(folder.rmdir)
        own = {"config_balance": 1, "config_generic": 1}
        edge = stack.enter_context(Edge(world, own, program="xdp_generic"))
        tcx, xdp = str(folder / "tcx"), str(folder / "xdp")
        stack.callback(links.remove, tcx)
        fd = world.object.prog_fd("from_net")
        stack.enter_context(links.attach_tcx(fd, OUTSIDE, "ingress", tcx))
        stack.callback(links.remove, xdp)
        fd = edge.object.prog_fd("xdp_generic")
        stack.enter_context(links.attach_xdp(fd, OUTSIDE, "generic", xdp))
        sockets = []
        for end in ("outside-peer", "underlay-peer"):
            subprocess.run(["ip", "link", "set", end, "up"], check=True)
            stack.callback(subprocess.run, ["ip", "link", "set", end, "down"], check=True)
            one = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, ALL))
            one.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            one.bind((end, 0))
            one.settimeout(2)
            sockets.append(one)
        yield sockets[0], sockets[1]


def sent_on(cards: tuple[socket.socket, socket.socket], packet: Packet, offset: int) -> bytes:
    """The frame that leaves for the hop, without its checksum at `offset` of the last header."""
    near, far = cards
    l4 = len(packet) - len(packet.payload) + 14
    near.send(HEADER.pack(NEEDS_CSUM, 0, 0, 0, l4, offset) + bytes(wire() / packet))
    while True:
        got = far.recv(4000)
        flags, _, _, _, start, at = HEADER.unpack(got[: HEADER.size])
        frame = got[HEADER.size :]
        if frame[:6] == mac_bytes(HOP_DMAC):
            grown = len(frame) - len(bytes(wire() / packet))
            assert (flags, start, at) == (NEEDS_CSUM, l4 + grown, offset)
            return frame


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [0, 4, 1000])
@pytest.mark.parametrize("kind", ["syn", "data", "udp"])
def test_whoever_sends_it_on_it_is_whole(
    world: World, cards: tuple[socket.socket, socket.socket], kind: str, size: int, family: int
) -> None:
    """SYNs, bare acknowledgements and datagrams XDP sends, what GRO may have joined from_net.
    A checksum that its sender left to the card is still said to be missing."""
    world.publish(frontends())
    make = {"syn": syn, "data": lambda s, d: tcp(s, d, "A").__class__(bytes(tcp(s, d, "A"))[:20])}
    l4 = make[kind](SPORT, PORTS[DSR]) if kind in make else udp(SPORT, PORTS[DSR])
    body = Raw(bytes(size)) if size and kind != "syn" else Raw(b"")
    offset = 6 if kind == "udp" else 16

    def packet(ttl: int) -> Packet:
        return ip(family, "world", LB[family], ttl=ttl) / l4 / body

    wanted = bytes(to_hop() / outer(packet(63), "remote"))
    assert sent_on(cards, packet(64), offset) == wanted

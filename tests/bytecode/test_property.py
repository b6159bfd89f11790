"""Random clusters, random packets: the kernel's programs mean what the specification says."""

from __future__ import annotations

import os
import random
import secrets

import pytest

from lockgate.compile.evaluate import class_of
from lockgate.compile.tables import CELL_ALLOW
from lockgate.spec.policy import Packet
from tests import generate
from tests.bytecode import compare
from tests.bytecode.compare import Case, Difference, Mismatch, play

SECONDS = float(os.environ.get("LOCKGATE_FUZZ_SECONDS", 0))
SEED = int(os.environ.get("LOCKGATE_FUZZ_SEED", 0)) or (secrets.randbits(32) if SECONDS else 1)


@pytest.mark.fuzz
def test_kernel_agrees_with_the_specification(world):
    """Verdict, directions judged, and every rule or policy of each direction."""
    print(f"\nseed {SEED} (LOCKGATE_FUZZ_SEED={SEED} repeats it)")
    if SECONDS:
        score = play(world, SEED, seconds=SECONDS, progress=compare.show)
    else:
        score = play(world, SEED, rounds=200)
        assert score.clusters >= 200 and score.packets >= 20_000
    print(f"{score.clusters} clusters, {score.packets} packets, no difference")


def judged_packet(world) -> tuple[Case, Packet, int, str]:
    """A case, a packet whose ingress a policy decides, and the image word of its cell."""
    for number in range(100):
        rng = random.Random(f"mutation/{number}")
        cluster = generate.cluster(rng)
        case = Case(world, cluster, "a")
        case.publish()
        for _ in range(200):
            packet = compare.random_packet(rng, cluster)
            target = compare.spec.pod_at(cluster, packet.destination)
            source = compare.spec.pod_at(cluster, packet.source)
            if (
                target is None
                or target.key not in case.slots
                or (source is not None and source.key in case.slots)
                or packet.from_own_node
                or packet.port is None
            ):
                continue
            judgement = compare.spec.judge(cluster, packet).ingress
            if judgement.isolated and judgement.allowed:
                case.check(packet)
                return case, packet, cell_word(case, packet, case.slots[target.key]), "ingress"
    raise AssertionError("the generator makes no such packet any more")


def cell_word(case: Case, packet: Packet, slot: int) -> int:
    """Where the cell stands that decides the packet's ingress, as bpf/types.h says."""
    tables, image = case.tables, case.tables.image
    cls = class_of(tables, compare.parse_address(packet.source))
    table = {"TCP": 0, "UDP": 1, "SCTP": 2}[packet.protocol]
    port = int(image[:49152].view("<u2")[table * 65536 + packet.port])
    view = tables.endpoints[slot]
    return (int(image[view.rows + cls]) + int(image[view.cols + port])) & 0xFFFFFFFF


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(CELL_ALLOW, id="verdict"),
        pytest.param(1, id="reason"),
    ],
)
def test_a_wrong_cell_is_noticed(world, change):
    """The comparison can fail: one flipped bit of one cell."""
    case, packet, word, _ = judged_packet(world)
    live = world.publisher._inner[world.publisher.epoch & 1].view
    live[word] ^= change
    try:
        with pytest.raises(Mismatch) as caught:
            case.check(packet)
        assert "ingress: kernel" in caught.value.text
    finally:
        live[word] ^= change
    assert case.check(packet)


def test_a_wrong_kernel_ends_the_run_with_a_small_cluster(world, monkeypatch):
    """A compiler that forgets a port makes `play` fail, and the report names few objects."""
    from lockgate.compile import compile_node

    def wrong(cluster, node, ids):
        tables = compile_node(cluster, node, ids)
        image = tables.image.copy()
        image.view("<u2")[80] = 0  # TCP port 80: the class of protocols without ports
        tables.image = image
        return tables

    monkeypatch.setattr(compare, "compile_node", wrong)
    with pytest.raises(Difference) as caught:
        play(world, 1, rounds=100)
    text = str(caught.value)
    assert "seed 1, round" in text and "smallest cluster" in text
    assert 1 <= text.count("kind: NetworkPolicy") <= 2
    assert 1 <= text.count("kind: Pod") <= 2

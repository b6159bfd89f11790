"""Random clusters, random packets: the kernel's programs mean what the specification says."""

from __future__ import annotations

import copy
import os
import random
import secrets

import pytest

from lockgate.compile.evaluate import class_of
from lockgate.compile.tables import CELL_ALLOW
from lockgate.objects.changes import Changed
from lockgate.spec.policy import Packet
from tests import changes, generate
from tests.bytecode import compare, rounds
from tests.bytecode.compare import Case, Mismatch

SECONDS = float(os.environ.get("LOCKGATE_FUZZ_SECONDS", 0))
SEED = int(os.environ.get("LOCKGATE_FUZZ_SEED", 0)) or (secrets.randbits(32) if SECONDS else 1)


@pytest.mark.fuzz
def test_kernel_agrees_with_the_specification(world):
    """Verdict, directions judged, and every rule or policy of each direction."""
    print(f"\nseed {SEED} (LOCKGATE_FUZZ_SEED={SEED} repeats it)")
    if SECONDS:
        score = rounds.play_for(world, SEED, SECONDS, rounds.show)
    else:
        score = rounds.play(world, SEED)
        assert score.clusters >= 200 and score.packets >= 20_000
    print(f"{score.clusters} clusters, {score.packets} packets, no difference")


#: What happens to clusters; but nodes, addresses, slots and families stay as the world has them.
HISTORY = [
    changes.pod_comes,
    changes.pod_goes,
    changes.pod_has_other_labels,
    changes.pod_takes_the_place_of_another,
    changes.pod_ends,
    changes.namespace_changes,
    changes.policies_come,
    changes.policy_goes,
    changes.service_goes,
    changes.slice_changes,
]


@pytest.mark.parametrize("seed", range(12))
def test_a_new_agent_moves_nothing_and_goes_on_from_any_history(world, seed: int) -> None:
    """Whatever the order of changes that the maps came to be by: an agent that compiles from
    nothing finds them in force, and kernel and specification agree before and after."""
    rng = random.Random(f"history/{seed}")
    case = Case(world, generate.cluster(rng), "a")
    case.publish()
    for _ in range(4):
        for _ in range(rng.randrange(6)):
            changes_one(rng, case)
            case.publish(case.tables)
        rounds.ask(case, rng, 60)
        world.publisher.read_back()
        assert not case.publish(), "the same objects, and a new agent"
        rounds.ask(case, rng, 60)
        changes_one(rng, case)
        if not rng.randrange(3):
            # While no agent ran.
            world.publisher.read_back()
            case.publish()
        else:
            case.publish(case.tables)
        rounds.ask(case, rng, 60)


def changes_one(rng: random.Random, case: Case) -> None:
    cluster = case.cluster
    while True:
        tried = copy.deepcopy(cluster)
        rng.choice(HISTORY)(rng, tried, Changed(), changes.Ids())
        if sum(pod.spec.node_name == case.node for pod in tried.pods.values()) <= compare.SLOTS:
            break
    case.cluster = tried


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
    with pytest.raises(rounds.Difference) as caught:
        rounds.play(world, 1, pods=4, policies=4, services=0)
    text = str(caught.value)
    assert "seed 1, node" in text and "smallest cluster" in text
    assert 1 <= text.count("kind: NetworkPolicy") <= 2
    assert 1 <= text.count("kind: Pod") <= 2

"""Random services, random clients: the kernel's programs serve whom the specification permits."""

from __future__ import annotations

import errno
import os
import random
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from lockgate.bpf import syscall
from lockgate.compile import Host, Tables, compile_node
from lockgate.compile.balance import table_words
from lockgate.compile.tables import (
    BACKEND_WORDS,
    SVC_INTERNAL_LOCAL,
    SVC_LOCAL,
    SVC_RANGES,
    SVC_SNAT,
    Ids,
)
from lockgate.objects.address import parse_address
from lockgate.objects.model import Cluster
from lockgate.spec.services import Client, Frontend
from tests import generate_services as generate
from tests.bytecode import service_nodes
from tests.bytecode import service_rounds as rounds
from tests.bytecode.service_nodes import Ask, Found, Node, Nodes
from tests.bytecode.service_sockets import Sockets
from tests.bytecode.service_trial import permitted

SECONDS = float(os.environ.get("LOCKGATE_FUZZ_SECONDS", 0))
SEED = int(os.environ.get("LOCKGATE_FUZZ_SEED", 0)) or (secrets.randbits(32) if SECONDS else 1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made = Nodes()
    with made.inside():
        yield made
    made.close()


#: What becomes of packets in any hundred clusters.
ENOUGH = (
    *("pod served", "pod no-backend", "pod no-local-backend", "pod source-range"),
    *("pod unknown-service-port", "pod passed", "pod sctp-port-rewrite"),
    *("outside served", "outside snat", "outside encapsulated", "at the backend's node", "xdp"),
    *("outside no-backend", "outside no-local-backend", "outside source-range", "outside passed"),
    *("outside unknown-service-port", "outside sctp-port-rewrite", "spoofed"),
    *("kept", "moved", "elsewhere", "a pod's address"),
)


@pytest.mark.fuzz
def test_kernel_serves_whom_the_specification_permits(nodes: Nodes) -> None:
    print(f"\nseed {SEED} (LOCKGATE_FUZZ_SEED={SEED} repeats it)")
    if SECONDS:
        score = rounds.play_for(nodes, SEED, SECONDS, rounds.show)
    else:
        score = rounds.play(nodes, SEED)
        assert score.clusters == 200 and score.packets > 50_000
        assert not {what: score.seen[what] for what in ENOUGH if score.seen[what] < 5}
    print(f"{score.clusters} clusters, {score.packets} packets, no difference", score.seen)


# ---- The comparison can fail -----------------------------------------------------------


def forget(flag: int) -> Callable[[Tables, str], None]:
    """Of all frontends."""

    def wrong(tables: Tables, node: str) -> None:
        tables.services = {
            key: replace(view, flags=view.flags & ~flag) for key, view in tables.services.items()
        }

    return wrong


def other_owners(tables: Tables, node: str) -> None:
    """One node's tables have the second owner first."""
    if node == "b":
        for view in tables.services.values():
            if view.owner_count > 1:
                size = table_words(view.slot_bits, view.number_bits)
                words = tables.image[view.table : view.table + size]
                slots = words.view(f"<u{view.number_bits // 2}")
                slots >>= slots.dtype.type(view.number_bits)


def ends_is_nothing(tables: Tables, node: str) -> None:
    for view in tables.services.values():
        words = tables.image[view.owners :][: view.owner_count * BACKEND_WORDS]
        words.view("<u2")[9 :: 4 * BACKEND_WORDS] = 0  # struct owner, flags


def one_backend_less(tables: Tables, node: str) -> None:
    tables.services = {
        key: replace(view, count=view.count - (view.count > 1))
        for key, view in tables.services.items()
    }


WRONG = {
    "ranges of sources": forget(SVC_RANGES),
    "policy Local outside": forget(SVC_LOCAL),
    "policy Local inside": forget(SVC_INTERNAL_LOCAL),
    "SNAT is DSR": forget(SVC_SNAT),
    "one node has other owners": other_owners,
    "backends that end take more": ends_is_nothing,
    "a backend is left out": one_backend_less,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_tables_end_the_run_with_a_small_cluster(
    nodes: Nodes, wrong: Callable[[Tables, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(cluster: Cluster, node: str, ids: Ids, _: Tables | None, host: Host) -> Tables:
        tables = compile_node(cluster, node, ids, host=host)
        tables.image = tables.image.copy()
        wrong(tables, node)
        return tables

    monkeypatch.setattr(service_nodes, "compile_node", compiled)
    with pytest.raises(rounds.Difference) as caught:
        rounds.play(nodes, 1)
    text = str(caught.value)
    assert "seed 1/" in text and "smallest cluster" in text
    assert text.count("kind: Service") == 1
    assert text.count("kind: Pod") <= 4


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        pytest.param(("affinities",), "but the client has", id="affinity"),
        pytest.param(
            ("connections", "half_open", "nat", "flows"), "but the connection has", id="connections"
        ),
    ],
)
def test_a_kernel_that_forgets_ends_the_run(
    nodes: Nodes, tables: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(node: Node, ask: Ask) -> Found:
        found = real(node, ask)
        for name in tables:
            table = getattr(node.world, name)
            table.delete_many(table.keys())
        return found

    real = Node.real
    monkeypatch.setattr(Node, "real", forgets)
    with pytest.raises(rounds.Difference, match=text):
        rounds.play(nodes, 1)


# ---- Sockets ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sockets() -> Iterator[Sockets]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = Path("/sys/fs/bpf") / f"lockgate-asking-{os.getpid()}"
    folder.mkdir()
    made = Sockets(folder)
    yield made
    made.close()
    for pin in folder.iterdir():
        pin.unlink()
    folder.rmdir()


#: Where a process of the node hears why it is not served.
ERRNO = {
    ("no-backend", "TCP"): errno.ECONNREFUSED,
    ("no-backend", "UDP"): errno.ECONNREFUSED,
    ("unknown-service-port", "TCP"): errno.ECONNREFUSED,
    ("unknown-service-port", "UDP"): errno.ECONNREFUSED,
    ("no-local-backend", "TCP"): errno.ETIMEDOUT,
    ("no-local-backend", "UDP"): errno.EPERM,
}


def wrong(sockets: Sockets, who: Literal["node", "pod"], asked: Frontend) -> str:
    """What is wrong with what a socket got; nothing."""
    node = sockets.node
    assert node.tables is not None
    found = sockets.ask(who, asked.protocol, asked.address, asked.port)
    six = ":" in asked.address
    client = Client(who, {"node": node.own[six], "pod": ("10.0.1.9", "fd00:1::9")[six]}[who])
    wanted = node.choose(client, asked)
    allowed = permitted(wanted, True)
    key = parse_address(asked.address), asked.port, {"TCP": 6, "UDP": 17}[asked.protocol]
    view = node.tables.services.get(key)
    # Of these a pod's packets are asked.
    by_packet = who == "pod" and (
        wanted.cause in ("unknown-service-port", "no-local-backend")
        or (view is not None and view.flags & SVC_RANGES)
    )
    if by_packet or wanted.verdict == "none":
        right = found == (asked.address, asked.port)
    elif wanted.verdict == "serve":
        right = found in allowed
    else:
        right = found == ERRNO[wanted.cause, asked.protocol]
    return "" if right else f"{who} at {asked}: {found}, wanted {wanted.cause or sorted(allowed)}"


def test_sockets_get_whom_the_specification_permits(sockets: Sockets) -> None:
    """Fewer: each is a real socket, of a process of the node or of a pod."""
    seen: Counter[str] = Counter()
    for number in range(30):
        rng = random.Random(f"sockets/{SEED}/{number}")
        cluster = generate.cluster(rng)
        sockets.node.forget(False)
        for step in range(2):
            cluster = rounds.changed(rng, cluster) if step else cluster
            sockets.node.take(cluster)
            for _ in range(25):
                asked = rounds.frontend(rng, sockets.node, False)
                if asked.protocol != "SCTP":
                    who: Literal["node", "pod"] = rng.choice(("node", "node", "pod"))
                    assert not (text := wrong(sockets, who, asked)), text
                    seen[asked.protocol] += 1
    print(seen)
    assert min(seen.values()) > 200


def test_no_test_run_plays_a_socket(sockets: Sockets) -> None:
    """The kernel has none for cgroup/sock_addr: that is why there are real ones here."""
    with pytest.raises(OSError) as caught:
        syscall.prog_test_run(sockets.node.world.object.prog_fd("sock_connect4"), bytes(64))
    assert caught.value.errno == 524  # ENOTSUPP

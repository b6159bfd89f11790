"""While the firewall's tables change, a packet sees the old state or the new, never another."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator

import pytest

from lockgate.agent import firewall_tables
from lockgate.agent.firewall_tables import Change
from lockgate.bpf import syscall
from lockgate.compile.firewall import Rule
from lockgate.compile.prefixes import parse
from tests.bytecode.firewall_world import XDP_DROP, FirewallWorld, frame

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

DENY = Rule("object", "deny", (), 0, "a", 0)
WEB = Rule("object", "deny", (("TCP", 80, 80),), 0, "b", 0)
#: Entries that do not match the packets, and lead on to those that do.
OTHER = Rule("object", "allow", (("TCP", 443, 443),), 0, "c", 0)
SOURCES = ("198.51.100.9", "2001:db8:c:1::9")
STAY = (*("198.51.0.0/16", "198.51.100.8/30", "2001:db8::/32", "2001:db8:c:1::/64"),)
#: In each state both sources are denied, by one entry or another.
STATES: dict[str, tuple[frozenset[tuple[Rule, str]], ...]] = {
    "the same prefix by another rule": (
        frozenset(((DENY, "198.51.100.0/24"), (DENY, "2001:db8:c::/48"))),
        frozenset(((WEB, "198.51.100.0/24"), (WEB, "2001:db8:c::/48"))),
    ),
    "a wider and a narrower prefix": (
        frozenset(((DENY, "198.51.0.0/16"), (DENY, "2001:db8::/32"))),
        frozenset(((DENY, "198.51.100.9/32"), (DENY, "2001:db8:c:1::9/128"))),
    ),
    "above and below prefixes that stay": tuple(
        frozenset((*state, *((OTHER, one) for one in STAY)))
        for state in (
            ((DENY, "198.0.0.0/8"), (DENY, "2001:d00::/24")),
            ((WEB, "198.51.100.9/32"), (WEB, "2001:db8:c:1::9/128")),
            ((DENY, "198.51.100.0/24"), (DENY, "2001:db8:c::/48")),
        )
    ),
    "beside others in the same /24": (
        frozenset(((DENY, "198.51.100.9/32"), (DENY, "2001:db8:c:1::9/128"))),
        frozenset(
            (
                *((DENY, "198.51.100.0/24"), (OTHER, "198.51.100.1/32")),
                *((OTHER, "198.51.100.9/32"), (DENY, "2001:db8:c:1::/64")),
                (OTHER, "2001:db8:c:1::1/128"),
            )
        ),
    ),
    "those in one another come and go at once": (
        frozenset(
            (
                *((DENY, "198.51.100.9/32"), (OTHER, "198.51.100.8/30")),
                *((OTHER, "198.51.100.1/32"), (OTHER, "198.51.100.0/26")),
                *((DENY, "2001:db8:c:1::9/128"), (OTHER, "2001:db8:c:1::/64")),
                (OTHER, "2001:db8:c::/48"),
            )
        ),
        frozenset(((DENY, "198.51.0.0/16"), (DENY, "2001:db8::/32"))),
    ),
}


@pytest.fixture(scope="module")
def world() -> Iterator[FirewallWorld]:
    made = FirewallWorld(1000)
    yield made
    made.close()


def _go(
    world: FirewallWorld, now: frozenset[tuple[Rule, str]], to: frozenset[tuple[Rule, str]]
) -> None:
    change = Change()
    for rule, prefix in now - to:
        change.removed.append(world.tables.find(parse([prefix])[0], rule))
    for rule in {rule for rule, _ in to - now}:
        prefixes = sorted(prefix for one, prefix in to - now if one == rule)
        change.added.append((rule, parse(prefixes)[0].unique(), 0.0))
    world.tables.apply(change)


@pytest.mark.parametrize("whole", [False, True], ids=["patched", "laid out anew"])
@pytest.mark.parametrize("name", STATES)
def test_no_packet_passes_between_two_states_that_deny_it(
    world: FirewallWorld, name: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole:
        monkeypatch.setattr(firewall_tables, "_FEW", 0)
    world.clear()
    states = STATES[name]
    now = states[0]
    _go(world, frozenset(), now)
    packets = [
        frame(source, "192.0.2.1" if "." in source else "2001:db8::1", 6) for source in SOURCES
    ]
    program = world.object.prog_fd("xdp_net")
    over, passed, sent = threading.Event(), list[bytes](), [0]

    def traffic() -> None:
        while not over.is_set():
            for packet in packets:
                if syscall.prog_test_run(program, packet).retval != XDP_DROP:
                    passed.append(packet)
                sent[0] += 1

    threads = [threading.Thread(target=traffic) for _ in range(2)]
    for thread in threads:
        thread.start()
    draw = random.Random(name)
    try:
        for turn in range(30 if whole else 400):
            to = draw.choice([one for one in states if one != now])
            _go(world, now, to)
            now = to
            if turn % 50 == 49:
                world.tables.settle()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert sent[0] > 100
    assert not passed, f"{len(passed)} of {sent[0]} packets passed"


def test_no_count_is_lost_while_entries_are_made_anew(world: FirewallWorld) -> None:
    world.clear()
    wide = Rule("object", "allow", (), 0, "d", 0)
    world.add(DENY, "198.51.100.9/32")
    program, packet = world.object.prog_fd("xdp_net"), frame(SOURCES[0], "192.0.2.1", 6)
    over, sent = threading.Event(), [0]

    def traffic() -> None:
        while not over.is_set():
            syscall.prog_test_run(program, packet, repeat=1000)
            sent[0] += 1000

    thread = threading.Thread(target=traffic)
    thread.start()
    for turn in range(100):
        world.add(WEB, "198.51.100.9/32")  # the whole prefix is made anew
        world.add(wide, "198.51.0.0/16")
        world.remove(WEB, "198.51.100.9/32")
        world.remove(wide, "198.51.0.0/16")
        if turn % 10 == 9:
            world.tables.settle()
    over.set()
    thread.join()
    world.tables.settle()
    counted = world.tables.counters(world.tables.numbers_of(DENY))[:, 0].tolist()
    assert counted == [sent[0]]

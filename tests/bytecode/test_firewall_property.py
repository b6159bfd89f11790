"""The firewall in the kernel against its specification, while its tables change in random ways."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from ipaddress import IPv6Network, ip_network

import pytest

from lockgate.agent import firewall_tables
from lockgate.agent.firewall_asked import Asked, judge
from lockgate.agent.firewall_tables import Change
from lockgate.compile.firewall import Rule
from lockgate.compile.prefixes import parse
from lockgate.spec import firewall as spec
from tests.bytecode.firewall_world import FirewallWorld, frame

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

RULES = (
    Rule("object", "deny", (), 0, "a", 0),
    Rule("object", "allow", (), 0, "a", 1),
    Rule("object", "deny", (("TCP", 80, 90), ("UDP", 0, 65535)), 0, "b", 0),
    Rule("object", "allow", (("ICMP", 0, 0), ("TCP", 0, 65535)), 0, "b", 1),
    Rule("command", "deny"),
    Rule("command", "allow", (("SCTP", 7, 7), ("UDP", 53, 53))),
)
OWN, MEMBER, SERVER = (Rule("builtin", one) for one in ("nobody", "member", "allow"))  # type: ignore[arg-type]
BUILTIN = (OWN, MEMBER, SERVER)

#: As who asks names them; what has no ports is any other.
PROTOCOLS = {6: "TCP", 17: "UDP", 132: "SCTP", 1: "ICMP", 58: "ICMPv6", 47: ""}

Have = set[tuple[Rule, str]]


@pytest.fixture(scope="module")
def world() -> Iterator[FirewallWorld]:
    made = FirewallWorld(1000)
    yield made
    made.close()


def _prefix(draw: random.Random) -> str:
    """Of few networks, so that many lie in one another."""
    if draw.random() < 0.6:
        low = draw.randrange(4) << draw.choice((0, 6))
        address = 10 << 24 | draw.randrange(2) << 16 | draw.randrange(2) << 8 | low
        length = draw.choice((0, 8, 15, 16, 17, 22, 23, 24, 24, 25, 26, 30, 31, 32, 32))
        return str(ip_network((address, length), strict=False))
    address = 0x20010DB8 << 96 | draw.randrange(2) << 80 | draw.randrange(2) << 64
    address |= draw.randrange(2) << 63 | draw.randrange(4)
    length = draw.choice((0, 16, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128))
    # A small number alone would be IPv4 to ip_network().
    return str(IPv6Network((address, length), strict=False))


def _packet(draw: random.Random) -> spec.Packet:
    if draw.random() < 0.6:
        low = draw.choice((0, 1, 2, 3, 64, 65, 128, 192, 255))
        source, target = f"10.{draw.randrange(3)}.{draw.randrange(3)}.{low}", "192.0.2.1"
    else:
        half = draw.choice(("", ":8000"))
        source = f"2001:db8:{draw.randrange(3):x}:{draw.randrange(2):x}"
        source += f"{half}::{draw.randrange(5)}"
        target = "2001:db8:ffff::1"
    protocol = draw.choice((6, 6, 17, 17, 132, 58 if ":" in source else 1, 47))
    return spec.Packet(
        source,
        target,
        protocol,
        draw.choice((7, 22, 53, 80, 85, 90, 91)),
        draw.random() < 0.1,
    )


def _change(world: FirewallWorld, draw: random.Random, have: Have) -> None:
    count = draw.choice((1, 1, 1, 2, 3, 8))
    gone: dict[Rule, set[str]] = {}
    for rule, prefix in draw.sample(
        sorted(have, key=str), min(len(have), draw.randrange(count + 1))
    ):
        gone.setdefault(rule, set()).add(prefix)
        have.discard((rule, prefix))
    come: dict[Rule, set[str]] = {}
    for _ in range(count):
        rule = draw.choice(RULES if draw.random() < 0.9 else BUILTIN)
        prefix = _prefix(draw)
        if prefix not in gone.get(rule, ()):
            come.setdefault(rule, set()).add(prefix)
            have.add((rule, prefix))
    change = Change()
    for rule, prefixes in gone.items():
        found = world.tables.find(parse(sorted(prefixes))[0].unique(), rule)
        assert len(found) == len(prefixes)
        change.removed.append(found)
    for rule, prefixes in come.items():
        change.added.append((rule, parse(sorted(prefixes))[0].unique(), 0.0))
    world.tables.apply(change)


@pytest.mark.parametrize("whole", [False, True], ids=["patched", "laid out anew"])
@pytest.mark.parametrize("seed", range(int(os.environ.get("LOCKGATE_FIREWALL_SEEDS", "2"))))
def test_the_kernel_does_as_the_specification_says(
    world: FirewallWorld, seed: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(f"{seed} {whole}")
    world.clear()
    have: Have = set()
    drop = inside = False
    world.inside(inside)
    for _ in range(12 if whole else 50):
        if whole:
            monkeypatch.setattr(firewall_tables, "_FEW", 0)
        _change(world, draw, have)
        if draw.random() < 0.3:
            world.tables.settle()
        if draw.random() < 0.2:
            drop = not drop
            world.tables.rules.set_default(drop)
        if draw.random() < 0.2:
            inside = not inside
            world.inside(inside)
        if draw.random() < 0.1:  # the agent starts again
            world.tables.settle()
            world.tables = world.open_tables()
        assert len(world.tables) == len(have)
        rules = [
            spec.Rule(
                "Deny" if rule.action == "deny" else "Allow",
                (prefix,),
                rule.ports,
                rule.name,
                rule.index,
            )
            for rule, prefix in have
            if rule.source != "builtin"
        ]
        own, members, servers = ([p for r, p in have if r == one] for one in BUILTIN)
        for _ in range(100):
            packet = _packet(draw)
            wanted = spec.decide(
                packet,
                rules,
                "Drop" if drop else "Allow",
                0,
                own=own,
                members=members,
                allowed=servers,
                inside=inside,
                known=packet.fragment,
            )
            sent = frame(
                packet.source,
                packet.destination,
                packet.protocol,
                dport=packet.port,
                later=packet.fragment,
            )
            found = world.run(sent)
            assert found.cause == wanted.cause, (packet, sorted(have, key=str))
            if not packet.fragment:
                asked = Asked(0, packet.source, packet.destination, PROTOCOLS[packet.protocol])
                asked.port = packet.port
                told = judge(world.tables, asked, inside=inside, now=0)
                assert (told["cause"] or "") == wanted.cause, (packet, told)
                if wanted.rule is not None:
                    assert told["rule"]["name"] == wanted.rule.name
                    assert told["rule"]["action"] == wanted.rule.action.lower()
            if wanted.rule is not None and found.cause:
                by = [
                    rule
                    for rule, number in world.reasons.items()
                    if number == found.reason and rule is not None
                ]
                assert [(one.name, one.index) for one in by if one.source == "object"] == [
                    (wanted.rule.name, wanted.rule.index)
                ] or (not wanted.rule.name and by[0].source == "command"), packet

"""ns per packet of the firewall over an XDP program that does nothing, and changing its tables.

The kernel runs the program again and again on a frame (`BPF_PROG_TEST_RUN`, repeat), to which the
program first gives another source: the same one (hot), or in turn 65,536 or 1,048,576 random ones,
which the prefixes have (dropped) or have not (passed). Both programs do that, and take turns.

Beside it a set of nftables with the same prefixes, at the netdev ingress of a veth, on live frames
that XDP lets pass into the stack: there each packet is an skb first, which costs what it costs.
That is told apart: the same frames, dropped there by a rule without a set.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import kernel
from lockgate.agent.firewall_maps import FirewallMaps, sizes
from lockgate.agent.firewall_tables import Change, FirewallTables
from lockgate.agent.limits import Limits
from lockgate.bpf import clock, syscall
from lockgate.bpf.maps import ArrayMap, MappedArray, PerCpuArray
from lockgate.bpf.object import Object
from lockgate.compile.firewall import Facts, Rule, builtin_rules
from lockgate.compile.prefixes import Prefixes, high_mask, low_mask

MILLION, SOURCES, HOT = 1_000_000, 1 << 20, 1 << 16
DROP, PASS = 1, 2  # enum xdp_action
CARD = 100
DENY = Rule("object", "deny", (), 0, "bench", 0)
#: Lengths as blocklists have them, and how many of a hundred have each.
LENGTHS = {
    4: {32: 70, 24: 20, 22: 4, 20: 3, 16: 3},
    6: {128: 40, 64: 30, 56: 10, 48: 15, 32: 5},
}


def prefixes(family: int, count: int, seed: int = 1) -> Prefixes:
    """Random ones: of IPv4 anywhere from 1.0.0.0 to 222.255.255.255 but 127.0.0.0/8, of IPv6 in
    20,000 networks of /32 below 2000::/3, as there are some."""
    draw = np.random.default_rng(seed)
    mix = LENGTHS[family]
    share = np.array(list(mix.values())) / sum(mix.values())
    length = draw.choice(np.array(list(mix), np.uint8), count, p=share)
    if family == 4:
        low = draw.integers(1 << 24, 223 << 24, count, dtype=np.uint64) | np.uint64(0xFFFF << 32)
        length = length + np.uint8(96)
        usable = low >> np.uint64(24) & np.uint64(0xFF) != 127
        low, length = low[usable], length[usable]
        count = len(low)
        return Prefixes(np.zeros(count, np.uint64), low & low_mask[length], length).unique()
    networks = np.random.default_rng(0).integers(0x2001_0000, 0x3000_0000, 20_000, dtype=np.uint64)
    high = networks[draw.integers(0, len(networks), count)] << np.uint64(32)
    high |= draw.integers(0, 1 << 32, count, dtype=np.uint64)
    low = draw.integers(0, 1 << 63, count, dtype=np.uint64)
    return Prefixes(high & high_mask[length], low & low_mask[length], length).unique()


def inside(of: Prefixes, family: int) -> NDArray[np.uint8]:
    """A million addresses that they have, one in each in turn, as 16 bytes."""
    draw = np.random.default_rng(2)
    order = draw.permutation(len(of))
    chosen = of.take(np.resize(order, SOURCES).astype(np.int64))
    high = (
        chosen.high
        | draw.integers(0, 1 << 63, SOURCES, dtype=np.uint64) & ~high_mask[chosen.length]
    )
    low = (
        chosen.low | draw.integers(0, 1 << 63, SOURCES, dtype=np.uint64) & ~low_mask[chosen.length]
    )
    return np.stack((high, low), axis=1).astype(">u8").view(np.uint8)


def beside(of: Prefixes, family: int) -> NDArray[np.uint8]:
    """A million addresses that they have not: of the same networks, with a bit of each flipped."""
    found: list[NDArray[np.uint64]] = []
    count, seed = 0, 3
    while count < SOURCES:
        made = prefixes(family, 2 * SOURCES, seed)
        free = ~_covered(of, made.high, made.low)
        found.append(np.stack((made.high[free], made.low[free]), axis=1))
        count, seed = count + int(free.sum()), seed + 1
    mixed = np.random.default_rng(4).permutation(np.concatenate(found))[:SOURCES]
    return mixed.astype(">u8").view(np.uint8)


def _covered(of: Prefixes, high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.bool_]:
    hit = np.zeros(len(high), np.bool_)
    for length in np.unique(of.length):
        mine = of.length == length
        keys = _words(of.high[mine], of.low[mine])
        hit |= np.isin(_words(high & high_mask[length], low & low_mask[length]), keys)
    return hit


def _words(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.void]:
    return np.ascontiguousarray(np.stack((high, low), axis=1)).view("V16").reshape(-1)


def frame(family: int) -> bytes:
    """A UDP datagram; its source is the program's."""
    udp = struct.pack("!HHHH", 40000, 53, 40, 0) + bytes(32)
    if family == 6:
        target = bytes.fromhex("20010db8" + 23 * "0" + "1")
        return (
            bytes(12)
            + b"\x86\xdd"
            + struct.pack("!IHBB", 6 << 28, 40, 17, 64)
            + bytes(16)
            + target
            + udp
        )
    return (
        bytes(12)
        + b"\x08\0"
        + struct.pack("!BBHHHBBH", 0x45, 0, 60, 1, 0, 64, 17, 0)
        + bytes(4)
        + bytes((192, 0, 2, 1))
        + udp
    )


class World:
    """Programs over tables with so many prefixes of each family."""

    def __init__(self, count: int) -> None:
        made = self.object = Object(Path(__file__).parents[1] / "build/firewall.bpf.o")
        made.set_rodata({"config_firewall": 1})
        known = made.schema.variables(".rodata")
        constants = {**Limits().constants(65536), **clock.constants()}
        made.set_rodata({name: value for name, value in constants.items() if name in known})
        for name, size in sizes(2 * count).items():
            made.set_max_entries(name, size)
        made.load()
        self.maps = FirewallMaps.of(made)
        self.tables = FirewallTables(self.maps, made.schema, lambda rule: 1)
        self.sources = MappedArray.of(made, "sources", made.schema.dtype("addr"))
        self.course = ArrayMap.of(made, "course", made.schema.dtype("course"))
        self.verdicts = PerCpuArray.of(made, "verdicts", np.dtype("<u8"))
        self._add_all(builtin_rules(Facts()))
        self.prefixes = {family: prefixes(family, count) for family in (4, 6)}

    def _add_all(self, rules: dict[Rule, tuple[Prefixes, float]]) -> None:
        change = Change()
        change.added = [(rule, found, 0.0) for rule, (found, _) in rules.items()]
        self.tables.apply(change)

    def load(self, family: int) -> float:
        """Seconds."""
        change = Change()
        change.added.append((DENY, self.prefixes[family], 0.0))
        begun = time.perf_counter()
        self.tables.apply(change)
        return time.perf_counter() - begun

    def close(self) -> None:
        self.maps.close()
        self.object.close()

    def send(self, sources: NDArray[np.uint8]) -> None:
        raw = self.sources.view.view(np.uint8).reshape(-1)
        raw[: sources.size] = sources.reshape(-1)

    def run(
        self, program: str, family: int, mask: int, frames: int, action: int, *, live: bool = False
    ) -> tuple[float, list[int]]:
        """ns a frame, and what was decided, by enum xdp_action."""
        record = np.zeros((), self.course.value_dtype)
        record["source"], record["size"] = (26, 4) if family == 4 else (22, 16)
        record["mask"], record["action"] = mask, action
        self.course[0] = record
        before = self.verdicts.values().sum(axis=1)
        data = frame(family)
        context = syscall.xdp_context(len(data), CARD) if live else b""
        fd = self.object.prog_fd(program)
        done = syscall.prog_test_run(fd, data, context, repeat=frames, live=live)
        return done.duration, (self.verdicts.values().sum(axis=1) - before).tolist()

    def live(self, program: str, family: int, frames: int, action: int) -> float:
        """ns a live frame, of random sources."""
        return self.run(program, family, HOT - 1, frames, action, live=True)[0]

    def cost(self, family: int, mask: int, frames: int, rounds: int, wanted: int) -> float:
        """Median of the rounds' differences, ns."""
        found = []
        for _ in range(rounds):
            empty, _ = self.run("nothing", family, mask, frames, PASS)
            ns, verdicts = self.run("guarded", family, mask, frames, PASS)
            if verdicts[wanted] != frames:
                raise AssertionError(f"IPv{family}: decided {verdicts}, expected {wanted}")
            found.append(ns - empty)
        return statistics.median(found)


def packets(world: World, count: int, frames: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for family in (4, 6):
        for name, sources, wanted in (
            ("dropped", inside(world.prefixes[family], family), DROP),
            ("passed", beside(world.prefixes[family], family), PASS),
        ):
            world.send(sources)
            rows.append(
                {
                    "packet": f"IPv{family} {name}",
                    "prefixes": count,
                    "one source": world.cost(family, 0, frames, rounds, wanted),
                    "65,536": world.cost(family, HOT - 1, frames, rounds, wanted),
                    "1,048,576": world.cost(family, SOURCES - 1, frames, rounds, wanted),
                }
            )
    return rows


def one_more(world: World, family: int, many: int) -> dict[str, Any]:
    """µs of adding one prefix to those that there are, and of deleting it."""
    fresh = prefixes(family, 2 * many, 99)
    fresh = fresh.take(~_covered(world.prefixes[family], fresh.high, fresh.low))
    fresh = fresh.take(np.random.default_rng(5).permutation(len(fresh))[:many])
    times: dict[str, list[float]] = {"add": [], "delete": []}
    for n in range(len(fresh)):
        change = Change()
        change.added.append((DENY, fresh.take(np.array([n])), 0.0))
        begun = time.perf_counter()
        world.tables.apply(change)
        times["add"].append(time.perf_counter() - begun)
    for n in range(len(fresh)):
        begun = time.perf_counter()
        change = Change()
        change.removed.append(world.tables.find(fresh.take(np.array([n])), DENY))
        world.tables.apply(change)
        times["delete"].append(time.perf_counter() - begun)
    world.tables.settle()
    return {
        f"{what} {kind}": value * 1e6
        for what, found in times.items()
        for kind, value in (
            ("p50 us", statistics.median(found)),
            ("p99 us", float(np.quantile(found, 0.99))),
        )
    }


def nft(script: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=script, text=True, check=True)


def against_nftables(world: World, count: int, frames: int, rounds: int) -> list[dict[str, Any]]:
    """A frame that is dropped: by XDP, and at netdev ingress by a set with the same prefixes."""
    rows = []
    hook = "type filter hook ingress device card priority 0;"
    table = f"table netdev bench {{{{ {{}}\n chain c {{{{ {hook} {{}} }}}};\n }}}};\n"
    for family, type_, field in ((4, "ipv4_addr", "ip"), (6, "ipv6_addr", "ip6")):
        of = world.prefixes[family]
        world.send(inside(of, family))
        texts = [of.text(n) for n in range(len(of))]
        elements = ", ".join(texts)
        rule = f"{field} saddr @denied drop;"
        # Overlaps are merged, as intervals must not.
        flags = f"type {type_}; flags interval; auto-merge;"
        set_ = f"set denied {{ {flags} elements = {{ {elements} }}; }};"
        times: dict[str, list[float]] = {"empty": [], "xdp": [], "skb": [], "nft": []}
        for _ in range(rounds):
            times["empty"].append(world.live("nothing", family, frames, DROP))
            times["xdp"].append(world.live("guarded", family, frames, DROP))
        nft(table.format("", "drop;"))
        for _ in range(rounds):
            times["skb"].append(world.live("nothing", family, frames, PASS))
        nft("delete table netdev bench")
        begun = time.perf_counter()
        nft(table.format(set_, rule))
        loading = time.perf_counter() - begun
        for _ in range(rounds):
            times["nft"].append(world.live("nothing", family, frames, PASS))
        nft("delete table netdev bench")
        ns = {name: statistics.median(found) for name, found in times.items()}
        mine, theirs = ns["xdp"] - ns["empty"], ns["nft"] - ns["empty"]
        rows.append(
            {
                "family": f"IPv{family}",
                "prefixes": count,
                "XDP ns": mine,
                "nftables ns": theirs,
                "of it the set": ns["nft"] - ns["skb"],
                "ratio": mine / theirs,
                "its load s": loading,
            }
        )
    return rows


def show(name: str, title: str, rows: list[dict[str, Any]], *notes: str) -> None:
    columns = list(rows[0])
    print(
        json.dumps(
            {"name": name, "title": title, "columns": columns, "rows": rows, "notes": notes}
        ),
        flush=True,
    )


def main() -> None:
    quick = "--quick" in sys.argv
    frames, rounds, many = (1 << 18, 3, 200) if quick else (1 << 20, 7, 2000)
    big = 100_000 if quick else MILLION
    kernel.own_namespace(())
    subprocess.run(["ip", "link", "add", "card", "index", str(CARD), "type", "veth"], check=True)
    subprocess.run(["ip", "link", "set", "card", "up"], check=True)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows: list[dict[str, Any]] = []
    loads: list[dict[str, Any]] = []
    beside_rows: list[dict[str, Any]] = []
    for count in (10, big):
        world = World(count)
        seconds = {family: world.load(family) for family in (4, 6)}
        rows += packets(world, count, frames, rounds)
        begun = time.perf_counter()
        FirewallTables(world.maps, world.object.schema, lambda rule: 1, [DENY])
        taken = time.perf_counter() - begun
        for family in (4, 6):
            row = {"family": f"IPv{family}", "prefixes": len(world.prefixes[family])}
            loads.append(
                {
                    **row,
                    "load s": seconds[family],
                    **one_more(world, family, many),
                    "start s": taken,
                }
            )
        beside_rows += against_nftables(world, count, frames, max(3, rounds // 3))
        world.close()
    show(
        "firewall",
        "ns per packet of the firewall over an empty XDP program (aim: IPv4 <= 60 at a million)",
        rows,
        f"by number of random sources; both programs in turn, {rounds} rounds of {frames:,} frames",
        "lengths in use: IPv4 " + _shares(4) + "; IPv6 " + _shares(6),
        "reading the frame included; drops tell at most 1,000 events a second",
    )
    show(
        "firewall",
        "changing the tables: all at once, one more, one less, an agent that starts",
        loads,
        f"p50 and p99 of {many:,}; start: both families, compared with what the kernel has",
    )
    show(
        "firewall",
        "dropping, ns a live frame over dropping it in an empty XDP program",
        beside_rows,
        "nftables: a set at netdev ingress, and the skb that it needs; the set: over `drop` alone",
    )


def _shares(family: int) -> str:
    return ", ".join(f"{share} % /{length}" for length, share in LENGTHS[family].items())


if __name__ == "__main__":
    main()

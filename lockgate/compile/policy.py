"""NetworkPolicies → classes, port classes, rows, columns and cells.

The steps, each a function below:

1. `parse`: a policy as plain values, once per object.
2. `Frame`: what tells addresses and ports apart on this node. A class is a
   vector of memberships: selectors, CIDR blocks and named ports in force here.
3. `compile_set`: the rules of one policy set become two bit matrices, rules by
   class and rules by port class. Equal lines are one row or one column; a
   cell's rules are the intersection of its row's and its column's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lockgate.compile.cidr import Block, Regions, block_key
from lockgate.compile.labels import PodSelector, Subjects, selector_key
from lockgate.compile.tables import (
    CELL_ALLOW,
    CELL_REASON,
    IMAGE_PORT_WORDS,
    ISOLATED_EGRESS,
    ISOLATED_INGRESS,
    POLICY,
    PORT_TABLE,
    UNREADABLE,
    Builder,
    Direction,
    Ids,
    Rule,
)
from lockgate.compile.trie import trie
from lockgate.objects.model import NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort

__all__ = ["Frame", "Parsed", "PolicySet", "compile_set", "parse"]

Peer = PodSelector | Block
#: (protocol's port table, first port, last port), inclusive
PortRange = tuple[int, int, int]
#: (name, protocol's port table)
PortName = tuple[str, int]
Indices = NDArray[np.intp]
_NOWHERE: frozenset[int] = frozenset()
NOTHING: Indices = np.zeros(0, dtype=np.intp)


# ---- 1. Policies as values ------------------------------------------------------


class ParsedRule(NamedTuple):
    """One rule. None means "any": every peer, or every port and protocol."""

    id: Rule
    peers: tuple[Peer, ...] | None
    ranges: tuple[PortRange, ...] | None
    names: tuple[PortName, ...]


@dataclass(slots=True, frozen=True)
class Parsed:
    """One policy. `errors` name the fields that could not be read; their rules match nothing."""

    policy: NetworkPolicy
    subject: PodSelector
    isolates: int
    ingress: tuple[ParsedRule, ...]
    egress: tuple[ParsedRule, ...]
    ingress_names: tuple[PortName, ...]
    errors: tuple[str, ...]


def _parse_peers(
    namespace: str, peers: Sequence[NetworkPolicyPeer], where: str, errors: list[str]
) -> tuple[Peer, ...] | None:
    if not peers:
        return None
    found: set[Peer] = set()
    for number, peer in enumerate(peers):
        if peer.ip_block is not None:
            try:
                block = block_key(peer.ip_block)
            except ValueError as error:
                errors.append(f"{where}[{number}].ipBlock: {error}")
                continue
            if block is not None:
                found.add(block)
        elif peer.pod_selector is not None or peer.namespace_selector is not None:
            spaces = peer.namespace_selector
            pods = None if peer.pod_selector is None else selector_key(peer.pod_selector)
            if spaces is None:
                found.add(PodSelector(namespace, None, pods))
            else:
                found.add(PodSelector("", selector_key(spaces), pods))
        else:
            errors.append(f"{where}[{number}]: expected podSelector, namespaceSelector or ipBlock")
    return tuple(sorted(found, key=repr))


def _parse_ports(
    ports: Sequence[NetworkPolicyPort],
) -> tuple[tuple[PortRange, ...] | None, tuple[PortName, ...]]:
    if not ports:
        return None, ()
    ranges: set[PortRange] = set()
    names: set[PortName] = set()
    for port in ports:
        table = PORT_TABLE[port.protocol]
        if port.port is None:
            ranges.add((table, 0, 65535))
        elif isinstance(port.port, str):
            names.add((port.port, table))
        else:
            last = port.port if port.end_port is None else port.end_port
            if 0 <= port.port <= last <= 65535:
                ranges.add((table, port.port, last))
    return tuple(sorted(ranges)), tuple(sorted(names))


def parse(policy: NetworkPolicy) -> Parsed:
    """The policy as values. Never fails: what can't be read matches nothing."""
    namespace, name = policy.key
    spec = policy.spec
    errors: list[str] = []
    types = spec.policy_types or (["Ingress", "Egress"] if spec.egress else ["Ingress"])

    def rules(
        direction: Direction,
        lists: Iterable[tuple[list[NetworkPolicyPeer], list[NetworkPolicyPort]]],
    ) -> tuple[ParsedRule, ...]:
        field_name = "from" if direction == "ingress" else "to"
        parsed = []
        for number, (peers, ports) in enumerate(lists):
            where = f"NetworkPolicy {namespace}/{name}: spec.{direction}[{number}].{field_name}"
            keys = _parse_peers(namespace, peers, where, errors)
            ranges, names = _parse_ports(ports)
            parsed.append(ParsedRule((namespace, name, number), keys, ranges, names))
        return tuple(parsed)

    isolates = 0
    ingress: tuple[ParsedRule, ...] = ()
    egress: tuple[ParsedRule, ...] = ()
    if "Ingress" in types:
        isolates |= ISOLATED_INGRESS
        ingress = rules("ingress", ((r.from_, r.ports) for r in spec.ingress))
    if "Egress" in types:
        isolates |= ISOLATED_EGRESS
        egress = rules("egress", ((r.to, r.ports) for r in spec.egress))
    return Parsed(
        policy=policy,
        subject=PodSelector(namespace, None, selector_key(spec.pod_selector)),
        isolates=isolates,
        ingress=ingress,
        egress=egress,
        ingress_names=tuple(sorted({n for rule in ingress for n in rule.names})),
        errors=tuple(errors),
    )


# ---- 2. What tells addresses and ports apart --------------------------------------


@dataclass(slots=True)
class PolicySet:
    """The policies of some local pods, by (namespace, name), and the numbers that the
    names of ingress ports have on those pods (None: no such port)."""

    policies: tuple[Parsed, ...]
    numbers: dict[PortName, int | None] = field(default_factory=dict)


class Addresses:
    """The classes of addresses.

    Class 0 is the empty vector. A class is a pair of a *kind* (what selectors and
    named ports say, for pods) and the set of blocks that contain the address.
    """

    def __init__(
        self,
        selectors: Sequence[PodSelector],
        names: Sequence[PortName],
        blocks: Sequence[Block],
        subjects: Subjects,
        before: Addresses | None = None,
    ) -> None:
        """`before`: an earlier instance, whose regions and trie serve again if they are equal."""
        self._regions: dict[int, Regions]
        self.trie: bytes
        self.selectors = selectors
        self.names = names
        self.blocks = blocks
        self._subjects = subjects
        self._no_numbers: tuple[int | None, ...] = (None,) * len(names)
        self._kinds: dict[tuple[bytes, tuple[int | None, ...]], int] = {}
        self._classes: dict[tuple[int, frozenset[int]], int] = {}
        self._listed = (0, 0)
        if before is not None and before.blocks == blocks:
            self._regions = before._regions
        else:
            numbered = list(enumerate(blocks))
            self._regions = {4: Regions(4, numbered), 6: Regions(6, numbered)}
        self._width = (len(selectors) + 7) // 8
        outside = self._kind(b"\0" * self._width, self._no_numbers)
        self.outside = outside
        self._class(outside, frozenset())
        self._leaves = tuple(
            (family, start, length, self._class(outside, members))
            for family, regions in self._regions.items()
            for (start, length), members in regions.networks.items()
        )
        if before is not None and before._leaves == self._leaves:
            self.trie = before.trie
        else:
            self.trie = trie(self._leaves)
        self.match()

    def match(self) -> None:
        """Ask which subjects the selectors match; again when namespaces have other labels."""
        subjects = self._subjects
        self._vectors = _transpose([subjects.match(s) for s in self.selectors], len(subjects))

    def _kind(self, vector: bytes, numbers: tuple[int | None, ...]) -> int:
        return self._kinds.setdefault((vector, numbers), len(self._kinds))

    def _class(self, kind: int, members: frozenset[int]) -> int:
        return self._classes.setdefault((kind, members), len(self._classes))

    def kind(self, subject: int, ports: Mapping[PortName, int]) -> int:
        """The kind of a pod, by its subject and its named ports."""
        numbers = self._no_numbers
        if self.names and ports:
            numbers = tuple(ports.get(name) for name in self.names)
        while subject >= len(self._vectors):
            found = self._subjects.matching(len(self._vectors), self.selectors)
            self._vectors.append(found.to_bytes(self._width, "little"))
        return self._kind(self._vectors[subject], numbers)

    def named_ports(self) -> set[PortRange]:
        """The numbers that the names have on any kind."""
        return {
            (name[1], number, number)
            for _, numbers in self._kinds
            for name, number in zip(self.names, numbers, strict=True)
            if number is not None
        }

    def classify(self, address: bytes, kind: int) -> int:
        """The class of an address that has this kind; new classes appear as they are met."""
        return self._class(kind, self.blocks_at(address))

    def class_of(self, kind: int, blocks: frozenset[int]) -> int:
        """The class of addresses of this kind in these blocks, as `classify`."""
        return self._class(kind, blocks)

    def blocks_at(self, address: bytes) -> frozenset[int]:
        """Numbers of the blocks that contain the address."""
        if not self.blocks:
            return _NOWHERE
        number = int.from_bytes(address, "big")
        v4 = number >> 32 == 0xFFFF
        return self._regions[4].at(number & 0xFFFF_FFFF) if v4 else self._regions[6].at(number)

    def same_regions(self, other: Addresses | None) -> bool:
        """Does `blocks_at` answer the same there?"""
        return other is not None and other._regions is self._regions

    @property
    def count(self) -> int:
        return len(self._classes)

    def close(self) -> bool:
        """All addresses are known: list the classes of each membership. False if that was done
        and no class came since: what was made of them still holds."""
        if self._listed == (len(self._kinds), self.count):
            return False
        self._listed = len(self._kinds), self.count
        kinds = np.fromiter((k for k, _ in self._classes), dtype=np.intp, count=self.count)
        self.by_peer: dict[Peer, Indices] = {}
        if self.selectors:
            packed = np.frombuffer(b"".join(v for v, _ in self._kinds), dtype=np.uint8)
            bits = np.unpackbits(packed.reshape(len(self._kinds), -1), axis=1, bitorder="little")
            by_class = bits[kinds].T
            for number, selector in enumerate(self.selectors):
                self.by_peer[selector] = np.flatnonzero(by_class[number])
        containing: list[list[int]] = [[] for _ in self.blocks]
        for cls, (_, members) in enumerate(self._classes):
            for number in members:
                containing[number].append(cls)
        for number, block in enumerate(self.blocks):
            self.by_peer[block] = np.array(containing[number], dtype=np.intp)
        self.by_name: dict[PortName, dict[int, Indices]] = {}
        for position, name in enumerate(self.names):
            of_kind: dict[int, list[int]] = {}
            for kind, (_, numbers) in enumerate(self._kinds):
                port = numbers[position]
                if port is not None:
                    of_kind.setdefault(port, []).append(kind)
            self.by_name[name] = {
                port: np.flatnonzero(np.isin(kinds, of_kind[port])) for port in sorted(of_kind)
            }
        self._by_peers: dict[tuple[Peer, ...], Indices] = {}
        return True

    def of(self, peers: tuple[Peer, ...]) -> Indices:
        """The classes that any of `peers` matches, ascending."""
        found = self._by_peers.get(peers)
        if found is None:
            lists = [self.by_peer[p] for p in peers]
            if len(lists) == 1:
                found = lists[0]
            else:
                found = np.unique(np.concatenate(lists)) if lists else NOTHING
            self._by_peers[peers] = found
        return found


def _transpose(sets: Sequence[int], width: int) -> list[bytes]:
    """Sets of subjects → for each subject the set of sets it is in, as bytes."""
    if not sets or not width:
        return [b""] * width
    size = (width + 7) // 8
    packed = np.frombuffer(b"".join(s.to_bytes(size, "little") for s in sets), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(len(sets), size), axis=1, bitorder="little")[:, :width]
    lines = np.packbits(bits, axis=0, bitorder="little").T.tobytes()
    step = (len(sets) + 7) // 8
    return [lines[at : at + step] for at in range(0, len(lines), step)]


class Ports:
    """The port classes: ports of a protocol that the same ranges contain.

    Class 0 holds what no range contains, so also every protocol without ports.
    """

    def __init__(self, ranges: Iterable[PortRange]) -> None:
        self.ranges = tuple(sorted(set(ranges)))
        classes: dict[tuple[int, ...], int] = {(): 0}
        table = np.zeros((3, 65536), dtype="<u2")
        for protocol in range(3):
            own = [(n, r[1], r[2]) for n, r in enumerate(self.ranges) if r[0] == protocol]
            cuts = sorted({0} | {first for _, first, _ in own} | {last + 1 for _, _, last in own})
            begin: dict[int, list[int]] = {}
            end: dict[int, list[int]] = {}
            for number, first, last in own:
                begin.setdefault(first, []).append(number)
                end.setdefault(last + 1, []).append(number)
            active: set[int] = set()
            for cut, until in zip(cuts, [*cuts[1:], 65536], strict=True):
                active.difference_update(end.get(cut, ()))
                active.update(begin.get(cut, ()))
                key = tuple(sorted(active))
                cls = classes.setdefault(key, len(classes))
                if cls > 0xFFFF:
                    raise OverflowError("the policies in force tell more than 65535 ports apart")
                table[protocol, cut:until] = cls
        self.table = table.tobytes()
        assert len(self.table) == IMAGE_PORT_WORDS * 8
        self.count = len(classes)
        members: dict[PortRange, list[int]] = {r: [] for r in self.ranges}
        for key, cls in classes.items():
            for number in key:
                members[self.ranges[number]].append(cls)
        self._of = {r: np.array(m, dtype=np.intp) for r, m in members.items()}
        self._of_many: dict[tuple[PortRange, ...], Indices] = {}

    def of(self, ranges: tuple[PortRange, ...]) -> Indices:
        """The port classes that any of `ranges` contains."""
        found = self._of_many.get(ranges)
        if found is None:
            lists = [self._of[r] for r in ranges]
            found = np.unique(np.concatenate(lists)) if lists else NOTHING
            self._of_many[ranges] = found
        return found


@dataclass(slots=True)
class Frame:
    """What tells addresses and ports apart: everything the cells depend on beside the rules."""

    addresses: Addresses
    ports: Ports


# ---- 3. Rows, columns, cells --------------------------------------------------------


@dataclass(slots=True)
class Half:
    """One direction of a policy set: `cells[row[class]][column[port class]]`."""

    row: Indices
    column: Indices
    cells: NDArray[np.uint64]


def _lines(count: int, members: Sequence[Indices | None]) -> tuple[list[int], Indices]:
    """`count` things in some of `members` (None: all) → the distinct sets of members
    as bit masks, and for each thing which of them is its own."""
    words = (len(members) + 63) // 64
    if words == 0:
        return [0], np.zeros(count, dtype=np.intp)
    bits = np.zeros((words, count), dtype=np.uint64)
    for number, things in enumerate(members):
        bit = np.uint64(1 << (number & 63))
        if things is None:
            bits[number >> 6] |= bit
        elif len(things):
            bits[number >> 6, things] |= bit
    if words == 1:
        values, inverse = np.unique(bits[0], return_inverse=True)
        return [int(v) for v in values], inverse
    lines = np.ascontiguousarray(bits.T).astype("<u8").tobytes()
    step = words * 8
    known: dict[bytes, int] = {}
    inverse = np.fromiter(
        (known.setdefault(lines[n : n + step], len(known)) for n in range(0, len(lines), step)),
        dtype=np.intp,
        count=count,
    )
    return [int.from_bytes(line, "little") for line in known], inverse


def _compile_half(
    rules: Sequence[ParsedRule],
    deny: tuple[Rule, ...],
    direction: Direction,
    frame: Frame,
    numbers: dict[PortName, int | None],
    reason: Callable[[Direction, tuple[Rule, ...], bool], int],
) -> Half:
    addresses, ports = frame.addresses, frame.ports
    # A rule whose egress ports have names splits: its numbers depend on the peer.
    owners: list[int] = []
    by_class: list[Indices | None] = []
    by_port: list[Indices | None] = []
    for owner, rule in enumerate(rules):
        peers = None if rule.peers is None else addresses.of(rule.peers)
        ranges = rule.ranges
        if direction == "ingress" and rule.names:
            resolved = {(t, n, n) for name, t in rule.names if (n := numbers[name, t]) is not None}
            ranges = tuple(sorted(resolved.union(ranges or ())))
        if ranges is None or ranges:
            owners.append(owner)
            by_class.append(peers)
            by_port.append(None if ranges is None else ports.of(ranges))
        if direction == "egress":
            for name in rule.names:
                for number, having in addresses.by_name[name].items():
                    owners.append(owner)
                    by_class.append(
                        having if peers is None else np.intersect1d(peers, having, True)
                    )
                    by_port.append(ports.of(((name[1], number, number),)))
    row_masks, row = _lines(addresses.count, by_class)
    column_masks, column = _lines(ports.count, by_port)
    known: dict[int, int] = {0: _cell(reason(direction, deny, False), False)}
    cells = np.empty((len(row_masks), len(column_masks)), dtype=np.uint64)
    for r, row_mask in enumerate(row_masks):
        line = []
        for column_mask in column_masks:
            mask = row_mask & column_mask
            cell = known.get(mask)
            if cell is None:
                matched = sorted({rules[owners[bit]].id for bit in _bits(mask)})
                cell = known[mask] = _cell(reason(direction, tuple(matched), True), True)
            line.append(cell)
        cells[r] = line
    return Half(row, column, cells)


def _bits(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _cell(reason: int, allow: bool) -> int:
    if not 0 <= reason <= CELL_REASON:
        raise OverflowError(f"reason {reason} does not fit a cell")
    half = reason | (CELL_ALLOW if allow else 0)
    return half | half << 32


def compile_set(own: PolicySet, frame: Frame, ids: Ids) -> tuple[Half, Half, int]:
    """Ingress, egress and the isolation bits of a policy set.

    A direction that nothing isolates gets a single open cell with reason 0.
    """

    def reason(direction: Direction, rules: tuple[Rule, ...], allow: bool) -> int:
        return ids.reason("allow" if allow else "deny", direction, rules)

    halves: list[Half] = []
    isolated = 0
    for direction, bit in (("ingress", ISOLATED_INGRESS), ("egress", ISOLATED_EGRESS)):
        policies = [p for p in own.policies if p.isolates & bit]
        if policies:
            isolated |= bit
            ingress = direction == "ingress"
            rules = [rule for p in policies for rule in (p.ingress if ingress else p.egress)]
            deny = tuple((*p.policy.key, _denial(p.policy)) for p in policies)
            halves.append(
                _compile_half(
                    rules, deny, "ingress" if ingress else "egress", frame, own.numbers, reason
                )
            )
        else:
            halves.append(
                Half(
                    np.zeros(frame.addresses.count, dtype=np.intp),
                    np.zeros(frame.ports.count, dtype=np.intp),
                    np.full((1, 1), _cell(0, True), dtype=np.uint64),
                )
            )
    return halves[0], halves[1], isolated


def _denial(policy: NetworkPolicy) -> int:
    return UNREADABLE if policy.unreadable else POLICY


def write_set(builder: Builder, halves: tuple[Half, Half]) -> tuple[int, int]:
    """Put a policy set into the image; its rows and columns as image words."""
    starts = []
    for half in halves:
        words = half.cells.astype("<u8", copy=False)
        at = np.fromiter((builder.add(line.tobytes()) for line in words), np.uint64, len(words))
        starts.append(at[half.row])
    shift = np.uint64(32)
    rows = starts[0] | starts[1] << shift
    columns = halves[0].column.astype(np.uint64) | halves[1].column.astype(np.uint64) << shift
    return (
        builder.add(rows.astype("<u8", copy=False).tobytes()),
        builder.add(columns.astype("<u8", copy=False).tobytes()),
    )

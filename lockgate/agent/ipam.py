"""Addresses and slots of this node's pods, kept in ipam.json.

Both are handed out in turn, so one that was given back is the last to be used again. The file
is replaced whole: written beside, the old one removed, the new one renamed. (Renamed over the old
one, ext4 would write it to disk first: half a millisecond to three of every ADD.) A crash between
leaves the new one alone, which is read then. It is not synced: what it tells does not outlive the
machine's power either, and should it be lost, the pods' links tell who has what
(`lockgate.net.pods.Seal`, `adopt`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

__all__ = ["Ipam", "Lease", "PoolExhausted"]

log = logging.getLogger(__name__)


class PoolExhausted(Exception):
    """No address, or no slot, is left; the message names the pool. `early`: the node has no pool
    yet, so a later attempt may succeed."""

    early = False


@dataclass(frozen=True, slots=True)
class Lease:
    """What a pod has: its addresses (primary first), its slot, and which of its sandboxes has
    them: "CONTAINERID/IFNAME", or "" when who asked knows no sandboxes."""

    uid: str
    ips: tuple[str, ...]
    slot: int
    sandbox: str = ""

    @property
    def key(self) -> str:
        """What DEL knows it by."""
        return self.sandbox or self.uid

    @property
    def ifname(self) -> str:
        return self.sandbox.rpartition("/")[2] or "eth0"


@dataclass(slots=True)
class Ipam:
    """The node's pools. Changes are on disk when a method returns."""

    path: Path
    slots: int
    pools: list[str] = field(default_factory=list)
    leases: dict[str, Lease] = field(default_factory=dict)
    damaged: str = ""
    retired: set[int] = field(default_factory=set)  # slots whose links have not gone yet
    foreign: set[str] = field(default_factory=set)  # addresses of pods that another plugin wired
    _next: dict[str, int] = field(default_factory=dict)
    _cidrs: list[str] = field(default_factory=list)
    _waits: bool = False

    def __post_init__(self) -> None:
        """Reads the file. One that can't be read is put aside; `damaged` says so."""
        try:
            self._finish_write()
            state: dict[str, Any] = json.loads(self.path.read_text())
            following = {str(k): int(v) for k, v in state["next"].items()}
            leases = {
                uid: Lease(uid, tuple(one["ips"]), int(one["slot"]), str(one.get("sandbox", "")))
                for uid, one in state["endpoints"].items()
            }
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            aside = self.path.with_name(f"{self.path.name}.damaged-{int(time.time())}")
            os.replace(self.path, aside)
            self.damaged = f"{self.path} was damaged ({error}): rebuilt; the old one is {aside}"
            log.warning("%s", self.damaged)
            return
        self._next, self.leases = following, leases

    def set_pools(self, cidrs: list[str]) -> None:
        """The node's podCIDRs; leases outside of them stay."""
        if cidrs != self._cidrs:
            self.pools = [str(ip_network(cidr, strict=False)) for cidr in cidrs]
            self._cidrs = list(cidrs)

    def adopt(self, lease: Lease) -> None:
        """Take over a lease that the kernel tells of. What comes after its addresses and slot is
        handed out next, as if it had been the last."""
        following = dict(self._next)
        following["slots"] = max(following.get("slots", 0), (lease.slot + 1) % self.slots)
        self._save(lease.uid, lease, following)

    def of_sandbox(self, sandbox: str) -> Lease | None:
        """The lease that a sandbox has."""
        return next((one for one in self.leases.values() if one.sandbox == sandbox), None)

    def acquire(self, uid: str, sandbox: str = "") -> Lease:
        """An address from each pool and a slot; the same again for a uid that has a lease, which
        is its newest sandbox's from then on. PoolExhausted changes nothing."""
        known = self.leases.get(uid)
        if known is not None:
            if known.sandbox == sandbox:
                return known
            lease = Lease(uid, known.ips, known.slot, sandbox)
            self._save(uid, lease, dict(self._next))
            return lease
        ips, slot, following = self._pick()
        lease = Lease(uid, ips, slot, sandbox)
        self._save(uid, lease, following)
        return lease

    def room(self) -> None:
        """PoolExhausted if `acquire` would be refused now."""
        self._pick()

    def _pick(self) -> tuple[tuple[str, ...], int, dict[str, int]]:
        """(addresses, slot, what is next then)."""
        if not self.pools:
            error = PoolExhausted("the Node object has no spec.podCIDRs to take addresses from")
            error.early = True
            raise error
        following = dict(self._next)
        taken = {_address(ip) for lease in self.leases.values() for ip in lease.ips}
        taken |= {_address(ip) for ip in self.foreign}
        ips = []
        for pool in self.pools:
            network = ip_network(pool)
            low, count = _usable(network)
            used = {int(ip) - low for ip in taken if ip in network}
            # Without a memory of what was last: behind the highest in use.
            start = following.get(pool, max(used, default=-1) + 1) % count
            index = _first_free(used, count, start)
            if index is None:
                raise PoolExhausted(f"pool {pool} is exhausted: all {count} addresses are in use")
            following[pool] = (index + 1) % count
            ips.append(str(network[0] + (low - int(network[0]) + index)))
        slots = {lease.slot for lease in self.leases.values()} | self.retired
        slot = _first_free(slots, self.slots, following.get("slots", 0))
        if slot is None:
            raise PoolExhausted(f"all {self.slots} endpoint slots of the node are in use")
        following["slots"] = (slot + 1) % self.slots
        return tuple(ips), slot, following

    def release(self, uid: str) -> Lease | None:
        """Give back; None if there was no lease."""
        lease = self.leases.get(uid)
        if lease is not None:
            self._save(uid, None, dict(self._next))
        return lease

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Changes inside are on disk when the block ends, all at once; on OSError none was made."""
        before = self.leases, self._next
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        try:
            if self.leases is not before[0]:
                self._write(self.leases, self._next)
        except OSError:
            self.leases, self._next = before
            raise

    def _save(self, uid: str, lease: Lease | None, following: dict[str, int]) -> None:
        leases = dict(self.leases)
        leases.pop(uid, None)
        if lease is not None:
            leases[uid] = lease
        if not self._waits:
            self._write(leases, following)
        self.leases, self._next = leases, following

    def _write(self, leases: dict[str, Lease], following: dict[str, int]) -> None:
        state = {
            "next": following,
            "endpoints": {
                key: {"ips": list(one.ips), "slot": one.slot, "sandbox": one.sandbox}
                for key, one in leases.items()
            },
        }
        self._beside.write_text(json.dumps(state))
        self.path.unlink(missing_ok=True)
        self._beside.rename(self.path)

    def _finish_write(self) -> None:
        """A crash came between removing and renaming. Of a first file that was not written to
        its end nobody was told."""
        if not self.path.exists() and self._beside.exists():
            with contextlib.suppress(ValueError):
                json.loads(self._beside.read_text())
                self._beside.rename(self.path)

    @property
    def _beside(self) -> Path:
        return self.path.with_suffix(".new")


_address = lru_cache(maxsize=65536)(ip_address)


def _usable(network: IPv4Network | IPv6Network) -> tuple[int, int]:
    """(first, count) of what pods may have: neither the network's own address, nor the first
    one, which is a gateway's by custom, nor IPv4's broadcast address. Tiny blocks: all."""
    first, size = int(network.network_address), network.num_addresses
    if size <= 4:
        return first, size
    return first + 2, min(size - 2 - (network.version == 4), 1 << 24)


def _first_free(used: set[int], count: int, start: int) -> int | None:
    """The first number from `start` on, round the end, that is not in `used`."""
    if len(used) >= count and all(index in used for index in range(count)):
        return None
    for step in range(count):
        index = (start + step) % count
        if index not in used:
            return index
    return None

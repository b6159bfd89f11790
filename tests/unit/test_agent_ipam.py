"""Addresses and slots of a node's pods."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockgate.agent.ipam import Ipam, PoolExhausted


def ipam(folder: Path, *pools: str, slots: int = 100) -> Ipam:
    made = Ipam(folder / "ipam.json", slots)
    made.set_pools(list(pools))
    return made


def test_an_address_of_each_family_and_the_same_again(tmp_path: Path) -> None:
    pools = ipam(tmp_path, "10.1.2.0/24", "fd00:1::/64")
    lease = pools.acquire("a", "/ns/a")
    assert lease.ips == ("10.1.2.2", "fd00:1::2")
    assert pools.acquire("a", "/ns/a") == lease
    assert pools.acquire("b", "/ns/b").ips == ("10.1.2.3", "fd00:1::3")


def test_leases_outlive_the_process(tmp_path: Path) -> None:
    lease = ipam(tmp_path, "10.1.2.0/24").acquire("a", "/ns/a")
    again = ipam(tmp_path, "10.1.2.0/24")
    assert again.leases == {"a": lease}
    assert again.acquire("b", "/ns/b").ips != lease.ips


def test_what_was_given_back_is_used_last(tmp_path: Path) -> None:
    pools = ipam(tmp_path, "10.1.2.0/29", slots=8)
    first = pools.acquire("a", "")
    assert pools.release("a") == first
    assert pools.release("a") is None
    others = [pools.acquire(str(n), "") for n in range(4)]
    assert first.ips not in [lease.ips for lease in others]
    assert first.slot not in [lease.slot for lease in others]
    assert pools.acquire("last", "").ips == first.ips


def test_exhaustion_names_the_pool_and_changes_nothing(tmp_path: Path) -> None:
    pools = ipam(tmp_path, "10.1.0.0/16", "fd00::/126")
    for n in range(4):
        pools.acquire(str(n), "")
    before = (tmp_path / "ipam.json").read_bytes()
    with pytest.raises(PoolExhausted, match=r"fd00::/126 is exhausted: all 4"):
        pools.acquire("more", "")
    assert (tmp_path / "ipam.json").read_bytes() == before


def test_slots_run_out_by_name(tmp_path: Path) -> None:
    pools = ipam(tmp_path, "10.1.0.0/16", slots=1)
    pools.acquire("a", "")
    with pytest.raises(PoolExhausted, match="1 endpoint slots"):
        pools.acquire("b", "")


def test_a_damaged_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "ipam.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        ipam(tmp_path, "10.1.0.0/16")
    assert (tmp_path / "ipam.json").read_text() == "{"


def test_leases_that_are_made_together_are_saved_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ipam = Ipam(tmp_path / "ipam.json", 8, ["10.1.0.0/24"])
    with ipam.together():
        ipam.acquire("a", "/a")
        ipam.acquire("b", "/b")
        assert not ipam.path.exists()
    assert set(Ipam(ipam.path, 8).leases) == {"a", "b"}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError), ipam.together():
        ipam.acquire("c", "/c")
    assert set(ipam.leases) == {"a", "b"}

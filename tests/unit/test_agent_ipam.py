"""Addresses and slots of a node's pods."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockgate.agent.ipam import Ipam, Lease, PoolExhausted


def ipam(folder: Path, *pools: str, slots: int = 100) -> Ipam:
    made = Ipam(folder / "ipam.json", slots)
    made.set_pools(list(pools))
    return made


def test_an_address_of_each_family_and_the_same_again(tmp_path: Path) -> None:
    pools = ipam(tmp_path, "10.1.2.0/24", "fd00:1::/64")
    lease = pools.acquire("a", "a/eth0")
    assert lease.ips == ("10.1.2.2", "fd00:1::2")
    assert pools.acquire("a", "a/eth0") == lease
    assert pools.acquire("b", "b/eth0").ips == ("10.1.2.3", "fd00:1::3")


def test_leases_outlive_the_process(tmp_path: Path) -> None:
    lease = ipam(tmp_path, "10.1.2.0/24").acquire("a", "a/eth0")
    again = ipam(tmp_path, "10.1.2.0/24")
    assert again.leases == {"a": lease}
    assert again.acquire("b", "b/eth0").ips != lease.ips


def test_what_was_given_back_is_used_last(tmp_path: Path) -> None:
    pools = ipam(tmp_path, "10.1.2.0/29", slots=8)
    first = pools.acquire("a", "")
    assert pools.release("a") == first
    assert pools.release("a") is None
    others = [pools.acquire(str(n), "") for n in range(4)]
    assert first.ips not in [lease.ips for lease in others]
    assert first.slot not in [lease.slot for lease in others]
    assert pools.acquire("last", "").ips == first.ips


def test_addresses_of_pods_that_another_plugin_wired_are_not_given_out(tmp_path: Path) -> None:
    pools = ipam(tmp_path, "10.1.2.0/29", "fd00:1::/64")
    pools.foreign = {"10.1.2.1", "10.1.2.3", "fd00:1::7"}
    found = [pools.acquire(str(n), "").ips for n in range(4)]
    assert found == [
        ("10.1.2.4", "fd00:1::8"),
        ("10.1.2.5", "fd00:1::9"),
        ("10.1.2.6", "fd00:1::a"),
        ("10.1.2.2", "fd00:1::b"),
    ], "behind them, and then the ones between"
    with pytest.raises(PoolExhausted, match=r"10\.1\.2\.0/29"):
        pools.acquire("more", "")


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


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[]",
        '{"next": {}, "endpoints": {"a": {"ips": ["10.1.0.2"]}}}',
        '{"next": {"a": "b"}}',
    ],
)
def test_a_damaged_file_is_put_aside_and_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "ipam.json").write_text(text)
    pools = ipam(tmp_path, "10.1.0.0/16")
    (aside,) = tmp_path.iterdir()
    assert aside.read_text() == text
    assert "was damaged" in pools.damaged and str(aside) in pools.damaged
    assert pools.leases == {} and pools.acquire("a").ips == ("10.1.0.2",)


def test_what_the_kernel_tells_of_is_nobody_elses_and_behind_it_comes_the_next(
    tmp_path: Path,
) -> None:
    pools = ipam(tmp_path, "10.1.0.0/24")
    live = Lease("live", ("10.1.0.9",), 7, "container/eth0")
    pools.adopt(live)
    assert pools.of_sandbox("container/eth0") == live
    new = pools.acquire("new")
    assert (new.ips, new.slot) == (("10.1.0.10",), 8)
    assert pools.acquire("live", "container/eth0") == live


def test_a_newer_sandbox_takes_over_the_lease(tmp_path: Path) -> None:
    pools = ipam(tmp_path, "10.1.0.0/24")
    old = pools.acquire("a", "one/eth0")
    new = pools.acquire("a", "two/net1")
    assert (new.ips, new.slot, new.ifname) == (old.ips, old.slot, "net1")
    assert pools.of_sandbox("one/eth0") is None


def test_leases_that_are_made_together_are_saved_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ipam = Ipam(tmp_path / "ipam.json", 8, ["10.1.0.0/24"])
    with ipam.together():
        ipam.acquire("a")
        ipam.acquire("b")
        assert not ipam.path.exists()
    assert set(Ipam(ipam.path, 8).leases) == {"a", "b"}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError), ipam.together():
        ipam.acquire("c")
    assert set(ipam.leases) == {"a", "b"}


def test_a_crash_between_removing_the_old_file_and_naming_the_new_one_loses_nothing(
    tmp_path: Path,
) -> None:
    lease = ipam(tmp_path, "10.1.0.0/24").acquire("a")
    (tmp_path / "ipam.json").rename(tmp_path / "ipam.new")
    pools = ipam(tmp_path, "10.1.0.0/24")
    assert pools.leases == {"a": lease} and not pools.damaged
    assert [path.name for path in tmp_path.iterdir()] == ["ipam.json"]


def test_a_first_file_that_was_cut_short_is_none(tmp_path: Path) -> None:
    (tmp_path / "ipam.new").write_text('{"next": {}, "endpo')
    pools = ipam(tmp_path, "10.1.0.0/24")
    assert pools.leases == {} and not pools.damaged

"""Pods of another CNI plugin are told from pods of ours by where the stack's routes lead."""

from __future__ import annotations

import errno

import pytest

from lockgate.agent import foreign
from lockgate.agent.foreign import Foreign
from lockgate.net.links import IFINDEX_BASE
from lockgate.objects.model import ObjectMeta, Pod, PodIP, PodSpec, PodStatus

BRIDGE = 7
LINKS = {"10.1.0.2": BRIDGE, "fd00:1::2": BRIDGE, "10.1.0.4": 0, "10.1.0.5": IFINDEX_BASE + 3}


def pod(uid: str, *ips: str, host_network: bool = False) -> Pod:
    meta = ObjectMeta(name=uid, namespace="default", uid=uid)
    status = PodStatus(pod_ips=[PodIP(ip) for ip in ips])
    return Pod(metadata=meta, status=status, spec=PodSpec(host_network=host_network))


@pytest.fixture(autouse=True)
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Links by the address that is on them; no route to any other."""
    links = dict(LINKS)

    def on_link(address: str) -> int:
        if address not in links:
            raise OSError(errno.EHOSTUNREACH, "no route")
        return links[address]

    monkeypatch.setattr(foreign.dumps, "on_link", on_link)
    return links


@pytest.mark.parametrize(
    ("what", "ips", "theirs"),
    [
        ("both addresses are on a link of the node", ("10.1.0.2", "fd00:1::2"), True),
        ("no address yet", (), False),
        ("a gateway or the default route", ("10.1.0.4",), False),
        ("a link of ours", ("10.1.0.5",), False),
        ("no route", ("10.1.0.9",), False),
        ("one of two without a route", ("10.1.0.2", "fd00:1::9"), False),
    ],
)
def test_whose_pod_it_is(what: str, ips: tuple[str, ...], theirs: bool) -> None:
    seen = Foreign()
    assert seen.look([pod("a", *ips)]) == ({("default", "a")} if theirs else set())
    assert seen.addresses == (set(ips) if theirs else set())


def test_only_changes_are_told_and_what_is_known_stays_while_the_pod_does(
    routes: dict[str, int],
) -> None:
    seen, one = Foreign(), pod("a", "10.1.0.2")
    assert seen.look([one]) == {one.key}
    assert seen.look([one]) == set()
    routes.clear()
    assert seen.look([one]) == set(), "its bridge may go up and down"
    assert seen.look([]) == {one.key} and not seen.pods


def test_a_pod_on_the_nodes_own_network_is_none(routes: dict[str, int]) -> None:
    assert Foreign().look([pod("a", "10.1.0.2", host_network=True)]) == set()


def test_who_is_none_is_asked_for_again_with_other_addresses_or_later(
    routes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(foreign.time, "monotonic", lambda: now)
    seen, one = Foreign(), pod("a", "10.1.0.9")
    assert seen.look([one]) == set()
    routes["10.1.0.9"] = BRIDGE
    assert seen.look([one]) == set(), "every change of any object would ask for every such pod"
    assert seen.look([pod("a", "10.1.0.2")]) == {one.key}
    assert seen.look([]) == {one.key}
    routes.pop("10.1.0.9")
    assert seen.look([one]) == set()
    routes["10.1.0.9"], now = BRIDGE, 110.0
    assert seen.look([one]) == {one.key}

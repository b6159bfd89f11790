"""Objects that claim another pod's uid: nobody loses what he has by them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from lockgate.agent.claims import Claims
from lockgate.agent.endpoints import Endpoints
from lockgate.agent.ipam import Lease
from lockgate.compile import compile_node
from lockgate.kube.stream import Change, Transaction, apply
from lockgate.objects.changes import Name
from lockgate.objects.model import Cluster, ObjectMeta, Pod, PodSpec
from tests.changes import Ids

STATIC = "0123456789abcdef0123456789abcdef"
TRUE, FORGED, LATER = ("shop", "db-one"), ("aaa", "x"), ("aaa", "y")
SLOT = 7


def pod(name: Name, uid: str = STATIC, node: str = "one") -> Pod:
    meta = ObjectMeta(name=name[1], namespace=name[0], uid=uid, labels={"app": name[1]})
    return Pod(metadata=meta, spec=PodSpec(containers=[], node_name=node))


class Node:
    """What an agent does with objects and leases, without a kernel."""

    def __init__(self) -> None:
        self.ipam = SimpleNamespace(leases={})
        self.journal: dict[str, Name] = {}
        self.begin()

    def begin(self) -> None:
        """An agent starts; leases and journal are there."""
        self.claims = Claims(lambda uid: uid in self.ipam.leases, self.journal.get)
        self.endpoints = Endpoints(None, self.ipam, "one")  # type: ignore[arg-type]
        self.cluster = Cluster()

    def tell(self, *changes: Change, complete: bool = False) -> None:
        whole = self.claims.take(Transaction(list(changes), 1, complete, []))
        self._publish(whole)

    def put(self, *pods: Pod) -> None:
        self.tell(*(Change("MODIFIED", one) for one in pods))

    def delete(self, item: Pod) -> None:
        self.tell(Change("DELETED", item))

    def add(self, name: Name) -> None:
        """CNI ADD, as the runtime asks for the static pod `name`."""
        assert self.claims.uid(name) == STATIC, "no object to wire it by"
        self._publish(Transaction(self.claims.believe(STATIC, name), 1, False, []))
        assert self.claims.names[STATIC] == name
        self.ipam.leases = {STATIC: Lease(STATIC, ("10.0.0.2",), SLOT)}
        self._publish()

    def cut(self) -> None:
        """CNI DEL."""
        self.ipam.leases = {}
        self._publish()

    def _publish(self, *transactions: Transaction) -> None:
        self.cluster, changed = apply(self.cluster, *transactions)
        self.judged, changed = self.endpoints.overlay(self.cluster, changed)
        uids = [one.metadata.uid for one in self.judged.pods.values()]
        assert len(uids) == len(set(uids)), "a uid of two pods"
        for one in self.judged.pods.values():
            self.journal[one.metadata.uid] = one.key

    @property
    def has_it(self) -> Name | None:
        """Who is judged, and named, by what the runtime calls STATIC."""
        found = [k for k, one in self.judged.pods.items() if one.metadata.uid == STATIC]
        return found[0] if found else None


def forged_afterwards(node: Node) -> None:
    node.put(pod(TRUE))
    node.add(TRUE)
    node.put(pod(FORGED))


def forged_and_deleted(node: Node) -> None:
    forged_afterwards(node)
    node.delete(pod(FORGED))
    assert node.claims.errors() == []


def forged_on_another_node(node: Node) -> None:
    node.put(pod(TRUE))
    node.add(TRUE)
    node.put(pod(FORGED, node="two"))
    node.delete(pod(FORGED, node="two"))


def forged_before(node: Node) -> None:
    node.put(pod(FORGED))
    node.put(pod(TRUE))
    assert node.has_it == FORGED
    node.add(TRUE)


def forged_before_and_deleted(node: Node) -> None:
    node.put(pod(FORGED))
    node.put(pod(TRUE))
    node.delete(pod(FORGED))
    assert node.has_it == TRUE
    node.add(TRUE)


def forged_twice_before(node: Node) -> None:
    node.put(pod(FORGED), pod(LATER), pod(TRUE))
    node.add(TRUE)
    node.delete(pod(FORGED))


def forged_while_the_mirror_is_made_anew(node: Node) -> None:
    node.put(pod(TRUE))
    node.add(TRUE)
    node.delete(pod(TRUE))
    node.put(pod(FORGED))
    assert node.has_it == TRUE
    node.put(pod(TRUE))


def claimed_by_an_object_that_was_another(node: Node) -> None:
    node.put(pod(TRUE), pod(FORGED, "uid-x"))
    node.add(TRUE)
    node.put(pod(FORGED))
    node.put(pod(FORGED, "uid-x"))
    assert node.claims.errors() == []


def an_agent_starts_again(node: Node) -> None:
    forged_afterwards(node)
    node.begin()
    everything = [Change("ADDED", pod(FORGED)), Change("ADDED", pod(TRUE))]
    node.tell(*everything, complete=True)


def an_agent_starts_again_while_the_mirror_is_made_anew(node: Node) -> None:
    forged_afterwards(node)
    node.begin()
    node.tell(Change("ADDED", pod(FORGED)), complete=True)
    assert node.has_it is None
    node.put(pod(TRUE))


def everything_is_told_again(node: Node) -> None:
    node.put(pod(TRUE))
    node.tell(Change("ADDED", pod(FORGED)), Change("ADDED", pod(TRUE)), complete=True)
    node.add(TRUE)


CASES: list[Callable[[Node], None]] = [
    forged_afterwards,
    forged_and_deleted,
    forged_on_another_node,
    forged_before,
    forged_before_and_deleted,
    forged_twice_before,
    forged_while_the_mirror_is_made_anew,
    claimed_by_an_object_that_was_another,
    an_agent_starts_again,
    an_agent_starts_again_while_the_mirror_is_made_anew,
    everything_is_told_again,
]


@pytest.mark.parametrize("case", CASES, ids=[one.__name__.replace("_", " ") for one in CASES])
def test_a_static_pod_keeps_its_uid(case: Callable[[Node], None]) -> None:
    node = Node()
    case(node)
    assert node.has_it == TRUE
    ids = Ids()
    ids.slots = {STATIC: SLOT}
    assert set(compile_node(node.judged, "one", ids).endpoints) == {SLOT}
    assert node.judged.pods[TRUE].ips == ["10.0.0.2"]
    assert all(not one.ips for key, one in node.judged.pods.items() if key != TRUE)


def test_who_is_refused_is_told_until_he_goes() -> None:
    node = Node()
    forged_afterwards(node)
    assert node.claims.errors() == [
        "Pod aaa/x: metadata.annotations: kubernetes.io/config.mirror:"
        f" {STATIC} is Pod shop/db-one's, which keeps it"
    ]
    assert node.judged.pods[FORGED].metadata.labels == {"app": "x"}
    node.delete(pod(FORGED))
    assert node.claims.errors() == [] and FORGED not in node.judged.pods


def test_a_uid_is_free_after_del() -> None:
    node = Node()
    node.put(pod(TRUE))
    node.add(TRUE)
    node.delete(pod(TRUE))
    node.cut()
    node.put(pod(LATER))
    assert node.has_it == LATER


def test_pods_without_a_uid_claim_none() -> None:
    node = Node()
    node.claims.take(Transaction([], 1, True, []))
    node.claims.take(
        Transaction([Change("ADDED", pod(k, "")) for k in (TRUE, LATER)], 2, False, [])
    )
    assert node.claims.errors() == []

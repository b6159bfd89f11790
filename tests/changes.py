"""Random changes of a small cluster, in place, for comparing what is patched with what is made
anew. Each function is one thing that happens to a cluster; `Ids` are those of a node."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from lockgate.compile.tables import ON_HOST
from lockgate.objects.changes import Changed
from lockgate.objects.model import Cluster, NodeAddress, ObjectMeta, Pod, PodIP
from tests import generate

__all__ = ["CHANGES", "Ids"]

replace = msgspec.structs.replace
GOING = "2026-01-01T00:00:00Z"


class Ids:
    """Numbers in the order of asking. Slots and hops are given and taken by tests."""

    def __init__(self) -> None:
        self.interned: dict[object, int] = {}
        self.slots: dict[str, int] = {}
        self.hops: dict[str, int] = {"b": 2}
        self.pods: dict[str, Pod] = {}

    def _number(self, key: object) -> int:
        return self.interned.setdefault(key, len(self.interned) + 1)

    def endpoint(self, pod: Pod) -> int:
        self.pods[pod.metadata.uid] = pod
        return self._number(("endpoint", pod.metadata.uid))

    def reason(self, verdict: str, direction: str, rules: tuple[Any, ...]) -> int:
        return self._number((verdict, direction, rules))

    def service(self, *key: object) -> int:
        return self._number(("service", *key))

    def slot(self, uid: str) -> int | None:
        return self.slots.get(uid)

    def hop(self, node: str) -> int | None:
        return self.hops.get(node)


def _with(pod: Pod, **meta: object) -> Pod:
    return replace(pod, metadata=replace(pod.metadata, **meta))


def _put(cluster: Cluster, changed: Changed, pod: Pod) -> None:
    cluster.pods[pod.key] = pod
    changed.pods.add(pod.key)


def _any(rng: Random, table: dict[Any, Any]) -> Any:
    return rng.choice(list(table.values())) if table else None


def pod_comes(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    pod = generate.cluster(rng, pods=1, policies=0, services=0).pods.popitem()[1]
    name = f"pod-{rng.randrange(14)}"
    _put(cluster, changed, _with(pod, name=name, uid=f"uid-{rng.getrandbits(64):x}"))


def pod_goes(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    if pod := _any(rng, cluster.pods):
        del cluster.pods[pod.key]
        changed.pods.add(pod.key)


def pod_has_other_labels(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    if pod := _any(rng, cluster.pods):
        other = _any(rng, generate.cluster(rng).pods)
        labels = other.metadata.labels | ({"new": str(rng.random())} if rng.random() < 0.5 else {})
        _put(cluster, changed, _with(pod, labels=labels))


def pod_takes_the_place_of_another(
    rng: Random, cluster: Cluster, changed: Changed, ids: Ids
) -> None:
    """Another name or uid, the same address: at once, or while the other is still there."""
    if pod := _any(rng, cluster.pods):
        if rng.random() < 0.5:
            del cluster.pods[pod.key]
            changed.pods.add(pod.key)
        name = rng.choice([pod.metadata.name, f"pod-{rng.randrange(14)}"])
        uid = f"uid-{rng.getrandbits(64):x}"
        _put(cluster, changed, _with(pod, name=name, uid=uid))


def pod_has_other_addresses(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    """A free one, none, another pod's, a node's, or what is none."""
    if pod := _any(rng, cluster.pods):
        ips = rng.choice(
            [
                [f"10.0.9.{rng.randrange(250)}"],
                [],
                _any(rng, cluster.pods).ips,
                ["192.0.2.2", "fd00:0:0:1::77"],
                ["nonsense", "10.0.1.4", "10.0.1.4"],
            ]
        )
        status = replace(pod.status, pod_ip="", pod_ips=[PodIP(ip) for ip in ips])
        _put(cluster, changed, replace(pod, status=status))


def pod_ends(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    if pod := _any(rng, cluster.pods):
        if rng.random() < 0.5:
            _put(cluster, changed, _with(pod, deletion_timestamp=rng.choice([GOING, None])))
        else:
            phase = rng.choice(["Succeeded", "Running"])
            _put(cluster, changed, replace(pod, status=replace(pod.status, phase=phase)))


def pod_gets_or_loses_its_slot(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    if pod := _any(rng, cluster.pods):
        uid = pod.metadata.uid
        if ids.slots.pop(uid, None) is None:
            free = min(set(range(100)) - set(ids.slots.values()))
            ids.slots[uid] = rng.choice((free, free, ON_HOST))
        changed.pods.update(p.key for p in cluster.pods.values() if p.metadata.uid == uid)


def node_changes(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    name = rng.choice(["a", "b", "c"])
    node = cluster.nodes.get(name) or replace(
        cluster.nodes.get("a") or generate.cluster(rng).nodes["a"], metadata=ObjectMeta(name=name)
    )
    pod = _any(rng, cluster.pods)
    match rng.randrange(4):
        case 0:
            cluster.nodes.pop(name, None)
        case 1:
            ips = [f"192.0.2.{rng.randrange(5)}", *(pod.ips if pod else ())]
            addresses = [NodeAddress("InternalIP", ip) for ip in ips]
            cluster.nodes[name] = replace(node, status=replace(node.status, addresses=addresses))
        case 2:
            ids.hops[name] = rng.randrange(1, 9)
        case 3:
            ids.hops.pop(name, None)
    changed.nodes.add(name)


def namespace_changes(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    name = rng.choice(generate.NAMESPACES)
    if rng.random() < 0.2:
        cluster.namespaces.pop(name, None)
    else:
        cluster.namespaces[name] = generate.cluster(rng).namespaces[name]
    changed.namespaces.add(name)


def policies_come(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    other = generate.cluster(rng, policies=rng.choice([1, 8])).policies
    cluster.policies.update(other)
    changed.policies |= other.keys()


def policy_goes(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    if policy := _any(rng, cluster.policies):
        del cluster.policies[policy.key]
        changed.policies.add(policy.key)


def services_come(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    """The same names, or the same addresses, as those that are there."""
    other = generate.cluster(rng, services=rng.choice([1, 3]))
    for service in other.services.values():
        meta = replace(service.metadata, name=f"service-{rng.randrange(4)}")
        key = meta.namespace, meta.name
        cluster.services[key] = replace(service, metadata=meta)
        changed.services.add(key)
    for key, slice_ in other.slices.items():
        pods = [pod.ips[:1] for pod in cluster.pods.values() if pod.ips]
        endpoints = [replace(one, addresses=rng.choice(pods)) for one in slice_.endpoints if pods]
        cluster.slices[key] = replace(slice_, endpoints=endpoints[: rng.randrange(9)])
        changed.slices.add(key)


def service_goes(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    if service := _any(rng, cluster.services):
        key = service.metadata.namespace, service.metadata.name
        del cluster.services[key]
        changed.services.add(key)


def slice_changes(rng: Random, cluster: Cluster, changed: Changed, ids: Ids) -> None:
    """It goes, is another service's, or has other backends."""
    if slice_ := _any(rng, cluster.slices):
        key = slice_.metadata.namespace, slice_.metadata.name
        changed.slices.add(key)
        match rng.randrange(3):
            case 0:
                del cluster.slices[key]
            case 1:
                labels = {"kubernetes.io/service-name": f"service-{rng.randrange(4)}"}
                meta = replace(slice_.metadata, labels=labels)
                cluster.slices[key] = replace(slice_, metadata=meta)
            case 2:
                kept = rng.sample(slice_.endpoints, len(slice_.endpoints) // 2)
                cluster.slices[key] = replace(slice_, endpoints=kept)


CHANGES: tuple[Callable[[Random, Cluster, Changed, Ids], None], ...] = (
    pod_comes,
    pod_goes,
    pod_has_other_labels,
    pod_takes_the_place_of_another,
    pod_has_other_addresses,
    pod_ends,
    pod_gets_or_loses_its_slot,
    node_changes,
    namespace_changes,
    policies_come,
    policy_goes,
    services_come,
    service_goes,
    slice_changes,
)

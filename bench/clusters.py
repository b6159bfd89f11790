"""Clusters with a given number of policy rules, made as objects."""

from __future__ import annotations

from lockgate.objects.model import (
    Cluster,
    IPBlock,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
    ObjectMeta,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
)

__all__ = ["LOCAL", "PORTS", "block", "in_block", "local_address", "remote_address", "with_rules"]

LOCAL = 16
"""Pods on node "a"; with any rules, each is isolated for ingress."""
PORTS = 500
"""Distinct ports in the rules, from 1000 on (as far as there are rules)."""
PER_POLICY = 50


def local_address(number: int) -> str:
    return f"10.1.0.{number + 1}"


def remote_address(number: int) -> str:
    return f"10.{2 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"


def block(number: int) -> str:
    """The /28 of rule `number`; rules that name a CIDR have an odd number."""
    return f"{in_block(number, 0)}/28"


def in_block(number: int, host: int) -> str:
    """Address `host` (0 to 15) of that /28."""
    return f"100.{64 + number // 4096 % 64}.{number // 16 % 256}.{number % 16 * 16 + host}"


def pod(name: str, address: str, node: str, labels: dict[str, str]) -> Pod:
    return Pod(
        metadata=ObjectMeta(name=name, namespace="bench", uid=f"uid-{name}", labels=labels),
        spec=PodSpec(node_name=node),
        status=PodStatus(phase="Running", pod_ips=[PodIP(ip=address)]),
    )


def with_rules(rules: int) -> Cluster:
    """LOCAL pods here, a remote pod for each even rule; rule n lets remote pod n (even) or a
    CIDR (odd) reach TCP port 1000 + n % PORTS. Rules are dealt out to the local pods."""
    cluster = Cluster()
    cluster.namespaces["bench"] = Namespace(metadata=ObjectMeta(name="bench"))
    for n in range(LOCAL):
        # Pod 0 is what rule 0 admits: there is one local pair that may talk.
        labels = {"app": f"app-{n}", "id": "0" if n == 0 else f"local-{n}"}
        one = pod(f"local-{n}", local_address(n), "a", labels)
        cluster.pods["bench", one.metadata.name] = one
    for n in range(0, rules, 2):
        one = pod(f"remote-{n}", remote_address(n), "b", {"id": str(n)})
        cluster.pods["bench", one.metadata.name] = one
    for number, start in enumerate(range(0, rules, PER_POLICY)):
        policy = NetworkPolicy(
            metadata=ObjectMeta(name=f"policy-{number}", namespace="bench", uid=f"policy-{number}"),
            spec=NetworkPolicySpec(
                pod_selector=LabelSelector(match_labels={"app": f"app-{(number + 1) % LOCAL}"}),
                policy_types=["Ingress"],
                ingress=[_rule(n) for n in range(start, min(start + PER_POLICY, rules))],
            ),
        )
        cluster.policies["bench", policy.metadata.name] = policy
    return cluster


def _rule(n: int) -> NetworkPolicyIngressRule:
    if n % 2:
        peer = NetworkPolicyPeer(ip_block=IPBlock(cidr=block(n)))
    else:
        peer = NetworkPolicyPeer(pod_selector=LabelSelector(match_labels={"id": str(n)}))
    port = NetworkPolicyPort(protocol="TCP", port=1000 + n % PORTS)
    return NetworkPolicyIngressRule(from_=[peer], ports=[port])

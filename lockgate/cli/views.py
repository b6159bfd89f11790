"""`lockgate get`: what the cluster has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import msgspec

from lockgate.access import Access
from lockgate.cli.common import access_options, json_option, load_objects, print_json
from lockgate.cli.render import table, wrapped
from lockgate.objects.model import Cluster

__all__ = [
    "endpoint_rows",
    "get",
    "node_rows",
    "pod_rows",
    "service_rows",
]

Row = dict[str, Any]
# ---- What is shown of each kind --------------------------------------------------


def pod_rows(cluster: Cluster) -> list[Row]:
    return [
        {
            "namespace": pod.metadata.namespace,
            "name": pod.metadata.name,
            "node": pod.spec.node_name,
            "ips": pod.ips,
            "labels": pod.metadata.labels,
            "phase": pod.status.phase,
            "deletionTimestamp": pod.metadata.deletion_timestamp,
            "ready": pod.ready,
            "reason": pod.status.reason or pod.status.message or None,
        }
        for _, pod in sorted(cluster.pods.items())
    ]


def _address(ip: str, port: int | None) -> str:
    text = f"[{ip}]" if ":" in ip else ip
    return text if port is None else f"{text}:{port}"


def _known(of: msgspec.Struct) -> Row:
    """Fields that say something, by their names in the API."""
    fields = msgspec.to_builtins(of)
    return {key: value for key, value in fields.items() if value not in (None, "")}


def endpoint_rows(cluster: Cluster) -> list[Row]:
    """One row per slice."""
    return [
        {
            "namespace": key[0],
            "name": key[1],
            "service": one.service,
            "addressType": one.address_type,
            "ports": [{"name": p.name, "port": p.port, "protocol": p.protocol} for p in one.ports],
            "endpoints": [
                {
                    "addresses": endpoint.addresses,
                    # Absent is ready (discovery.k8s.io/v1 EndpointConditions).
                    "conditions": {"ready": True} | _known(endpoint.conditions),
                    "nodeName": endpoint.node_name or None,
                    "targetRef": _known(endpoint.target_ref) if endpoint.target_ref else None,
                }
                for endpoint in one.endpoints
            ],
        }
        for key, one in sorted(cluster.slices.items())
    ]


def service_rows(cluster: Cluster) -> list[Row]:
    backends: dict[tuple[str, str], list[str]] = {}
    for (namespace, _), one in sorted(cluster.slices.items()):
        backends.setdefault((namespace, one.service), []).extend(
            _address(address, port.port)
            for port in one.ports
            for endpoint in one.endpoints
            if endpoint.conditions.ready is not False
            for address in endpoint.addresses[:1]
        )
    return [
        {
            "namespace": key[0],
            "name": key[1],
            "type": service.spec.type,
            "clusterIPs": service.cluster_ips
            or ([] if service.spec.type == "ExternalName" else ["None"]),
            "loadBalancer": [one.ip for one in service.status.load_balancer.ingress if one.ip],
            "externalIPs": service.spec.external_ips,
            "externalName": service.spec.external_name or None,
            "ports": [
                {
                    "name": p.name,
                    "port": p.port,
                    "protocol": p.protocol,
                    "targetPort": p.target_port,
                    "nodePort": p.node_port or None,
                }
                for p in service.spec.ports
            ],
            "selector": service.spec.selector,
            "backends": backends.get(key, []),
        }
        for key, service in sorted(cluster.services.items())
    ]


def policy_rows(cluster: Cluster) -> list[Row]:
    rows = []
    for key, policy in sorted(cluster.policies.items()):
        spec = msgspec.to_builtins(policy.spec)
        types = policy.spec.policy_types or (
            ["Ingress", "Egress"] if policy.spec.egress else ["Ingress"]
        )
        rows.append(
            {
                "namespace": key[0],
                "name": key[1],
                "podSelector": spec.get("podSelector", {}),
                "policyTypes": list(types),
                "ingress": spec.get("ingress", []),
                "egress": spec.get("egress", []),
            }
        )
    return rows


def node_rows(cluster: Cluster) -> list[Row]:
    return [
        {
            "name": name,
            "addresses": [a.address for a in node.status.addresses if a.type == "InternalIP"],
            "podCIDRs": node.pod_cidrs,
            "pods": sum(pod.spec.node_name == name for pod in cluster.pods.values()),
        }
        for name, node in sorted(cluster.nodes.items())
    ]


_ROWS: dict[str, Callable[[Cluster], list[Row]]] = {
    "pods": pod_rows,
    "services": service_rows,
    "endpoints": endpoint_rows,
    "policies": policy_rows,
    "nodes": node_rows,
}


# ---- As tables -------------------------------------------------------------------


def _selector(selector: Row) -> str:
    pairs = [f"{k}={v}" for k, v in selector.get("matchLabels", {}).items()]
    pairs += [
        f"{one['key']} {one['operator']}"
        + (f" ({','.join(one['values'])})" if one.get("values") else "")
        for one in selector.get("matchExpressions", [])
    ]
    return ", ".join(pairs) or "all pods"


def external_of(row: Row) -> list[str]:
    """Names of a service outside the cluster, as kubectl shows them."""
    found = [*row["loadBalancer"], *row["externalIPs"], *filter(None, [row["externalName"]])]
    return found or ["pending" if row["type"] == "LoadBalancer" else "-"]


def port_text(port: Row) -> str:
    """80:30080/TCP, the second where there is a node port."""
    node_port = f":{port['nodePort']}" if port["nodePort"] else ""
    return f"{port['port']}{node_port}/{port['protocol']}"


def as_table(kind: str, rows: list[Row], *, wide: bool = False) -> str:
    """A table of what `get` shows."""
    if kind == "nodes":
        head = ["NODE", "ADDRESSES", "POD CIDRS", "PODS"]
        lines = [
            [
                r["name"],
                ", ".join(r["addresses"]) or "-",
                ", ".join(r["podCIDRs"]) or "-",
                str(r["pods"]),
            ]
            for r in rows
        ]
        return table(head, lines, cut=not wide)
    head = ["NAMESPACE", "NAME"]
    keys = [[r["namespace"], r["name"]] for r in rows]
    if kind == "pods":
        head += ["NODE", "STATUS", "READY", "ADDRESSES"] + (["LABELS"] if wide else [])
        rest = [
            [
                r["node"] or "-",
                "Terminating" if r["deletionTimestamp"] else r["phase"] or "Pending",
                "yes" if r["ready"] else "no",
                ", ".join(r["ips"]) or "-",
                *([",".join(f"{k}={v}" for k, v in r["labels"].items()) or "-"] if wide else []),
            ]
            for r in rows
        ]
    elif kind == "services":
        head += ["TYPE", "CLUSTER IPS", "EXTERNAL", "PORTS", "BACKENDS"]
        rest = [
            [
                r["type"],
                "\n".join(r["clusterIPs"]) or "-",
                "\n".join(external_of(r)),
                wrapped([port_text(p) for p in r["ports"]], 20) or "-",
                wrapped(list(dict.fromkeys(r["backends"])), 16 if not wide else 200) or "none",
            ]
            for r in rows
        ]
    elif kind == "endpoints":
        head += ["SERVICE", "PORTS", "ENDPOINTS"]
        rest = [
            [
                r["service"],
                wrapped([f"{p['port']}/{p['protocol']}" for p in r["ports"]], 20) or "-",
                wrapped(
                    [
                        e["addresses"][0] + ("" if e["conditions"]["ready"] else " (not ready)")
                        for e in r["endpoints"]
                    ],
                    30 if not wide else 200,
                )
                or "none",
            ]
            for r in rows
        ]
    else:
        head += ["SELECTS", "TYPES", "INGRESS RULES", "EGRESS RULES"]
        rest = [
            [
                _selector(r["podSelector"]),
                ",".join(r["policyTypes"]),
                str(len(r["ingress"])),
                str(len(r["egress"])),
            ]
            for r in rows
        ]
    return table(head, [[*a, *b] for a, b in zip(keys, rest, strict=True)], cut=not wide)


@click.command()
@click.argument("kind", type=click.Choice(list(_ROWS)))
@click.option("-n", "--namespace", help="Only objects of this namespace.")
@click.option("-o", "output", type=click.Choice(["wide", "json"]), help="More columns, or JSON.")
@json_option
@access_options
def get(
    kind: str, namespace: str | None, output: str | None, as_json: bool, access: Access
) -> None:
    """List objects as the agents know them.

    Exit codes: 0 listed (perhaps none), 2 no such cluster.
    """
    known = load_objects(access)
    rows = _ROWS[kind](known)
    if namespace and kind != "nodes":
        rows = [row for row in rows if row["namespace"] == namespace]
    if as_json or output == "json":
        print_json(rows)
    elif rows:
        click.echo(as_table(kind, rows, wide=output == "wide"))
    else:
        click.echo(f"no {kind}" + (f" in namespace {namespace}" if namespace else ""), err=True)

"""What an agent is asked: its state, and what its programs would do with a packet."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockgate import __version__
from lockgate.objects.address import format_address

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["dry_run", "dry_run_facts", "status"]

# bpf/types.h; macros leave no BTF.
DRY_MARK = 0x6C6B6761


def dry_run(agent: Agent, packets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run live programs; `packet` is bytes here. From the worker."""
    answers: list[dict[str, Any]] = []
    for item in packets:
        try:
            ifindex = int(item.get("ifindex") or agent.uplinks.underlay)
            run = agent.dp.dry_run(
                item["at"], item["packet"], ifindex, DRY_MARK, own_socket=item["ownSocket"]
            )
        except (OSError, ValueError) as error:
            answers.append({"error": str(error)})
            continue
        result, egress, ingress, target, service = run.cb
        answers.append(
            {
                "retval": run.retval,
                "verdict": result & 0xFF,
                "cause": result >> 8 & 0xFF,
                "judged": result >> 16,
                "egress": egress,
                "ingress": ingress,
                "targetKind": target >> 28,
                "target": target & 0xFFFFFFF,
                "service": service,
                "cb": list(run.cb),
                "packet": base64.b64encode(run.data).decode(),
            }
        )
    return answers


def dry_run_facts(agent: Agent) -> dict[str, Any]:
    """What it takes to build packets for dry runs: pods' slots and MACs as they are in force,
    cards by their role (`enum link_role`), and where tunnels end, by hop. From the worker."""
    records = agent.dp.endpoints.view
    slots = [int(slot) for slot in np.flatnonzero(records["flags"] & 1)]
    links, roles = agent.dp.link_roles.items()
    hops, tunnel = agent.publisher.hops(), agent.dp.object.schema.enum("hop_flag")["HOP_TUNNEL"]
    return {
        "endpoints": [
            {
                "slot": slot,
                "mac": records[slot]["mac"].tobytes().hex(),
                "hostMac": records[slot]["host_mac"].tobytes().hex(),
                "ips": [
                    format_address(address)
                    for address in (records[slot][key].tobytes() for key in ("addr4", "addr6"))
                    if any(address)
                ],
            }
            for slot in slots
        ],
        "links": {int(role): int(link) for link, role in zip(links, roles, strict=True)},
        "tunnels": {
            int(hop): format_address(hops[hop]["remote"].tobytes())
            for hop in np.flatnonzero(hops["flags"] & tunnel)
        },
    }


def status(agent: Agent) -> dict[str, Any]:
    """What GET /v1/status answers. From the worker."""
    totals = agent.dp.counters.values().sum(axis=1)
    schema = agent.dp.object.schema
    counters, causes = schema.enum("counter"), schema.enum("cause")
    first = counters["COUNT_CAUSE"]
    drops = {
        name.removeprefix("CAUSE_").lower().replace("_", "-"): int(totals[first + n])
        for name, n in causes.items()
        if name != "CAUSE_MAX" and totals[first + n]
    }

    def total(name: str) -> int:
        return int(totals[counters[f"COUNT_{name}"]])

    return {
        "version": __version__,
        "cluster": agent.config.cluster,
        "node": agent.config.node,
        "epoch": agent.publisher.epoch,
        "revision": agent.revision,
        "applied": agent.applied,
        "connected": agent.source.connected,
        "forwarding": agent.config.forwarding,
        "started": agent.started,
        "counts": {
            **agent.publisher.sizes,
            "endpoints": len(agent.ipam.leases),
            "foreign": len(agent.foreign.pods),
            "hops": len(agent.hops.numbers),
            "swept": agent.swept,
            "repaired": agent.patrol.repaired,
        },
        "endpoints": [
            {"uid": one.uid, "ips": list(one.ips), "slot": one.slot}
            for one in agent.ipam.leases.values()
        ],
        "errors": [text for texts in agent.problems() for text in texts],
        "api": agent.source.status(),
        "features": agent.features,
        "memory": _resident(),
        "losses": {
            "events": total("EVENTS_LOST"),
            "cutEvents": total("EVENTS_CUT"),
            "answers": total("UNANSWERED"),
        },
        "events": total("EVENTS"),
        "forwarded": total("FORWARDED"),
        "crowded": total("CROWDED"),
        "balanced": total("BALANCED"),
        "xdp": [
            {"card": name, "mode": place.mode or "none", "why": place.why}
            for name, place in sorted(agent.edge.places.items())
        ],
        "firewall": agent.firewall.summary(),
        "drops": drops,
    }


def _resident() -> int:
    """Bytes of memory this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

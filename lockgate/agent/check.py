"""CNI CHECK: is what ADD made still there, down to the maps?"""

from __future__ import annotations

from lockgate.agent.datapath import Datapath
from lockgate.agent.encode import EP_LIVE
from lockgate.agent.ipam import Lease
from lockgate.net import pods
from lockgate.net.pods import PodLink
from lockgate.objects.address import is_ipv4, parse_address

__all__ = ["damages"]

_PEER_LOCAL = 1


def damages(dp: Datapath, lease: Lease, link: PodLink, endpoint: int, netns: str) -> list[str]:
    """One sentence for each thing that is not as it was made; blocks. `endpoint` is the pod's
    id, `netns` its namespace."""
    return [
        *pods.problems(link, netns),
        *_programs(dp, link),
        *_maps(dp, lease, endpoint),
    ]


def _programs(dp: Datapath, link: PodLink) -> list[str]:
    try:
        missing = dp.guard.missing(link.ifindex)
    except OSError:
        return []  # the interface has gone, as is said already
    return [f"program {one} is not the first on {link.name}" for one in missing]


def _maps(dp: Datapath, lease: Lease, endpoint: int) -> list[str]:
    found = []
    row = dp.endpoints[lease.slot]
    if int(row["id"]) != endpoint or not int(row["flags"]) & EP_LIVE:
        found.append(f"map endpoints: slot {lease.slot} is not the pod's")
    view = int(dp.state[0]["epoch"]) & 1
    for ip in lease.ips:
        address = parse_address(ip)
        field = "addr4" if is_ipv4(address) else "addr6"
        if row[field].tobytes() != address:
            found.append(f"map endpoints: slot {lease.slot} lacks {ip}")
        peer = dp.peers.get(address)
        one = None if peer is None else peer["view"][view]
        if one is None or int(one["kind"]) != _PEER_LOCAL or int(one["target"]) != lease.slot:
            found.append(f"map peers: {ip} is not the pod's")
    return found

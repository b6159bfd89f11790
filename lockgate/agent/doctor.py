"""What is wrong with a node, as its agent sees it: facts collected, and checked by pure functions.

A finding says what is the matter and what to do. `error`: something does not work, or will
not; `warning`: it may not; `ok`: what was looked at and is well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from lockgate.net import dumps, firewall
from lockgate.net.firewall import Drop

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["Facts", "Finding", "check", "collect"]

Severity = Literal["error", "warning", "ok"]
_OURS = "05-lockgate.conflist"

# Interfaces that other data planes make, by the beginning of their names.
_FOREIGN_LINKS = {
    "cni0": "the bridge plugin or flannel",
    "cbr0": "kubenet",
    "flannel": "flannel",
    "cilium_": "Cilium",
    "lxc": "Cilium",
    "cali": "Calico",
    "tunl0": "Calico",
    "vxlan.calico": "Calico",
    "weave": "Weave Net",
    "kube-bridge": "kube-router",
    "kube-ipvs0": "kube-proxy",
    "antrea-": "Antrea",
    "ovn-k8s": "OVN-Kubernetes",
}
#: The kubelet's own: packets to 127.0.0.0/8 from elsewhere.
_KUBELETS = " KUBE-FIREWALL"
#: What a drop at a hook can hit of ours: the rest of it passes below netfilter.
_HIT = {
    "input": "what pods and other nodes send to this node itself (answers to probes, VXLAN)",
    "output": "what this node's own processes (the kubelet's probes) send to pods",
    "egress": "everything that leaves by that card",
    "postrouting": "what this node's own processes send to pods",
    "prerouting": "what pods send to this node itself",
}


class Finding(msgspec.Struct, omit_defaults=True):
    """One line of the report. `check` is its kind, for machines."""

    severity: Severity
    check: str
    text: str
    advice: str = ""
    node: str = ""


class Facts(msgspec.Struct, kw_only=True):
    """All that the checks look at."""

    features: list[dict[str, object]] = []
    #: Links by name → MTU; cards are those that lead to other nodes and to the world.
    links: dict[str, int] = {}
    cards: list[str] = []
    pod_mtu: int = 0
    #: Effective reverse path filter (the larger of all's and its own) by card.
    rp_filter: dict[str, int] = {}
    forwarding: dict[str, str] = {}
    chains: list[tuple[str, str, str]] = []
    drops: list[Drop] = []
    #: Names in /etc/cni/net.d in the order that runtimes take them; None where nobody looks.
    cni_files: list[str] | None = None
    #: Pods (namespace/name) that another CNI plugin wired.
    foreign: list[str] = []
    errors: list[str] = []
    #: Programs of others on pods' links, one line each.
    programs: list[str] = []
    #: Cards by name → how XDP runs there ("" = not), and why so.
    xdp: dict[str, tuple[str, str]] = {}


def collect(agent: Agent) -> Facts:
    """The node as it is now. From the worker: in the node's network namespace."""
    found = agent.uplinks.read()
    cards = [card.name for card in found.all]
    links = {}
    for one in dumps.interfaces():
        try:
            links[one.name] = dumps.link(one.index)[1]
        except OSError:
            continue  # it went just now
    everywhere = _sysctl("ipv4/conf/all/rp_filter")
    chains = firewall.nft_chains()
    return Facts(
        features=list(agent.features),
        links=links,
        cards=list(dict.fromkeys(cards)),
        pod_mtu=agent.endpoints.mtu,
        rp_filter={
            card: max(int(everywhere or 0), int(_sysctl(f"ipv4/conf/{card}/rp_filter") or 0))
            for card in cards
        },
        forwarding={
            "IPv4": _sysctl("ipv4/ip_forward"),
            "IPv6": _sysctl("ipv6/conf/all/forwarding"),
        },
        chains=[chain.name for chain in chains],
        drops=[*firewall.reached(chains), *firewall.legacy_drops()],
        cni_files=_cni_files(agent.config.cni_conf_dir),
        foreign=sorted("/".join(pod.key) for pod in agent.foreign.pods.values()),
        errors=[text for texts in agent.problems() for text in texts],
        programs=_programs_of_others(agent),
        xdp={name: (place.mode or "", place.why) for name, place in agent.edge.places.items()},
    )


def _sysctl(key: str) -> str:
    try:
        return Path("/proc/sys/net", key).read_text().strip()
    except OSError:
        return ""


def _programs_of_others(agent: Agent) -> list[str]:
    found = []
    for lease in agent.ipam.leases.values():
        link = agent.endpoints.link(lease)
        with contextlib.suppress(OSError):  # it went just now
            others = agent.dp.guard.others(link.ifindex)
            found += [
                f"{one}, {agent.endpoints.title(lease.uid)}, link {link.name}" for one in others
            ]
    return found


def _cni_files(folder: Path | None) -> list[str] | None:
    if folder is None:
        return None
    suffixes = (".conf", ".conflist", ".json")
    return sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)


# ---- Checks: pure ------------------------------------------------------------------


def check(facts: Facts) -> list[Finding]:
    """All findings; at least one of each check."""
    return [finding for one in _CHECKS for finding in one(facts)]


def _features(facts: Facts) -> list[Finding]:
    missing = [one for one in facts.features if not one["ok"]]
    return [
        Finding("error", "kernel", f"the kernel lacks {one['name']}", str(one["advice"]))
        for one in missing
    ] or [Finding("ok", "kernel", f"the kernel has all {len(facts.features)} features")]


def _agent_errors(facts: Facts) -> list[Finding]:
    return [
        Finding("error", "agent", text, "lockgate status shows the rest of the agent's state")
        for text in facts.errors
    ] or [Finding("ok", "agent", "the agent has nothing to complain of")]


def _mtu(facts: Facts) -> list[Finding]:
    found = []
    mtus = [(facts.links[card], card) for card in facts.cards if card in facts.links]
    if mtus:
        mtu, card = min(mtus)
        if facts.pod_mtu > mtu:
            text = f"pods' MTU is {facts.pod_mtu}, that of {card} {mtu}: large packets are lost"
            advice = f"set mtu in the ConfigMap lockgate to {mtu} or less, then restart the pods"
            found.append(Finding("error", "mtu", text, advice))
        for name, own in facts.links.items():
            if name.startswith("lg") and name[2:].isdigit() and own > mtu:
                text = f"the pod at {name} has an MTU of {own}, {card} has {mtu}"
                found.append(Finding("error", "mtu", text, "restart the pod"))
    if not facts.cards:
        text = "no card leads to other nodes"
        advice = "set underlay in the ConfigMap lockgate to the link that has the node's address"
        found.append(Finding("error", "cards", text, advice))
    return found or [Finding("ok", "mtu", f"pods' MTU is {facts.pod_mtu}, no card's is smaller")]


def _rp_filter(facts: Facts) -> list[Finding]:
    strict = [card for card, value in facts.rp_filter.items() if value == 1]
    if strict and len(facts.cards) > 1:
        return [
            Finding(
                "warning",
                "rp_filter",
                f"{card} refuses packets whose way back leads by another card (rp_filter=1)",
                f"sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{card}.rp_filter=2, and "
                "in /etc/sysctl.d, unless answers leave by the card that the question came by",
            )
            for card in strict
        ]
    return [Finding("ok", "rp_filter", "no card refuses packets by their way back")]


def _forwarding(facts: Facts) -> list[Finding]:
    off = [family for family, value in facts.forwarding.items() if value == "0"]
    text = f"off for {' and '.join(off)}: pods do not need it" if off else "on"
    return [Finding("ok", "forwarding", f"the host stack's forwarding is {text}")]


def _firewall(facts: Facts) -> list[Finding]:
    found = []
    for drop in facts.drops:
        if drop.hook not in _HIT or drop.chain.endswith(_KUBELETS):
            continue  # pods' traffic does not pass there
        what = f"rule {drop.rule} of" if drop.rule else "the policy of"
        text = f"{what} chain {drop.chain} drops"
        text += " some packets" if drop.conditional else " all packets"
        advice = (
            "make sure that it lets through the pods' addresses, the nodes' addresses and VXLAN"
            " (UDP 8472 unless vxlanPort says another): nft -a list ruleset, iptables-save"
        )
        found.append(
            Finding("warning", "firewall", f"{text}; it may hit {_HIT[drop.hook]}", advice)
        )
    return found or [Finding("ok", "firewall", "no other firewall drops where our packets pass")]


def _programs(facts: Facts) -> list[Finding]:
    advice = (
        "ours is put in front of it and judges first; find out whose it is (bpftool net show),"
        " for packets that ours let pass meet it"
    )
    return [
        Finding("warning", "programs", f"a program of somebody else: {one}", advice)
        for one in facts.programs
    ] or [Finding("ok", "programs", "no programs but ours are on pods' links")]


def _xdp(facts: Facts) -> list[Finding]:
    others = [
        Finding(
            "warning",
            "xdp",
            f"{card} has no XDP of ours: {why}",
            "frontends are served all the same, but slower, and no firewall is at that card; find"
            " out whose it is (bpftool net show)",
        )
        for card, (mode, why) in facts.xdp.items()
        if not mode and why.startswith("another program")
    ]
    used = [f"{mode} at {card}" for card, (mode, _) in sorted(facts.xdp.items()) if mode]
    return others or [Finding("ok", "xdp", f"XDP runs {', '.join(used)}" if used else "no XDP")]


def _kube_proxy(facts: Facts) -> list[Finding]:
    tables = {(family, table) for family, table, _ in facts.chains if table == "kube-proxy"}
    chains = {
        f"{family} {table}"
        for family, table, chain in facts.chains
        if chain == "KUBE-SERVICES" and table in ("nat", "filter")
    }
    found = [" ".join(table) for table in tables] + list(chains)
    if not found:
        return [Finding("ok", "kube-proxy", "kube-proxy has left nothing")]
    return [
        Finding(
            "warning",
            "kube-proxy",
            f"kube-proxy's rules are here: {', '.join(sorted(found))}; they cost time, and"
            " go stale when it does not run",
            "delete the DaemonSet kube-proxy, then run `kube-proxy --cleanup` here, or reboot",
        )
    ]


def _cni(facts: Facts) -> list[Finding]:
    found = []
    if facts.cni_files is not None:
        others = [name for name in facts.cni_files if name != _OURS]
        if _OURS not in facts.cni_files:
            text = "there is no CNI configuration of ours in /etc/cni/net.d: no pod can start"
            advice = "the agent writes it when it is ready: lockgate status"
            found.append(Finding("error", "cni", text, advice))
        elif facts.cni_files[0] != _OURS:
            text = f"container runtimes take {facts.cni_files[0]} before {_OURS}"
            advice = "remove it from /etc/cni/net.d: new pods are wired by somebody else"
            found.append(Finding("error", "cni", text, advice))
        elif others:
            text = f"other CNI configurations are in /etc/cni/net.d: {', '.join(others)}"
            advice = "remove them: they would serve if ours went"
            found.append(Finding("warning", "cni", text, advice))
    owners: dict[str, list[str]] = {}
    for name in facts.links:
        owner = next((o for prefix, o in _FOREIGN_LINKS.items() if name.startswith(prefix)), None)
        if owner:
            owners.setdefault(owner, []).append(name)
    if facts.foreign:
        text = (
            f"another CNI plugin wired {_listed(facts.foreign)}: nobody enforces policies for them"
        )
        advice = "restart them: kubectl delete pod (docs/migrate.md)"
        found.append(Finding("warning", "cni", text, advice))
    for owner, names in owners.items():
        text = f"links of {owner} are here: {_listed(names)}"
        advice = "take it away when no pod of its is left (docs/migrate.md), or reboot the node"
        found.append(Finding("warning", "cni", text, advice))
    return found or [Finding("ok", "cni", "no other CNI plugin is here")]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    _features,
    _agent_errors,
    _mtu,
    _rp_filter,
    _forwarding,
    _firewall,
    _programs,
    _xdp,
    _kube_proxy,
    _cni,
)

"""Where packets leave the node: hops, routes to what is no peer, roles of links.

Hop numbers are remembered by connections, so a node keeps its number: those in use are found
again in the kernel's table by the next hop's address. Numbers below FIRST_NODE are fixed.

Hops are published with all else that a packet decides by; routes and roles are words of their
own that lead to them (docs/architecture.md, Two views, one epoch).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.cards import AUTO, Card, Cards, names
from lockgate.agent.datapath import Datapath
from lockgate.agent.hop import DROP, NONE, Hop, masquerading
from lockgate.agent.stack_routes import StackRoutes
from lockgate.agent.tunnel import TunnelDevice
from lockgate.agent.ways import Routing, Way, choose_way, internal_ips, of_family, pod_cidrs
from lockgate.bpf.grace import wait_grace
from lockgate.net import xdp
from lockgate.net.dumps import Route
from lockgate.net.links import Net
from lockgate.net.vxlan import OVERHEAD4, OVERHEAD6
from lockgate.objects.address import is_ipv4, parse_address, parse_cidr
from lockgate.objects.model import Cluster, Node

__all__ = ["Hops"]

log = logging.getLogger(__name__)

HERE, WORLD, NOWHERE, NEAR_UNDERLAY, NEAR_OUTSIDE = 0, 1, 2, 3, 4
#: Where the families are on different cards.
WORLD6, NEAR_UNDERLAY2, NEAR_OUTSIDE6 = 5, 6, 7
FIRST_NODE = 8
#: Addresses that mean something only within a host or on a link (RFC 6890): no way leads there.
NEVER_LEAVES = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "::/127", "fe80::/10")
_MAC, _MASQ, _TUNNEL, _XDP = 1, 2, 8, 16
_UNDERLAY, _OUTSIDE, _TUNNEL_ROLE = 1, 2, 3
#: Where frames in the tunnel are made out to: whoever gets them takes them.
_TUNNEL_MAC = bytes.fromhex("0a6c00000001")


class Hops:
    """The node's hops. `number` and `assign` touch memory only; the others the kernel, from the
    worker thread that is in the node's namespace.

    `table` has `struct hop_view` by number, to be published; a change makes it another array. It
    begins as what is `in_force`, so that an agent that starts changes nothing."""

    def __init__(
        self,
        dp: Datapath,
        in_force: NDArray[Any],
        node: str,
        underlay: str,
        outside: str,
        service_cidrs: list[str],
        routing: Routing,
        device: TunnelDevice,
    ) -> None:
        self._dp, self._node = dp, node
        self._underlay, self._outside = underlay, outside
        self._service_cidrs = service_cidrs
        self._routing, self._device = routing, device
        #: No way in the table leads through the device.
        self._needless = False
        self._stack = StackRoutes()
        self.table = in_force
        self._roles: dict[int, int] | None = None
        self._routes: dict[tuple[bytes, int], int] | None = None
        self._wanted_routes: dict[tuple[bytes, int], int] | None = None
        self._made_of: Cards | None = None
        self._asking = False
        self._next = FIRST_NODE
        mtus = in_force["mtu"][FIRST_NODE:]
        #: Of the way to another node with the smallest; 0 = there is none.
        self.mtu = int(mtus[mtus != 0].min(initial=65535)) if mtus.any() else 0
        self.numbers: dict[str, int] = {}
        #: Is any other node reached without a tunnel?
        self.direct = False
        self.errors: list[str] = []
        self._old = {
            bytes(row[via]): number
            for number, row in enumerate(in_force)
            for via in ("via4", "via6", "remote")
            if number >= FIRST_NODE and bytes(row[via]) != NONE
        }

    def number(self, node: str) -> int | None:
        """Hop towards another node; None for one without an address."""
        return self.numbers.get(node)

    def assign(self, nodes: Mapping[str, Node]) -> None:
        """Give every other node a number. A node that went gives its number back."""
        for gone in set(self.numbers) - set(nodes):
            del self.numbers[gone]
        for name, node in sorted(nodes.items()):
            if name == self._node or name in self.numbers:
                continue
            taken = set(self.numbers.values())
            addresses = [parse_address(ip) for ip in internal_ips(node)]
            if not addresses:
                continue
            known = [self._old[a] for a in addresses if a in self._old]
            # The number that was given up longest ago: what still remembers one does not
            # find another node behind it.
            last = len(self.table)
            free = (
                n
                for n in (*range(self._next, last), *range(FIRST_NODE, self._next))
                if n not in taken and n not in self._old.values()
            )
            number = next((n for n in known if n not in taken), None) or next(free, None)
            if number is None:
                log.error("Node %s: no hop is left for it", name)
                continue
            self._next = max(FIRST_NODE, (number + 1) % last)
            self.numbers[name] = number

    def need(self, cards: Cards) -> bool:
        """Is there anything to refresh, as far as the kernel is concerned?"""
        return cards != self._made_of or self._asking or bool(self.errors)

    def refresh(self, net: Net, cards: Cards, cluster: Cluster) -> None:
        """Bring the table, roles and the stack's routes up to what the kernel and the objects
        say. `write_routes` is due when the table was published."""
        self.errors = []
        self._made_of, self._asking = None, False
        there = {card.name for card in cards.all}
        for name in (self._underlay, *names(self._outside)):
            if name not in ("", AUTO) and name not in there:
                self.errors.append(f"interface {name} does not exist")
        if self._underlay == AUTO and cards.underlay is None:
            self.errors.append(
                f"Node {self._node}: no interface that is up has an InternalIP of it"
            )
        ways = self._ways(cluster, cards.underlay)
        self.direct = any(not way.remote for way in ways.values())
        tunnel = self._tunnel(cluster, cards.underlay, ways)
        self._write_roles(cards, tunnel.index if tunnel is not None else cards.tunnel)
        if tunnel is not None:
            self._device.attach(tunnel.index)
        wanted = {NOWHERE: Hop(flags=DROP | _MASQ)}  # no way of the world's
        routes: dict[tuple[bytes, int], int] = {}
        services = self._services(cluster)
        for cidr in (*services, *NEVER_LEAVES):
            routes[parse_cidr(cidr)] = NOWHERE
        me = cluster.nodes.get(self._node)
        mine = internal_ips(me) if me is not None else []
        self._write_own(mine)
        for name, number in self.numbers.items():
            hop = self._to_node(net, cards.underlay, tunnel, ways.get(name))
            # The source of what goes to a backend as this node's own.
            wanted[number] = masquerading(hop, mine) if hop.ifindex else hop
        self.mtu = min((card.mtu for card in (cards.underlay, tunnel) if card), default=0)
        self._near(cards, wanted, routes)
        self._world(net, cards, wanted, routes)
        table = self._records(wanted)
        if not np.array_equal(table.view(np.uint8), self.table.view(np.uint8)):
            self.table = table
        self._wanted_routes = routes
        routes_of_stack = self._stack_routes(cluster, cards, tunnel, ways)
        self.errors += self._stack.write(net, services, routes_of_stack)
        self._made_of = cards

    def write_routes(self) -> None:
        """Have the programs' routes lead to the hops, which are in force by now; what only
        those before needed goes."""
        if self._needless:
            self._device.remove()
            self._needless = False
        wanted, found = self._wanted_routes, self._routes
        if wanted is None or wanted is found:
            return
        self._routes = None
        if found is None:
            keys, values = self._dp.routes.items()
            found = {
                (bytes(k["addr"]), int(k["prefixlen"])): int(v)
                for k, v in zip(keys, values, strict=True)
            }
        for prefix, hop in wanted.items():
            if found.get(prefix) != hop:
                self._dp.routes.set(self._route_key(*prefix), hop)
        for prefix in set(found) - set(wanted):
            self._dp.routes.delete(self._route_key(*prefix))
        self._routes = wanted

    # ---- Inside --------------------------------------------------------------------

    def _write_own(self, mine: list[str]) -> None:
        """Where the node's ports are, for what other nodes send here: see `frontend.h`."""
        state = self._dp.state.view
        for name, sample in (("node4", "."), ("node6", ":")):
            own = next((parse_address(ip) for ip in mine if sample in ip), NONE)
            if state[name][0].tobytes() != own:
                state[name][0] = np.frombuffer(own, np.uint8)

    def _services(self, cluster: Cluster) -> list[str]:
        """The ranges of services' addresses: those of the settings, else the API's."""
        found = set(self._service_cidrs)
        for item in cluster.service_cidrs.values() if not found else ():
            for cidr in item.spec.cidrs:
                try:
                    parse_cidr(cidr)
                    found.add(cidr)
                except ValueError as error:
                    self.errors.append(f"ServiceCIDR {item.metadata.name}: spec.cidrs: {error}")
        return sorted(found)

    def _ways(self, cluster: Cluster, card: Card | None) -> dict[str, Way]:
        """How to reach each node that has a number and a way."""
        me = cluster.nodes.get(self._node)
        mine = internal_ips(me) if me is not None else []
        ways: dict[str, Way] = {}
        for name in self.numbers:
            node = cluster.nodes.get(name)
            ips = internal_ips(node) if node is not None else []
            if card is None or not ips:
                continue
            way = choose_way(self._routing, ips, mine, card.addresses)
            if isinstance(way, str):
                self.errors.append(f"Node {name}: {way}")
            else:
                ways[name] = way
        return ways

    def _tunnel(self, cluster: Cluster, card: Card | None, ways: Mapping[str, Way]) -> Card | None:
        """The VXLAN device, if a way leads through it or may soon."""
        remotes = [way.remote for way in ways.values() if way.remote]
        if card is None or not (remotes or self._routing == "vxlan"):
            self._needless = True
            return None
        self._needless = False
        six = any(":" in remote for remote in remotes)
        try:
            return self._device.ensure(card.mtu - (OVERHEAD6 if six else OVERHEAD4))
        except OSError as error:
            self.errors.append(error.strerror or str(error))
            return None

    def _to_node(self, net: Net, card: Card | None, tunnel: Card | None, way: Way | None) -> Hop:
        if card is None or way is None:
            return Hop()
        if not way.remote:
            hop = self._towards(net, card, way.direct)
            sends = hop.flags & _MAC and card.xdp.features & xdp.NDO_XMIT
            return replace(hop, flags=hop.flags | _XDP) if sends else hop
        if tunnel is None:
            return Hop()
        return Hop(
            tunnel.index,
            _MAC | _TUNNEL,
            dmac=_TUNNEL_MAC,
            smac=tunnel.mac,
            mtu=card.mtu - (OVERHEAD6 if ":" in way.remote else OVERHEAD4),
            remote=parse_address(way.remote),
            local=parse_address(way.local),
        )

    def _stack_routes(
        self, cluster: Cluster, cards: Cards, tunnel: Card | None, ways: Mapping[str, Way]
    ) -> dict[str, Route]:
        """What leads the node's own packets to other nodes' pods, by block. A family without an
        address on the underlay's link goes by the card that has one; pods' packets need none."""
        card, second = cards.underlay, cards.underlay2
        me = cluster.nodes.get(self._node)
        mine = internal_ips(me) if me is not None else []
        wanted = {}
        for name, way in ways.items():
            for cidr in pod_cidrs(cluster.nodes[name]):
                source = of_family(mine, cidr)
                via = of_family(way.direct, cidr)
                if way.remote and tunnel is not None:
                    wanted[cidr] = Route(tunnel.index, "", source, way.remote, way.local)
                elif via and card is not None:
                    wanted[cidr] = Route(card.index, via, source)
                elif second is not None:
                    near = choose_way(
                        "direct", internal_ips(cluster.nodes[name]), mine, second.addresses
                    )
                    via = of_family(near.direct, cidr) if isinstance(near, Way) else ""
                    if via:
                        wanted[cidr] = Route(second.index, via, source)
        return wanted

    def _near(
        self, cards: Cards, wanted: dict[int, Hop], routes: dict[tuple[bytes, int], int]
    ) -> None:
        """On-link neighbours that are no nodes: the kernel's neighbour table finds them."""
        numbered = (
            (NEAR_UNDERLAY, cards.underlay),
            (NEAR_OUTSIDE, cards.outside),
            (NEAR_UNDERLAY2, cards.underlay2),
            (NEAR_OUTSIDE6, cards.outside6),
        )
        seen = set()
        for number, card in numbered:
            if card is None or card.index in seen:
                continue
            seen.add(card.index)
            wanted[number] = masquerading(
                Hop(card.index, _MASQ, smac=card.mac, mtu=card.mtu), card.addresses
            )
            for address in card.addresses:
                interface = ip_interface(address)
                routes[parse_cidr(str(interface.network))] = number
                routes[_alone(interface)] = HERE
        for card in cards.others:
            for address in card.addresses:
                routes[_alone(ip_interface(address))] = HERE

    def _world(
        self,
        net: Net,
        cards: Cards,
        wanted: dict[int, Hop],
        routes: dict[tuple[bytes, int], int],
    ) -> None:
        v4, v6 = parse_cidr("0.0.0.0/0"), parse_cidr("::/0")
        # ::/0 holds the IPv4 block too, so that one must not be left out.
        routes[v4] = routes[v6] = NOWHERE
        card, six = cards.outside or cards.underlay, cards.outside6
        # One hop for both families, with one MAC mostly, or one for each.
        ways = (
            [(WORLD, card, [ip for ip in card.gateways if six is None or ":" not in ip])]
            if card
            else []
        )
        if six is not None:
            ways.append((WORLD6, six, [ip for ip in six.gateways if ":" in ip]))
        for number, one, gateways in ways:
            if not gateways:
                continue
            hop = self._towards(net, one, gateways)
            hop = replace(hop, flags=hop.flags | _MASQ)
            wanted[number] = masquerading(hop, one.addresses)
            for gateway in gateways:
                routes[v6 if ":" in gateway else v4] = number

    def _towards(self, net: Net, card: Card, ips: Iterable[str]) -> Hop:
        """A hop to a neighbour with these addresses; without its MAC until the kernel knows it."""
        vias = {4: NONE, 6: NONE}
        known = set()
        for ip in ips:
            mac = card.macs.get(ip)
            if mac is None:
                net.ask(card.index, ip)
                self._asking = True
            else:
                known.add(mac)
            address = parse_address(ip)
            family = 4 if is_ipv4(address) else 6
            if vias[family] == NONE:
                vias[family] = address
        hop = Hop(card.index, 0, smac=card.mac, mtu=card.mtu, via4=vias[4], via6=vias[6])
        # Two gateways with a MAC each: the kernel looks it up per packet.
        return replace(hop, flags=_MAC, dmac=known.pop()) if len(known) == 1 else hop

    def _write_roles(self, cards: Cards, tunnel: int) -> None:
        roles: dict[int, int] = {}
        if tunnel:
            roles[tunnel] = _TUNNEL_ROLE
        # A card that is both is the outside only if there is no other.
        for role, those in (
            (_OUTSIDE, (*cards.others, cards.outside6, cards.outside)),
            (_UNDERLAY, (cards.underlay2, cards.underlay)),
        ):
            roles |= {card.index: role for card in those if card is not None}
        found, self._roles = self._roles, None
        if found is None:
            keys, values = self._dp.link_roles.items()
            found = {int(k): int(v) for k, v in zip(keys, values, strict=True)}
        for ifindex in set(found) - set(roles):
            self._dp.link_roles.delete(ifindex)
            # The next key may get this memory, which a packet of that link may be reading.
            wait_grace()
        for ifindex, role in roles.items():
            if found.get(ifindex) != role:
                self._dp.link_roles.set(ifindex, role)
                if ifindex in found:
                    wait_grace()
        self._roles = roles

    def _route_key(self, address: bytes, length: int) -> bytes:
        key = np.zeros((), self._dp.routes.key_dtype)
        key["prefixlen"], key["addr"] = length, np.frombuffer(address, np.uint8)
        return key.tobytes()

    def _records(self, hops: Mapping[int, Hop]) -> NDArray[Any]:
        table = np.zeros_like(self.table)
        numbers = list(hops)
        for name in table.dtype.names or ():
            values = [getattr(hop, name) for hop in hops.values()]
            if table.dtype[name].subdtype is not None:
                table[name][numbers] = np.frombuffer(b"".join(values), np.uint8).reshape(
                    len(hops), -1
                )
            else:
                table[name][numbers] = values
        return table


def _alone(interface: IPv4Interface | IPv6Interface) -> tuple[bytes, int]:
    """What the node listens on besides its InternalIPs, which are peers."""
    return parse_cidr(f"{interface.ip}/{interface.max_prefixlen}")

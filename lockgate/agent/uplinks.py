"""The node's cards as they are now, and what follows from them: programs, hops, pods' MTU."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from lockgate.agent.cards import Cards, read_cards
from lockgate.agent.ways import internal_ips
from lockgate.net.links import Net
from lockgate.objects.address import parse_address
from lockgate.objects.model import Cluster

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["Uplinks"]

log = logging.getLogger(__name__)
#: Seconds after which cards are read although the kernel told of no change.
_OFTEN = 10
_ETHERNET = 1500


class Uplinks:
    """For one agent. All but `watch` block: call them from its worker, in turn; `read` from any
    thread in the node's namespace."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        #: Neighbours or links are others, maybe.
        self.changed = asyncio.Event()
        #: Cards with our program, by name → ifindex.
        self._attached: dict[str, int] = {}
        #: The node's own addresses on its cards, as the kernel keeps them.
        self.addresses: frozenset[bytes] = frozenset()
        #: ifindex of the link to the other nodes; lo's before it is known.
        self.underlay = 1
        self._made_of: tuple[object, object] | None = None

    def read(self) -> Cards:
        """The node's cards as they are."""
        config, cluster = self._agent.config, self._agent.cluster
        me = cluster.nodes.get(config.node) if cluster is not None else None
        own = internal_ips(me) if me is not None else []
        return read_cards(config.underlay, config.outside, own)

    def attach(self, cards: Cards) -> None:
        """Our program to the cards, wherever it is not."""
        if cards.underlay is not None:
            self.underlay = cards.underlay.index
        for card in cards.all:
            if self._attached.get(card.name) != card.index:
                self._agent.dp.attach_net(card.name, card.index)
                self._attached[card.name] = card.index

    def set_mtu(self, cards: Cards) -> None:
        """What pods get: the settings' MTU, or that of the narrowest way to other nodes."""
        agent = self._agent
        mtu = cards.underlay.mtu if cards.underlay is not None else _ETHERNET
        agent.endpoints.mtu = agent.config.mtu or agent.hops.mtu or mtu

    def follow(self, cluster: Cluster) -> None:
        """Nodes or ranges of services may be others in `cluster`, which is to be published."""
        self._agent.hops.assign(cluster.nodes)
        made_of = dict(cluster.nodes), dict(cluster.service_cidrs)
        if made_of != self._made_of:
            self._refresh(cluster)
            self._made_of = made_of

    async def watch(self) -> None:
        """Follow the kernel's neighbours and cards until cancelled."""
        agent = self._agent
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), _OFTEN)
            # Netlink messages come in bursts, our own changes among them.
            await asyncio.sleep(0.05)
            self.changed.clear()
            # Not in the turn: mostly all is as it was, and no change has to wait for that.
            with contextlib.suppress(OSError):
                cards = await asyncio.to_thread(self.read)
                if agent.hops.need(cards):
                    async with agent.turn:
                        await agent.work(self._refresh, agent.cluster, cards)
                    agent.changed_soon()

    def _refresh(self, cluster: Cluster | None, cards: Cards | None = None) -> None:
        agent = self._agent
        if cluster is None:
            return
        try:
            cards = cards or self.read()
            if not agent.dp.pending:
                self.attach(cards)
            with Net() as net:
                agent.hops.refresh(net, cards, cluster)
            self.addresses = frozenset(
                parse_address(one.partition("/")[0]) for card in cards.all for one in card.addresses
            )
            self.set_mtu(cards)
            agent.errors["hops"] = agent.hops.errors
        except OSError as error:
            log.warning("hops: %s", error)
            agent.errors["hops"] = [str(error)]

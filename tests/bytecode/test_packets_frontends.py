"""Clients outside at a service's frontend: served here, sent on encapsulated, or as the node."""

from __future__ import annotations

from collections.abc import Iterator

from scapy.layers.inet import TCP as Tcp
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from tests.bytecode.balancing import (
    DSR,
    EMPTY,
    HERE,
    HOST,
    LB,
    LOCAL,
    NODE,
    NODE_PORT,
    PORTS,
    RANGED,
    SPORT,
    ask,
    back,
    frontends,
    outer,
)
from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    B,
    Golden,
    allowed,
    answer4,
    check,
    dropped,
    echo,
    ip,
    sctp,
    syn,
    table,
    tcp,
    time_exceeded,
    to_hop,
    to_pod,
    too_big,
    udp,
    unreachable,
    wire,
)
from tests.bytecode.world import (
    DROP,
    INGRESS,
    NEXT,
    OUTSIDE,
    REDIRECT,
    UNDERLAY,
    World,
)


def tables() -> Iterator[Golden]:
    for family in FAMILIES:
        name = f"IPv{family}"
        known = ADDRESSES[family]
        for kind, l4 in (("syn", syn), ("udp", udp)):
            yield Golden(
                f"{name} {kind}: a pod of the node serves, and sees the client",
                "from_net",
                wire() / ask(family, HERE, kind),
                OUTSIDE,
                REDIRECT,
                to_pod(B) / ip(family, "world", "b") / l4(SPORT, 8080),
                allowed(INGRESS, service=HERE),
                frontends,
            )
            yield Golden(
                f"{name} {kind}: to a pod elsewhere, encapsulated",
                "from_net",
                wire() / ask(family, DSR, kind),
                OUTSIDE,
                REDIRECT,
                to_hop()
                / outer(ip(family, "world", LB[family], ttl=63) / l4(SPORT, PORTS[DSR]), "remote"),
                [],
                frontends,
            )
            yield Golden(
                f"{name} {kind}: to a process of another node, encapsulated",
                "from_net",
                wire() / ask(family, NODE, kind),
                OUTSIDE,
                REDIRECT,
                to_hop()
                / outer(ip(family, "world", LB[family], ttl=63) / l4(SPORT, PORTS[NODE]), "node"),
                [],
                frontends,
            )
            yield Golden(
                f"{name} {kind}: a process of the node serves",
                "from_net",
                wire() / ask(family, HOST, kind),
                OUTSIDE,
                NEXT,
                wire() / ip(family, "world", "host") / l4(SPORT, 8080),
                [],
                frontends,
            )
        yield Golden(
            f"{name}: TCP that does not begin goes to the first owner, here it is to be reset",
            "from_net",
            wire() / ask(family, HERE, "ack"),
            OUTSIDE,
            REDIRECT,
            to_pod(B) / ip(family, "world", "b") / tcp(SPORT, 8080, "A"),
            None,
            frontends,
        )
        yield Golden(
            f"{name}: no owner: reset",
            "from_net",
            wire() / ask(family, EMPTY),
            OUTSIDE,
            REDIRECT,
            back(wire())
            / answer4(ip(family, LB[family], "world"))
            / Tcp(sport=PORTS[EMPTY], dport=SPORT, flags="RA", seq=0, ack=101, window=0),
            dropped("no-backend", service=EMPTY),
            frontends,
        )
        yield Golden(
            f"{name}: no owner: port unreachable",
            "from_net",
            wire() / ask(family, EMPTY, "udp"),
            OUTSIDE,
            REDIRECT,
            back(wire())
            / answer4(ip(family, LB[family], "world"))
            / unreachable(family, ask(family, EMPTY, "udp")),
            dropped("no-backend", service=EMPTY),
            frontends,
        )
        yield Golden(
            f"{name}: no owner here with traffic policy Local: dropped",
            "from_net",
            wire() / ask(family, LOCAL),
            OUTSIDE,
            DROP,
            None,
            dropped("no-local-backend", service=LOCAL),
            frontends,
        )
        yield Golden(
            f"{name}: a source in the ranges",
            "from_net",
            wire() / ask(family, RANGED),
            OUTSIDE,
            REDIRECT,
            None,
            allowed(INGRESS, service=RANGED),
            frontends,
        )
        yield Golden(
            f"{name}: a source outside the ranges",
            "from_net",
            wire() / ask(family, RANGED, source={4: "198.51.101.7", 6: "2001:db8:1::7"}[family]),
            OUTSIDE,
            DROP,
            None,
            dropped("source-range", service=RANGED),
            frontends,
        )
        yield Golden(
            f"{name}: an unknown port of a service's own address is rejected",
            "from_net",
            wire() / ip(family, "world", LB[family]) / udp(SPORT, 9999),
            OUTSIDE,
            REDIRECT,
            back(wire())
            / answer4(ip(family, LB[family], "world"))
            / unreachable(family, ip(family, "world", LB[family]) / udp(SPORT, 9999)),
            dropped("unknown-service-port"),
            frontends,
        )
        yield Golden(
            f"{name}: an unknown port of the node's address is the stack's",
            "from_net",
            wire() / ip(family, "world", "host") / syn(SPORT, 22),
            OUTSIDE,
            NEXT,
            wire() / ip(family, "world", "host") / syn(SPORT, 22),
            [],
            frontends,
        )
        yield Golden(
            f"{name}: a node port",
            "from_net",
            wire() / ip(family, "world", "host") / syn(SPORT, NODE_PORT),
            OUTSIDE,
            REDIRECT,
            to_pod(B) / ip(family, "world", "b") / syn(SPORT, 8080),
            allowed(INGRESS, service=70),
            frontends,
        )
        yield Golden(
            f"{name}: a cluster IP is none for clients outside",
            "from_net",
            wire() / ip(family, "world", "svc") / syn(SPORT, 80),
            OUTSIDE,
            NEXT,
            None,
            [],
            frontends,
        )
        yield Golden(
            f"{name}: echo to a service's address is answered",
            "from_net",
            wire() / ip(family, "world", LB[family], ttl=9) / echo(family),
            OUTSIDE,
            REDIRECT,
            back(wire()) / ip(family, LB[family], "world") / echo(family, reply=True),
            [],
            frontends,
        )
        yield Golden(
            f"{name}: echo to the node's address is the stack's",
            "from_net",
            wire() / ip(family, "world", "host") / echo(family),
            OUTSIDE,
            NEXT,
            None,
            [],
            frontends,
        )
        yield Golden(
            f"{name}: the last hop that it may take",
            "from_net",
            wire() / ask(family, DSR, ttl=1),
            OUTSIDE,
            REDIRECT,
            back(wire())
            / answer4(ip(family, LB[family], "world"))
            / time_exceeded(family, ask(family, DSR, ttl=1)),
            dropped("ttl-exceeded"),
            frontends,
        )
        mtu = 1400 - (20 if family == 4 else 40)
        for size, fits in ((mtu, True), (mtu + 1, False)):
            packet = ip(family, "world", LB[family]) / udp(SPORT, PORTS[DSR])
            packet = packet / Raw(bytes(size - len(packet)))
            yield Golden(
                f"{name}: {size} bytes {'fit' if fits else 'do not fit'} with the outer header",
                "from_net",
                wire() / packet,
                OUTSIDE,
                REDIRECT,
                None
                if fits
                else back(wire())
                / answer4(ip(family, LB[family], "world"))
                / too_big(family, packet, mtu),
                [] if fits else dropped("packet-too-big"),
                frontends,
            )
        yield Golden(
            f"{name}: a frame for another machine is not touched",
            "from_net",
            Ether(src="02:00:00:00:00:aa", dst="02:00:00:00:00:cc") / ask(family, DSR),
            OUTSIDE,
            # The address is no machine's: what is left is not said to its client.
            NEXT,
            None,
            [],
            frontends,
        )
        yield Golden(
            f"{name}: a pod of this node does not come by a card",
            "from_net",
            wire() / ask(family, DSR, source="a"),
            UNDERLAY,
            DROP,
            None,
            dropped("spoofed-source"),
            frontends,
        )
        yield Golden(
            f"{name}: a pod does not come from outside",
            "from_net",
            wire() / ask(family, DSR, source="remote"),
            OUTSIDE,
            DROP,
            None,
            dropped("spoofed-source"),
            frontends,
        )
        yield Golden(
            f"{name}: a pod of another node comes by the link to it",
            "from_net",
            wire() / ask(family, HERE, source="remote"),
            UNDERLAY,
            REDIRECT,
            to_pod(B) / ip(family, "remote", "b") / syn(SPORT, 8080),
            allowed(INGRESS, service=HERE),
            frontends,
        )
        yield Golden(
            f"{name}: SCTP to a pod of the node",
            "from_net",
            wire() / ip(family, "world", LB[family], **_sctp(family)) / sctp(SPORT, 70),
            OUTSIDE,
            REDIRECT,
            to_pod(B) / ip(family, "world", "b", **_sctp(family)) / sctp(SPORT, 70),
            allowed(INGRESS),
            frontends,
        )
        yield Golden(
            f"{name}: SCTP with another port is refused",
            "from_net",
            wire() / ip(family, "world", LB[family], **_sctp(family)) / sctp(SPORT, 71),
            OUTSIDE,
            REDIRECT,
            None,
            dropped("sctp-port-rewrite"),
            frontends,
        )
        yield Golden(
            f"{name}: SCTP as the node keeps its port",
            "from_net",
            wire() / ip(family, "world", LB[family], **_sctp(family)) / sctp(SPORT, 73),
            OUTSIDE,
            REDIRECT,
            to_hop()
            / ip(family, known["host"], "remote", ttl=63, **_sctp(family))
            / sctp(SPORT, 73),
            [],
            frontends,
        )


def _sctp(family: int) -> dict[str, int]:
    return {"proto": 132} if family == 4 else {"nh": 132}


@table(tables())
def test_a_client_outside_at_a_frontend(world: World, golden: Golden) -> None:
    check(world, golden)

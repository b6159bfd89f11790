"""Commands to the node's firewall, as requests and answers (docs/firewall.md)."""

from __future__ import annotations

import time
from typing import Any, TypeVar

import msgspec
import numpy as np
from aiohttp import web

from lockgate.agent.agent import Agent
from lockgate.agent.firewall import FirewallFull
from lockgate.agent.firewall_asked import rule_row
from lockgate.bpf.object import LoadError
from lockgate.compile.firewall import Rule
from lockgate.compile.prefixes import Prefixes, parse
from lockgate.objects.errors import FieldError
from lockgate.objects.firewall import LIFETIME_MAX, RATE_MAX, Range, read_ranges

__all__ = ["FirewallError", "add", "delete", "show"]

_SHOWN = 20
T = TypeVar("T")
_MOST = 100_000


class FirewallError(Exception):
    """What was asked can't be done; one sentence."""


class _Add(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    action: str
    cidrs: list[str]
    ports: list[str] = []
    rate: int = 0
    seconds: float = 0.0  # lifetime; 0 = until it is deleted


class _Delete(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    cidrs: list[str] = []
    ports: list[str] | None = None
    all: bool = False


async def add(agent: Agent, body: bytes) -> dict[str, Any]:
    """What POST /v1/firewall answers; then it is in force. FirewallError, ValueError."""
    asked = _decode(body, _Add)
    if asked.action not in ("allow", "deny"):
        raise ValueError(f"action: expected allow or deny, got {asked.action!r}")
    if not 0 <= asked.rate <= RATE_MAX or (asked.rate and asked.action == "deny"):
        raise ValueError(f"rate: expected 1 to {RATE_MAX} packets a second, with allow")
    if not 0 <= asked.seconds <= LIFETIME_MAX:
        raise ValueError(f"seconds: expected 0 to {LIFETIME_MAX}, got {asked.seconds}")
    rule = Rule("command", asked.action, _ranges(asked.ports), asked.rate)  # type: ignore[arg-type]

    def work() -> int:
        prefixes = _prefixes(asked.cidrs)
        expires = round(time.time() + asked.seconds, 3) if asked.seconds else 0.0
        try:
            new = agent.firewall.add(rule, prefixes, expires)
        except (FirewallFull, LoadError, OSError) as error:
            raise FirewallError(str(error)) from error
        agent.settle_firewall()
        _check_places(agent)
        return new

    async with agent.turn:
        new = await agent.work(work)
    return {"added": new, "known": len(asked.cidrs) - new}


async def delete(agent: Agent, body: bytes) -> dict[str, Any]:
    """What POST /v1/firewall/delete answers."""
    asked = _decode(body, _Delete)
    if bool(asked.cidrs) == asked.all:
        raise ValueError("expected cidrs, or all")
    ports = None if asked.ports is None else _ranges(asked.ports)

    def work() -> dict[str, Any]:
        prefixes = None if asked.all else _prefixes(asked.cidrs)
        done = agent.firewall.delete(prefixes, ports)
        agent.settle_firewall()
        return {
            "deleted": done.count,
            "ofObjects": done.of_objects[:_SHOWN],
            "ofObjectsCount": len(done.of_objects),
            "unknown": done.unknown[:_SHOWN],
            "unknownCount": len(done.unknown),
        }

    async with agent.turn:
        return await agent.work(work)


async def show(agent: Agent, top: int) -> dict[str, Any]:
    """What GET /v1/firewall answers: the rules, and the `top` entries with the most packets."""
    if not 0 <= top <= _MOST:
        raise ValueError(f"top: expected 0 to {_MOST}, got {top}")
    return await agent.work(_show, agent, top)


# ---- Inside --------------------------------------------------------------------


def _decode(body: bytes, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=type_)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def _show(agent: Agent, top: int) -> dict[str, Any]:
    tables = agent.firewall.tables
    found: dict[str, Any] = {"default": "Allow", "entries": 0, "rules": [], "top": []}
    if tables is None:
        return found
    tables.settle()
    numbers = tables.all()
    counters = tables.counters(numbers)
    own = tables.rule_numbers(numbers)
    found["default"] = "Drop" if tables.rules.drops else "Allow"
    found["entries"] = len(numbers)
    for rule, number in sorted(tables.rules.numbers.items(), key=lambda one: one[0].order):
        mine = own == number
        packets, bytes_ = counters[mine].sum(axis=0).tolist()
        found["rules"].append(
            {**rule_row(rule), "entries": int(mine.sum()), "packets": packets, "bytes": bytes_}
        )
    most = np.argsort(counters[:, 0], kind="stable")[::-1][:top]
    prefixes, ends = tables.prefixes(numbers[most]), tables.expires(numbers[most])
    for place, at in enumerate(most.tolist()):
        found["top"].append(
            {
                "cidr": prefixes.text(place),
                **rule_row(tables.rules.rules[int(own[at])]),
                "packets": int(counters[at, 0]),
                "bytes": int(counters[at, 1]),
                "expires": float(ends[place]) or None,
            }
        )
    return found


def _prefixes(texts: list[str]) -> Prefixes:
    prefixes, bad = parse(texts, bare=True)
    if bad:
        more = f" ({len(bad)} are not)" if len(bad) > 1 else ""
        raise ValueError(f"expected addresses and CIDR blocks, got {texts[bad[0]]!r}{more}")
    if not len(prefixes):
        raise ValueError("expected at least one address or CIDR block")
    return prefixes.unique()


def _ranges(texts: list[str]) -> tuple[Range, ...]:
    try:
        return read_ranges(texts)
    except FieldError as error:
        raise ValueError(str(error)) from error


def _check_places(agent: Agent) -> None:
    """Is it in force anywhere? Not before the first state of the cluster is known."""
    places = agent.edge.places
    if agent.published and places and not any(place.mode for place in places.values()):
        why = "; ".join(f"{name}: {place.why}" for name, place in sorted(places.items()))
        raise FirewallError(f"it is kept, but XDP is at no card of this node ({why})")


async def respond(handler: Any, *arguments: Any) -> web.Response:
    """JSON, or a FirewallError as a conflict."""
    try:
        return web.json_response(await handler(*arguments))
    except FirewallError as error:
        return web.json_response({"error": str(error)}, status=409)

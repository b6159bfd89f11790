"""What a node has in force at addresses of services: backends, and the table for clients outside.

Read from the maps that packets read, so that `lockgate service` shows what is, not what should be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lockgate.bpf.btf import Schema
from lockgate.compile.balance import numbers_of, table_words
from lockgate.compile.drafts import HOST_PORT
from lockgate.compile.tables import BACKEND_WORDS, PROTOCOL_NUMBER, Words
from lockgate.objects.address import format_address, parse_address

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["Asked", "frontends", "view_of"]

#: A backend in the image (bpf/types.h).
_BACKEND = np.dtype([("addr", "u1", 16), ("port", ">u2"), ("flags", "<u2"), ("endpoint", "<u4")])


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """One frontend. `hash`: of a flow, whose slot is wanted; -1 for none."""

    address: str
    port: int
    protocol: str = "TCP"
    hash: int = -1


def frontends(agent: Agent, asked: list[Asked]) -> list[dict[str, Any] | None]:
    """What is in force at each; None where nothing is. ValueError for what is no address or no
    protocol with ports. From the worker."""
    schema = agent.dp.object.schema
    number = agent.publisher.epoch & 1
    image = agent.dp.images.inner(number)
    if image is None:
        return [None] * len(asked)
    served = agent.journal.served()
    targets = {agent.hops.numbers[node]: node for node in agent.hops.numbers}
    answers: list[dict[str, Any] | None] = []
    with image:
        for one in asked:
            if one.protocol not in PROTOCOL_NUMBER:
                raise ValueError(f"protocol: {one.protocol} has no ports that a service could have")
            key = np.zeros((), schema.dtype("service_key"))
            key["addr"] = np.frombuffer(parse_address(one.address), np.uint8)
            key["port"], key["proto"] = one.port, PROTOCOL_NUMBER[one.protocol]
            found = agent.dp.services.get(key)
            view = None
            if found is not None:
                view = view_of(schema, found["view"][number], image.view, one.hash)
            if view is not None:
                view["of"] = _holder(served.get(view["service"]))
                for owner in view["owners"]:
                    owner["node"] = targets.get(owner["hop"], agent.config.node)
            answers.append(view)
    return answers


def _holder(key: tuple[str, str, str, str, int] | None) -> dict[str, str] | None:
    """Whose it is: a Service, or the Pod that has a hostPort there."""
    if key is None:
        return None
    kind = "Pod" if key[2] == HOST_PORT else "Service"
    return {"kind": kind, "namespace": key[0], "name": key[1]}


def view_of(schema: Schema, view: Any, image: Words, flow: int) -> dict[str, Any] | None:
    """A `struct service_view` in words; None where the view does not have it. `slot`: that of the
    flow with this hash, and its owners in order; None for a hash below 0 or where is no table."""
    bits = schema.enum("service_flag")
    flags = int(view["flags"])
    if not flags & bits["SVC_PRESENT"]:
        return None
    frontend = bool(flags & bits["SVC_FRONTEND"])
    count = int(view["owner_count"]) if frontend else 0
    slots = 1 << int(view["slot_bits"]) if count else 0
    shape = (int(view["slot_bits"]), int(view["number_bits"])) if count else (0, 2)
    numbers = numbers_of(image[int(view["table"]) :][: table_words(*shape)], *shape)
    owners = _records(image, int(view["owners"]), count * BACKEND_WORDS, schema.dtype("owner"))
    first, second = (np.bincount(numbers[rank], minlength=count)[:count] for rank in (0, 1))
    number = flow & slots - 1 if slots and flow >= 0 else None
    kinds = {value: name for name, value in schema.enum("target_kind").items()}
    backends = _records(image, int(view["backends"]), int(view["count"]) * BACKEND_WORDS, _BACKEND)
    return {
        "service": int(view["id"]),
        "frontend": frontend,
        "forwarding": ("snat" if flags & bits["SVC_SNAT"] else "dsr") if frontend else None,
        # Only this node's backends serve: without one it is dropped, not refused.
        "localOutside": bool(flags & bits["SVC_LOCAL"]),
        "localInside": bool(flags & bits["SVC_INTERNAL_LOCAL"]),
        "ranges": bool(flags & bits["SVC_RANGES"]),
        "affinity": int(view["affinity"]),
        "backends": [_end(one) for one in backends],
        "owners": [
            {
                **_end(one),
                "ends": bool(one["flags"] & schema.enum("owner_flag")["OWNER_ENDS"]),
                "target": kinds[int(one["target"]) >> 28].removeprefix("TO_").lower(),
                "hop": int(one["target"]) & 0xFFF_FFFF if int(one["target"]) >> 28 == 2 else None,
                "slots": int(first[place]),
                "second": int(second[place]),
            }
            for place, one in enumerate(owners)
        ],
        "slots": slots,
        "slot": None
        if number is None
        else {
            "number": number,
            "owners": [owner for owner in numbers[:, number].tolist() if owner < count],
        },
    }


def _records(image: Words, at: int, words: int, dtype: np.dtype[Any]) -> Any:
    return np.frombuffer(image[at : at + words].tobytes(), dtype)


def _end(record: Any) -> dict[str, Any]:
    return {"address": format_address(record["addr"].tobytes()), "port": int(record["port"])}

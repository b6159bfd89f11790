"""Pinned maps of other versions, as far as the agent itself writes them.

Read with the layout that their maker knew, and copied field by field.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.bpf import syscall
from lockgate.bpf.btf import BtfError
from lockgate.bpf.maps import ArrayMap, HashMap, LpmTrie, MappedArray
from lockgate.bpf.pins import OtherPin, convert, schema_of

__all__ = ["Table", "inherit", "open_other"]

log = logging.getLogger(__name__)
Table = HashMap | LpmTrie | ArrayMap


def open_other(pin: OtherPin) -> Table | None:
    """A map of another version with that version's records; None, and a line in the log, for
    one that can't be read."""
    fd = -1
    try:
        fd = syscall.obj_get(str(pin.path))
        schema = schema_of(fd)
        if schema is None:
            raise BtfError("it has no types")
        made = schema.map(pin.name)
        if made.key is None or made.value is None:
            raise BtfError("its types are not complete")
        if made.type in ArrayMap.types:
            return ArrayMap(fd, made.value, pin.path.name)
        table = LpmTrie if made.type in LpmTrie.types else HashMap
        return table(fd, made.key, made.value, pin.path.name)
    except (OSError, BtfError, TypeError) as error:
        if fd >= 0:
            os.close(fd)
        log.warning("%s can't be read, what it holds is lost: %s", pin.path, error)
        return None


def inherit(
    others: Iterable[OtherPin], state: MappedArray, ids: MappedArray, tables: Mapping[str, Table]
) -> int:
    """Take from other versions what outlives them: the last ids, of all of them; and of the one
    that was published last, unless it was ours, `tables`: connections remember the numbers of
    hops. Returns the last epoch that any of them was in."""
    beyond, latest = 0, ""
    for pin in others:
        if pin.name == "state":
            epoch = max((int(value["epoch"]) for value in _values(pin)), default=0)
            if epoch > beyond:
                beyond, latest = epoch, pin.version
        elif pin.name == "ids":
            for value in convert(_values(pin), ids.value_dtype):
                for name in ids.value_dtype.names or ():
                    ids.view[name][0] = max(value[name], ids.view[name][0])
    if beyond > int(state.view["epoch"][0]):
        for pin in others:
            if pin.version == latest and pin.name in tables:
                _copy(pin, tables[pin.name], beyond & 1)
    return beyond


def _values(pin: OtherPin) -> NDArray[Any]:
    other = open_other(pin)
    if not isinstance(other, ArrayMap):
        return np.zeros(0, np.uint8)
    with other:
        return other.values()


def _copy(pin: OtherPin, mine: Table, view: int) -> None:
    """`view` is the one in force; it becomes both."""
    other = open_other(pin)
    if other is None:
        return
    with other:
        if isinstance(mine, ArrayMap) and isinstance(other, ArrayMap):
            values = convert(other.values()[: len(mine)], mine.value_dtype)
            if "view" in (values.dtype.names or ()):
                values = values.copy()
                values["view"] = values["view"][:, view : view + 1]
            mine.update_many(np.arange(len(values)), values)
        elif not isinstance(mine, ArrayMap) and not isinstance(other, ArrayMap):
            keys, values = other.items()
            mine.update_many(convert(keys, mine.key_dtype), convert(values, mine.value_dtype))

"""Lists of the API, object by object, while they arrive.

A list of 50,000 pods is 200 MB of JSON, and what is kept of it a tenth of that: so the answer
is cut into objects as it comes, and never held as a whole.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Iterator

import aiohttp
import msgspec

from lockgate.kube.meter import Meter

__all__ = ["ListMeta", "Splitter", "chunks"]

_ITEMS = b'"items":['
#: Where one object ends and the next begins, as the API server writes it. In a string the
#: quotes would be escaped; but it may stand within an object too, so a cut counts only if what
#: is before it is a whole object.
_CUT = b'},{"metadata":{'


class ListMeta(msgspec.Struct, rename="camel"):
    """meta/v1 ListMeta."""

    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _Page(msgspec.Struct):
    metadata: ListMeta = msgspec.field(default_factory=ListMeta)
    items: list[msgspec.Raw] | None = None


class Splitter:
    """Cuts one list into objects: `feed` what comes, then `finish`. A server that writes lists
    in another form costs memory, and nothing else."""

    def __init__(self) -> None:
        self._head: bytes | None = None
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The objects that ended with this chunk."""
        self._buffer += chunk
        if self._head is None:
            start = self._buffer.find(_ITEMS)
            if start < 0:
                return
            start += len(_ITEMS)
            self._head = bytes(self._buffer[:start])
            del self._buffer[:start]
        begin = at = 0
        while (cut := self._buffer.find(_CUT, at)) >= 0:
            piece, at = bytes(self._buffer[begin : cut + 1]), cut + 2
            if _whole(piece):
                yield piece
                begin = at
        del self._buffer[:begin]

    def finish(self) -> tuple[list[bytes], ListMeta]:
        """The remaining objects, and what the list says of itself. msgspec.DecodeError for
        what is no list."""
        page = msgspec.json.decode((self._head or b"") + self._buffer, type=_Page)
        return [bytes(item) for item in page.items or ()], page.metadata


def _whole(piece: bytes) -> bool:
    try:
        msgspec.json.decode(piece, type=msgspec.Raw)
    except msgspec.DecodeError:
        return False
    return True


async def chunks(response: aiohttp.ClientResponse, meter: Meter) -> AsyncIterator[bytes]:
    """A body as it comes, decompressed; the bytes on the wire are added to `meter`. OSError
    if it is damaged or ends too early."""
    inflate = None
    if response.headers.get("Content-Encoding") == "gzip":
        inflate = zlib.decompressobj(wbits=31)
    async for chunk in response.content.iter_any():
        meter.add(len(chunk))
        if inflate is None:
            yield chunk
            continue
        try:
            yield inflate.decompress(chunk)
        except zlib.error as error:
            raise OSError(f"the API server's answer is damaged: {error}") from error
    if inflate is not None and not inflate.eof:
        raise OSError("the API server's answer ended in the middle")

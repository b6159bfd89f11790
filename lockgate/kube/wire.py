"""One object as the API server writes it. As in the API, null is a field that is not there: a
slice without endpoints says `"endpoints":null`."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["plain", "read"]


def read(raw: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    """What the decoder makes of it. msgspec.MsgspecError names the field that is none."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError:
        if b"null" not in raw:
            raise
    return msgspec.convert(plain(raw), decoder.type)


def plain(raw: bytes) -> Any:
    """Its plain values. msgspec.DecodeError for what is no JSON."""
    return _without_nulls(msgspec.json.decode(raw))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value

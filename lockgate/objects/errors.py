"""The errors that a manifest can have, told as the user wrote it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["FieldError", "ManifestError", "clean", "describe", "one_of"]


class ManifestError(Exception):
    """One sentence: file, document, object, field, what was expected and what is there."""


class FieldError(Exception):
    """A fault at a path inside one object; `parse` adds file, document and name."""

    def __init__(self, path: str, expected: str, got: object = ...) -> None:
        text = f"expected {expected}" + ("" if got is ... else f", got {describe(got)}")
        super().__init__(f"{path}: {text}")
        self.path = path
        self.text = text


def describe(value: Any) -> str:
    """A value of a manifest, short and on one line, named by its JSON type where that helps."""
    match value:
        case None:
            return "null"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() if value.bit_length() > 64:
            return "a number of more than 64 bits"
        case int() | float():
            return f"the number {value}"
        case str():
            text = json.dumps(value, ensure_ascii=not value.isprintable())
            return text if len(text) <= 80 else f'{text[:76]}…" ({len(value)} characters)'
        case dict():
            return "an object"
        case list():
            return "a list"
    return f"a value of type {type(value).__name__}"


def clean(text: str) -> str:
    """Text of a manifest for a message: one line, not too long."""
    text = text if text.isprintable() else json.dumps(text)
    return text if len(text) <= 300 else f"{text[:299]}…"


def one_of(values: Sequence[str]) -> str:
    """The values as a choice in a sentence: "a", "a or b", "a, b or c"."""
    return " or ".join(filter(None, (", ".join(values[:-1]), values[-1])))

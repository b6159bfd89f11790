"""Checks of values that several kinds have. Each raises FieldError at `path`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lockgate.objects.address import parse_address, parse_cidr
from lockgate.objects.errors import FieldError, one_of
from lockgate.objects.model import ObjectMeta
from lockgate.objects.names import check_dns_label, check_label_key, check_labels

__all__ = [
    "check_address",
    "check_cidr",
    "check_metadata",
    "check_one_of",
    "check_one_per_family",
    "check_unique",
]


def check_metadata(meta: ObjectMeta, check_name: Callable[[str, str], None]) -> None:
    check_name(meta.name, "metadata.name")
    if meta.namespace:
        check_dns_label(meta.namespace, "metadata.namespace")
    check_labels(meta.labels, "metadata.labels")
    for key in meta.annotations:
        check_label_key(key.lower(), "metadata.annotations")


def check_address(text: str, path: str) -> bytes:
    try:
        return parse_address(text)
    except ValueError:
        raise FieldError(path, "an IP address", text) from None


def check_cidr(text: str, path: str) -> tuple[bytes, int]:
    try:
        return parse_cidr(text)
    except ValueError:
        raise FieldError(path, "a CIDR block such as 10.0.0.0/8 or fd00::/8", text) from None


def check_one_per_family(addresses: list[str], path: str) -> None:
    families = [":" in address for address in addresses]
    if len(set(families)) != len(families):
        raise FieldError(path, "at most one of each family", addresses)


def check_one_of(value: str, values: tuple[str, ...], path: str) -> None:
    if value not in values:
        raise FieldError(path, one_of(values), value)


def check_unique(items: Iterable[tuple[str, str]]) -> None:
    """Refuses the second of two equal values, each given with its path."""
    seen: dict[str, str] = {}
    for value, path in items:
        if value in seen:
            raise FieldError(path, f"a value that differs from {seen[value]}", value)
        seen[value] = path

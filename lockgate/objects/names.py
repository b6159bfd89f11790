"""The forms of names in the Kubernetes API (k8s.io/apimachinery/pkg/util/validation).

Each check raises FieldError at `path`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lockgate.objects.errors import FieldError

__all__ = [
    "check_dns_label",
    "check_dns_name",
    "check_label_key",
    "check_label_value",
    "check_labels",
    "check_port",
    "check_port_name",
    "check_service_name",
]

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")


def check_dns_label(text: str, path: str) -> None:
    """DNS-1123 label: namespaces, containers, port names of services."""
    if len(text) > 63 or not _DNS_LABEL.fullmatch(text):
        raise FieldError(
            path,
            "a DNS label (at most 63 lower case letters, digits and '-',"
            " with a letter or digit at both ends)",
            text,
        )


def check_dns_name(text: str, path: str) -> None:
    """DNS-1123 subdomain: the names of most objects."""
    if not _is_dns_name(text):
        raise FieldError(
            path,
            "a DNS name (at most 253 lower case letters, digits, '-' and '.',"
            " with a letter or digit at both ends of each part)",
            text,
        )


def check_service_name(text: str, path: str) -> None:
    """DNS-1035 label: names of services."""
    if len(text) > 63 or not _SERVICE_NAME.fullmatch(text):
        raise FieldError(
            path,
            "a service name (at most 63 lower case letters, digits and '-', the first a letter,"
            " the last a letter or digit)",
            text,
        )


def check_label_key(key: str, path: str) -> None:
    prefix, slash, name = key.rpartition("/")
    if len(name) > 63 or not _QUALIFIED.fullmatch(name) or (slash and not _is_dns_name(prefix)):
        raise FieldError(
            path,
            "a label key ([DNS name/]name, the name at most 63 letters, digits, '-', '_' and '.',"
            " with a letter or digit at both ends)",
            key,
        )


def check_label_value(value: str, path: str) -> None:
    if value and (len(value) > 63 or not _QUALIFIED.fullmatch(value)):
        raise FieldError(
            path,
            "a label value (empty, or at most 63 letters, digits, '-', '_' and '.',"
            " with a letter or digit at both ends)",
            value,
        )


def check_labels(labels: Mapping[str, str], path: str) -> None:
    for key, value in labels.items():
        check_label_key(key, path)
        check_label_value(value, f"{path}[{key}]")


def check_port_name(text: str, path: str) -> None:
    """IANA_SVC_NAME (RFC 6335, 5.1): names of container ports."""
    if not (
        len(text) <= 15
        and _DNS_LABEL.fullmatch(text)
        and "--" not in text
        and re.search("[a-z]", text)
    ):
        raise FieldError(
            path,
            "a port name (at most 15 lower case letters, digits and single '-', at least one"
            " letter, a letter or digit at both ends)",
            text,
        )


def check_port(port: int | str, path: str) -> None:
    """A port number, or the name of a container's port."""
    if isinstance(port, int):
        if not 1 <= port <= 65535:
            raise FieldError(path, "a port number from 1 to 65535", port)
    elif port.isascii() and port.isdigit():
        raise FieldError(path, "a port number without quotes, or a port name", port)
    else:
        check_port_name(port, path)


def _is_dns_name(text: str) -> bool:
    return len(text) <= 253 and all(_DNS_LABEL.fullmatch(part) for part in text.split("."))

"""Manifests, as YAML or JSON, to objects.

Everything that the API server would refuse in the fields that Lockgate uses is refused here, with
the file, the document, the object and the field in the message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from lockgate.objects import model
from lockgate.objects.documents import documents
from lockgate.objects.errors import FieldError, ManifestError, clean, describe
from lockgate.objects.model import Object
from lockgate.objects.shape import shape
from lockgate.objects.validate import CLOSED, VALIDATORS

__all__ = ["ManifestError", "Parsed", "merge", "parse"]

# kind → apiVersion, Struct.
_KINDS: dict[str, tuple[str, Any]] = {
    "Namespace": ("v1", model.Namespace),
    "Node": ("v1", model.Node),
    "Pod": ("v1", model.Pod),
    "Service": ("v1", model.Service),
    "EndpointSlice": ("discovery.k8s.io/v1", model.EndpointSlice),
    "NetworkPolicy": ("networking.k8s.io/v1", model.NetworkPolicy),
    "Deployment": ("apps/v1", model.Workload),
    "StatefulSet": ("apps/v1", model.Workload),
    "DaemonSet": ("apps/v1", model.Workload),
    "ReplicaSet": ("apps/v1", model.Workload),
    "Job": ("batch/v1", model.Workload),
    "Firewall": ("lockgate.dev/v1alpha1", model.Firewall),
}
# Groups where a kind above is the same kind in an older version: refused rather than skipped.
_OLD_GROUPS = frozenset(
    ("", "apps", "batch", "extensions", "networking.k8s.io", "discovery.k8s.io", "lockgate.dev")
)
_CLUSTER_SCOPED = frozenset(("Namespace", "Node", "Firewall"))
# Configuration that has no meaning for the data plane.
_SILENT = frozenset(
    (
        *("ConfigMap", "Secret", "ServiceAccount", "Role", "RoleBinding", "ClusterRole"),
        *("ClusterRoleBinding", "PodDisruptionBudget", "LimitRange", "ResourceQuota"),
    )
)


class Parsed(msgspec.Struct):
    """The objects of one or more files, and for each where it was found."""

    objects: list[Object] = []
    warnings: list[str] = []
    places: list[str] = []  # parallel to objects: "FILE, document N"


def parse(data: bytes | str, source: str) -> Parsed:
    """The objects of one file: YAML documents, or JSON. Raises ManifestError and nothing else."""
    result = Parsed()
    for number, document in enumerate(documents(data, source), 1):
        place = f"{source}, document {number}"
        if document is not None:
            _read(document, place, "", "", result)
    return merge([result])


def merge(parts: Iterable[Parsed]) -> Parsed:
    """All parts as one. Raises ManifestError when two objects have the same kind and name."""
    result = Parsed()
    seen: dict[tuple[str, str, str], str] = {}
    for part in parts:
        result.warnings += part.warnings
        for item, place in zip(part.objects, part.places, strict=True):
            key = (item.kind, item.metadata.namespace, item.metadata.name)
            if key in seen:
                name = _title(item.kind, item.metadata.namespace, item.metadata.name)
                where = "this document" if place == seen[key] else seen[key]
                raise ManifestError(
                    f"{place} ({name}), field metadata.name: expected a name that no other"
                    f" {item.kind} has, got one that {where} defines already"
                )
            seen[key] = place
            result.objects.append(item)
            result.places.append(place)
    return result


# ---- One object --------------------------------------------------------------


def _read(value: Any, place: str, path: str, default_kind: str, result: Parsed) -> None:
    """Reads one document, or one item of a List at `path`, into the result."""
    if not isinstance(value, dict):
        field = path.rstrip(".") or "(top)"
        raise ManifestError(f"{place}, field {field}: expected an object, got {describe(value)}")
    kind, version = value.get("kind"), value.get("apiVersion")
    if default_kind and kind is None and version is None:
        kind, version = default_kind, _KINDS[default_kind][0]
    namespace, name = _names(value)
    try:
        for field, text in (("apiVersion", version), ("kind", kind)):
            if not isinstance(text, str) or not text:
                raise FieldError(field, "a string that is not empty", text)
        assert isinstance(kind, str) and isinstance(version, str)
        item_kind = kind.removesuffix("List")
        if kind == "List" or (item_kind != kind and item_kind in _KINDS):
            items = value.get("items")
            if items is not None and not isinstance(items, list):
                raise FieldError("items", "a list", items)
            for index, item in enumerate(items or ()):
                _read(item, place, f"{path}items[{index}].", item_kind, result)
            return
        group = version.rpartition("/")[0]
        if kind not in _KINDS or group not in _OLD_GROUPS:
            if kind not in _SILENT:
                result.warnings.append(
                    f"{place}: ignored {clean(version)} {_title(kind, namespace, name)},"
                    " a kind that Lockgate does not know"
                )
            return
        if version != _KINDS[kind][0]:
            raise FieldError("apiVersion", _KINDS[kind][0], version)
        result.objects.append(_object(value, kind))
        result.places.append(place)
    except FieldError as error:
        title = _title(kind, namespace, name) if isinstance(kind, str) else "no kind"
        field = clean(f"{path}{error.path}")
        raise ManifestError(f"{place} ({title}), field {field}: {error.text}") from None


def _object(value: dict[str, Any], kind: str) -> Object:
    struct = _KINDS[kind][1]
    metadata = value.get("metadata")
    if not isinstance(metadata, dict):
        raise FieldError("metadata", "an object with a name", metadata)
    metadata = dict(metadata)
    if not metadata.get("name") and metadata.get("name") in (None, ""):
        raise FieldError("metadata.name", "a name", metadata.get("name"))
    if kind not in _CLUSTER_SCOPED:
        metadata["namespace"] = metadata.get("namespace") or "default"
    elif metadata.get("namespace"):
        raise FieldError(
            "metadata.namespace", f"none, as a {kind} is in no namespace", metadata["namespace"]
        )
    plain = shape(
        {**value, "metadata": metadata, "apiVersion": _KINDS[kind][0], "kind": kind},
        struct,
        CLOSED.get(kind, frozenset()),
    )
    _set_defaults(plain, kind)
    item: Object = msgspec.convert(plain, struct)
    VALIDATORS[kind](item)
    return item


def _set_defaults(plain: dict[str, Any], kind: str) -> None:
    """What the API server fills in, beyond the defaults of the model."""
    if kind == "Namespace":
        labels = plain["metadata"].setdefault("labels", {})
        labels["kubernetes.io/metadata.name"] = plain["metadata"]["name"]
    elif kind == "Service":
        for port in plain.get("spec", {}).get("ports", ()):
            if port.get("targetPort") in (0, ""):
                del port["targetPort"]  # the same as port


def _names(value: dict[str, Any]) -> tuple[str, str]:
    """Namespace and name as far as they are there, for messages."""
    metadata = value.get("metadata")
    if not isinstance(metadata, dict):
        return "", ""
    namespace, name = metadata.get("namespace"), metadata.get("name")
    return namespace if isinstance(namespace, str) else "", name if isinstance(name, str) else ""


def _title(kind: str, namespace: str, name: str) -> str:
    kind, namespace, name = clean(kind), clean(namespace), clean(name) or "without a name"
    if kind in _KINDS and kind not in _CLUSTER_SCOPED:
        namespace = namespace or "default"
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"

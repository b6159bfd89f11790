"""What `lockgate get` prints of objects: fields have the names of the Kubernetes API."""

from __future__ import annotations

import pytest

from lockgate.cli.views import as_table, endpoint_rows
from lockgate.objects.model import (
    Cluster,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    ObjectMeta,
    ObjectReference,
)

LABELS = {"kubernetes.io/service-name": "web"}
POD = ObjectReference(kind="Pod", namespace="shop", name="web-0", uid="u")

CASES = [
    (
        "nobody says whether it is ready: it is",
        Endpoint(["10.0.0.1"]),
        {"addresses": ["10.0.0.1"], "conditions": {"ready": True}, "nodeName": None},
        "10.0.0.1",
    ),
    (
        "a pod's",
        Endpoint(["10.0.0.1"], EndpointConditions(ready=True), "node-1", POD),
        {
            "addresses": ["10.0.0.1"],
            "conditions": {"ready": True},
            "nodeName": "node-1",
            "targetRef": {"kind": "Pod", "namespace": "shop", "name": "web-0", "uid": "u"},
        },
        "10.0.0.1",
    ),
    (
        "one that ends and still serves",
        Endpoint(["fd00::1"], EndpointConditions(False, True, True), "node-1"),
        {
            "addresses": ["fd00::1"],
            "conditions": {"ready": False, "serving": True, "terminating": True},
            "nodeName": "node-1",
        },
        "fd00::1 (not ready)",
    ),
]


@pytest.mark.parametrize(
    ("endpoint", "wanted", "shown"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_an_endpoint_is_told_as_in_an_endpoint_slice(endpoint, wanted, shown):
    meta = ObjectMeta(namespace="shop", name="web-x1", labels=LABELS)
    one = EndpointSlice(metadata=meta, endpoints=[endpoint], ports=[EndpointPort(80, "http")])
    rows = endpoint_rows(Cluster(slices={("shop", "web-x1"): one}))
    assert rows == [
        {
            "namespace": "shop",
            "name": "web-x1",
            "service": "web",
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
            "endpoints": [{"targetRef": None} | wanted],
        }
    ]
    assert as_table("endpoints", rows).splitlines()[-1].rstrip().endswith(f" {shown}")

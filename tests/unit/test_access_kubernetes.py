"""What commands with a kubeconfig read from the API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from lockgate.access import Refused
from lockgate.access.kubernetes import KubernetesAccess
from lockgate.agent.writeback import RBAC
from lockgate.kube.client import Settings
from lockgate.kube.kinds import KINDS
from tests.apiserver import ApiServer

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = [kind.name for kind in KINDS if not kind.optional]


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    one = ApiServer()
    one.put({"kind": "Namespace", "metadata": {"name": "shop"}})
    one.put({"kind": "ServiceCIDR", "metadata": {"name": "a"}, "spec": {"cidrs": ["10.96.0.0/16"]}})
    await one.start()
    yield one
    await one.stop()


@pytest.fixture
async def access(server: ApiServer) -> AsyncIterator[KubernetesAccess]:
    one = KubernetesAccess(Settings(api_server=f"http://127.0.0.1:{server.port}"), "the test's")
    yield one
    await asyncio.to_thread(one.close)


async def test_all_kinds_are_read(access: KubernetesAccess) -> None:
    found = await asyncio.to_thread(access.objects)
    assert list(found.namespaces) == ["shop"]
    assert found.service_cidrs["a"].spec.cidrs == ["10.96.0.0/16"]


async def test_a_kind_that_older_servers_lack_is_as_good_as_empty(
    server: ApiServer, access: KubernetesAccess
) -> None:
    server.absent = {"ServiceCIDR"}
    found = await asyncio.to_thread(access.objects)
    assert list(found.namespaces) == ["shop"]
    assert found.service_cidrs == {}


@pytest.mark.parametrize("kind", REQUIRED)
async def test_one_that_every_server_has_may_not_lack(
    server: ApiServer, access: KubernetesAccess, kind: str
) -> None:
    server.absent = {kind}
    with pytest.raises(Refused, match="404 NotFound"):
        await asyncio.to_thread(access.objects)


async def test_a_slice_without_endpoints_is_one(
    server: ApiServer, access: KubernetesAccess
) -> None:
    """Of none the API server says null, not []."""
    server.put(
        {
            "kind": "EndpointSlice",
            "metadata": {"name": "web-1", "namespace": "shop"},
            "addressType": "IPv4",
            "endpoints": None,
            "ports": None,
        }
    )
    found = await asyncio.to_thread(access.objects)
    assert found.slices["shop", "web-1"].endpoints == []
    assert access.skipped == []


async def test_an_object_that_cannot_be_read_is_named(
    server: ApiServer, access: KubernetesAccess
) -> None:
    server.put(
        {
            "kind": "NetworkPolicy",
            "metadata": {"name": "odd", "namespace": "shop"},
            "spec": {"podSelector": {}, "ingress": [{"ports": [{"protocol": "QUIC"}]}]},
        }
    )
    found = await asyncio.to_thread(access.objects)
    (said,) = access.skipped
    assert said.startswith("NetworkPolicy shop/odd can't be read: Invalid enum value 'QUIC'")
    assert found.policies["shop", "odd"].unreadable


def test_the_documented_role_lists_what_the_agents_does() -> None:
    text = (ROOT / "docs/operate.md").read_text()
    roles = yaml.safe_load_all(text.partition("```yaml\n")[2].partition("```")[0])
    allowed = {
        (group, resource)
        for role in roles
        if role["kind"] == "ClusterRole"
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert allowed == {what for what, verbs in RBAC.items() if "list" in verbs}

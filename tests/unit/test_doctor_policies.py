"""Policies of other systems, which nobody enforces any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from lockgate.access.kubernetes import KubernetesAccess
from lockgate.agent.doctor import Finding
from lockgate.cli.doctor import FOREIGN_POLICIES, policies
from lockgate.kube.client import Settings
from lockgate.objects.model import Cluster, ObjectMeta, Pod, PodSpec, PodStatus
from tests.apiserver import ApiServer


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    one = ApiServer()
    await one.start()
    yield one
    await one.stop()


async def found(server: ApiServer, cluster: Cluster | None = None) -> list[Finding]:
    access = KubernetesAccess(Settings(api_server=f"http://127.0.0.1:{server.port}"), "the test's")
    try:
        return await asyncio.to_thread(policies, access, cluster or Cluster())
    finally:
        await asyncio.to_thread(access.close)


KINDS = {
    "cilium.io/v2/ciliumnetworkpolicies": "ciliumnetworkpolicies.cilium.io",
    "cilium.io/v2/ciliumclusterwidenetworkpolicies": "ciliumclusterwidenetworkpolicies.cilium.io",
    "crd.projectcalico.org/v1/networkpolicies": "networkpolicies.crd.projectcalico.org",
    "crd.projectcalico.org/v1/globalnetworkpolicies": "globalnetworkpolicies.crd.projectcalico.org",
    "projectcalico.org/v3/networkpolicies": "networkpolicies.projectcalico.org",
    "projectcalico.org/v3/globalnetworkpolicies": "globalnetworkpolicies.projectcalico.org",
    "crd.antrea.io/v1beta1/networkpolicies": "networkpolicies.crd.antrea.io",
    "crd.antrea.io/v1beta1/clusternetworkpolicies": "clusternetworkpolicies.crd.antrea.io",
    "policy.networking.k8s.io/v1alpha1/adminnetworkpolicies": (
        "adminnetworkpolicies.policy.networking.k8s.io"
    ),
    "policy.networking.k8s.io/v1alpha1/baselineadminnetworkpolicies": (
        "baselineadminnetworkpolicies.policy.networking.k8s.io"
    ),
    "policy.networking.k8s.io/v1alpha2/clusternetworkpolicies": (
        "clusternetworkpolicies.policy.networking.k8s.io"
    ),
}


def test_all_kinds_are_tried() -> None:
    assert set(KINDS.values()) == FOREIGN_POLICIES.keys()


@pytest.mark.parametrize(("path", "name"), KINDS.items(), ids=KINDS.values())
async def test_a_policy_that_nobody_enforces_is_an_error(
    server: ApiServer, path: str, name: str
) -> None:
    server.extensions = {other: [] for other in KINDS} | {path: [{}, {}]}
    (finding,) = await found(server)
    assert finding.severity == "error"
    assert finding.text == f"2 {name}: nobody enforces them any more"
    assert name in finding.advice


async def test_one_whose_daemon_runs_is_enforced(server: ApiServer) -> None:
    server.extensions = {"cilium.io/v2/ciliumnetworkpolicies": [{}]}
    pod = Pod(
        metadata=ObjectMeta(name="a", namespace="kube-system", labels={"k8s-app": "cilium"}),
        spec=PodSpec(host_network=True),
        status=PodStatus(phase="Running"),
    )
    (finding,) = await found(server, Cluster(pods={("kube-system", "a"): pod}))
    assert finding.severity == "ok"


async def test_who_may_not_count_one_kind_is_told_so_and_of_the_others(server: ApiServer) -> None:
    server.extensions = {
        "cilium.io/v2/ciliumnetworkpolicies": "you may not",
        "crd.antrea.io/v1beta1/networkpolicies": [{}],
    }
    told = await found(server)
    assert [one.severity for one in told] == ["warning", "error"]
    assert "ciliumnetworkpolicies.cilium.io could not be counted" in told[0].text
    assert "you may not" in told[0].text


async def test_kinds_that_mean_nothing_to_us_are_none_of_ours(server: ApiServer) -> None:
    server.extensions = {"example.org/v1/networkpolicies": [{}], "metrics.k8s.io/v1/pods": [{}]}
    (finding,) = await found(server)
    assert finding.severity == "ok"

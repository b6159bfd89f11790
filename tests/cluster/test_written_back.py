"""What agents write to the API server, as kubectl shows it."""

from __future__ import annotations

import json

from cluster import Cluster
from cluster.commands import until

CONDITION = "NetworkUnavailable"


def test_what_befell_a_pod_is_among_its_events(real: Cluster) -> None:
    """kubectl describe finds them by the object's uid."""
    pod = real.json("-n", "visitors", "get", "pod", "customer")
    node, ip = pod["spec"]["nodeName"], pod["status"]["podIP"]
    (route,) = json.loads(real.node_exec(node, "ip", "-j", "route", "show", ip))
    real.node_exec(node, "tc", "filter", "del", "dev", route["dev"], "ingress")

    def told() -> bool:
        text = real.kubectl("-n", "visitors", "describe", "pod", "customer")
        return "ProgramPutBack" in text.partition("\nEvents:")[2]

    assert until("the event", told, 60)


def test_the_nodes_network_is_there_whoever_says_otherwise(real: Cluster) -> None:
    def condition() -> tuple[str, str]:
        conditions = real.json("get", "node", "node-2")["status"]["conditions"]
        (found,) = (one for one in conditions if one["type"] == CONDITION)
        return found["status"], found["reason"]

    assert condition() == ("False", "LockgateIsUp")
    other = {"type": CONDITION, "status": "True", "reason": "OtherIsDown", "message": "gone"}
    patch = json.dumps({"status": {"conditions": [other]}})
    patching = ("patch", "node", "node-2", "--subresource=status", "--type=strategic")
    real.kubectl(*patching, "-p", patch)
    assert until("it to be put right", lambda: condition() == ("False", "LockgateIsUp"), 60)

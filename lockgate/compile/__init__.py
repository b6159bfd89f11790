"""Objects → tables: classes, policies, services, the verdict image. Pure."""

from lockgate.compile.node import compile_node
from lockgate.compile.tables import EndpointView, Host, Ids, PeerView, Rule, ServiceView, Tables

__all__ = [
    "EndpointView",
    "Host",
    "Ids",
    "PeerView",
    "Rule",
    "ServiceView",
    "Tables",
    "compile_node",
]

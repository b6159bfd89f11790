"""Which objects changed, by kind and key."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

__all__ = ["Changed", "Name"]

#: (namespace, name)
Name = tuple[str, str]


@dataclass(slots=True)
class Changed:
    """Keys of the objects that came, went or may be others, by the fields of `Cluster`."""

    namespaces: set[str] = field(default_factory=set)
    nodes: set[str] = field(default_factory=set)
    pods: set[Name] = field(default_factory=set)
    services: set[Name] = field(default_factory=set)
    slices: set[Name] = field(default_factory=set)
    policies: set[Name] = field(default_factory=set)
    service_cidrs: set[str] = field(default_factory=set)
    firewalls: set[str] = field(default_factory=set)

    def update(self, other: Changed) -> None:
        """Add what changed after."""
        for one in fields(self):
            getattr(self, one.name).update(getattr(other, one.name))

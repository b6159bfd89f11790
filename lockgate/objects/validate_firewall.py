"""What a Firewall object may say beyond types."""

from __future__ import annotations

from lockgate.objects.blocks import pack_cidrs
from lockgate.objects.errors import FieldError
from lockgate.objects.firewall import RATE_MAX, moment, port_ranges
from lockgate.objects.model import FirewallRule

__all__ = ["check_rule"]


def check_rule(rule: FirewallRule, path: str) -> None:
    """Raises FieldError for the first fault; `path` is the rule's."""
    if not rule.from_:
        raise FieldError(f"{path}.from", "at least one CIDR block", rule.from_)
    _, _, bad = pack_cidrs(rule.from_)
    if bad:
        raise FieldError(
            f"{path}.from[{bad[0]}]",
            "a CIDR block such as 192.0.2.0/24 or 2001:db8::/32",
            rule.from_[bad[0]],
        )
    port_ranges(rule.ports, f"{path}.ports")
    rate = rule.packets_per_second
    if rate and rule.action == "Deny":
        raise FieldError(f"{path}.packetsPerSecond", "none, as the action is Deny", rate)
    if not 0 <= rate <= RATE_MAX:
        raise FieldError(f"{path}.packetsPerSecond", f"a number from 1 to {RATE_MAX}", rate)
    if rule.expires:
        moment(rule.expires, f"{path}.expires")

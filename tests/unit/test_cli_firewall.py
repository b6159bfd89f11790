"""`lockgate firewall`: what it refuses before any node is asked."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

# The package has the command of that name.
firewall: Any = importlib.import_module("lockgate.cli.firewall")


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (
            lambda: firewall.seconds_of("0s"),
            "--for: expected a time such as 90s, 10m, 2h or 1d, got '0s'",
        ),
        (lambda: firewall.seconds_of("99999d"), "--for: expected 36500d at most, got '99999d'"),
        (
            lambda: firewall._ports(["tcp/0"]),
            "--port: expected a port number from 1 to 65535, got the number 0",
        ),
        (
            lambda: firewall._ports(["udp/53", "tcp/9-3"]),
            "--port: expected a number from port (9) to 65535, got the number 3",
        ),
        (
            lambda: firewall._ports(["icmp/3"]),
            "--port: expected none, as ICMP has no ports, got the number 3",
        ),
        (lambda: firewall._ports(["80"]), "--port: expected ports such as tcp/80"),
        (
            lambda: firewall._sources(["10.0.0.0/33"], None),
            "expected an address or a CIDR block, got '10.0.0.0/33'",
        ),
    ],
)
def test_what_a_command_cannot_mean_is_told(
    ask: Callable[[], Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        ask()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"lockgate: {told}")


def test_lifetimes_in_seconds() -> None:
    assert [firewall.seconds_of(text) for text in ("90s", "1.5m", "2h", "36500d")] == [
        90,
        90,
        7200,
        3_153_600_000,
    ]

"""What fits a terminal: tables of any width."""

from __future__ import annotations

import pytest

from lockgate.cli import render

HEAD = ("NAME", "PORTS", "BACKENDS")
ROWS = [
    ("web", "80/TCP,\n81/TCP", "10.0.0.1:80,\n10.0.0.2:80,\n10.0.0.3:80"),
    ("db", "5432/TCP", "none"),
]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (
            40,
            [
                "NAME  PORTS     BACKENDS",
                "web   80/TCP,   10.0.0.1:80,",
                "      81/TCP    10.0.0.2:80,",
                "                10.0.0.3:80",
                "db    5432/TCP  none",
            ],
        ),
        (
            26,
            [
                "NAME  PORTS",
                "    BACKENDS",
                "web   80/TCP,",
                "      81/TCP",
                "    10.0.0.1:80,",
                "    10.0.0.2:80,",
                "    10.0.0.3:80",
                "db    5432/TCP",
                "    none",
            ],
        ),
        (
            10,
            [
                "NAME  POR…",
                "web   80/…",
                "      81/…",
                "         …",
                "db    543…",
            ],
        ),
    ],
)
def test_a_table_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, width: int, lines: list[str]
) -> None:
    monkeypatch.setattr(render, "width", lambda: width)
    assert render.table(HEAD, ROWS).splitlines() == lines

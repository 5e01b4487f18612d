"""Ports for a Ray of one's own."""

from __future__ import annotations

import socket

import pytest

from cluster import local
from cluster.local import PORTS, free_ports


def test_ports_are_different_ones_that_nothing_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = free_ports(12)
    assert len(set(found)) == 12
    assert set(found) <= set(PORTS)
    monkeypatch.setattr(local, "PORTS", range(found[0], found[0] + 1))
    assert free_ports(1) == found[:1]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", found[0]))
        with pytest.raises(RuntimeError, match=r"of the ports from \d+ to \d+ fewer than 1 are free"):
            free_ports(1)

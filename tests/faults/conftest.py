"""Redis servers that die with their test, and guards that do not wait long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.world import short_pauses
from tests.stores.servers import Server

StartRedis = Callable[..., Server]


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[StartRedis]:
    """Starts servers with options of redis-server."""
    started: list[Server] = []

    def start(*options: str) -> Server:
        started.append(Server(tmp_path / f"redis{len(started)}", *options))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Broken stores are tried again after moments, so that many faults fit into a test."""
    with short_pauses(monkeypatch):
        yield

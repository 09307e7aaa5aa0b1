"""Stores of every kind, over servers of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chunkcache.stores import MemoryStore, Store
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.redis import RedisStore
from tests.stores.servers import Server, cluster, watched

BUDGET = 64 * 2**20
KINDS = ["memory", "disk", "redis", "unix", "cluster", "sentinel"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("redis")
    server = Server(folder, "--unixsocket", str(folder / "s"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    nodes = cluster(tmp_path_factory.mktemp("cluster"))
    yield nodes
    for node in nodes:
        node.kill()


@pytest.fixture(scope="session")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    primary, replica, sentinels = watched(tmp_path_factory.mktemp("sentinel"))
    yield sentinels
    for server in (*sentinels, primary, replica):
        server.kill()


Make = Callable[..., Store]


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Opens a store of a kind; all of one test see the same values, and begin with none."""
    opened: list[Store] = []

    def open_(kind: str, ttl: float | None = None, budget: int = BUDGET) -> Store:
        if kind == "memory":
            store: Store = MemoryStore(budget)
        elif kind == "disk":
            store = DiskStore(tmp_path / "store", budget, ttl)
        else:
            store = RedisStore.open(url_of(kind, request), ttl, timeout=2)
            if not any(one.kind == "redis" for one in opened):
                store.client.flushall()
        opened.append(store)
        return store

    yield open_
    for store in opened:
        store.close()


def url_of(kind: str, request: pytest.FixtureRequest) -> str:
    if kind == "cluster":
        nodes = request.getfixturevalue("nodes")
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    if kind == "sentinel":
        sentinels = request.getfixturevalue("sentinels")
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
        return f"redis+sentinel://{hosts}/main"
    server = request.getfixturevalue("server")
    return f"unix://{server.folder}/s" if kind == "unix" else server.url


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, make: Make) -> Store:
    return make(request.param)

"""Stores by name."""

from __future__ import annotations

import pytest

from chunkcache.errors import ConfigError
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.open import open_store
from chunkcache.stores.redis import RedisStore


def test_names_and_their_options(tmp_path, server) -> None:
    memory = open_store("memory:1MiB")
    assert isinstance(memory, MemoryStore) and memory.budget == 2**20
    disk = open_store(f"disk:{tmp_path}/store?budget=20MB&ttl=1.5h")
    assert isinstance(disk, DiskStore) and (disk.budget, disk.ttl) == (20_000_000, 5400.0)
    assert disk.folder == tmp_path / "store"
    disk.close()
    for url in (
        f"{server.url}/1?ttl=7d&timeout=3s",
        f"unix://{server.folder}/s?db=1&ttl=7d&timeout=3s",
    ):
        redis = open_store(url)
        assert isinstance(redis, RedisStore) and redis.ttl == 7 * 86400 * 1000
        settings = redis.client.connection_pool.connection_kwargs
        assert (settings["socket_timeout"], settings["db"]) == (3.0, 1)
        assert redis.client.ping()
        redis.close()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "is no store"),
        ("tape:/dev/st0", "is no store"),
        ("disk:", "names no folder"),
        ("disk:x?budget=many", "not a number of bytes"),
        ("disk:x?size=1", "unknown option 'size'"),
        ("disk:x?ttl=soon", "not a time"),
        ("memory:", "not a number of bytes"),
        ("redis://a?ttl=0", "not a time"),
    ],
)
def test_other_names_are_refused(name: str, why: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=why):
        open_store(name)
    assert not list(tmp_path.iterdir())

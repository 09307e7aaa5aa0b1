"""The folder in the user's cache, and names of stores that may be shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkcache.stores.places import budget, cache_folder, shown

HOME = Path.home()


@pytest.mark.parametrize(
    ("environment", "platform", "wanted"),
    [
        ({"XDG_CACHE_HOME": "/caches"}, "linux", Path("/caches/chunkcache")),
        ({"XDG_CACHE_HOME": "/caches"}, "darwin", Path("/caches/chunkcache")),
        ({}, "linux", HOME / ".cache" / "chunkcache"),
        ({"XDG_CACHE_HOME": ""}, "linux", HOME / ".cache" / "chunkcache"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "linux", HOME / ".cache" / "chunkcache"),
        ({}, "darwin", HOME / "Library" / "Caches" / "chunkcache"),
        ({"LOCALAPPDATA": "/local"}, "win32", Path("/local/chunkcache")),
        ({}, "win32", HOME / ".cache" / "chunkcache"),
        ({"LOCALAPPDATA": "/local"}, "linux", HOME / ".cache" / "chunkcache"),
    ],
)
def test_the_folder(environment: dict[str, str], platform: str, wanted: Path) -> None:
    assert cache_folder(environment, platform) == wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("disk:/tmp/kv?budget=1GiB", "disk:/tmp/kv"),
        ("memory:2GiB", "memory:2GiB"),
        ("redis://host", "redis://host"),
        ("redis://:secret@host:1/2", "redis://host:1/2"),
        ("rediss+cluster://me:secret@a:1,b:2?ttl=1h", "rediss+cluster://a:1,b:2"),
        ("redis://:sec/ret@host", "redis://host"),
        ("redis://:sec?ret@host", "redis://..."),
        ("redis://:sec#ret@host", "redis://..."),
        ("redis://:sec@ret@host", "redis://host"),
        ("redis://host?password=secret", "redis://host"),
        ("redis://host?password=sec@ret", "redis://..."),
        ("unix:///run/redis?password=secret", "unix:///run/redis"),
    ],
)
def test_names_without_passwords(name: str, wanted: str) -> None:
    assert shown(name) == wanted


def test_budgets() -> None:
    assert budget("disk:/tmp/kv") == 10 * 2**30
    assert budget("disk:/tmp/kv?load=always&budget=1GiB") == 2**30
    assert budget("memory:2MiB?hits=1") == 2 * 2**20
    assert budget("redis://host") is None

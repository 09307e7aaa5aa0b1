"""A Redis that is too small: values leave all the time, or none is taken."""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from chunkcache.stores.open import open_store
from tests.faults.conftest import StartRedis
from tests.faults.world import (
    assert_all_whole,
    check,
    check_again,
    count,
    guards,
    kept,
    rows,
    until,
    wrap,
)
from tests.stores.servers import Server

PARTS = 3000  # bytes
ROOM = 500_000  # bytes beside what an empty server takes: some 40 chunks of a tiny model


def shrink(server: Server, policy: str) -> None:
    """Leaves little room."""
    client = server.client()
    client.config_set("maxmemory-policy", policy)
    client.config_set("maxmemory", client.info("memory")["used_memory"] + ROOM)


@pytest.mark.parametrize("part", [None, PARTS], ids=["whole", "in parts"])
def test_values_leave_all_the_time(
    part: int | None, start_redis: StartRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part is not None:
        monkeypatch.setattr("chunkcache.stores.redis.PART", part)
    server, random_ = start_redis(), random.Random(f"leave {part}")
    shrink(server, "allkeys-lru")
    asked = [row for seed in range(8) for row in rows(seed, 3)]
    with wrap("llama", server.url) as cached:
        for number in range(150):
            if random_.random() < 0.5:
                cached.flush()
            check(cached, "llama", random_.choice(asked), (part, number))
            cached.settle(60)
            if number % 10 == 0:
                assert_all_whole([server.url], (part, number))
        assert server.client().info("stats")["evicted_keys"] > 0
        assert count(cached, "loaded") > 0, "some are there now and then"
        assert count(cached, "failed") == count(cached, "corrupt") == 0
        for row in asked[:3]:
            check_again(cached, "llama", row, "redis", "although parts of it left")


def test_a_value_that_lost_a_part_is_written_again(
    start_redis: StartRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its head, which is asked for all the time, would keep its place for ever."""
    monkeypatch.setattr("chunkcache.stores.redis.PART", PARTS)
    server, (row,) = start_redis(), rows("part", 1)
    client = server.client()
    with wrap("llama", server.url) as cached, closing(open_store(server.url)) as store:
        check(cached, "llama", row)
        cached.settle(60)
        before = kept(store)
        for name in client.scan_iter("*:0"):
            client.delete(name)
        assert len(kept(store)) < len(before)
        cached.flush()
        check(cached, "llama", row)
        check_again(cached, "llama", row, "redis")
        assert kept(store) == before


def test_a_full_redis_takes_no_more_and_goes_on(start_redis: StartRedis) -> None:
    server, asked = start_redis(), [row for seed in range(12) for row in rows(seed, 3)]
    shrink(server, "noeviction")
    with wrap("llama", server.url) as cached:
        (guard,) = guards(cached)
        for row in asked:
            check(cached, "llama", row)
            cached.settle(60)
        refused, failed = guard.store.stats().refused, count(cached, "failed")
        assert refused > 0 and failed > 0
        assert cached.stats().stores["redis"]["failures"] == 0 and not guard.open
        cached.flush()
        assert check(cached, "llama", asked[0]).tiers["redis"] > 0, "what is there is still read"
        assert_all_whole([server.url])
        server.client().config_set("maxmemory", 0)
        saved = count(cached, "saved")

        def saves() -> bool:
            cached.flush()
            check(cached, "llama", asked[-1])
            cached.settle(60)
            return count(cached, "saved") > saved

        until(saves, "a store that has room again")
        assert_all_whole([server.url])

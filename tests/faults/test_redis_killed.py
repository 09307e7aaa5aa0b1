"""Redis is killed at any moment while models generate."""

from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from chunkcache.stores.open import open_store
from tests.faults.conftest import StartRedis
from tests.faults.world import (
    KILLS,
    PATIENCE,
    assert_all_whole,
    check,
    check_again,
    count,
    groups,
    kept,
    rows,
    wrap,
)
from tests.stores.servers import Server

PARTS = 3000  # bytes, so that a chunk of a tiny model is cut into several
KEPT = ("--appendonly", "yes")
HOW = {"forgetful": ((), None), "appendonly": (KEPT, None), "in parts": (KEPT, PARTS)}


def kill_and_start(server: Server, random_: random.Random) -> None:
    """Some time from now."""
    before, between = random_.random() * 0.06, random_.random() * 0.03
    time.sleep(before)
    server.kill()
    time.sleep(between)
    server.start()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seed", groups(2))
@pytest.mark.parametrize("how", HOW)
def test_redis_may_be_killed_at_any_moment(
    how: str, seed: int, start_redis: StartRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, part = HOW[how]
    if part is not None:
        monkeypatch.setattr("chunkcache.stores.redis.PART", part)
    server, asked = start_redis(*options), rows((how, seed), 6)
    seen: Counter[str] = Counter()
    with wrap("llama", server.url) as cached, ThreadPoolExecutor(1) as killer:
        for trial in range(KILLS):
            where = f"how={how} seed={seed} trial={trial}"
            random_ = random.Random(where)
            killing = killer.submit(kill_and_start, server, random_)
            ask_meanwhile(cached, asked, killing, random_, where)
            with closing(open_store(server.url)) as store:
                seen["survived"] += len(kept(store))
            assert_all_whole([server.url], where)
            check_again(cached, "llama", random_.choice(asked), "redis", where)
            assert_all_whole([server.url], where)
        assert count(cached, "failed") > 0 and cached.stats().stores["redis"]["failures"] > 0
        assert count(cached, "loaded") > 0 and count(cached, "corrupt") == 0
        cached.store.check()
    assert how == "forgetful" or seen["survived"] > 0


def ask_meanwhile(
    cached: Any,
    asked: list[list[int]],
    killing: Future[None],
    random_: random.Random,
    where: str,
) -> None:
    """Until the server is there again."""
    while not killing.done():
        if random_.random() < 0.5:
            cached.flush()
        check(cached, "llama", random_.choice(asked), where)
    killing.result(PATIENCE)


def test_a_pause_ends_by_itself(start_redis: StartRedis) -> None:
    """With the breaker as it is in earnest."""
    server, (row,) = start_redis(), rows("pause", 1)
    with wrap("llama", server.url) as cached:
        check_again(cached, "llama", row, "redis")
        server.kill()
        cached.flush()
        check(cached, "llama", row)
        assert cached.stats().stores["redis"]["open"]
        server.start()
        check_again(cached, "llama", row, "redis")
        assert not cached.stats().stores["redis"]["open"]

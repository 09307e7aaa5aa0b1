"""The first requests of a production trace through the tree and a naive per-block leaf-LRU."""

from __future__ import annotations

import json
import os
from functools import cache
from itertools import islice
from pathlib import Path

import pytest

from chunkcache.tree import PrefixTree

from .oracle import LeafLRU, run_of

REQUESTS = 1_500
HERE = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CHUNKCACHE_DATA", HERE.parent / "shared" / "data"))
TRACE = DATA / "traces" / "mooncake_conversation.jsonl"


@cache
def requests() -> list[list[int]]:
    if not TRACE.exists():
        reason = f"{TRACE} is missing; set CHUNKCACHE_DATA"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with TRACE.open() as lines:
        return [json.loads(line)["hash_ids"] for line in islice(lines, REQUESTS)]


@cache
def expected(capacity: int) -> list[int]:
    oracle = LeafLRU(capacity)
    return [oracle.request(blocks) for blocks in requests()]


def replay(capacity: int, touch: str) -> list[int]:
    tree = PrefixTree(chunk_size=1, touch=touch)
    hits = []
    for blocks in requests():

        def make_run(first, count, blocks=blocks):
            free = capacity - tree.chunks
            if free < count:
                free += tree.evict(count - free)
            return run_of(blocks, 1, first, min(count, free)) if free else None

        with tree.lease(blocks) as lease:
            hits.append(lease.tokens)
            tree.insert(blocks, make_run)
        assert tree.chunks <= capacity
    tree.check()
    return hits


@pytest.mark.parametrize("touch", ["leaf_first", "root_first"])
@pytest.mark.parametrize("capacity", [300, 1_000, 5_859])
def test_replay_hits_as_often_as_leaf_lru(capacity: int, touch: str) -> None:
    assert replay(capacity, touch) == expected(capacity)

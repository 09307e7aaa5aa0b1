"""Seeded random driving of tree and oracle, with check() after every step.

`CHUNKCACHE_STEPS=1000000 pytest tests/tree/test_random.py` runs longer.
"""

from __future__ import annotations

import os
import random

import pytest

from .pair import Pair

STEPS = int(os.environ.get("CHUNKCACHE_STEPS", "100000"))
PARTS = 8
WEIGHTS = {
    "insert": 24, "lease": 18, "release": 17, "match": 8, "evict": 12, "wait": 5, "expire": 3,
    "pin": 4, "unpin": 6, "remove": 2, "clear": 0.15, "keep": 24, "resume": 8, "evict_snapshots": 4,
}  # fmt: skip


def prompt(rng: random.Random, size: int) -> tuple[int, ...]:
    """Short alphabets and few lengths, so that prompts share, diverge and repeat all the time.

    One in three is the beginning of a longer text instead, so that nodes have several chunks too.
    """
    length = rng.randrange(0, 5 * size + 2)
    if rng.random() < 1 / 3:
        return (rng.randrange(2, 4),) * (length * 2)
    return tuple(
        rng.choices(range(2 if size < 3 else 3), (8, 3, 1)[: 2 if size < 3 else 3], k=length)
    )


def step(pair: Pair, rng: random.Random) -> None:
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    tokens = prompt(rng, pair.size)
    name = rng.choice([None, None, "a", "b"])
    ttl = rng.choice([None, None, None, 1.0, 5.0])
    if kind == "insert":
        pair.insert(
            tokens,
            short=rng.choice([None, None, 1, 2]),
            stop=rng.choice([None] * 6 + [1, 2]),
            fail=rng.choice([None] * 6 + [1, 2]),
            evict=rng.choice([0, 0, 1, 3]),
            name=name,
            pin=rng.random() < 0.05,
            ttl=ttl,
        )
    elif kind == "lease":
        if len(pair.leases) < 6:
            limit = rng.choice([None, max(0, len(tokens) - 1), rng.randrange(6)])
            pair.lease(tokens, limit, count=rng.random() < 0.8)
    elif kind == "release":
        if pair.leases:
            pair.release(rng.randrange(len(pair.leases)))
    elif kind == "match":
        pair.match(tokens, rng.choice([None, rng.randrange(6)]))
    elif kind == "evict":
        pair.evict(rng.randrange(1, 5))
    elif kind == "keep":
        if pair.tree.nodes and rng.random() < 0.7:
            tokens = tuple(rng.choice(list(pair.tree)).prefix.tolist())
        pair.keep(tokens, rng.randrange(len(tokens) // pair.size + 2) * pair.size, rng.randrange(4))
    elif kind == "resume":
        if pair.leases:
            pair.resume(rng.randrange(len(pair.leases)), rng.choice([None, rng.randrange(-1, 9)]))
    elif kind == "evict_snapshots":
        pair.evict_snapshots(rng.randrange(8))
    elif kind == "wait":
        pair.wait(rng.choice([0.5, 1.0, 3.0]))
    elif kind == "pin":
        pair.pin(tokens, name, ttl)
    elif kind == "unpin":
        pair.unpin(rng.choice([tokens, "a", "b"]))
    elif kind == "remove":
        pair.remove(tokens)
    else:
        getattr(pair, kind)()
    if pair.tree.chunks > 24:
        pair.evict(pair.tree.chunks - 16)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_steps_agree_with_the_oracle(part: int) -> None:
    rng = random.Random(part)
    touch = "root_first" if part % 3 == 2 else "leaf_first"
    pair = Pair(1 + part % 4, touch, budget=(float("inf"), 8)[part % 2])
    for _ in range(STEPS // PARTS):
        step(pair, rng)
        pair.check()
    pair.finish()

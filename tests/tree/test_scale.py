"""Deep trees, wide trees, many threads."""

from __future__ import annotations

import random
import threading

import numpy as np

from chunkcache.tree import PrefixTree, SnapshotOrder

from .oracle import State, run_of

DEPTH = 100_000


class Plain:
    """A run that is only a length."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks

    def __len__(self) -> int:
        return self.chunks

    def split(self, chunks: int):
        return Plain(chunks), Plain(self.chunks - chunks)


def test_a_hundred_thousand_nodes_deep() -> None:
    tree = PrefixTree(chunk_size=1, clock=lambda: now[0])
    now = [0.0]
    prompt = np.arange(DEPTH)
    assert tree.insert(prompt, lambda first, count: Plain(1), ttl=1).tokens == DEPTH
    assert tree.nodes == DEPTH and tree.leaves == 1
    assert tree.match(prompt).tokens == DEPTH
    with tree.lease(prompt):
        assert tree.leased_chunks == DEPTH
    tree.pin(prompt)
    tree.unpin(prompt)
    tree.check()
    assert tree.evict(DEPTH // 2) == DEPTH // 2
    assert tree.clear() == DEPTH // 2
    tree.insert(prompt, lambda first, count: Plain(1), ttl=1)
    now[0] = 2.0
    assert tree.expire() == DEPTH
    tree.insert(prompt, lambda first, count: Plain(1))
    del tree  # a chain of a hundred thousand references goes without overflowing the stack


def test_wide_tree() -> None:
    tree = PrefixTree(chunk_size=1)
    for token in range(5_000):
        tree.insert([token], lambda first, count: Plain(1))
    tree.check()
    assert tree.leaves == 5_000 and tree.evict(2_500) == 2_500
    tree.check()
    assert tree.match([2_500]).tokens == 1 and tree.match([2_499]).tokens == 0


def test_threads() -> None:
    live: dict[int, int] = {}
    dropped: list[State] = []
    tree = PrefixTree(
        chunk_size=2,
        on_evict=lambda run: [live.pop(id(p)) for p in run.parts],
        on_drop=dropped.append,
        snapshot_order=SnapshotOrder(40),
    )
    keep, given, errors = [], [], []

    def make(tokens):
        def make_run(first, count):
            if tree.chunks > 60:
                tree.evict(10)
            run = run_of(tokens, 2, first, count)
            run.parts = [list(part) for part in run.parts]  # own identity each
            keep.extend(run.parts)
            live.update((id(part), 1) for part in run.parts)
            return run

        return make_run

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(400):
                tokens = tuple(rng.choices(range(3), k=rng.randrange(14)))
                with tree.lease(tokens) as lease:
                    tree.insert(tokens, make(tokens), ttl=rng.choice([None, 0.001]))
                    seen = [t for p in lease.pieces for part in p.run.parts for t in part]
                    assert tuple(seen[: lease.tokens]) == tokens[: lease.tokens]
                    state = State(rng.randrange(9))
                    if tree.keep(tokens, rng.randrange(len(tokens) // 2 + 1) * 2, state):
                        given.append(state)
                    lease.snapshot()
                if rng.random() < 0.1:
                    tree.pin(tokens, name=str(seed), ttl=0.01)
                if rng.random() < 0.1:
                    tree.remove(tokens)
                tree.evict(rng.randrange(2))
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    tree.check()
    assert tree.leased_chunks == 0 and len(live) == tree.chunks
    tree.clear()
    assert tree.chunks == 0 and not live
    assert len(dropped) == len(given) and set(dropped) == set(given)

"""One order of eviction over several trees: what is worth least leaves, wherever it is."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.tree import LFU, LRU, LeafOrder, PrefixTree

from .oracle import run_of

SIZE = 2
PROMPTS = st.lists(st.integers(0, 2), min_size=SIZE, max_size=10).map(tuple)
STEPS = st.lists(
    st.tuples(st.sampled_from(["insert", "lease", "hold", "evict"]), st.integers(0, 2), PROMPTS),
    max_size=40,
)


def insert(tree: PrefixTree, tokens: tuple[int, ...]) -> None:
    tree.insert(tokens, lambda *span: run_of(tokens, SIZE, *span))


def leaves(trees: list[PrefixTree]) -> dict[tuple[PrefixTree, int], tuple]:
    """All leaves nobody holds, and their priorities."""
    return {
        (tree, node.serial): (node.priority, node.serial)
        for tree in trees
        for node in tree._iterate()
        if not (node.children or node.leases or node.pins)
    }


@settings(max_examples=150)
@given(st.sampled_from([LRU, LFU]), STEPS)
def test_the_least_of_all_trees_leaves(policy, steps) -> None:
    order, lock = LeafOrder(policy()), threading.RLock()
    trees = [PrefixTree(SIZE, leaf_order=order, lock=lock) for _ in range(3)]
    held = []
    for what, which, tokens in steps:
        tree = trees[which]
        if what == "insert":
            insert(tree, tokens)
        elif what == "lease":
            tree.lease(tokens).release()
        elif what == "hold":
            held.append(tree.lease(tokens))
        else:
            before, chunks = leaves(trees), sum(tree.chunks for tree in trees)
            freed = tree.evict(1)
            assert freed == (1 if before else 0) == chunks - sum(tree.chunks for tree in trees)
            gone = before.keys() - leaves(trees).keys()
            assert all(before[one] == min(before.values()) for one in gone)
        for each in trees:
            each.check()
    for lease in held:
        lease.release()
    stored = sum(tree.chunks for tree in trees)
    assert trees[0].evict(1000) == stored and not order.entries


def test_a_tree_gives_up_what_another_needs() -> None:
    order, lock, left = LeafOrder(), threading.RLock(), []
    trees = [
        PrefixTree(SIZE, leaf_order=order, lock=lock, on_evict=lambda run, n=n: left.append(n))
        for n in range(2)
    ]
    insert(trees[0], (1, 2))
    insert(trees[1], (1, 2, 3, 4))
    insert(trees[0], (5, 6))
    assert trees[0].evict(2) == 2 and left == [0, 1]  # not the younger (5, 6) of its own
    assert [tree.chunks for tree in trees] == [1, 1]


def test_one_policy_decides() -> None:
    with pytest.raises(ValueError, match="leaf_order"):
        PrefixTree(policy=LFU(), leaf_order=LeafOrder())

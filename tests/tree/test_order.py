"""One order of eviction over several trees: what is worth least leaves, wherever it is."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.tree import LFU, LRU, LeafOrder, Policy, PrefixTree, Priority

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


def sizes_of(trees: list[PrefixTree]) -> dict[tuple[PrefixTree, int], int]:
    return {(tree, node.serial): node.chunks for tree in trees for node in tree._iterate()}


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
            before = leaves(trees)
            sizes = sizes_of(trees)
            assert tree.evict(1) == (1 if before else 0)
            after = sizes_of(trees)
            shorter = [one for one, chunks in sizes.items() if after.get(one, 0) < chunks]
            assert sum(sizes.values()) - sum(after.values()) == len(shorter) == bool(before)
            assert all(before[one] == min(before.values()) for one in shorter)
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


def test_one_policy_and_one_lock() -> None:
    with pytest.raises(ValueError, match="leaf_order"):
        PrefixTree(policy=LFU(), leaf_order=LeafOrder())
    with pytest.raises(ValueError, match="share a lock"):
        PrefixTree(leaf_order=LeafOrder())


def test_a_priority_that_cannot_be_sorted_is_refused() -> None:
    tree = PrefixTree(SIZE, policy=Priority(lambda node: 0.0))
    insert(tree, (1, 2))
    tree._structure.order.policy = Unsortable()
    with pytest.raises(ValueError, match="gives nan"):
        tree.lease((1, 2, 3))
    with pytest.raises(ValueError, match="gives nan"):
        insert(tree, (5, 6))
    tree.check()


class Unsortable(Policy):
    def priority(self, node, now):
        return float("nan")


def test_what_expires_anywhere_is_known_before_it_is_due() -> None:
    order, lock, now = LeafOrder(), threading.RLock(), [0.0]
    trees = [PrefixTree(SIZE, leaf_order=order, lock=lock, clock=lambda: now[0]) for _ in range(2)]
    assert order.soonest == float("inf") == trees[0].next_deadline
    trees[0].insert((1, 2), lambda *span: run_of((1, 2), SIZE, *span), ttl=9)
    insert(trees[1], (3, 4))
    trees[1].pin((3, 4), ttl=5)
    assert order.soonest == 5 == trees[1].next_deadline and trees[0].next_deadline == 9
    now[0] = 6.0
    assert trees[1].expire() == 0 and trees[1].next_deadline == float("inf")

"""One order of eviction over several trees: what is worth least leaves, wherever it is."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.errors import ConfigError
from chunkcache.tree import (
    ARC,
    GDLF,
    LFU,
    LRU,
    PGDSF,
    POLICIES,
    S3FIFO,
    SLRU,
    LeafOrder,
    Policy,
    PrefixTree,
    Priority,
    TwoQueues,
    named_policy,
)

from .oracle import Chunks, run_of

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
    with pytest.raises(ValueError, match="nan"):
        insert(PrefixTree(SIZE, policy=Priority(lambda node: float("nan"))), (1, 2))


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


# -- policies


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), st.integers(1, 12), STEPS)
def test_every_policy_keeps_every_invariant(name, capacity, steps) -> None:
    """Whatever is inserted, leased, held and evicted."""
    order, lock = LeafOrder(named_policy(name), capacity), threading.RLock()
    tree = PrefixTree(SIZE, leaf_order=order, lock=lock)
    held = []
    for what, _, tokens in steps:
        if what == "insert":
            insert(tree, tokens)
        elif what == "lease":
            tree.lease(tokens).release()
        elif what == "hold":
            held.append(tree.lease(tokens))
        else:
            free = tree.evictable_chunks
            assert tree.evict(2) == min(2, free)
        tree.check()
    for lease in held:
        lease.release()
    tree.evict(1000)
    tree.check()
    assert not tree.chunks and order.sizes == [0] * len(order.sizes)


def order_of_leaving(policy: Policy, capacity: int, uses: str) -> str:
    """Letters are prompts of one chunk; each is leased, then stored. What leaves, in that order."""
    left: list[str] = []
    tree = PrefixTree(
        1,
        leaf_order=LeafOrder(policy, capacity),
        lock=threading.RLock(),
        on_evict=lambda run: left.append(chr(run.parts[0][0])),
    )
    for letter in uses:
        ids = (ord(letter),)

        def make_run(*span: int, ids: tuple[int, ...] = ids) -> Chunks:
            if tree.chunks == capacity:
                tree.evict(1)
            return run_of(ids, 1, *span)

        with tree.lease(ids):
            tree.insert(ids, make_run)
    return "".join(left)


def test_policies_by_hand() -> None:
    """Worked out with pencil and paper from the papers."""
    assert order_of_leaving(LRU(), 3, "abcabda") == "c"
    assert order_of_leaving(LFU(), 3, "aabbcdde") == "ca"
    # a is protected (60 % of 5 are 3), b to f pass by
    assert order_of_leaving(SLRU(0.6), 5, "aabcdefgh") == "bcd"
    # three may be protected; of four the first falls back behind e, which leaves before it
    assert order_of_leaving(SLRU(0.6), 5, "aabbccddefgh") == "eaf"
    # 2q: first in, first out while more than a quarter is new; b comes back from memory and is old then
    assert order_of_leaving(TwoQueues(), 4, "abcdeab") == "abc"
    assert order_of_leaving(TwoQueues(), 4, "aabcdea") == "ab"
    # s3-fifo: a and b were used twice more and go to the main queue when it is their turn
    assert order_of_leaving(S3FIFO(), 4, "aaabbbcdef") == "cd"
    assert order_of_leaving(S3FIFO(), 4, "abcdefg") == "abc"
    # arc: what is new leaves first; b comes back, so one new prompt may stay, f, and a leaves for g
    assert order_of_leaving(ARC(), 4, "aabcdebfeg") == "bcda"
    assert order_of_leaving(ARC(), 4, "aabcdexfeg") == "bcdx"
    # a lasts two rounds, the others one
    assert order_of_leaving(GDLF(), 2, "aabcdef") == "bacd"
    assert order_of_leaving(GDLF(), 2, "aaabcdef") == "bcad"
    # the clock rises with what leaves: c is worth as much as a, which was used twice, but long ago
    assert order_of_leaving(PGDSF(), 2, "aabcdef") == "bacd"


def test_what_is_not_used_for_a_while_expires() -> None:
    now = [0.0]
    order = LeafOrder(named_policy("ttl:10"))
    tree = PrefixTree(SIZE, leaf_order=order, lock=threading.RLock(), clock=lambda: now[0])
    insert(tree, (1, 2, 3, 4))
    insert(tree, (5, 6))
    now[0] = 9.0
    tree.lease((1, 2, 7)).release()
    now[0] = 11.0
    assert tree.expire() == 2 and tree.match((1, 2, 3, 4)).tokens == 2
    now[0] = 20.0
    assert tree.expire() == 1


def test_what_was_pinned_expires_again() -> None:
    """After its last use, once the pin is gone; meanwhile not."""
    now = [0.0]
    order = LeafOrder(named_policy("ttl:10"))
    tree = PrefixTree(SIZE, leaf_order=order, lock=threading.RLock(), clock=lambda: now[0])
    tree.insert((1, 2, 3, 4), lambda *span: run_of((1, 2, 3, 4), SIZE, *span), name="a", pin=True)
    now[0] = 1000.0
    assert tree.expire() == 0
    tree.lease((1, 2, 9)).release()
    assert tree.unpin("a")
    tree.check()
    assert tree.expire() == 1 and tree.match((1, 2, 3, 4)).tokens == 2
    now[0] = 1011.0
    assert tree.expire() == 1
    tree.check()


def test_policies_remember_no_more_than_there_is() -> None:
    """Without a capacity too."""
    policy = ARC()
    tree = PrefixTree(1, policy=policy)
    for number in range(300):
        tree.insert((number,), lambda *span, n=number: run_of((n,), 1, *span))
        tree.evict(max(0, tree.chunks - 10))
    assert sum(gone.chunks for gone in policy._gone) <= 10


@pytest.mark.parametrize("name", ["fifo", "ttl:", "ttl:-1", "ttl:nan", "LRU", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="these are: lru"):
        named_policy(name)

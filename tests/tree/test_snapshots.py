"""Snapshots: where they belong, when they leave, and in which order."""

from __future__ import annotations

import pytest

from chunkcache.errors import ReleasedLeaseError
from chunkcache.tree import PrefixTree, SnapshotOrder

from .oracle import State
from .test_edges import PROMPT, World

OTHER = (*PROMPT[:8], *range(8))


class Keeping(World):
    """A world that names its snapshots by position and remembers which left."""

    def __init__(self, budget: float = float("inf"), **how) -> None:
        self.dropped: list[State] = []
        order = SnapshotOrder(budget)
        super().__init__(on_drop=self.dropped.append, snapshot_order=order, **how)

    def keep(self, tokens, *positions: int, size: int = 1) -> list[State]:
        states = [State(size) for _ in positions]
        for position, state in zip(positions, states, strict=True):
            assert self.tree.keep(tokens, position, state), position
        return states

    def positions(self, tokens) -> list[int]:
        found = {self.tree.snapshot_at(tokens, limit) for limit in range(len(tokens) + 1)}
        return sorted(resume.position for resume in found if resume is not None)


@pytest.fixture
def world():
    world = Keeping()
    yield world
    world.tree.check()


def test_the_deepest_within_limit_and_match(world) -> None:
    world.insert(PROMPT)
    states = dict(zip((0, 4, 12), world.keep(PROMPT, 0, 4, 12), strict=True))
    for limit, position in ((0, 0), (3, 0), (4, 4), (11, 4), (12, 12), (99, 12), (None, 12)):
        assert world.tree.snapshot_at(PROMPT, limit) == (position, states[position])
        with world.tree.lease(PROMPT) as lease:
            assert lease.snapshot(limit) == (position, states[position])
    assert world.tree.snapshot_at((*PROMPT[:11], 1)).position == 4, "the match ends at 11"
    with world.tree.lease(PROMPT, limit=11) as lease:
        assert lease.snapshot().position == 4 and lease.snapshot(-1) is None
    assert world.tree.snapshot_at((1,)) == (0, states[0])


def test_what_cannot_be_kept(world) -> None:
    world.insert(PROMPT)
    assert not world.tree.keep(PROMPT, 20, State()), "behind what is stored"
    assert not world.tree.keep(PROMPT[:3], 4, State()), "behind the tokens"
    assert not world.tree.keep((*PROMPT[:7], 1), 8, State()), "another prefix"
    for position in (-4, 3):
        with pytest.raises(ValueError, match="multiple of 4"):
            world.tree.keep(PROMPT, position, State())
    with pytest.raises(ValueError, match="-1 bytes"):
        world.tree.keep(PROMPT, 4, State(-1))
    assert world.tree.snapshots == 0 and world.dropped == []


def test_the_first_one_stays(world) -> None:
    world.insert(PROMPT)
    (first,) = world.keep(PROMPT, 8)
    assert not world.tree.keep(PROMPT, 8, State())
    assert world.tree.snapshot_at(PROMPT).snapshot is first and world.tree.snapshots == 1


def test_an_empty_tree_may_have_one_at_position_0(world) -> None:
    (state,) = world.keep((), 0, size=7)
    assert world.tree.snapshot_at(PROMPT) == (0, state) and world.tree.snapshot_bytes == 7
    with world.tree.lease(PROMPT) as lease:
        assert lease.snapshot() == (0, state)
    assert world.tree.clear() == 0 and world.dropped == [state]


def test_splits_take_each_to_its_half(world) -> None:
    world.insert(PROMPT)
    world.keep(PROMPT, 4, 8, 12, 16)
    world.insert(OTHER)
    assert [(n.start, n.snapshots) for n in world.tree] == [(0, 2), (8, 0), (8, 2)]
    assert world.positions(PROMPT) == [4, 8, 12, 16] and world.positions(OTHER) == [4, 8]
    world.keep(OTHER, 12, size=5)
    assert [n.snapshot_bytes for n in world.tree] == [2, 5, 2]
    assert world.tree.snapshot_bytes == 9


def test_they_leave_with_their_chunk(world) -> None:
    world.insert(PROMPT)
    states = world.keep(PROMPT, 0, 4, 12, 16)
    world.tree.evict(1)
    assert world.dropped == states[3:], "trimmed"
    world.tree.remove(PROMPT[:12])
    assert world.dropped == [states[3], states[2]] and world.positions(PROMPT) == [0, 4]
    world.tree.evict(9)
    assert world.positions(PROMPT) == [0] and world.tree.chunks == 0
    world.insert(PROMPT)
    assert world.positions(PROMPT) == [0], "not back with the chunks"


def test_they_expire_with_their_chunk(world) -> None:
    world.insert(PROMPT[:8])
    world.insert(PROMPT, ttl=5)
    states = world.keep(PROMPT, 8, 16)
    lease = world.tree.lease(PROMPT)
    world.now = 6.0
    assert world.tree.snapshot_at(PROMPT) == (8, states[0])
    assert not world.tree.keep(PROMPT, 12, State())
    assert lease.snapshot() == (16, states[1]), "as its KV, until it is released"
    lease.release()
    assert world.dropped == states[1:]
    with pytest.raises(ReleasedLeaseError):
        lease.snapshot()


def test_what_expires_leaves_before_what_lives(world) -> None:
    world.insert(PROMPT)
    world.insert(OTHER, ttl=5)
    world.keep(PROMPT, 16)
    dying = world.keep(OTHER, 12, 16, size=2)
    world.now = 6.0
    assert world.tree.evict_snapshots(3) == 4 and set(world.dropped) == set(dying)


def test_the_least_recently_resumed_leaves_first(world) -> None:
    world.insert(PROMPT)
    world.insert(OTHER)
    (old,) = world.keep(OTHER, 16)
    world.tree.lease(PROMPT).release()
    new = world.keep(PROMPT, 16)
    with world.tree.lease(OTHER) as lease:
        world.tree.snapshot_at(PROMPT)
        assert lease.snapshot().snapshot is old
        assert world.tree.evict_snapshots(1) == 1 and world.dropped == new
        assert world.tree.evict_snapshots(9) == 1 and lease.snapshot() is None
    assert world.tree.chunks == 6, "chunks stay"


def test_of_equally_old_ones_those_that_save_least_leave_first(world) -> None:
    long = tuple(range(48))
    world.insert(long)
    states = world.keep(long, 0, *range(4, 36, 4), 44)
    world.tree.evict_snapshots(4)
    assert world.positions(long) == [0, 8, 16, 24, 32, 44], "thinned, not cut off"
    world.tree.evict_snapshots(5)
    assert world.positions(long) == [0], "work before the first token is worth most"
    assert world.tree.evict_snapshots(1) == 1 and world.dropped[-1] is states[0]


def test_savings_are_measured_across_nodes(world) -> None:
    world.insert(PROMPT[:8])
    world.insert(PROMPT)
    world.keep(PROMPT, 8, 12)
    assert world.tree.evict_snapshots(1) == 1 and world.positions(PROMPT) == [8]
    world.keep(PROMPT, 4)
    assert world.tree.evict_snapshots(1) == 1 and world.positions(PROMPT) == [8]


def test_a_pinned_prompt_stays_resumable(world) -> None:
    world.keep((), 0)
    world.insert(PROMPT, pin=True, name="bot")
    assert world.tree.evict_snapshots(9) == 0, "there is nothing but the root's"
    world.keep(PROMPT, 4, 8, 12)
    assert world.tree.evict_snapshots(9) == 2 and world.positions(PROMPT) == [0, 12]
    world.keep(PROMPT, 16)
    assert world.tree.evict_snapshots(9) == 1 and world.positions(PROMPT) == [0, 16]
    world.tree.unpin("bot")
    assert world.tree.evict_snapshots(9) == 2 and world.tree.snapshots == 0


def test_a_pin_that_ends_lets_go_and_one_that_is_split_does_not(world) -> None:
    world.insert(PROMPT)
    world.keep(PROMPT, 4, 8, 12, 16)
    world.tree.pin(PROMPT[:12], ttl=5)
    world.insert(OTHER)
    world.tree.check()
    assert world.tree.evict_snapshots(9) == 2 and world.positions(PROMPT) == [8, 12]
    world.now = 5.0
    assert world.tree.evict_snapshots(9) == 2


def test_a_budget_makes_room_or_refuses() -> None:
    world = Keeping(budget=4)
    world.insert(PROMPT)
    world.insert(OTHER)
    old = world.keep(PROMPT, 4, 16, size=2)
    assert not world.tree.keep(PROMPT, 12, State(5)) and world.dropped == []
    world.tree.lease(OTHER).release()
    world.keep(OTHER, 16, size=3)
    assert world.dropped == old, "one was not enough"
    world.tree.pin(OTHER)
    assert not world.tree.keep(PROMPT, 8, State(2)) and world.tree.snapshot_bytes == 3
    assert world.tree._structure.snapshots.order.refused == 2
    world.tree.check()


def test_a_deeper_one_takes_over_from_the_pinned_one() -> None:
    world = Keeping(budget=1)
    world.insert(PROMPT, pin=True)
    for position in (4, 16):
        world.keep(PROMPT, position)
        world.tree.check()
    assert not world.tree.keep(PROMPT, 8, State()) and world.positions(PROMPT) == [16]
    world.tree.check()


def test_a_deeper_one_that_is_refused_takes_over_nothing() -> None:
    world = Keeping(budget=2)
    world.insert(PROMPT, pin=True)
    world.keep(PROMPT, 4, 8)
    assert not world.tree.keep(PROMPT, 16, State(5)) and world.dropped == []
    world.tree.check()
    assert world.tree.evict_snapshots(9) == 1 and world.positions(PROMPT) == [8]


def test_trees_with_one_order_share_a_budget() -> None:
    order, left = SnapshotOrder(2), []
    lock = PrefixTree()._lock
    trees = [PrefixTree(on_drop=left.append, lock=lock, snapshot_order=order) for _ in range(3)]
    states = [State() for _ in trees]
    for tree, state in zip(trees, states, strict=True):
        tree.lease([]).release()
        assert tree.keep([], 0, state)
    assert left == states[:1] and [tree.snapshots for tree in trees] == [0, 1, 1]
    with trees[1].lease([]) as lease:
        lease.snapshot()
    assert trees[1].evict_snapshots(1) == 1 and left == [states[0], states[2]]
    for tree in trees:
        tree.check()


@pytest.mark.parametrize("harm", ["position", "bytes", "saves", "used", "node", "owner"])
def test_check_sees_harm(harm) -> None:
    world = Keeping()
    world.insert(PROMPT)
    world.keep(PROMPT, 4, 8)
    (node,) = world.tree
    setattr(node._snapshots[1], harm, 7)
    with pytest.raises(AssertionError, match="tree:"):
        world.tree.check()

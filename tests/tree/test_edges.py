"""Each edge of matching, inserting, leasing and leaving, one by one."""

from __future__ import annotations

import pytest

from chunkcache.errors import ReleasedLeaseError, RunLengthError
from chunkcache.tree import (
    LFU,
    Lease,
    Miss,
    PrefixTree,
    Priority,
)

from .oracle import Chunks, run_of

SIZE = 4
PROMPT = tuple(range(100, 118))  # four whole chunks and two tokens


class World:
    """A tree with a fake clock that remembers what left."""

    def __init__(self, **how) -> None:
        self.now = 0.0
        self.left: list[tuple[int, ...]] = []
        self.tree = PrefixTree(
            SIZE, clock=lambda: self.now, on_evict=lambda run: self.left.extend(run.parts), **how
        )

    def insert(self, tokens, **how):
        return self.tree.insert(tokens, lambda *span: run_of(tokens, SIZE, *span), **how)


@pytest.fixture
def world():
    world = World()
    yield world
    world.tree.check()


def test_empty_tree_and_empty_prompt(world) -> None:
    assert world.tree.match([]) == (0, (), Miss.NONE, world.tree.match([]).node)
    assert world.tree.match(PROMPT).reason is Miss.NEVER_SEEN
    assert world.insert([])[:2] == (0, 0) and world.insert([]).complete
    with world.tree.lease([]) as lease:
        assert lease.tokens == 0 and lease.pieces == ()
    assert world.tree.evict(5) == world.tree.clear() == world.tree.remove([]) == 0
    assert world.tree.pin([]) == 0 and not world.tree.unpin([]) and not world.tree.unpin("x")


def test_shorter_than_a_chunk(world) -> None:
    assert world.insert(PROMPT[:3]).tokens == 0
    assert world.tree.match(PROMPT[:3]).reason is Miss.TOO_SHORT
    world.insert(PROMPT)
    assert world.tree.match(PROMPT[:3])[0] == 3  # inside the first chunk
    assert world.tree.match(PROMPT[:3]).reason is Miss.NONE


def test_whole_prompt_stored(world) -> None:
    assert world.insert(PROMPT)[:2] == (16, 16)
    assert world.insert(PROMPT)[:2] == (16, 0)
    found = world.tree.match(PROMPT)
    assert (found.tokens, found.reason) == (16, Miss.TOO_SHORT)
    assert world.tree.match(PROMPT[:16]).reason is Miss.NONE
    assert world.tree.nodes == world.tree.leaves == 1 and world.tree.chunks == 4


@pytest.mark.parametrize("at", range(17))
def test_divergence_at_every_token(world, at) -> None:
    world.insert(PROMPT[:16])
    other = (*PROMPT[:at], *range(900, 920))
    found = world.tree.match(other)
    assert found.tokens == at and found.reason is Miss.NEVER_SEEN
    assert world.tree.nodes == 1, "match changes nothing"
    new = len(other) // SIZE * SIZE - at // SIZE * SIZE
    assert world.insert(other)[:2] == (len(other) // SIZE * SIZE, new)
    world.tree.check()
    assert world.tree.match(other).tokens == len(other) // SIZE * SIZE
    assert world.tree.match(PROMPT).tokens == 16
    assert world.left == [], "a split copies and frees nothing"


@pytest.mark.parametrize("limit", range(20))
def test_limit(world, limit) -> None:
    world.insert(PROMPT)
    found = world.tree.match(PROMPT, limit)
    assert found.tokens == min(16, limit)
    assert (found.reason is Miss.NONE) == (limit <= 16)
    with world.tree.lease(PROMPT, limit) as lease:
        assert lease.tokens == min(16, limit)
        assert world.tree.leased_chunks == -(-lease.tokens // SIZE), "no more than needed"
        assert [p.start for p in lease.pieces] in ([], [0])
    assert world.tree.match(PROMPT, -1).tokens == 0


def test_limit_prefers_the_chunk_that_is_stored_whole(world) -> None:
    for last in (1, 2, 3):
        world.insert((*PROMPT[:7], last))
    with world.tree.lease((*PROMPT[:7], 2), limit=7) as lease:
        assert lease.node.prefix.tolist() == [*PROMPT[:7], 2]


def test_insert_limit(world) -> None:
    assert world.insert(PROMPT, limit=11)[:2] == (8, 8)


def test_nearest_neighbour_inside_a_chunk(world) -> None:
    for third in range(0, 100, 10):
        world.insert((1, 2, third, 4))
    assert world.tree.match((1, 2, 50, 9)).tokens == 3
    assert world.tree.match((1, 2, 55, 9)).tokens == 2
    assert world.tree.match((1, 3, 50, 4)).tokens == 1
    assert world.tree.match((1, 2, 90)).tokens == 3
    assert world.tree.match((0, 2, 90)).tokens == 0


def test_removal_in_any_order(world) -> None:
    a, b = PROMPT[:16], (*PROMPT[:8], *range(8))
    for first, second in ((a, b), (b, a)):
        world.insert(a)
        world.insert(b)
        assert world.tree.remove(first) == 1  # its last chunk and what is below
        assert world.tree.match(first).tokens == 12 and world.tree.match(second).tokens == 16
        assert world.tree.match(first).reason is Miss.EVICTED
        assert world.tree.remove(second[:12]) == 2
        assert world.tree.remove(second) == 0
        assert world.tree.remove(first[:4]) == 3
        assert world.tree.nodes == 0
        world.tree.check()


def test_remove_waits_for_leases_and_ends_pins(world) -> None:
    world.insert(PROMPT, pin=True, name="x")
    with world.tree.lease(PROMPT):
        assert world.tree.remove(PROMPT[:4]) == 0
    assert world.tree.remove(PROMPT[:4]) == 4
    assert world.tree.pinned_chunks == 0 and not world.tree.names


def test_leases_across_splits(world) -> None:
    world.insert(PROMPT)
    lease = world.tree.lease(PROMPT)
    (before,) = lease.pieces
    version = world.tree.version
    other = (*PROMPT[:8], *range(8))
    world.insert(other)
    assert world.tree.version > version and lease.match.pieces == (before,)
    assert [(p.start, p.tokens) for p in lease.pieces] == [(0, 8), (8, 8)]
    second = world.tree.lease(PROMPT)
    assert [p.run for p in second.pieces] == [p.run for p in lease.pieces]
    assert world.tree.evict(100) == 2 and world.tree.chunks == world.tree.leased_chunks == 4
    lease.release()
    lease.release()
    assert lease.released and world.tree.evict(1) == 0
    with pytest.raises(ReleasedLeaseError):
        _ = lease.pieces
    second.release()
    assert world.tree.evictable_chunks == 4


def test_a_lease_is_released_by_an_exception(world) -> None:
    world.insert(PROMPT)
    with pytest.raises(KeyError), world.tree.lease(PROMPT) as lease:
        assert isinstance(lease, Lease) and "held" in repr(lease)
        raise KeyError
    assert world.tree.leased_chunks == 0 and "released" in repr(lease)


def test_eviction_trims_the_tail_and_only_what_is_needed(world) -> None:
    world.insert(PROMPT)
    assert world.tree.evict(1) == 1 and world.left == [PROMPT[12:16]]
    assert world.tree.evict(2) == 2 and world.tree.match(PROMPT).tokens == 4
    assert world.tree.match(PROMPT).reason is Miss.EVICTED
    assert world.tree.evict(9) == 1 and world.tree.nodes == 0


def test_the_least_recently_used_leaf_leaves_first(world) -> None:
    a, b = (1,) * 8, (2,) * 8
    world.insert(a)
    world.insert(b)
    world.tree.lease(a).release()
    world.tree.evict(3)
    assert world.tree.match(a).tokens == 4 and world.tree.match(b).tokens == 0


def test_other_policies() -> None:
    a, b = (1,) * 8, (2,) * 8
    for policy in (LFU(), Priority(lambda node: -node.tokens[0])):
        world = World(policy=policy)
        world.insert(a)
        world.tree.lease(a).release()
        world.insert(b)
        world.tree.evict(2)
        assert world.tree.match(a).tokens == 8 and world.tree.match(b).tokens == 0
        world.tree.check()


def test_a_failing_policy_leaves_the_tree_valid() -> None:
    ready = [True]

    def rank(node):
        if not ready[0]:
            raise KeyError("rank")
        return 0

    world = World(policy=Priority(rank))
    world.insert(PROMPT)
    ready[0] = False
    with pytest.raises(KeyError):
        world.tree.lease(PROMPT)
    with pytest.raises(KeyError):
        world.insert((*PROMPT[:8], *range(8)))
    assert world.tree.leased_chunks == 0
    ready[0] = True
    world.tree.check()
    assert len(world.left) == 2, "the run that could not be ranked is given back"
    assert world.tree.clear() == 4


def test_eviction_inside_make_run_spares_the_path(world) -> None:
    world.insert(PROMPT[:8])
    longer = PROMPT[:16]

    def make_run(first, count):
        assert world.tree.evict(100) == 0 and world.tree.leased_chunks == first
        world.tree.check()
        return run_of(longer, SIZE, first, 1)

    assert world.tree.insert(longer, make_run)[:2] == (16, 8)
    assert world.tree.nodes == 3


def test_make_run_may_store_the_same_chunk_itself(world) -> None:
    def make_run(first, count):
        world.insert(PROMPT)
        return run_of(PROMPT, SIZE, first, count)

    assert world.tree.insert(PROMPT, make_run)[:2] == (16, 0)
    assert len(world.left) == 4, "the second run is given back"


def test_none_from_make_run_keeps_what_is_there(world) -> None:
    runs = iter([run_of(PROMPT, SIZE, 0, 1), None])
    result = world.tree.insert(PROMPT, lambda *span: next(runs), name="part", pin=True)
    assert (result.tokens, result.new_tokens, result.complete) == (4, 4, False)
    assert world.tree.names["part"].token_count == 4 and world.tree.evict(1) == 0
    assert world.tree.insert((9,) * 4, lambda *span: None, pin=True, name="none").tokens == 0
    assert set(world.tree.names) == {"part"}


def test_an_exception_in_make_run_propagates(world) -> None:
    def make_run(first, count):
        if first:
            raise MemoryError
        return run_of(PROMPT, SIZE, 0, 1)

    with pytest.raises(MemoryError):
        world.tree.insert(PROMPT, make_run)
    assert world.tree.match(PROMPT).tokens == 4 and world.tree.evictable_chunks == 1


@pytest.mark.parametrize("length", [0, 5])
def test_runs_of_a_wrong_length_are_given_back(world, length) -> None:
    run = Chunks([(1, 1, 1, 1)] * length)
    with pytest.raises(RunLengthError):
        world.tree.insert(PROMPT, lambda *span: run)
    assert len(world.left) == length and world.tree.nodes == 0


def test_a_wrong_split_is_refused(world) -> None:
    class Odd(Chunks):
        def split(self, chunks):
            return Chunks(self.parts[:1]), Chunks(self.parts[1:])

    world.tree.insert(PROMPT, lambda first, count: Odd(run_of(PROMPT, SIZE, first, count).parts))
    with pytest.raises(RunLengthError):
        world.tree.lease(PROMPT[:8])
    assert world.tree.leased_chunks == 0


def test_hits_survive_splits(world) -> None:
    world.insert(PROMPT)
    for limit in (16, 16, 6, 9):
        world.tree.lease(PROMPT, limit).release()
    seen = [(n.start, n.token_count, n.hits, n.hit_tokens) for n in world.tree]
    assert seen == [(0, 8, 4, 30), (8, 4, 3, 9), (12, 4, 2, 8)]


def test_nodes_show_themselves(world) -> None:
    world.now = 3.0
    world.insert(PROMPT, name="shop")
    world.insert((*PROMPT[:8], *range(8)), ttl=2)
    nodes = list(world.tree)
    assert [n.start for n in nodes] == [0, 8, 8] and len(world.tree) == 3
    assert [n.expires for n in nodes] == [None, 5.0, None], "siblings in token order"
    assert nodes[2].tokens.tolist() == list(PROMPT[8:16]) and nodes[2].names == ("shop",)
    assert nodes[1].prefix.tolist() == [*PROMPT[:8], *range(8)]
    assert nodes[1].parent is nodes[0] and nodes[0].created == nodes[0].last_used == 3.0
    assert "names=('shop',)" in repr(nodes[2]) and "nodes=3" in repr(world.tree)


def test_bad_arguments() -> None:
    for bad in ({"chunk_size": 0}, {"touch": "both"}):
        with pytest.raises(ValueError):
            PrefixTree(**bad)
    for ttl in (0, -1.0, float("nan")):
        with pytest.raises(ValueError):
            World().insert(PROMPT, ttl=ttl)
        with pytest.raises(ValueError):
            World().tree.pin(PROMPT, ttl=ttl)


@pytest.mark.parametrize("harm", ["chunks", "leases", "pins", "data", "order", "priority"])
def test_check_sees_harm(harm) -> None:
    world = World()
    world.insert(PROMPT)
    world.insert((*PROMPT[:8], *range(8)))
    node = list(world.tree)[-1]
    if harm == "order":
        node.parent._order.pop()
    else:
        setattr(node, harm, b"1234" * 8 if harm == "data" else 7)
    with pytest.raises(AssertionError, match="tree:"):
        world.tree.check()


# -- what is stored behind a match


def test_behind_a_match_lies_what_would_have_matched(world: World) -> None:
    world.insert(PROMPT[:8])
    world.insert((*PROMPT[:4], 1, 2, 3, 4))
    for asked, wanted in [
        (PROMPT[:3], PROMPT[3:5]),  # in a chunk, of which the rest and no more is read
        ((*PROMPT[:4], 9), (1, 2)),  # where ways part: the newest
        ((*PROMPT[:6], 9), PROMPT[6:8]),
        (PROMPT[:8], ()),
        ((9, 9), (PROMPT[0], PROMPT[1])),  # nothing matched
    ]:
        with world.tree.lease(asked) as lease:
            found = lease.behind(2)
            assert tuple(found) == wanted[: len(found)]
            assert bool(found) == bool(wanted)
    with pytest.raises(ReleasedLeaseError):
        lease.behind(2)


def test_nothing_lies_behind_in_an_empty_tree(world: World) -> None:
    with world.tree.lease(PROMPT) as lease:
        assert lease.behind(5) == []

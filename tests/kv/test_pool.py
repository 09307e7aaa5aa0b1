"""The pool against a plain set of slots, and how the arena grows."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from chunkcache.errors import ConfigError
from chunkcache.kv import Arena, ChunkLayout, LayerShape, Pool
from chunkcache.kv.store import PrefixStore
from tests.models import DEVICE

LAYOUT = ChunkLayout(
    (LayerShape(2, 3, 5), LayerShape(1, 4, 4)), 4, torch.float32, torch.device(DEVICE)
)


def slots(run):
    return {(run.slab, run.start + number) for number in range(len(run))}


class PoolMachine(RuleBasedStateMachine):
    """Allocates, splits and frees at random; no slot is ever handed out twice."""

    runs = Bundle("runs")

    def __init__(self):
        super().__init__()
        self.pool = Pool(LAYOUT, LAYOUT.chunk_bytes * 23, slab_bytes=LAYOUT.chunk_bytes * 7)
        self.taken = set()

    @rule(target=runs, chunks=st.integers(1, 12))
    def allocate(self, chunks):
        run = self.pool.allocate(chunks)
        if run is None:
            assert len(self.taken) == self.pool.capacity
            return multiple()
        assert 1 <= len(run) <= chunks
        assert not slots(run) & self.taken
        self.taken |= slots(run)
        for layer in range(2):
            keys, values = run.layer(layer)
            assert len(keys) == len(values) == len(run)
        return run

    @rule(run=consumes(runs))
    def free(self, run):
        self.pool.free(run)
        self.taken -= slots(run)

    @rule(target=runs, run=consumes(runs), data=st.data())
    def split(self, run, data):
        if len(run) == 1:
            return run
        before = run.layer(0)[0]
        head, rest = run.split(data.draw(st.integers(1, len(run) - 1)))
        together = [head.layer(0)[0], rest.layer(0)[0]]
        assert before.data_ptr() == together[0].data_ptr(), "nothing is copied"
        assert slots(head) | slots(rest) == slots(run)
        return multiple(head, rest)

    @invariant()
    def walk(self):
        self.pool.check()
        assert self.pool.used == len(self.taken)
        assert self.pool.used_bytes <= self.pool.reserved_bytes <= 23 * LAYOUT.chunk_bytes


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_freed_neighbours_become_one_range():
    pool = Pool(LAYOUT, LAYOUT.chunk_bytes * 6)
    runs = [pool.allocate(2) for _ in range(3)]
    for run in (runs[0], runs[2], runs[1]):
        pool.free(run)
    assert len(pool.allocate(6)) == 6


def test_a_fragmented_pool_gives_what_is_contiguous():
    pool = Pool(LAYOUT, LAYOUT.chunk_bytes * 5)
    runs = [pool.allocate(1) for _ in range(5)]
    pool.free(runs[1])
    pool.free(runs[3])
    assert [len(pool.allocate(2)), len(pool.allocate(2)), pool.allocate(2)] == [1, 1, None]


def test_growth_keeps_old_memory_where_it_is():
    pool = Pool(LAYOUT, LAYOUT.chunk_bytes * 20, slab_bytes=LAYOUT.chunk_bytes * 2)
    first = pool.allocate(2)
    address = first.layer(1)[0].data_ptr()
    pool.allocate(9)
    assert first.layer(1)[0].data_ptr() == address


def test_a_device_with_less_memory_than_the_budget_ends_growth(monkeypatch):
    pool = Pool(LAYOUT, LAYOUT.chunk_bytes * 10, slab_bytes=LAYOUT.chunk_bytes * 2)
    first = pool.allocate(2)

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ChunkLayout, "allocate_alike", full)
    assert pool.allocate(2) is None
    assert (pool.capacity, pool.available) == (2, 0)
    pool.check()
    pool.free(first)
    assert len(pool.allocate(2)) == 2


def test_what_cannot_be_copied_leaves_nothing_behind():
    store = PrefixStore(LAYOUT, LAYOUT.chunk_bytes * 10)
    with pytest.raises(ZeroDivisionError):
        store.publish(b"space", list(range(8)), lambda first, count: 1 / 0)
    store.check()
    assert (store.pool.used, store.flow.stored) == (0, 0)


def test_a_budget_below_one_chunk_is_refused():
    with pytest.raises(ConfigError, match="device_bytes"):
        Pool(LAYOUT, LAYOUT.chunk_bytes - 1)


def test_an_arena_grows_in_small_steps_and_keeps_its_chunks():
    arena = Arena(LAYOUT)
    arena.extend(1)
    arena.layer(0)[0].fill_(7)
    for _ in range(63):
        arena.extend(1)
    assert arena.bytes <= 64 * LAYOUT.chunk_bytes * 17 / 16
    assert (arena.layer(0)[0][0] == 7).all() and (arena.layer(0)[0][1:] == 0).all()
    picked = arena.select([0, 5, 0])
    assert picked.layer(0)[0].flatten(1).amax(1).tolist() == [7, 0, 7]

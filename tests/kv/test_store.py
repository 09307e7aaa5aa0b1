"""The store: trees over one pool, budgets of chunks and snapshots, namespaces that come and go."""

from __future__ import annotations

import gc

import pytest
import torch

from chunkcache.errors import ConfigError
from chunkcache.kv import ChunkLayout, LayerShape, Pool
from chunkcache.kv.store import PrefixStore
from chunkcache.tree import Miss
from tests.models import DEVICE

LAYOUT = ChunkLayout((LayerShape(1, 2, 2),), 4, torch.float32, torch.device(DEVICE))
BARE = ChunkLayout((), 4, torch.float32, torch.device(DEVICE))
TOKENS = list(range(16))


class State:
    """A snapshot of a few bytes."""

    def __init__(self, size: int = 1) -> None:
        self.bytes = size


def filled(layout, value):
    def give(first, count):
        return [tuple(part.fill_(value) for part in layer) for layer in layout.allocate(count)]

    return give


@pytest.fixture
def store():
    store = PrefixStore(LAYOUT, LAYOUT.chunk_bytes * 8, snapshot_budget=4)
    yield store
    store.check()
    store.close()
    store.check()
    assert store.pool.used == store.pool.reserved_bytes == store.snapshot_bytes == 0
    assert not store.trees()


def publish(store, namespace, tokens=TOKENS, **labels):
    return store.publish(namespace, tokens, filled(store.layout, 1.0), **labels)


def test_published_blocks_are_copied(store):
    publish(store, b"a")
    (piece,) = store.tree(b"a").match(TOKENS).pieces
    assert all(bool((part == 1).all()) and len(part) == 4 for part in piece.run.layer(0))


@pytest.mark.parametrize("tensors", [1, 3])
def test_layers_of_any_number_of_tensors(monkeypatch, tensors):
    def allocate(layer, chunks, *_):
        return tuple(torch.zeros(chunks, 2 + number) for number in range(tensors))

    monkeypatch.setattr(LayerShape, "allocate", allocate)
    store = PrefixStore(LAYOUT, LAYOUT.chunk_bytes * 8)
    publish(store, b"a")
    (piece,) = store.tree(b"a").match(TOKENS[:8]).pieces
    head, rest = piece.run.split(3)
    assert [tuple(p.shape) for p in head.layer(0)] == [(3, 2 + n) for n in range(tensors)]
    assert all(bool((part == 1).all()) for part in rest.layer(0))
    store.check()


def test_a_block_with_a_tensor_too_few_is_refused(store):
    with pytest.raises(ValueError):
        store.publish(b"a", TOKENS, lambda first, count: [LAYOUT.allocate(count)[0][:1]])
    assert (store.pool.used, store.flow.stored, store.trees()) == (0, 0, [])


def test_chunks_without_layers_count_as_their_ids():
    store = PrefixStore(BARE, 16 * 6 + 5, snapshot_budget=2)
    assert (store.pool.chunk_bytes, store.pool.capacity) == (16, 6)
    assert publish(store, b"a").tokens == 16
    assert store.keep(b"a", TOKENS, 16, State())
    assert (store.pool.used_bytes, store.pool.capacity_bytes) == (64, 96)
    assert store.pool.used_bytes <= store.pool.reserved_bytes <= 96
    (piece,) = store.tree(b"a").match(TOKENS).pieces
    assert piece.run.split(1)[1].start == 1
    publish(store, b"b")
    assert store.flow.evicted == 2 and store.flow.snapshots_evicted == 1, "it ended there"
    store.check()
    with pytest.raises(ConfigError, match="16 bytes"):
        Pool(BARE, 15)


def test_the_least_recently_used_chunks_of_all_namespaces_leave(store):
    publish(store, b"hot")
    publish(store, b"cold")
    store.lease(b"hot", TOKENS, 16).release()
    publish(store, b"cold", [90, *TOKENS[1:]])
    assert store.tree(b"hot").match(TOKENS).tokens == 16
    assert store.tree(b"cold").match(TOKENS).tokens == 0


def test_the_least_recently_used_snapshot_of_all_namespaces_leaves(store):
    for namespace in (b"a", b"b"):
        publish(store, namespace)
        assert store.keep(namespace, TOKENS, 8, State(2))
    with store.lease(b"a", TOKENS, 15) as lease:
        assert lease.snapshot().position == 8
    assert store.keep(b"a", TOKENS, 16, State(2))
    assert store.tree(b"b").snapshot_at(TOKENS) is None
    assert store.tree(b"a").snapshots == 2 and store.snapshot_bytes == 4
    flow = store.flow
    assert (flow.snapshots_stored, flow.snapshots_evicted, flow.snapshots_refused) == (3, 1, 0)
    assert store.pool.used == 8, "chunks have a budget of their own"


def test_snapshots_without_room_are_refused_and_counted(store):
    publish(store, b"a")
    assert not store.keep(b"a", TOKENS, 16, State(5))
    assert not store.keep(b"a", TOKENS, 20, State()), "not stored, but not for lack of room"
    assert store.keep(b"a", TOKENS, 16, State(3))
    store.tree(b"a").pin(TOKENS)
    assert not store.keep(b"b", [], 0, State(2))
    flow = store.flow
    assert (flow.snapshots_stored, flow.snapshots_evicted, flow.snapshots_refused) == (1, 0, 2)
    assert len(store.trees()) == 1


def test_without_a_budget_nothing_is_kept():
    store = PrefixStore(LAYOUT, LAYOUT.chunk_bytes * 8)
    assert not store.keep(b"a", [], 0, State()) and not store.trees()
    assert store.flow.snapshots_refused == 1


def test_chunks_under_pressure_take_their_snapshots_along(store):
    publish(store, b"a")
    store.keep(b"a", TOKENS, 8, State())
    store.keep(b"a", TOKENS, 16, State())
    publish(store, b"b", list(range(100, 124)))
    assert store.tree(b"a").match(TOKENS).tokens == 8
    assert store.tree(b"a").snapshot_at(TOKENS).position == 8
    assert store.snapshot_bytes == 1
    store.drop(b"a")
    assert store.snapshot_bytes == 0 and store.flow.snapshots_evicted == 2


def test_a_namespace_may_be_only_a_snapshot(store):
    """As the cross-attention KV of an encoder's input, before anything was decoded."""
    state = State()
    assert store.keep(b"a", [], 0, state)
    assert store.trees() == [store.tree(b"a")]
    assert store.tree(b"a").snapshot_at(TOKENS) == (0, state)
    store.check()
    assert store.drop(b"a") == 0 and not store.trees() and store.snapshot_bytes == 0


def test_thousands_of_namespaces_leave_nothing_behind(store):
    for number in range(3_000):
        namespace = number.to_bytes(4)
        assert store.keep(namespace, [], 0, State())
        if number % 100 == 0:
            publish(store, namespace, TOKENS[:4])
        store.tree(b"never" + namespace).match(TOKENS)
        with store.lease(b"never" + namespace, TOKENS, 15) as lease:
            assert lease.snapshot() is None
    gc.collect()
    assert len(store._filled) <= 12, "four snapshots and eight chunks are stored at most"
    assert len(store._alive) <= 12 + store._emptied.maxlen
    store.check()
    store.close()
    assert store.flow.snapshots_stored == store.flow.snapshots_evicted == 3_000
    assert store.flow.stored == store.flow.evicted == 30
    del lease
    gc.collect()
    assert not store._filled and not store._alive


def test_an_empty_tree_still_tells_why(store):
    publish(store, b"a")
    store.tree(b"a").evict(4)
    assert not store.trees() and store.tree(b"a").match(TOKENS).reason is Miss.EVICTED
    publish(store, b"a")
    store.drop(b"a")
    assert store.tree(b"a").match(TOKENS).reason is Miss.NEVER_SEEN, "dropped means forgotten"


def test_a_lease_on_an_empty_tree_sees_what_is_stored_later(store):
    with store.lease(b"a", [], 0) as lease:
        store.keep(b"a", [], 0, State())
        assert lease.snapshot() == store.tree(b"a").snapshot_at([])
        store.drop(b"a")
        store.keep(b"a", [], 0, State())
        assert lease.snapshot() == store.tree(b"a").snapshot_at([])


def test_what_is_leased_outlives_drop_and_then_leaves(store):
    publish(store, b"a")
    store.keep(b"a", TOKENS, 16, State())
    lease = store.lease(b"a", TOKENS, 8)
    assert store.drop(b"a") == 2 and store.snapshot_bytes == 0
    store.close()
    assert store.pool.used == 2 and len(store.trees()) == 1
    lease.release()
    assert store.drop(b"a") == 2 and not store.trees()


def test_an_insert_that_fails_half_way_is_accounted_for(store):
    calls = []

    def give(first, count):
        calls.append(first)
        if len(calls) > 1:
            raise MemoryError
        return filled(LAYOUT, 1.0)(first, count)

    publish(store, b"x", list(range(50, 62)))
    runs = [store.pool.allocate(1) for _ in range(5)]
    store.pool.free(runs[1])
    store.pool.free(runs[3])
    with pytest.raises(MemoryError):
        store.publish(b"a", TOKENS[:8], give)
    assert store.tree(b"a").chunks == 1 and len(store.trees()) == 2
    for run in (runs[0], runs[2], runs[4]):
        store.pool.free(run)

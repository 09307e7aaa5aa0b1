"""Chunks between the pool and stores that are slow, hang, lie, or are full."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from chunkcache.errors import StoreFullError
from chunkcache.kv import ChunkLayout, LayerShape
from chunkcache.kv.codec import identities
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tier import Tier
from chunkcache.kv.tiers import Tiers
from chunkcache.stores import MemoryStore
from chunkcache.stores.guard import Guard
from chunkcache.tree import pack

LAYOUT = ChunkLayout(
    (LayerShape(1, 2, 3), LayerShape(1, 4, 4)), 4, torch.float32, torch.device("cpu")
)
SPACE = bytes(32)
TOKENS = list(range(1600))
CHUNKS = len(TOKENS) // LAYOUT.chunk_size


class Moody(MemoryStore):
    """Waits before it answers, and may answer with what lies elsewhere."""

    def __init__(self) -> None:
        super().__init__(2**30)
        self.wait = 0.0
        self.lies = False
        self.full = False
        self.meanwhile = lambda: None

    def get(self, keys):
        time.sleep(self.wait)
        self.meanwhile()
        found = super().get(keys)
        return found[1:] + found[:1] if self.lies else found

    def put(self, values):
        time.sleep(self.wait)
        if self.full:
            raise StoreFullError("no room")
        return super().put(values)


class World:
    """A store of chunks whose numbers tell their place, over a moody tier."""

    def __init__(self, timeout: float = 5.0, patience: float = 5.0):
        self.moody = Moody()
        self.guard = Guard(self.moody, timeout)
        self.tiers = self.fresh(patience)

    def fresh(self, patience: float = 5.0) -> Tiers:
        store = PrefixStore(LAYOUT, LAYOUT.chunk_bytes * 2 * CHUNKS)
        return Tiers(store, [Tier(self.guard)], None, patience)

    def fill(self, tokens: list[int] = TOKENS) -> None:
        self.tiers.store.publish(SPACE, tokens, blocks)


def blocks(first: int, count: int):
    chunks = LAYOUT.allocate(count)
    for layer, kv in enumerate(chunks):
        for part, tensor in enumerate(kv):
            for number in range(count):
                tensor[number] = 100 * (first + number) + 10 * layer + part
    return chunks


def assert_right(tiers: Tiers, tokens: int) -> None:
    match = tiers.store.tree(SPACE).match(TOKENS)
    assert match.tokens == tokens
    for piece in match.pieces:
        first = piece.start // LAYOUT.chunk_size
        wanted = blocks(first, len(piece.run))
        for layer in range(len(LAYOUT.layers)):
            for stored, expected in zip(piece.run.layer(layer), wanted[layer], strict=True):
                assert torch.equal(stored, expected)
    tiers.store.check()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.fill()
    assert world.tiers.save(SPACE, TOKENS) == CHUNKS
    yield world
    world.moody.wait = 0.0
    world.tiers.close()
    world.guard.close()


def test_what_is_saved_is_loaded(world: World) -> None:
    again = world.fresh()
    assert again.load(SPACE, TOKENS, 0, 1599).tokens == {"memory": 1596}
    assert_right(again, 1596)
    assert again.load(SPACE, TOKENS, 1596, 1599).tokens == {}
    assert again.load(SPACE, TOKENS[:40] + [0] * 40, 40, 79).tokens == {}
    assert world.tiers.save(SPACE, TOKENS) == 0
    assert again.counts == {"loaded": 399}


def test_a_match_is_continued(world: World) -> None:
    again = world.fresh()
    again.store.publish(SPACE, TOKENS[:40], blocks)
    assert again.load(SPACE, TOKENS, 42, 200).tokens == {"memory": 160}
    assert_right(again, 200)


def test_what_is_there_already_cannot_leave_meanwhile(world: World) -> None:
    """Else chunks would be laid down in the wrong places."""
    again = world.fresh()
    again.store.publish(SPACE, TOKENS[:40], blocks)
    evicted: list[int] = []
    world.moody.meanwhile = lambda: evicted.append(again.store.tree(SPACE).evict(CHUNKS))
    again.load(SPACE, TOKENS, 40, 1599)
    assert evicted[0] == 0, "what is held when the first batch is read"
    assert_right(again, 1596)
    again.store.tree(SPACE).evict(CHUNKS)
    again.load(SPACE, TOKENS, 40, 200)  # gone since it was looked up
    assert_right(again, 200)


def test_a_slow_store_costs_no_more_than_the_patience(world: World) -> None:
    world.moody.wait = 0.2
    again = world.fresh(patience=0.3)
    loaded = again.load(SPACE, TOKENS, 0, 1599).tokens["memory"]
    assert loaded in (256, 512), "what came in time is used, and no more is asked for"
    assert_right(again, loaded)


def test_a_store_that_hangs_is_a_miss() -> None:
    world = World(timeout=0.1)
    world.fill()
    world.tiers.save(SPACE, TOKENS)
    world.moody.wait = 1.0
    again = world.fresh()
    for _ in range(20):
        assert again.load(SPACE, TOKENS, 0, 1599).tokens == {}
    assert world.guard.counts["timeouts"] <= 2, "no call but those on their way at once"
    assert again.counts["failed"] == 20
    world.guard.close()


def test_values_of_other_keys_are_not_used(world: World) -> None:
    world.moody.lies = True
    again = world.fresh()
    assert again.load(SPACE, TOKENS, 0, 1599).tokens == {}
    assert again.counts["corrupt"] == 1
    assert_right(again, 0)


def test_a_full_store_is_counted_and_tried_again() -> None:
    world = World()
    world.moody.full = True
    world.fill()
    world.tiers.offer(SPACE, TOKENS)
    assert world.tiers.flush(5) and world.tiers.counts["failed"] == 1
    world.moody.full = False
    world.tiers.offer(SPACE, TOKENS)
    assert world.tiers.flush(5) and world.tiers.counts["saved"] == CHUNKS
    world.tiers.close()
    world.guard.close()


def test_the_queue_is_bounded_and_never_waits() -> None:
    world = World(timeout=60.0)
    world.fill()
    begun, go_on = threading.Event(), threading.Event()
    exists = world.moody.exists

    def slow(keys):
        begun.set()
        go_on.wait(60)
        return exists(keys)

    world.moody.exists = slow
    world.tiers.offer(SPACE, TOKENS)
    assert begun.wait(60)
    for number in range(1, 201):
        world.tiers.offer(bytes([number]) * 32, TOKENS)
    assert world.tiers.counts["dropped"] == 200 - 64
    last = bytes([200]) * 32
    world.tiers.offer(last, TOKENS[:8])  # waits there already, as a part of another
    world.tiers.offer(last, [*TOKENS, 0, 0, 0, 0])  # and this takes its place
    assert world.tiers.counts["dropped"] == 200 - 64
    go_on.set()
    assert world.tiers.flush(60) and world.tiers.counts["saved"] == CHUNKS
    world.tiers.close()
    world.tiers.offer(SPACE, TOKENS)  # too late, and no error
    world.guard.close()


def test_chunks_that_are_written_cannot_leave_meanwhile() -> None:
    world = World()
    world.fill()
    begun, go_on = threading.Event(), threading.Event()
    put = world.moody.put

    def slow(values):
        begun.set()
        go_on.wait(5)
        return put(values)

    world.moody.put = slow
    world.tiers.offer(SPACE, TOKENS)
    assert begun.wait(5)
    tree = world.tiers.store.tree(SPACE)
    assert tree.evict(CHUNKS) == CHUNKS - 64
    go_on.set()
    assert world.tiers.flush(5)
    saved = world.tiers.counts["saved"]
    assert saved == 64, "one batch was held, and the rest could leave"
    assert tree.evict(CHUNKS) == 64
    world.tiers.close()
    world.guard.close()


def test_a_load_goes_on_when_its_tiers_are_closed(world: World) -> None:
    """A model may change, and its tiers with it, while a request reads."""
    again = world.fresh()
    world.moody.meanwhile = again.close
    assert again.load(SPACE, TOKENS, 0, 1599).tokens == {"memory": 1596}
    assert_right(again, 1596)


def test_threads_end_with_their_tiers(world: World) -> None:
    before = threading.active_count()
    for _ in range(5):
        again = world.fresh()
        again.load(SPACE, TOKENS, 0, 1599)
        again.close()
    del again
    gc.collect()
    end = time.monotonic() + 30
    while threading.active_count() > before + 4 and time.monotonic() < end:  # those of the guard
        time.sleep(0.01)
    assert threading.active_count() <= before + 4


def test_one_load_takes_no_longer_than_its_patience() -> None:
    """Not a time-out for each call that it takes."""
    world = World(timeout=30.0)
    world.fill()
    world.tiers.save(SPACE, TOKENS)
    world.moody.wait = 0.4
    again = world.fresh(patience=0.5)
    begin = time.monotonic()
    assert again.load(SPACE, TOKENS, 0, 1599).tokens["memory"] in (256, 512)
    assert time.monotonic() - begin < 20, "four batches and the rest would be bounded by 30 s each"
    assert world.guard.counts["failures"] == 0
    world.moody.wait = 0.0
    world.guard.close()


def test_errors_that_stores_may_not_raise_are_misses(world: World) -> None:
    def bad() -> None:
        raise MemoryError

    again = world.fresh()
    world.moody.meanwhile = bad
    loaded = again.load(SPACE, TOKENS, 0, 1599)
    assert loaded.tokens == {} and loaded.reason == "store down"


def test_damaged_values_are_forgotten_with_all_behind_them(world: World) -> None:
    key = identities(SPACE, pack(TOKENS), 4)[10].key
    (value,) = world.moody.get([key])
    world.moody.put([(key, bytes(value[:-1]) + bytes([value[-1] ^ 1]))])
    again = world.fresh()
    assert again.load(SPACE, TOKENS, 0, 1599).tokens == {"memory": 40}
    assert (
        again.flush(10) and len(list(world.moody.scan())) == 10 + 2
    )  # a chunk beyond what was asked for, a note

"""What a tier is given, and when it is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.errors import ConfigError
from chunkcache.kv import ChunkLayout, LayerShape, saving, writer
from chunkcache.kv.codec import encode_chunk, identities
from chunkcache.kv.notes import decode_note, model_key, prompt_key
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tier import Pace, Tier
from chunkcache.kv.tiers import Tiers
from chunkcache.stores import MemoryStore, Store
from chunkcache.stores.guard import Guard
from chunkcache.stores.open import Admission, read_admission
from chunkcache.tree import pack
from tests.stores.servers import wait_for

LAYOUT = ChunkLayout((LayerShape(1, 2, 2),), 4, torch.float32, torch.device("cpu"))
SPACE = bytes(32)
TOKENS = list(range(80))
PATH = identities(SPACE, pack(TOKENS), 4)
KEYS = [one.key for one in PATH]
SECONDS = st.floats(0, 10)


def zeros(first: int, count: int):
    return [tuple(part.zero_() for part in layer) for layer in LAYOUT.allocate(count)]


class World:
    """One store of chunks over two tiers."""

    def __init__(self, *admissions: Admission, budget: int = 2**20):
        self.stores: list[Store] = [MemoryStore(budget) for _ in admissions]
        self.tiers = [
            Tier(Guard(store, 5), admission, f"tier{number}")
            for number, (store, admission) in enumerate(zip(self.stores, admissions, strict=True))
        ]
        self.chunks = PrefixStore(LAYOUT, 2**20)
        self.all = Tiers(self.chunks, self.tiers, about={"model": "tiny"})

    def request(self, tokens: list[int] = TOKENS, name: str | None = None) -> None:
        """What a request does to the tree."""
        with self.chunks.lease(SPACE, tokens, len(tokens)):
            self.chunks.publish(SPACE, tokens, zeros, name=name)

    def has(self, store: int) -> int:
        """Chunks of the path, which have to be the first ones."""
        there = self.stores[store].exists(KEYS)
        assert there == sorted(there, reverse=True), "a child without its parent"
        return sum(there)

    def close(self) -> None:
        self.all.close()
        for tier in self.tiers:
            tier.guard.close()


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[type[World]]:
    made: list[World] = []

    def world(*admissions: Admission, budget: int = 2**20) -> World:
        made.append(World(*admissions, budget=budget))
        return made[-1]

    yield world
    for one in made:
        one.close()


# -- pace


def test_reading_pays_until_something_is_known() -> None:
    pace = Pace()
    assert pace.break_even == 1 and pace.pays(1)
    pace.observe(4, 100.0)
    assert pace.pays(1), "nobody knows what computing takes"
    assert Pace(0.0).pays(1)


@given(compute=SECONDS, call=SECONDS, chunk=SECONDS, chunks=st.integers(1, 200))
def test_break_even_is_the_fewest_chunks_that_are_faster(compute, call, chunk, chunks) -> None:
    pace = Pace(compute)
    pace.call = call
    pace.observe(1, call + chunk)
    chunk = pace.chunk
    least = pace.break_even
    if least is not None and least < 10**6:
        assert call + least * chunk < least * compute * (1 + 1e-9) + 1e-9
        assert least == 1 or call + (least - 1) * chunk >= (least - 1) * compute * (1 - 1e-9) - 1e-9
    elif least is None:
        assert call + chunks * chunk >= chunks * compute * (1 - 1e-9) - 1e-6
    if call + chunks * chunk < chunks * compute:
        assert pace.pays(chunks)


def test_a_load_that_was_disturbed_changes_nothing() -> None:
    pace = Pace(1.0)
    for _ in range(5):
        pace.observe(2, 0.2)
    pace.observe(2, 1000.0)
    assert pace.chunk == pytest.approx(0.1) and pace.pays(1)


def test_what_became_slow_is_tried_again_sometimes() -> None:
    pace = Pace(1.0)
    for _ in range(5):
        pace.observe(1, 3.0)
    assert pace.break_even is None
    tried = [pace.pays(10) for _ in range(64)]
    assert tried.count(True) == 2


def test_a_store_that_is_slower_than_computing_is_not_asked(make) -> None:
    world = make(Admission())
    world.request()
    world.all.save(SPACE, TOKENS)
    world.chunks.tree(SPACE).clear()
    world.all.measure(1e-9)
    assert world.tiers[0].pace.chunk is not None
    world.tiers[0].pace.call = 1.0
    assert world.all.load(SPACE, TOKENS, 0, 80).tokens == {}
    report = world.all.report()["tier0"]
    assert report["computed"] == 1 and (report["break_even"] is None or report["break_even"] > 20)
    world.all.measure(10.0)
    assert world.all.load(SPACE, TOKENS, 0, 80).tokens == {"tier0": 80}


def test_measuring_leaves_nothing_behind(make) -> None:
    world = make(Admission(), Admission())
    world.all.measure(1.0)
    for store in world.stores:
        assert not list(store.scan())
    assert all(tier.pace.break_even == 1 for tier in world.tiers)


def test_a_store_without_room_is_not_measured() -> None:
    tier = Tier(Guard(MemoryStore(10), 5))
    tier.measure(LAYOUT, 1.0)
    assert tier.pace.chunk is None and tier.pays(1)
    tier.guard.close()


def test_always_is_always(make) -> None:
    world = make(Admission(always=True))
    world.tiers[0].pace = Pace(0.0)
    world.tiers[0].pace.observe(1, 100.0)
    assert world.tiers[0].pays(1)


# -- admission


def test_hot_chunks_are_admitted(make) -> None:
    world = make(Admission(), Admission(hits=2))
    world.request()
    world.all.save(SPACE, TOKENS)
    assert (world.has(0), world.has(1)) == (20, 0)
    for _ in range(2):
        world.request(TOKENS[:40])
    world.all.save(SPACE, TOKENS)
    assert (world.has(0), world.has(1)) == (20, 10)


def test_beginnings_are_admitted(make) -> None:
    world = make(Admission(depth=30), Admission(hits=1, depth=8))
    world.request()
    world.request()
    world.all.save(SPACE, TOKENS)
    assert (world.has(0), world.has(1)) == (7, 2)


@pytest.mark.parametrize("how", ["pin", "name"])
def test_pinned_and_named_prompts_are_admitted_at_once(make, how) -> None:
    world = make(Admission(hits=100))
    world.request()
    if how == "pin":
        world.chunks.tree(SPACE).pin(TOKENS[:40])
    world.all.save(SPACE, TOKENS if how == "pin" else TOKENS[:40], "bot" if how == "name" else None)
    assert world.has(0) == 10


def test_people_can_read_what_it_is(make) -> None:
    world = make(Admission(), Admission(hits=1))
    world.request()
    world.all.save(SPACE, TOKENS[:41], "bot")
    path = identities(SPACE, pack(TOKENS[:40]), 4)
    notes = world.stores[0].get([model_key(SPACE), prompt_key(path[-1])])
    assert [decode_note(note) for note in notes] == [
        {"model": "tiny"},
        {"name": "bot", "tokens": 40},
    ]
    world.request([7] * 8)
    world.all.save(SPACE, [7] * 8)
    assert len(list(world.stores[1].scan())) == 10 + 2, "nothing of what it does not admit"


def test_compressed_and_plain_tiers_read_each_others_chunks(make) -> None:
    world = make(Admission(compress=True), Admission())
    world.request()
    world.all.save(SPACE, TOKENS)
    sizes = [sum(one.bytes for one in store.scan()) for store in world.stores]
    assert sizes[0] != sizes[1]
    for number in range(2):
        world.chunks.tree(SPACE).clear()
        world.stores[1 - number].delete(KEYS)
        assert world.all.load(SPACE, TOKENS, 0, 80).tokens == {f"tier{number}": 80}
        world.all.save(SPACE, TOKENS)


def test_what_comes_from_a_slower_tier_goes_to_the_faster_one(make) -> None:
    world = make(Admission(), Admission())
    world.request()
    world.all.save(SPACE, TOKENS)
    world.stores[0].delete(KEYS[3:])
    world.chunks.tree(SPACE).clear()
    assert world.all.load(SPACE, TOKENS, 0, 80).tokens == {"tier0": 12, "tier1": 68}
    world.all.used(SPACE, TOKENS, 0)
    assert world.all.flush(5) and world.has(0) == 20


# -- order


def test_the_hottest_are_written_first_and_the_coldest_dropped(make) -> None:
    world = make(Admission())
    world.request()
    begun, go_on = threading.Event(), threading.Event()
    order: list[int] = []
    exists = world.stores[0].exists

    def slow(keys):
        begun.set()
        assert go_on.wait(5)
        return exists(keys)

    world.stores[0].exists = slow
    world.all.offer(SPACE, TOKENS)
    assert begun.wait(5)
    save = world.all._writer.save
    world.all._writer.save = lambda path: order.append(path.hits) or save(path)
    for hits in range(70):
        world.all.used(bytes([hits]) * 32, TOKENS, hits)
    world.all.offer(b"n" * 32, TOKENS, "named")
    assert world.all.counts["dropped"] == 7
    go_on.set()
    assert world.all.flush(5)
    assert order == [0, *range(69, 6, -1)]


def test_a_path_is_looked_at_again_only_now_and_then(make) -> None:
    world = make(Admission())
    world.request()
    world.all.used(SPACE, TOKENS, 1)
    assert world.all.flush(5) and world.has(0) == 20
    calls = world.tiers[0].guard.counts["calls"]
    for _ in range(10):
        world.all.used(SPACE, TOKENS, 1)
    assert world.all.flush(5) and world.tiers[0].guard.counts["calls"] == calls


def test_a_path_that_became_hot_is_looked_at_at_once(make) -> None:
    world = make(Admission(hits=2))
    for hits in range(3):
        world.request()
        world.all.used(SPACE, TOKENS, hits)
        assert world.all.flush(30)
    assert world.has(0) == 20


def test_beside_requests_it_works_a_small_part_of_the_time(make, monkeypatch) -> None:
    """And as fast as it goes when none runs, or when somebody waits for it."""
    monkeypatch.setattr(saving, "batch_of", lambda layout: 4)
    monkeypatch.setattr(writer, "_PART", 10**6)  # one piece, and no second one
    world = make(Admission())
    world.request()
    world.all.begin()
    world.all.offer(SPACE, TOKENS)
    wait_for(lambda: world.has(0) == 4, "the first piece")
    time.sleep(0.1)
    assert world.has(0) == 4
    assert world.all.flush(30) and world.has(0) == 20, "whoever waits is not kept waiting"
    world.stores[0].delete(KEYS)
    world.all.offer(SPACE, TOKENS)
    time.sleep(0.1)
    assert world.has(0) == 0
    world.all.end()
    wait_for(lambda: world.has(0) == 20, "all of it")


def test_short_requests_are_left_alone(make, monkeypatch) -> None:
    monkeypatch.setattr(writer, "_GRACE", 1000.0)
    monkeypatch.setattr(writer, "_LULL", 1000.0)
    world = make(Admission())
    world.request()
    for _ in range(3):
        world.all.begin()
        world.all.offer(SPACE, TOKENS)
        time.sleep(0.02)
        world.all.end()
    assert world.has(0) == 0
    assert world.all.flush(30) and world.has(0) == 20


# -- budgets


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_beginnings_stay_when_a_path_grows_under_pressure(make, batch, monkeypatch) -> None:
    """However many calls it takes to write it, the end of a path leaves before its beginning."""
    monkeypatch.setattr("chunkcache.kv.saving.batch_of", lambda layout: batch)
    monkeypatch.setattr(Tier, "room", lambda tier, layout: 20)
    value = len(encode_chunk(PATH[-1], LAYOUT.allocate(1), LAYOUT))
    world = make(Admission(), budget=21 * value)
    other = [9] * 40
    world.request(other)
    world.all.save(SPACE, other)
    for end in (40, 48, 56, 64, 72, 80):
        world.request(TOKENS[:end])
        world.all.save(SPACE, TOKENS[:end])
        assert world.has(0) == end // 4, "what is not of this path leaves"
    for number in range(3):
        small = [20 + number] * 8
        world.request(small)
        world.all.save(SPACE, small)
        assert 12 <= world.has(0) < 20, "of this path, the end leaves"


@pytest.mark.parametrize("batch", [1, 64])
def test_a_path_longer_than_a_store_is_written_as_far_as_it_goes(make, batch, monkeypatch) -> None:
    monkeypatch.setattr("chunkcache.kv.saving.batch_of", lambda layout: batch)
    world = make(Admission(), budget=25_000)
    world.request()
    written = world.all.save(SPACE, TOKENS)
    assert 0 < written == world.has(0) < 20
    assert world.all.save(SPACE, TOKENS) == 0, "and not again and again"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_store_that_keeps_less_gets_no_children_of_it(make, batch, monkeypatch) -> None:
    monkeypatch.setattr("chunkcache.kv.saving.batch_of", lambda layout: batch)
    world = make(Admission(), Admission())
    put = world.stores[0].put

    def picky(values):
        kept = [pair for pair in values if pair[0] not in KEYS[5:7]]
        return put(kept[: next((n for n, p in enumerate(values) if p not in kept), len(values))])

    world.stores[0].put = picky
    world.request()
    world.all.save(SPACE, TOKENS)
    assert (world.has(0), world.has(1)) == (5, 20)


# -- options


@pytest.mark.parametrize(
    "name", ["disk:/x?hits=-1", "disk:/x?hits=", "redis://h?depth=x", "memory:1GiB?load=maybe"]
)
def test_other_options_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"memory|disk|redis"):
        read_admission(name)


def test_options_are_taken_out_of_names() -> None:
    assert read_admission("memory:1GiB") == ("memory:1GiB", Admission())
    assert read_admission("redis://h:1/0?ttl=1h&hits=3&depth=99") == (
        "redis://h:1/0?ttl=1h",
        Admission(3, 99),
    )
    assert read_admission("memory:1GiB?compress=zstd&load=always") == (
        "memory:1GiB",
        Admission(compress=True, always=True),
    )

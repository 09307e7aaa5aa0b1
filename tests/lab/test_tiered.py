"""Colder tiers behind a device, against one cache and against tiers that look at every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.lab.simulation.atoms import atomise
from chunkcache.lab.simulation.belady import Future
from chunkcache.lab.simulation.fleet import ROUTERS, Fleet, named_router
from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.simulation.tiered import Tiered
from chunkcache.lab.traces.trace import Form, Request
from chunkcache.tree import LRU, POLICIES, Packed, named_policy, unpack
from tests.lab.traces import BLOCKS, REQUESTS, request

WHOLE = Form(1, 4, partial=True)
LONGEST = 18  # chunks of a prompt and its answer, in REQUESTS
SIZES = st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=1, max_size=3)


def cache(
    capacity: int | None, policy: str = "lru", form: Form = BLOCKS, size: int = 1
) -> Simulator:
    return Simulator(form, size, capacity, named_policy(policy))


def tiered(
    capacity: int | None,
    sizes: Sequence[int | None],
    admit: int = 1,
    policy: str = "lru",
    form: Form = BLOCKS,
) -> Tiered:
    colder = {str(n): cache(size, form=form) for n, size in enumerate(sizes)}
    return Tiered(cache(capacity, policy, form), colder, admit)


def parts(one: Tiered, each: Request) -> list[int]:
    """Of one request, the tokens of each tier."""
    before = one.outcome.tiers.values()
    one.request(each)
    return [new - old for new, old in zip(one.outcome.tiers.values(), before, strict=True)]


# -- against one cache


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), REQUESTS, st.integers(LONGEST, 40))
def test_behind_a_device_a_tier_without_limit_is_a_cache_without_limit(
    policy: str, requests: list[Request], capacity: int
) -> None:
    """If the device has room for each prompt and its answer: what it cannot store is not written."""
    one, unlimited = tiered(capacity, [None], policy=policy), cache(None)
    assert [one.request(each) for each in requests] == [
        unlimited.request(each) for each in requests
    ]


@settings(max_examples=100, deadline=None)
@given(REQUESTS, st.integers(0, 12))
def test_no_tier_has_more_of_a_prompt_than_the_device_can_hold(
    requests: list[Request], capacity: int
) -> None:
    one, unlimited = tiered(capacity, [None], form=WHOLE), cache(None, form=WHOLE)

    def cut(each: Request) -> Request:
        keys = Packed(each.keys[: 4 * capacity])
        answer = Packed(each.answer[: 4 * capacity - len(keys)])
        return replace(each, keys=keys, answer=answer)

    assert [one.request(each) for each in requests] == [
        unlimited.request(cut(each)) for each in requests
    ]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), REQUESTS, st.integers(0, 20), st.integers(1, 3))
def test_tiers_without_room_change_nothing(
    policy: str, requests: list[Request], capacity: int, admit: int
) -> None:
    one, plain = tiered(capacity, [0, 0], admit, policy), cache(capacity, policy)
    for each in requests:
        assert parts(one, each) == [plain.request(each), 0, 0]
    assert one.device.evicted == plain.evicted


@settings(max_examples=100, deadline=None)
@given(REQUESTS, st.integers(0, 20), SIZES, st.integers(1, 3))
def test_what_an_lru_device_hits_does_not_depend_on_tiers(
    requests: list[Request], capacity: int, sizes: list[int | None], admit: int
) -> None:
    """Loading uses what the request uses anyway, so that tiers only add."""
    one, plain = tiered(capacity, sizes, admit), cache(capacity)
    for each in requests:
        assert parts(one, each)[0] == plain.request(each)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), REQUESTS, st.integers(0, 12), SIZES, st.integers(1, 3))
def test_tiers_sum_up_below_the_bound(
    policy: str, requests: list[Request], capacity: int, sizes: list[int | None], admit: int
) -> None:
    one, total = tiered(capacity, sizes, admit, policy), 0
    for each in requests:
        found = parts(one, each)
        total += sum(found)
        assert one.outcome.hit_tokens == total and min(found) >= 0
        assert one.device.chunks <= capacity
        for tier, size in zip(one.colder.values(), sizes, strict=True):
            assert size is None or tier.chunks <= size
            for tree in tier._trees.values():
                tree.check()
    room = capacity + sum(float("inf") if size is None else size for size in sizes)
    assert total <= Future(atomise(requests, BLOCKS, 1)).hit_tokens(room)
    assert one.outcome.requests == len(requests)


# -- against tiers that look at every block


Name = tuple[object, ...]


class SlowTier:
    """Blocks by name, which is the whole prefix: when they were used, and how often they were hits."""

    def __init__(self, capacity: int | None):
        self.capacity = float("inf") if capacity is None else capacity
        self.used: dict[Name, int] = {}
        self.hits: dict[Name, int] = {}

    def match(self, path: Sequence[Name]) -> int:
        return next((n for n, name in enumerate(path) if name not in self.used), len(path))

    def store(self, path: Sequence[Name], now: int, held: Sequence[Name]) -> None:
        for name in path:
            if name not in self.used:
                if len(self.used) >= self.capacity and not self.evict(held):
                    break
                self.hits[name] = 0
            self.used[name] = now
        for name in held[: self.match(held)]:
            self.used[name] = now

    def evict(self, held: Sequence[Name]) -> bool:
        parents = {name[:-1] for name in self.used}
        leaves = [name for name in self.used if name not in parents and name not in held]
        if leaves:
            victim = min(leaves, key=self.used.__getitem__)
            del self.used[victim], self.hits[victim]
        return bool(leaves)


class SlowTiers:
    def __init__(self, capacity: int | None, sizes: Sequence[int | None], admit: int):
        self.device, self.admit, self.now = SlowTier(capacity), admit, 0
        self.colder = [SlowTier(size) for size in sizes]

    def request(self, each: Request) -> list[int]:
        self.now += 1
        ids = unpack(each.keys + each.answer).tolist()
        path: list[Name] = [(each.tenant, *ids[: end + 1]) for end in range(len(ids))]
        limit = path[: each.tokens - 1]
        ends = [tier.match(limit) for tier in (self.device, *self.colder)]
        ends = [max(ends[: n + 1]) for n in range(len(ends))]
        if ends[-1] > ends[0]:
            self.device.store(path[: ends[-1]], self.now, path)
        hit = self.device.match(limit)
        for name in path[:hit]:
            self.device.hits[name] += 1
        self.device.store(path, self.now, path)
        stored = path[: self.device.match(path)]
        hot = [name for name in stored if self.device.hits[name] + 1 >= self.admit]
        for tier in self.colder:
            tier.store(hot, self.now, path)
        ends = [0, *(min(end, hit) for end in ends)]
        return [end - begin for begin, end in pairwise(ends)]


@settings(max_examples=300, deadline=None)
@given(REQUESTS, st.one_of(st.none(), st.integers(0, 20)), SIZES, st.integers(1, 4))
def test_tiers_decide_as_slow_ones_do(
    requests: list[Request], capacity: int | None, sizes: list[int | None], admit: int
) -> None:
    fast, slow = tiered(capacity, sizes, admit), SlowTiers(capacity, sizes, admit)
    assert [parts(fast, each) for each in requests] == [slow.request(each) for each in requests]


# -- by example


def test_what_several_requests_used_is_admitted() -> None:
    """The head was used by two, the tails by one each."""
    one = tiered(4, [None], admit=2)
    for tail in (5, 6):
        one.request(request([1, 2, 3, tail]))
    assert one.colder["0"].chunks == 3
    one.request(request([9] * 4))
    assert parts(one, request([1, 2, 3, 5, 7])) == [0, 3]
    assert parts(one, request([1, 2, 3, 5, 7])) == [4, 0]
    every = tiered(4, [None])
    every.request(request([1, 2, 3, 5]))
    assert every.colder["0"].chunks == 4


def test_tiers_are_asked_one_behind_the_other() -> None:
    one = tiered(4, [6, None])
    for ids in ([1, 2, 3, 4], [5, 6, 7, 8]):
        one.request(request(ids))
    assert [tier.chunks for tier in one.colder.values()] == [6, 8]
    assert parts(one, request([1, 2, 3, 4, 9])) == [0, 2, 2]
    assert parts(one, request([1, 2, 3, 4, 9])) == [4, 0, 0]
    assert one.outcome.tiers == {"device": 4, "0": 2, "1": 2}


def test_the_last_block_counts_as_far_as_there_are_tokens() -> None:
    """As in Mooncake's traces: 2 blocks of 4 for 6 tokens."""
    form = Form(4, 4, partial=True)
    one = Tiered(Simulator(form, 4, 2, LRU()), {"host": Simulator(form, 4, None, LRU())})
    long, other = (replace(request(ids), tokens=6) for ids in ([1, 2], [3, 4]))
    assert [parts(one, each) for each in (long, other, long)] == [[0, 0], [0, 0], [0, 6]]
    assert one.outcome.tiers == {"device": 0, "host": 6}


def test_chunks_of_several_blocks() -> None:
    one = Tiered(Simulator(BLOCKS, 2, 2, LRU()), {"host": Simulator(BLOCKS, 2, None, LRU())})
    for ids in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]):
        one.request(request(ids))
    assert one.colder["host"].chunks == 4
    assert parts(one, request([1, 2, 3, 9])) == [0, 2]
    assert parts(one, request([6, 7, 8, 9, 11])) == [0, 4]


def test_a_use_keeps_what_a_tier_has() -> None:
    """Also what would not be admitted again: on the device, counting begins anew."""
    one = tiered(4, [6], admit=3)
    first, second, third = ([n, n + 1, n + 2, n + 3] for n in (0, 10, 20))
    for ids in [first] * 3 + [second] * 3 + [first] + [third] * 3:
        one.request(request(ids))
    assert [one.colder["0"].match(request(ids)) for ids in (first, second, third)] == [3, 0, 3]


def test_a_device_takes_what_it_has_room_for() -> None:
    """Of a tier that larger ones fill too."""
    shared = {"redis": cache(None)}
    large, small = (Tiered(cache(capacity), shared) for capacity in (8, 2))
    assert parts(large, request([1, 2, 3, 4, 5])) == [0, 0]
    assert parts(small, request([1, 2, 3, 4, 5])) == [0, 2]


def test_storing_is_no_hit() -> None:
    one, each = cache(None), request([1, 2, 3, 4])
    one.request(each)
    one.store(each, 4)
    assert (one.reused(each, 0), one.reused(each, 1)) == (4, 0)
    one.request(each)
    assert (one.reused(each, 1), one.reused(each, 2)) == (3, 0)
    assert one.reused(request([1, 2]), 0) == 2, "no more than there is of the prompt"
    assert one.reused(request([1], tenant="other"), 0) == 0


# -- behind a fleet


@pytest.mark.parametrize("router", sorted(ROUTERS))
@settings(max_examples=50, deadline=None)
@given(requests=REQUESTS, count=st.integers(1, 3))
def test_replicas_share_what_lies_behind_them(
    router: str, requests: list[Request], count: int
) -> None:
    """Wherever a request goes, it finds all that was ever stored."""
    shared = {"redis": cache(None)}
    replicas = [Tiered(cache(LONGEST), shared) for _ in range(count)]
    fleet, unlimited = Fleet(replicas, named_router(router)), cache(None)
    for each in requests:
        assert fleet.request(each) == unlimited.request(each)
    assert fleet.outcome.tiers["redis"] == sum(one.outcome.colder["redis"] for one in replicas)
    assert sum(fleet.outcome.tiers.values()) == fleet.outcome.hit_tokens

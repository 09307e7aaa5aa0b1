"""Replicas and routers, against one cache and against a fleet that remembers everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.errors import ConfigError
from chunkcache.lab.simulation.atoms import atomise
from chunkcache.lab.simulation.belady import Future
from chunkcache.lab.simulation.fleet import (
    ROUTERS,
    WINDOW,
    Cache,
    Fleet,
    PrefixAndLoad,
    Router,
    named_router,
)
from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.traces.trace import Request
from chunkcache.tree import POLICIES, named_policy
from tests.lab.traces import BLOCKS, REQUESTS, request

CAPACITIES = st.one_of(st.none(), st.integers(0, 20))
NAMES = st.sampled_from(sorted(ROUTERS))


@st.composite
def timed(draw: st.DrawFn) -> list[Request]:
    """Requests with times, some of which go back, over a few windows."""
    requests = draw(REQUESTS)
    steps = draw(st.lists(st.sampled_from([0.0, 0.4, 1.0, 100.0, 200.0, -50.0]), min_size=40))
    time, found = 0.0, []
    for one, step in zip(requests, steps, strict=False):
        time += step
        found.append(replace(one, time=time))
    return found


def cache(capacity: int | None, policy: str = "lru") -> Simulator:
    return Simulator(BLOCKS, 1, capacity, named_policy(policy))


def fleet(router: str | Router, count: int, capacity: int | None, policy: str = "lru") -> Fleet:
    chosen = named_router(router) if isinstance(router, str) else router
    return Fleet([cache(capacity, policy) for _ in range(count)], chosen)


def hits(one: Cache | Fleet, requests: Sequence[Request]) -> list[int]:
    return [one.request(each) for each in requests]


# -- against one cache


@settings(max_examples=100, deadline=None)
@given(NAMES, st.sampled_from([*sorted(POLICIES), "ttl:150"]), timed(), CAPACITIES)
def test_a_fleet_of_one_is_the_plain_cache(
    router: str, policy: str, requests: list[Request], capacity: int | None
) -> None:
    alone, one = cache(capacity, policy), fleet(router, 1, capacity, policy)
    assert hits(one, requests) == hits(alone, requests)
    assert one.outcome == alone.outcome and one.imbalance == 1.0


@settings(max_examples=100, deadline=None)
@given(timed(), st.integers(1, 4))
def test_without_limit_the_prefix_router_hits_as_one_cache(
    requests: list[Request], count: int
) -> None:
    """What is stored at all is stored somewhere, and that is where the longest match is."""
    assert hits(fleet("prefix", count, None), requests) == hits(cache(None), requests)


@settings(max_examples=100, deadline=None)
@given(NAMES, st.sampled_from(sorted(POLICIES)), timed(), st.integers(0, 8), st.integers(1, 4))
def test_no_fleet_beats_the_bound_of_one_cache_as_large_as_all(
    router: str, policy: str, requests: list[Request], capacity: int, count: int
) -> None:
    bound = Future(atomise(requests, BLOCKS, 1)).hit_tokens(count * capacity)
    assert sum(hits(fleet(router, count, capacity, policy), requests)) <= bound


def test_routing_decides() -> None:
    """Two conversations in turns, of which a replica holds one."""
    talks = [list(range(10)), list(range(20, 30))]
    requests = [request(talks[n % 2]) for n in range(20)]
    found = {name: sum(hits(fleet(name, 2, 10), requests)) for name in ROUTERS}
    assert found["prefix"] == found["prefix+load"] == found["round-robin"] == 18 * 9
    assert found["random"] < 18 * 9
    assert sum(hits(cache(10), requests)) == 0
    thrice = [request(talks[n % 2]) for n in (0, 0, 1, 1) * 5]
    assert sum(hits(fleet("round-robin", 2, 10), thrice)) < sum(
        hits(fleet("prefix", 2, 10), thrice)
    )


# -- against one that remembers everything


class Slow:
    """Every question is answered by simulating anew what a replica was sent."""

    def __init__(self, router: str, count: int, capacity: int | None, policy: str):
        self.router, self.new = router, lambda: cache(capacity, policy)
        self.sent: list[list[Request]] = [[] for _ in range(count)]
        self.computed: list[tuple[float, int, int]] = []  # (time, place, tokens)
        self.count, self.now, self.random = 0, 0.0, Random(0)

    def request(self, one: Request) -> int:
        self.now = max(self.now, one.time)
        place = self.choose(one)
        self.sent[place].append(replace(one, time=self.now))
        simulator = self.new()
        hit = hits(simulator, self.sent[place])[-1]
        self.computed.append((self.now, place, one.tokens - hit))
        self.count += 1
        return hit

    def choose(self, one: Request) -> int:
        places = range(len(self.sent))
        if self.router == "random":
            return self.random.randrange(len(places))
        if self.router == "round-robin":
            return self.count % len(places)
        if self.router == "prefix":
            return min(places, key=lambda place: (-self.match(place, one), self.total(place)))
        return min(places, key=lambda place: (self.cost(place, one), self.total(place)))

    def match(self, place: int, one: Request) -> int:
        simulator = self.new()
        simulator.run(self.sent[place])
        simulator.advance(self.now)
        return simulator.match(one)

    def total(self, place: int, since: float = -math.inf) -> int:
        return sum(n for time, at, n in self.computed if at == place and math.floor(time) > since)

    def cost(self, place: int, one: Request) -> int:
        lately = self.total(place, math.floor(self.now) - WINDOW)
        return lately + one.tokens - self.match(place, one)


@settings(max_examples=150, deadline=None)
@given(NAMES, st.sampled_from(["lru", "s3fifo", "ttl:150"]), timed(), CAPACITIES, st.integers(1, 3))
def test_a_fleet_decides_as_one_that_remembers_everything(
    router: str, policy: str, requests: list[Request], capacity: int | None, count: int
) -> None:
    slow, fast = Slow(router, count, capacity, policy), fleet(router, count, capacity, policy)
    assert hits(fast, requests) == [slow.request(one) for one in requests]
    computed = [slow.total(place) for place in range(count)]
    assert [one.outcome.computed for one in fast.replicas] == computed
    assert fast.imbalance == pytest.approx(max(computed) / (sum(computed) / count))


# -- sums


@settings(max_examples=50, deadline=None)
@given(NAMES, timed(), st.integers(1, 4))
def test_sums_are_those_of_the_replicas(router: str, requests: list[Request], count: int) -> None:
    one = fleet(router, count, 5)
    found = hits(one, requests)
    assert one.outcome.hit_tokens == sum(found)
    assert one.outcome.requests == len(requests)
    assert one.outcome.prompt_tokens == sum(each.tokens for each in requests)
    assert 1.0 <= one.imbalance <= count


def test_imbalance_is_the_most_over_the_mean() -> None:
    one = fleet("round-robin", 2, None)
    assert one.imbalance == 1.0, "nothing is even"
    hits(one, [request([1] * 9), request([2])])
    assert one.imbalance == 9 / 5


# -- ways


def test_chance_is_decided_by_the_seed() -> None:
    places = [replaced(named_router("random", seed)) for seed in (1, 1, 2)]
    assert places[0] == places[1] != places[2]
    assert set(places[0]) == {0, 1, 2}


def replaced(router: Router) -> list[int]:
    """Where the same request goes again and again."""
    return [router.choose(request([1]), [cache(1)] * 3) for _ in range(40)]


def test_round_robin_goes_around() -> None:
    assert replaced(named_router("round-robin"))[:7] == [0, 1, 2, 0, 1, 2, 0]


def test_what_all_share_draws_all_to_one_replica_unless_load_counts() -> None:
    """A first block that all prompts have: the longest match alone is a trap."""
    requests = [request([0, *range(10 * n, 10 * n + 9)]) for n in range(1, 40)]
    one, other = fleet("prefix", 4, 50), fleet("prefix+load", 4, 50)
    hits(one, requests)
    hits(other, requests)
    assert one.imbalance == 4.0 and other.imbalance < 1.1


@pytest.mark.parametrize(("later", "place"), [(179.9, 1), (180.0, 0), (500.0, 0)])
def test_load_is_forgotten_after_the_window(later: float, place: int) -> None:
    one = fleet("prefix+load", 2, None)
    long, short = request(list(range(100))), request(list(range(200, 230)))
    hits(one, [long, short, short])  # the second replica computes 31
    again = replace(request([*range(50), *range(300, 380)]), time=later)  # matches 50 in the first
    assert [cache.match(again) for cache in one.replicas] == [50, 0]
    assert one.router.choose(again, one.replicas) == place


def test_load_of_a_time_that_went_back_counts_from_now() -> None:
    router, replicas = PrefixAndLoad(), [cache(4), cache(4)]
    found = []
    for time, computed in ((300.0, 0), (100.0, 50), (479.0, 0), (480.0, 0)):
        found.append(router.choose(replace(request([1]), time=time), replicas))
        router.sent(0, computed)
    assert found == [0, 0, 1, 0]


def test_load_takes_no_memory_for_each_request() -> None:
    router, replicas = PrefixAndLoad(), [cache(4), cache(4)]
    one = Fleet(replicas, router)
    hits(one, [request([n]) for n in range(500)])
    assert len(router._seconds) == 1, "all at time 0"
    hits(one, [replace(request([n]), time=n / 3) for n in range(3000)])
    assert len(router._seconds) <= WINDOW and len(router._load) == 2
    sums = [sum(second[place] for _, second in router._seconds) for place in (0, 1)]
    assert sums == [router._load[0], router._load[1]]


def test_what_expired_where_nothing_was_sent_attracts_nobody() -> None:
    one = fleet("prefix", 2, None, "ttl:10")
    head = [1, 2, 3, 4]
    hits(one, [request([*head, 5])])
    hits(one, [replace(request([7, 8]), time=5.0)])  # keeps the clock of the second going
    again = replace(request([*head, 5]), time=20.0)
    assert hits(one, [again]) == [0]
    assert [each.outcome.requests for each in one.replicas] == [1, 2]


def test_unknown_routers_are_refused() -> None:
    with pytest.raises(ConfigError, match="random, round-robin, prefix, prefix"):
        named_router("sticky")

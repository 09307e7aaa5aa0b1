"""Simulated hits are those of slow and obviously right versions, and of published figures."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.lab.simulation.atoms import atomise
from chunkcache.lab.simulation.belady import Future
from chunkcache.lab.simulation.distance import Distances
from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.traces.trace import Form, Request
from chunkcache.tree import LRU, POLICIES, named_policy, unpack
from tests.lab.traces import BLOCKS, IDS, REQUESTS, mooncake, request
from tests.tree.oracle import LeafLRU

WHOLE = Form(1, 4, partial=True)  # a whole prompt may be a hit
CAPACITIES = st.integers(0, 30)
# Hit tokens of an independent simulator, by capacity in tokens; None is without limit.
REFERENCE = {
    None: 54_098_411,
    512_000: 6_575_459,
    3_000_000: 20_087_299,
    5_120_000: 31_238_981,
    15_360_000: 48_093_740,
    25_600_000: 52_347_371,
    51_200_000: 53_695_979,
}


def hits(simulator: Simulator, requests: list[Request]) -> list[int]:
    return [simulator.request(one) for one in requests]


def lru(capacity: int | None, form: Form = BLOCKS, chunk: int = 1) -> Simulator:
    return Simulator(form, chunk, capacity, LRU())


# -- LRU


@settings(max_examples=150, deadline=None)
@given(st.lists(IDS, min_size=1, max_size=40), CAPACITIES)
def test_lru_is_that_of_the_oracle(prompts: list[list[int]], capacity: int) -> None:
    """Block by block, by looking at all leaves. Blocks are named by their whole prefix, as in traces."""
    oracle, names = LeafLRU(capacity), dict[tuple[int, ...], int]()
    wanted = [
        oracle.request([names.setdefault(tuple(ids[: n + 1]), len(names)) for n in range(len(ids))])
        for ids in prompts
    ]
    requests = [request(ids) for ids in prompts]
    assert hits(lru(capacity, WHOLE), requests) == wanted
    assert Distances(atomise(requests, WHOLE, 1)).by_prompt(capacity).tolist() == wanted


@settings(max_examples=150, deadline=None)
@given(REQUESTS, CAPACITIES, st.sampled_from([1, 2, 3]))
def test_one_pass_knows_all_sizes(requests: list[Request], capacity: int, chunk: int) -> None:
    """Answers, tenants and chunks of several blocks among them."""
    requests = [whole_chunks(one, chunk) for one in requests]
    found = Distances(atomise(requests, BLOCKS, chunk))
    assert found.by_prompt(capacity).tolist() == hits(lru(capacity, chunk=chunk), requests)
    assert found.by_prompt(float("inf")).tolist() == hits(lru(None, chunk=chunk), requests)


def whole_chunks(one: Request, chunk: int) -> Request:
    """The same with every number so often that chunks match as a whole or not at all."""

    def repeated(keys: bytes) -> list[int]:
        return [int(number) for number in unpack(keys) for _ in range(chunk)]

    return request(repeated(one.keys), repeated(one.answer), one.tenant)


@pytest.mark.parametrize("capacity", REFERENCE)
def test_the_production_trace_hits_as_published(capacity: int | None) -> None:
    trace, requests = mooncake()
    blocks = None if capacity is None else capacity // 512
    outcome = lru(blocks, trace.form, 512).run(requests)
    assert (outcome.requests, outcome.prompt_tokens) == (12_031, 144_793_823)
    assert outcome.hit_tokens == REFERENCE[capacity]


def test_one_pass_over_the_production_trace() -> None:
    trace, requests = mooncake()
    found = Distances(atomise(requests, trace.form, 512))
    sizes = {size: float("inf") if size is None else size // 512 for size in REFERENCE}
    assert {size: found.hit_tokens(blocks) for size, blocks in sizes.items()} == REFERENCE


def flat(requests: list[Request], capacity: int, leaf_first: bool) -> list[int]:
    """LRU over blocks that knows no tree: any of them may leave."""
    used: OrderedDict[bytes, None] = OrderedDict()
    hits = []
    for one in requests:
        names = [one.keys[:end] for end in range(4, len(one.keys) + 1, 4)]
        stored = next((n for n, name in enumerate(names) if name not in used), len(names))
        hits.append(stored)
        mine = set(names)
        for name in names:
            if name not in used:
                if len(used) >= capacity:
                    victim = next((other for other in used if other not in mine), None)
                    if victim is None:
                        break
                    del used[victim]
                used[name] = None
        for name in reversed(names) if leaf_first else names:
            if name in used:
                used.move_to_end(name)
    return hits


@settings(max_examples=150, deadline=None)
@given(st.lists(IDS, min_size=1, max_size=40), CAPACITIES)
def test_a_flat_cache_that_touches_leaves_first_is_a_tree(
    prompts: list[list[int]], capacity: int
) -> None:
    requests = [request(ids) for ids in prompts]
    assert hits(lru(capacity, WHOLE), requests) == flat(requests, capacity, leaf_first=True)


def test_the_order_of_touches_alone_ruins_a_flat_cache() -> None:
    """Two agents in turns, of which one and a half fit: beginnings that were touched first leave first."""
    agents = [list(range(20)), list(range(20, 40))]
    requests = [request(agents[n % 2]) for n in range(20)]
    good, bad = (sum(flat(requests, 30, leaf_first=order)) for order in (True, False))
    assert (good, bad) == (18 * 10, 0)
    by_touch = [
        sum(hits(Simulator(WHOLE, 1, 30, LRU(), touch=touch), requests))
        for touch in ("leaf_first", "root_first")
    ]
    assert by_touch == [good, good], "a tree does not care"


# -- the bound


def best(requests: list[Request], capacity: int) -> int:
    """By trying everything that may be kept after each request."""
    paths = [prefixes(one.keys + one.answer, one.tenant) for one in requests]
    states: dict[frozenset, int] = {frozenset(): 0}
    for one, path in zip(requests, paths, strict=True):
        found: dict[frozenset, int] = {}
        for kept, sum_ in states.items():
            stored = 0
            while stored < one.tokens and path[stored] in kept:
                stored += 1
            for choice in closed(kept | set(path), capacity):
                worth = sum_ + min(stored, one.tokens - 1)
                found[choice] = max(found.get(choice, 0), worth)
        states = found
    return max(states.values())


def prefixes(keys: bytes, tenant: str) -> list[tuple]:
    ids = unpack(keys).tolist()
    return [(tenant, *ids[: end + 1]) for end in range(len(ids))]


def closed(nodes: set[tuple], capacity: int) -> set[frozenset]:
    """All sets of at most so many nodes in which no node is without its parent."""
    found = {frozenset[tuple]()}
    for node in sorted(nodes, key=len):
        found |= {
            one | {node}
            for one in found
            if len(one) < capacity and (len(node) == 2 or node[:-1] in one)
        }
    return found


FEW = st.lists(
    st.builds(
        request,
        st.lists(st.integers(0, 1), min_size=1, max_size=3),
        st.one_of(st.none(), st.lists(st.integers(0, 1), max_size=1)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(FEW, st.integers(0, 5))
def test_the_bound_is_the_best_there_is(requests: list[Request], capacity: int) -> None:
    future = Future(atomise(requests, BLOCKS, 1))
    assert future.hit_tokens(capacity) == best(requests, capacity)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), REQUESTS, CAPACITIES)
def test_no_policy_beats_the_bound(name: str, requests: list[Request], capacity: int) -> None:
    future = Future(atomise(requests, BLOCKS, 1))
    simulator = Simulator(BLOCKS, 1, capacity, named_policy(name))
    assert sum(hits(simulator, requests)) <= future.hit_tokens(capacity)
    assert future.hit_tokens(float("inf")) == sum(hits(lru(None), requests))


# -- memory


def test_tenants_that_came_once_are_forgotten() -> None:
    simulator = lru(8)
    for number in range(5000):
        simulator.request(request([1, 2, 3], tenant=str(number)))
    assert len(simulator._trees) <= 1024 and simulator.chunks == 8
    assert simulator.request(request([1, 2, 3], tenant="4999")) == 2


# -- policies


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), REQUESTS, CAPACITIES)
def test_what_is_counted_is_what_is_stored(
    name: str, requests: list[Request], capacity: int
) -> None:
    simulator = Simulator(BLOCKS, 1, capacity, named_policy(name))
    for one in requests:
        simulator.request(one)
        assert simulator.chunks == sum(tree.chunks for tree in simulator._trees.values())
        assert simulator.chunks <= capacity
        for tree in simulator._trees.values():
            tree.check()
    simulator._order.evict(1000)
    assert simulator.chunks == 0, "nobody holds anything"

"""A hypothesis state machine over the same pair of tree and oracle: failures come out minimal."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .pair import Pair

prompts = st.lists(st.integers(0, 1), max_size=9).map(tuple)
names = st.sampled_from([None, "a", "b"])
ttls = st.sampled_from([None, 1.0, 5.0])
small = st.integers(1, 3)


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(1)

    @initialize(
        size=small,
        touch=st.sampled_from(["leaf_first", "root_first"]),
        budget=st.sampled_from([float("inf"), 4, 9]),
    )
    def start(self, size: int, touch: str, budget: float) -> None:
        self.pair = Pair(size, touch, budget)

    @rule(
        tokens=prompts,
        short=st.none() | small,
        stop=st.none() | small,
        fail=st.none() | small,
        evict=st.integers(0, 3),
        name=names,
        pin=st.booleans(),
        ttl=ttls,
    )
    def insert(self, tokens, **how) -> None:
        self.pair.insert(tokens, **how)

    @rule(tokens=prompts, limit=st.none() | st.integers(0, 9))
    def match(self, tokens, limit) -> None:
        self.pair.match(tokens, limit)

    @rule(tokens=prompts, limit=st.none() | st.integers(0, 9), count=st.booleans())
    def lease(self, tokens, limit, count) -> None:
        self.pair.lease(tokens, limit, count)

    @precondition(lambda self: self.pair.leases)
    @rule(data=st.data())
    def release(self, data) -> None:
        self.pair.release(data.draw(st.integers(0, len(self.pair.leases) - 1)))

    @rule(tokens=prompts, name=names, ttl=ttls)
    def pin(self, tokens, name, ttl) -> None:
        self.pair.pin(tokens, name, ttl)

    @rule(which=prompts | st.sampled_from(["a", "b"]))
    def unpin(self, which) -> None:
        self.pair.unpin(which)

    @rule(chunks=st.integers(0, 5))
    def evict(self, chunks) -> None:
        self.pair.evict(chunks)

    @rule(tokens=prompts, chunks=st.integers(0, 5), bytes=small)
    def keep(self, tokens, chunks, bytes) -> None:
        self.pair.keep(tokens, chunks * self.pair.size, bytes)

    @precondition(lambda self: self.pair.leases)
    @rule(data=st.data(), limit=st.none() | st.integers(-1, 9))
    def resume(self, data, limit) -> None:
        self.pair.resume(data.draw(st.integers(0, len(self.pair.leases) - 1)), limit)

    @rule(tokens=prompts, limit=st.none() | st.integers(0, 9))
    def snapshot_at(self, tokens, limit) -> None:
        self.pair.snapshot_at(tokens, limit)

    @rule(bytes=st.integers(0, 9))
    def evict_snapshots(self, bytes) -> None:
        self.pair.evict_snapshots(bytes)

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]))
    def wait(self, seconds) -> None:
        self.pair.wait(seconds)

    @rule()
    def expire(self) -> None:
        self.pair.expire()

    @rule(tokens=prompts)
    def remove(self, tokens) -> None:
        self.pair.remove(tokens)

    @rule()
    def clear(self) -> None:
        self.pair.clear()

    @invariant()
    def holds(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        self.pair.finish()


TestTree = TreeMachine.TestCase
TestTree.settings = settings(
    max_examples=200,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

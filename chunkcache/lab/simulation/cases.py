"""What is simulated: a policy at a size, in one cache or a fleet, with or without colder tiers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from chunkcache.lab.simulation.fleet import Cache, Fleet, named_router
from chunkcache.lab.simulation.simulator import Outcome, Simulator
from chunkcache.lab.simulation.tiered import Tiered
from chunkcache.lab.traces.trace import Form, Request
from chunkcache.tree import named_policy


@dataclass(frozen=True)
class Case:
    """One policy at one size.

    Attributes:
        capacity_tokens: of each replica's device; None is without limit.
        router: between replicas; None for a single one, and for the optimum.
    """

    policy: str
    capacity_tokens: int | None
    router: str | None = None


@dataclass(frozen=True)
class Setup:
    """What all cases of a sweep have in common.

    Attributes:
        tiers: names and tokens of those behind the device, the fastest first; replicas share them.
        admit: requests that must have used a chunk before it is written there.
        seed: of routers that chance decides for.
    """

    replicas: int = 1
    tiers: tuple[tuple[str, int | None], ...] = ()
    admit: int = 1
    seed: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is one cache of one tier."""
        return self.replicas == 1 and not self.tiers

    def chunks(self, case: Case, size: int) -> float:
        """Of `size` tokens, that all devices and tiers of a case hold together."""
        device = capacity(case.capacity_tokens, size)
        return self.replicas * device + sum(capacity(tokens, size) for _, tokens in self.tiers)


class Found(NamedTuple):
    """What became of a case; `imbalance` is that of a fleet."""

    outcome: Outcome
    imbalance: float | None = None


def capacity(tokens: int | None, size: int) -> float:
    """Whole chunks of `size` tokens; infinity without limit."""
    return float("inf") if tokens is None else tokens // size


def simulate(
    requests: Iterable[Request], form: Form, size: int, setup: Setup, cases: Sequence[Case]
) -> list[Found]:
    """Runs cases side by side, over one reading of the requests.

    Args:
        size: tokens of a chunk.
    """
    caches = [made(case, form, size, setup) for case in cases]
    for request in requests:
        for cache in caches:
            cache.request(request)
    return [_found(cache) for cache in caches]


def _found(cache: Cache | Fleet) -> Found:
    return Found(cache.outcome, cache.imbalance if isinstance(cache, Fleet) else None)


def made(case: Case, form: Form, size: int, setup: Setup) -> Cache | Fleet:
    """A case's cache, empty; `size` is tokens of a chunk."""

    def tree(policy: str, tokens: int | None) -> Simulator:
        chunks = None if tokens is None else tokens // size
        return Simulator(form, size, chunks, named_policy(policy))

    tiers = {name: tree("lru", tokens) for name, tokens in setup.tiers}

    def replica() -> Cache:
        device = tree(case.policy, case.capacity_tokens)
        return Tiered(device, tiers, setup.admit) if tiers else device

    if case.router is None:
        return replica()
    router = named_router(case.router, setup.seed)
    return Fleet([replica() for _ in range(setup.replicas)], router)

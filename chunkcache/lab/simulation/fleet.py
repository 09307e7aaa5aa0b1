"""Replicas of one model, each with a cache of its own, and routers that choose one for a request.

Routers see what a replica holds on its device and what it was given to compute.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from chunkcache.errors import ConfigError
from chunkcache.lab.simulation.simulator import Outcome
from chunkcache.lab.traces.trace import Request

WINDOW = 180  # seconds, as in Preble


class Cache(Protocol):
    """One replica's, with or without colder tiers."""

    outcome: Outcome

    def advance(self, time: float) -> None:
        """Moves the clock to a time in seconds, never back."""

    def match(self, request: Request) -> int:
        """Tokens of a request that are stored; changes nothing."""

    def request(self, request: Request) -> int:
        """Tokens that a request reuses; it is stored then."""


class Router:
    """Base of ways to route: override `choose`."""

    def choose(self, request: Request, replicas: Sequence[Cache]) -> int:
        """The place of the replica that a request goes to."""
        raise NotImplementedError

    def sent(self, place: int, computed: int) -> None:
        """Hears how many tokens a replica computes of the request that was sent there."""


class AtRandom(Router):
    """Any replica, each as likely as the others.

    Args:
        seed: the same one makes the same choices.
    """

    def __init__(self, seed: int = 0):
        self._random = Random(seed)

    def choose(self, request: Request, replicas: Sequence[Cache]) -> int:
        """See the base class. O(1)."""
        return self._random.randrange(len(replicas))


class RoundRobin(Router):
    """One after another."""

    def __init__(self) -> None:
        self._count = 0

    def choose(self, request: Request, replicas: Sequence[Cache]) -> int:
        """See the base class. O(1)."""
        self._count += 1
        return (self._count - 1) % len(replicas)


class LongestPrefix(Router):
    """The longest match; of equals, the one that has computed least."""

    def choose(self, request: Request, replicas: Sequence[Cache]) -> int:
        """See the base class. O(replicas * keys)."""

        def rank(place: int) -> tuple[int, int]:
            return -replicas[place].match(request), replicas[place].outcome.computed

        return min(range(len(replicas)), key=rank)


class PrefixAndLoad(Router):
    """The least to compute: lately given to a replica, and of this request, which is less where it matches.

    After Srivatsa et al., "Preble", ICLR 2025, which has the window; costs are tokens here, and nothing
    is sent elsewhere afterwards. Of equals, the one that has computed least.

    Args:
        window: seconds that count as lately, of the trace's time and as whole seconds.
    """

    def __init__(self, window: int = WINDOW):
        self.window = window
        self._load: Counter[int] = Counter()  # by place, the sum of all that follow
        self._seconds: deque[tuple[int, Counter[int]]] = deque()  # few, however many requests come
        self._now = 0

    def choose(self, request: Request, replicas: Sequence[Cache]) -> int:
        """See the base class. O(replicas * keys)."""
        self._forget(request.time)

        def rank(place: int) -> tuple[int, int]:
            own = request.tokens - replicas[place].match(request)
            return self._load[place] + own, replicas[place].outcome.computed

        return min(range(len(replicas)), key=rank)

    def sent(self, place: int, computed: int) -> None:
        """See the base class. O(1)."""
        if not self._seconds or self._seconds[-1][0] != self._now:
            self._seconds.append((self._now, Counter()))
        self._seconds[-1][1][place] += computed
        self._load[place] += computed

    def _forget(self, time: float) -> None:
        self._now = max(self._now, math.floor(time))
        while self._seconds and self._seconds[0][0] <= self._now - self.window:
            self._load.subtract(self._seconds.popleft()[1])


ROUTERS: dict[str, Callable[[int], Router]] = {
    "random": AtRandom,
    "round-robin": lambda seed: RoundRobin(),
    "prefix": lambda seed: LongestPrefix(),
    "prefix+load": lambda seed: PrefixAndLoad(),
}


def named_router(name: str, seed: int = 0) -> Router:
    """A new router.

    >>> type(named_router("prefix+load")).__name__
    'PrefixAndLoad'

    Args:
        seed: of what chance decides.

    Raises:
        ConfigError: there is no such router.
    """
    if name not in ROUTERS:
        raise ConfigError(f"there is no router {name!r}; these are: {', '.join(ROUTERS)}")
    return ROUTERS[name](seed)


class Fleet:
    """Replicas behind a router; a request is stored where it was sent.

    Args:
        replicas: at least one.
    """

    def __init__(self, replicas: Sequence[Cache], router: Router):
        self.replicas = replicas
        self.router = router

    @property
    def outcome(self) -> Outcome:
        """Sums over the replicas. O(replicas)."""
        found = Outcome()
        colder: Counter[str] = Counter()
        for one in (cache.outcome for cache in self.replicas):
            found.requests += one.requests
            found.prompt_tokens += one.prompt_tokens
            found.hit_tokens += one.hit_tokens
            colder.update(one.colder)
        found.colder = dict(colder)
        return found

    @property
    def imbalance(self) -> float:
        """The most tokens that a replica computed / the mean; 1 is even, also if none were. O(replicas)."""
        computed = [cache.outcome.computed for cache in self.replicas]
        total = sum(computed)
        return max(computed) * len(computed) / total if total else 1.0

    def request(self, request: Request) -> int:
        """Tokens that a request reuses where it is sent."""
        for cache in self.replicas:  # those that get nothing lose what expires all the same
            cache.advance(request.time)
        place = self.router.choose(request, self.replicas)
        hit = self.replicas[place].request(request)
        self.router.sent(place, request.tokens - hit)
        return hit

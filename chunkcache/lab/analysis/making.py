"""Making reports: a trace is looked at as a whole, and a cache of its size is simulated."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from chunkcache.errors import TraceError
from chunkcache.lab.analysis.observed import Observed, histogram
from chunkcache.lab.analysis.report import Histogram, Money, Report, Size
from chunkcache.lab.analysis.sums import Sums
from chunkcache.lab.analysis.told import Asked, Cache, cache_of
from chunkcache.lab.simulation.atoms import Atoms, atomise
from chunkcache.lab.simulation.belady import Future
from chunkcache.lab.simulation.distance import Distances
from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.simulation.sweep import held
from chunkcache.lab.traces.trace import TOKENS, Request, Trace
from chunkcache.tree import named_policy

_TIMES = (1 / 4, 1 / 2, 2, 4)  # of a capacity, for other sizes
_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of all different tokens, where no capacity is known
_BINS = 60  # of requests, over which hit rates go up and down
_POINTS = 12  # of a curve


def make_report(
    name: str,
    trace: Trace,
    asked: Asked | None = None,
    chunk: int | None = None,
    price: float | None = None,
    cached_price: float = 0.0,
) -> Report:
    """The report of a trace, which is read once, or several times if it is large.

    Takes O(keys), and for each size that is looked at the time of a simulation.

    Args:
        asked: a cache to simulate, or what makes one of the cache that the trace tells of.
        chunk: tokens of a chunk, else what the trace says.
        price, cached_price: of a million tokens of prompts, computed and reused.

    Raises:
        ConfigError: chunks that are no multiple of the trace's blocks; no such policy.
        TraceError: nothing of the trace could be read.
    """
    requests = held(trace)
    cache = cache_of(trace, chunk, asked)
    return _Maker(name, trace, requests, cache, asked is not None).report(price, cached_price)


class _Maker:
    """Looks at a trace as a whole once."""

    def __init__(
        self, name: str, trace: Trace, requests: Iterable[Request], cache: Cache, simulate: bool
    ):
        self._name = name
        self._form = trace.form
        self._requests = requests
        self._cache = cache
        self._simulate = simulate
        self._atoms: Atoms = atomise(requests, trace.form, cache.chunk_size)
        if not self._atoms.tokens:
            raise TraceError(f"no line of {trace.path} could be read")
        self._distances = Distances(self._atoms)
        self._future = Future(self._atoms)
        self._sizes: dict[int | None, int] = {}

    def report(self, price: float | None, cached_price: float) -> Report:
        """Puts everything together."""
        simulated, lives = self._simulated()
        self._sizes[self._cache.capacity_tokens] = int(simulated.sum())
        recorded = None if self._simulate else self._recorded()
        cached = simulated if recorded is None else recorded
        sums = Sums(self._cache, self._form, recorded is not None)
        unlimited = self._distances.by_prompt(float("inf"))
        for request, hit, known in zip(
            self._requests, cached.tolist(), unlimited.tolist(), strict=True
        ):
            sums.add(request, hit, known)
        tokens = np.frombuffer(self._atoms.tokens, np.int64)
        whole = cached if self._form.partial else cached - cached % self._cache.chunk_size
        found = int(cached.sum())
        return Report(
            name=self._name,
            source="simulated" if recorded is None else "recorded",
            cache=self._cache,
            requests=len(tokens),
            prompt_tokens=int(tokens.sum()),
            generated_tokens=sums.generated,
            seconds=sums.seconds,
            cached_tokens=found,
            whole_tokens=int(whole.sum()),
            unlimited_tokens=int(unlimited.sum()),
            belady_tokens=self._future.hit_tokens(self._chunks(self._cache.capacity_tokens)),
            footprint_tokens=self._atoms.chunks * self._cache.chunk_size,
            tiers=dict(sums.tiers),
            misses=dict(sums.misses.most_common()),
            prompts=sums.parts("prompt"),
            tenants=sums.parts("tenant"),
            sizes=[self._size(size) for size in self._others()],
            reuse=self._reuse(),
            lifetimes=lives,
            timeline=_timeline(cached, tokens),
            curve=self._curve(self._others()[0] or 0),
            first_tokens=sums.timed,
            token_seconds=sums.pace.token_seconds,
            money=_money(found, int(tokens.sum()) - found, price, cached_price),
        )

    def _recorded(self) -> npt.NDArray[np.int64] | None:
        """What a cache said that it reused of each prompt; None if it did not."""
        found = array("q")
        for request in self._requests:
            if request.reuse is None:
                return None
            found.append(request.reuse["cached_tokens"])
        return np.frombuffer(found, np.int64)

    def _simulated(self) -> tuple[npt.NDArray[np.int64], Histogram | None]:
        """Tokens that each prompt hits, and how long lived what left."""
        policy = named_policy(self._cache.policy)
        cache = Observed(self._form, self._cache.chunk_size, self._room(), policy)
        found = array("q", (cache.request(request) for request in self._requests))
        return np.frombuffer(found, np.int64), cache.lifetimes()

    def _room(self) -> int | None:
        capacity = self._cache.capacity_tokens
        return None if capacity is None else capacity // self._cache.chunk_size

    def _others(self) -> list[int | None]:
        """Capacities to look at: around the present one, or parts of all there is, if that is less."""
        chunk, now = self._cache.chunk_size, self._cache.capacity_tokens
        whole = self._atoms.chunks * chunk
        near = now is not None and now <= whole
        base, factors = (now or 0, _TIMES) if near else (whole, _SHARES)
        sizes = {max(chunk, int(base * factor) // chunk * chunk) for factor in factors}
        if now is not None:
            sizes.add(now)
        return [*sorted(sizes), None]

    def _size(self, capacity: int | None) -> Size:
        chunks = self._chunks(capacity)
        return Size(capacity, self._hits(capacity), self._future.hit_tokens(chunks))

    def _hits(self, capacity: int | None) -> int:
        if capacity not in self._sizes:
            policy = self._cache.policy
            blocks = policy == "lru" and self._form is not TOKENS
            if blocks or (capacity is None and "ttl" not in policy):
                self._sizes[capacity] = self._distances.hit_tokens(self._chunks(capacity))
            else:
                room = None if capacity is None else capacity // self._cache.chunk_size
                cache = Simulator(self._form, self._cache.chunk_size, room, named_policy(policy))
                self._sizes[capacity] = cache.run(self._requests).hit_tokens
        return self._sizes[capacity]

    def _chunks(self, capacity: int | None) -> float:
        return float("inf") if capacity is None else capacity // self._cache.chunk_size

    def _reuse(self) -> Histogram:
        found: Counter[int] = Counter()
        chunk = self._cache.chunk_size
        for above, size in zip(
            self._distances.above.tolist(), self._distances.sizes.tolist(), strict=True
        ):
            found[((above + size) * chunk).bit_length()] += size
        return histogram("tokens", found, chunk)

    def _curve(self, least: int) -> list[Size]:
        """LRU and the bound, from half of a capacity on, at equal distances of logarithms."""
        chunk, most = self._cache.chunk_size, max(1, self._atoms.chunks)
        begin = min(most, max(1, least // chunk // 2))
        sizes = np.unique(np.geomspace(begin, most, _POINTS).round().astype(int)).tolist()
        return [
            Size(size * chunk, self._distances.hit_tokens(size), self._future.hit_tokens(size))
            for size in sizes
        ]


def _money(cached: int, computed: int, price: float | None, cached_price: float) -> Money | None:
    if price is None:
        return None
    spent = (computed * price + cached * cached_price) / 1e6
    return Money(price, cached_price, spent, cached * (price - cached_price) / 1e6)


def _timeline(cached: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> list[float]:
    parts = min(_BINS, len(tokens))
    hits, all_ = (np.array_split(column, parts) for column in (cached, tokens))
    return [float(a.sum() / max(1, b.sum())) for a, b in zip(hits, all_, strict=True)]

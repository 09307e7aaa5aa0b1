"""What a cache did with the requests of a trace, what it could have done, and what another size would do.

A trace that a cache recorded tells what it reused of each prompt; of another, or for a cache that somebody
thinks of, the simulator tells it. Both are held against two bounds: a cache without limit, and one of the
same size that knows the future. These know whole chunks, so only whole chunks are compared with them.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkcache.errors import ConfigError, TraceError
from chunkcache.lab.analysis.pace import Pace
from chunkcache.lab.simulation.atoms import Atoms, atomise
from chunkcache.lab.simulation.belady import Future
from chunkcache.lab.simulation.distance import Distances
from chunkcache.lab.simulation.simulator import Blank, Simulator
from chunkcache.lab.simulation.sweep import CHUNK, held
from chunkcache.lab.traces.trace import TOKENS, Form, Request, Trace
from chunkcache.tree import Miss, Policy, Run, named_policy

_TIMES = (1 / 4, 1 / 2, 2, 4)  # of a capacity, for other sizes
_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of all different tokens, where no capacity is known
_BINS = 60  # of requests, over which hit rates go up and down
_POINTS = 40  # of a curve
_BARS = 12  # of a histogram, before two become one
_GONE = {True: "evicted or expired", False: str(Miss.EVICTED)}


@dataclass(frozen=True)
class Cache:
    """What answered, or would have.

    Attributes:
        capacity_tokens: None is without limit; model: empty if nobody said.
    """

    capacity_tokens: int | None
    policy: str = "lru"
    chunk_size: int = CHUNK
    model: str = ""


@dataclass(frozen=True)
class Part:
    """Some of the requests."""

    requests: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def hit_rate(self) -> float:
        """Cached tokens / prompt tokens; 0 without any."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True)
class Size:
    """What a cache of another size would hit, in whole chunks.

    Attributes:
        capacity_tokens: None is without limit.
        belady_tokens: what the optimum hits at that size.
    """

    capacity_tokens: int | None
    hit_tokens: int
    belady_tokens: int


@dataclass(frozen=True)
class Histogram:
    """Tokens by powers of two of something.

    Attributes:
        unit: of the edges; bin n counts from edge n up to edge n + 1.
    """

    unit: str
    edges: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class Money:
    """Prices are per million tokens of prompts; amounts have no currency."""

    price: float
    cached_price: float
    spent: float
    saved: float


@dataclass(frozen=True)
class Report:
    """See the module.

    Attributes:
        source: "recorded", by the cache itself, or "simulated".
        seconds: from the first request to the last; None without time stamps.
        cached_tokens: reused; whole_tokens: the same in whole chunks, to be compared with the bounds.
        unlimited_tokens, belady_tokens: what a cache without limit and the optimum of its size hit.
        tiers: cached tokens by where they lay.
        misses: computed tokens by reason. What was known before counts for the reason why it was not there,
            the rest of a prompt as never seen.
        prompts, tenants: by name; what has none is under "".
        sizes: other capacities, upwards; curve: (tokens, hit tokens under LRU) for a figure.
        reuse: tokens reused by how many others were used in between.
        lifetimes: evicted tokens by how long they had been stored; None if nothing left.
        timeline: hit rates of requests in their order, in equal parts.
        first_tokens: (cached tokens, seconds) of requests that were timed.
        token_seconds: that computing a token takes, None if nothing was timed.
    """

    name: str
    source: str
    cache: Cache
    requests: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float | None
    cached_tokens: int
    whole_tokens: int
    unlimited_tokens: int
    belady_tokens: int
    footprint_tokens: int
    tiers: dict[str, int]
    misses: dict[str, int]
    prompts: dict[str, Part]
    tenants: dict[str, Part]
    sizes: list[Size]
    reuse: Histogram
    lifetimes: Histogram | None
    timeline: list[float]
    curve: list[tuple[int, int]] = field(repr=False)
    first_tokens: list[tuple[int, float]] = field(repr=False)
    token_seconds: float | None
    money: Money | None = None

    @property
    def hit_rate(self) -> float:
        """Cached tokens / prompt tokens; 0 without any."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def percent_of_unlimited(self) -> float | None:
        """Of what a cache without limit hits; None if that is nothing."""
        return _percent(self.whole_tokens, self.unlimited_tokens)

    @property
    def percent_of_belady(self) -> float | None:
        """Of what the optimum hits at this size; None if that is nothing."""
        return _percent(self.whole_tokens, self.belady_tokens)

    @property
    def saved_seconds(self) -> float | None:
        """What computing the reused tokens would have taken; None if nothing was timed."""
        return None if self.token_seconds is None else self.cached_tokens * self.token_seconds

    def to_dict(self) -> dict[str, Any]:
        """All fields and properties, for JSON."""
        names = ("hit_rate", "percent_of_unlimited", "percent_of_belady", "saved_seconds")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def _repr_html_(self) -> str:
        from chunkcache.lab.views.report import notebook

        return notebook(self)


def make_report(
    name: str,
    trace: Trace,
    asked: Cache | None = None,
    chunk: int | None = None,
    price: float | None = None,
    cached_price: float = 0.0,
) -> Report:
    """The report of a trace, which is read once, or several times if it is large.

    Takes O(keys), and for each size that is looked at the time of a simulation.

    Args:
        asked: a cache to simulate, whatever the trace says of one.
        chunk: tokens of a chunk, else what the trace says.
        price, cached_price: of a million tokens of prompts, computed and reused.

    Raises:
        ConfigError: chunks that are no multiple of the trace's blocks; no such policy.
        TraceError: nothing of the trace could be read.
    """
    requests = held(trace)
    cache = asked or told_cache(trace, chunk)
    return _Maker(name, trace, requests, cache, asked is not None).report(price, cached_price)


class _Maker:
    """Looks at a trace as a whole once."""

    def __init__(
        self, name: str, trace: Trace, requests: Iterable[Request], cache: Cache, simulate: bool
    ):
        if cache.chunk_size % trace.form.block:
            raise ConfigError(
                f"blocks of {trace.form.block} tokens make no chunks of {cache.chunk_size}; "
                "try a multiple"
            )
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
        sums = _Sums(self._cache, recorded is not None)
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
            curve=self._curve(),
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
        cache = _Observed(self._form, self._cache.chunk_size, self._room(), policy)
        found = array("q", (cache.request(request) for request in self._requests))
        unit = "seconds" if cache.clocked else "prompts"
        lives = _histogram(unit, cache.lives, self._cache.chunk_size) if cache.lives else None
        return np.frombuffer(found, np.int64), lives

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
            chunks = self._chunks(capacity)
            if capacity is None or (self._cache.policy == "lru" and self._form is not TOKENS):
                self._sizes[capacity] = self._distances.hit_tokens(chunks)
            else:
                policy = named_policy(self._cache.policy)
                cache = Simulator(self._form, self._cache.chunk_size, int(chunks), policy)
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
        return _histogram("tokens", found, chunk)

    def _curve(self) -> list[tuple[int, int]]:
        """Sizes at equal distances of their logarithms, and what LRU hits."""
        most = max(1, self._atoms.chunks)
        sizes = np.unique(np.geomspace(1, most, _POINTS).round().astype(int)).tolist()
        chunk = self._cache.chunk_size
        return [(size * chunk, self._distances.hit_tokens(size)) for size in sizes]


def told_cache(trace: Trace, chunk: int | None) -> Cache:
    """What the trace says of the cache that recorded it."""
    told = trace.cache
    if chunk is None:
        own = told.get("chunk_size")
        known = own if type(own) is int and own > 0 else CHUNK
        chunk = known if trace.form is TOKENS else trace.form.block
    capacity = told.get("capacity_tokens")
    policy = str(told.get("policy") or "lru")
    return Cache(
        capacity if type(capacity) is int else None, policy, chunk, str(told.get("model") or "")
    )


def _money(cached: int, computed: int, price: float | None, cached_price: float) -> Money | None:
    if price is None:
        return None
    spent = (computed * price + cached * cached_price) / 1e6
    return Money(price, cached_price, spent, cached * (price - cached_price) / 1e6)


class _Dated(Blank):
    """A run of chunks that knows since when it is stored."""

    __slots__ = ("since",)

    def __init__(self, chunks: int, since: float):
        super().__init__(chunks)
        self.since = since

    def split(self, chunks: int) -> tuple[Run, Run]:
        """As the tree needs it."""
        return _Dated(chunks, self.since), _Dated(len(self) - chunks, self.since)


class _Observed(Simulator):
    """Counts how long chunks stay: `lives` has chunks by the power of two of their time."""

    def __init__(self, form: Form, chunk: int, capacity: int | None, policy: Policy):
        super().__init__(form, chunk, capacity, policy)
        self.lives: Counter[int] = Counter()
        self.clocked = False
        self._begin: float | None = None

    def request(self, request: Request) -> int:
        if self._begin is None:
            self._begin = request.time
        self.clocked = self.clocked or request.time > self._begin
        return super().request(request)

    @property
    def _clock(self) -> float:
        return self.now if self.clocked else self.outcome.requests

    def _make_run(self, first: int, count: int) -> Blank | None:
        run = super()._make_run(first, count)
        return None if run is None else _Dated(len(run), self._clock)

    def _freed(self, run: Run) -> None:
        super()._freed(run)
        assert isinstance(run, _Dated)
        self.lives[int(self._clock - run.since).bit_length()] += len(run)


class _Sums:
    """What requests add up to."""

    def __init__(self, cache: Cache, recorded: bool):
        self._gone = _GONE["ttl" in cache.policy]
        self._recorded = recorded
        self._chunk = cache.chunk_size
        self._times: list[float] = []
        self._parts: dict[tuple[str, str], list[int]] = {}
        self.generated = 0
        self.tiers: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.pace = Pace()
        self.timed: list[tuple[int, float]] = []

    def add(self, request: Request, cached: int, known: int) -> None:
        """Counts one; `known`: tokens that a cache without limit would have had."""
        told = request.reuse if self._recorded else None
        self._times = [*self._times[:1], request.time]
        self.generated += request.output
        for kind, name in (("prompt", request.prompt), ("tenant", request.tenant)):
            part = self._parts.setdefault((kind, name), [0, 0, 0])
            for place, count in enumerate((1, request.tokens, cached)):
                part[place] += count
        lost = max(0, known - cached)
        new = request.tokens - cached - lost
        short = request.tokens <= self._chunk
        self.misses[str(Miss.TOO_SHORT if short else Miss.NEVER_SEEN)] += new
        if lost:
            self.misses[self._gone if told is None else str(told.get("reason"))] += lost
        self._tier(cached, told)
        if told is not None and request.seconds is not None:
            self.pace.add(request.tokens - cached, request.seconds)
            self.timed.append((cached, request.seconds))

    def _tier(self, cached: int, told: dict[str, Any] | None) -> None:
        tiers = told.get("tiers") if told is not None else None
        if isinstance(tiers, dict):
            self.tiers.update({str(name): int(tokens) for name, tokens in tiers.items() if tokens})
        elif cached:
            self.tiers["device"] += cached

    @property
    def seconds(self) -> float | None:
        """From the first request to the last."""
        span = self._times[-1] - self._times[0]
        return span if span > 0 else None

    def parts(self, kind: str) -> dict[str, Part]:
        """By the prompts' names or by tenants, the largest first."""
        found = {name: Part(*counts) for (of, name), counts in self._parts.items() if of == kind}
        return dict(sorted(found.items(), key=lambda item: -item[1].prompt_tokens))


def _histogram(unit: str, found: Counter[int], chunk: int) -> Histogram:
    """Of chunks by the bit length of something; of many lengths two make a bin."""
    low, high = min(found, default=0), max(found, default=-1)
    step = 1 if high - low < _BARS else 2
    bits = [*range(low, high + 1, step)]
    edges = [float(2 ** (bit - 1)) if bit else 0.0 for bit in [*bits, low + step * len(bits)]]
    return Histogram(
        unit, edges, [chunk * sum(found[bit + n] for n in range(step)) for bit in bits]
    )


def _timeline(cached: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> list[float]:
    parts = min(_BINS, len(tokens))
    hits, all_ = (np.array_split(column, parts) for column in (cached, tokens))
    return [float(a.sum() / max(1, b.sum())) for a, b in zip(hits, all_, strict=True)]


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def other_sizes(report: Report) -> tuple[Sequence[Size], Size | None, Sequence[Size]]:
    """Smaller ones, the present one, larger ones."""
    now = report.cache.capacity_tokens
    known = [one for one in report.sizes if one.capacity_tokens is not None]
    if now is None:
        return known, report.sizes[-1], []
    smaller = [one for one in known if (one.capacity_tokens or 0) < now]
    here = next((one for one in known if one.capacity_tokens == now), None)
    return smaller, here, [one for one in known if (one.capacity_tokens or 0) > now]

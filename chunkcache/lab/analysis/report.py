"""What a cache did with the requests of a trace, what it could have done, and what another size would do.

A trace that a cache recorded tells what it reused of each prompt; of another, or for a cache that somebody
thinks of, the simulator tells it. Both are held against two bounds: a cache without limit, and one of the
same size that knows the future. These know whole chunks, so only whole chunks are compared with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from chunkcache.lab.analysis.told import Cache


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
        sizes: other capacities, upwards; curve: more of them, under LRU, for a figure.
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
    curve: list[Size] = field(repr=False)
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

    def __str__(self) -> str:
        from chunkcache.lab.views.report import sections
        from chunkcache.lab.views.sections import to_text

        return to_text(sections(self))

    def _repr_html_(self) -> str:
        from chunkcache.lab.views.report import notebook

        return notebook(self)


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

"""What requests add up to."""

from __future__ import annotations

from collections import Counter
from typing import Any

from chunkcache.lab.analysis.pace import Pace
from chunkcache.lab.analysis.report import Part
from chunkcache.lab.analysis.told import Cache
from chunkcache.lab.simulation.simulator import DEVICE
from chunkcache.lab.traces.trace import Form, Request
from chunkcache.tree import Miss

_GONE = {True: "evicted or expired", False: str(Miss.EVICTED)}


class Sums:
    """What requests add up to."""

    def __init__(self, cache: Cache, form: Form, recorded: bool):
        self._gone = _GONE["ttl" in cache.policy]
        self._recorded = recorded
        self._chunk = cache.chunk_size
        self._partial = form.partial
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
        short = request.tokens <= self._chunk and not self._partial
        self.misses[str(Miss.TOO_SHORT if short else Miss.NEVER_SEEN)] += new
        if lost:
            self.misses[self._gone if told is None else str(told.get("reason") or self._gone)] += (
                lost
            )
        self._tier(cached, told)
        if told is not None and request.seconds is not None:
            self.pace.add(request.tokens - cached, request.seconds)
        if told is not None and request.first_token is not None:
            self.timed.append((cached, request.first_token))

    def _tier(self, cached: int, told: dict[str, Any] | None) -> None:
        tiers = told.get("tiers") if told is not None else None
        if tiers:
            self.tiers.update(tiers)
        elif cached:
            self.tiers[DEVICE] += cached

    @property
    def seconds(self) -> float | None:
        """From the first request to the last."""
        span = self._times[-1] - self._times[0]
        return span if span > 0 else None

    def parts(self, kind: str) -> dict[str, Part]:
        """By the prompts' names or by tenants, the largest first."""
        found = {name: Part(*counts) for (of, name), counts in self._parts.items() if of == kind}
        return dict(sorted(found.items(), key=lambda item: -item[1].prompt_tokens))

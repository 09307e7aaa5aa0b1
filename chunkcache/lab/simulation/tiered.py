"""A device and colder tiers behind it, as the live cache has them (kv/tiers.py).

What the device stores is written to every tier that admits it, so that tiers hold the same and not one
after another. Where the device's match ends they are asked in order, and what one of them has is laid
into the device before the request leases it. Simpler than in the live cache: writing is instant, reading
always pays, every use keeps what a tier has (the live one says so once a minute), and prompts with a
name are like others.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.traces.trace import Request


class Tiered:
    """One cache of several tiers.

    Args:
        colder: by name, the fastest first; several devices may share them. The least recently used
            leaves first.
        admit: of the requests that used a chunk, as many as it takes until it is written: the first,
            which computes it, is one. `hits` of a store counts from the second.
    """

    def __init__(self, device: Simulator, colder: Mapping[str, Simulator], admit: int = 1):
        self.device = device
        self.colder = colder
        self.admit = admit
        self.outcome = device.outcome
        self.outcome.colder = dict.fromkeys(colder, 0)

    def advance(self, time: float) -> None:
        """Moves the clock to a time in seconds, never back."""
        self.device.advance(time)

    def match(self, request: Request) -> int:
        """Tokens that a request would reuse of the device, all that routers know; changes nothing."""
        return self.device.match(request)

    def request(self, request: Request) -> int:
        """Tokens that a request reuses of any tier; it is stored then. Each tier costs as much again."""
        self.advance(request.time)
        ends = [self.device.match(request)]
        for tier in self.colder.values():
            ends.append(max(ends[-1], tier.match(request)))
        if ends[-1] > ends[0]:
            self.device.store(request, self._words(ends[-1]))
        hit = self.device.request(request)
        for name, (begin, end) in zip(self.colder, pairwise(ends), strict=True):
            self.outcome.colder[name] += min(end, hit) - min(begin, hit)
        self._write(request)
        return hit

    def _write(self, request: Request) -> None:
        hot = self.device.reused(request, self.admit - 1)
        for tier in self.colder.values():
            tier.store(request, hot)

    def _words(self, tokens: int) -> int:
        form = self.device.form
        return -(-tokens // form.block) * form.words

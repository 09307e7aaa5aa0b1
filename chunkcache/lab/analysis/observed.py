"""How long chunks stay in a simulated cache."""

from __future__ import annotations

from collections import Counter

from chunkcache.lab.analysis.report import Histogram
from chunkcache.lab.simulation.simulator import Blank, Simulator
from chunkcache.lab.traces.trace import Form, Request
from chunkcache.tree import Policy, Run

_BARS = 12  # of a histogram, before two become one


class _Dated(Blank):
    """A run of chunks that knows since which time and which prompt it is stored."""

    __slots__ = ("prompt", "time")

    def __init__(self, chunks: int, time: float, prompt: int):
        super().__init__(chunks)
        self.time = time
        self.prompt = prompt

    def split(self, chunks: int) -> tuple[Run, Run]:
        """As the tree needs it."""
        first, second = (chunks, len(self) - chunks)
        return _Dated(first, self.time, self.prompt), _Dated(second, self.time, self.prompt)


class Observed(Simulator):
    """Counts how long chunks stayed that left."""

    def __init__(self, form: Form, chunk: int, capacity: int | None, policy: Policy):
        super().__init__(form, chunk, capacity, policy)
        self._seconds: Counter[int] = Counter()
        self._prompts: Counter[int] = Counter()
        self._begin: float | None = None
        self._clocked = False

    def request(self, request: Request) -> int:
        if self._begin is None:
            self._begin = request.time
        self._clocked = self._clocked or request.time != self._begin
        return super().request(request)

    def lifetimes(self) -> Histogram | None:
        """In seconds, or in prompts if these have no times; None if nothing left."""
        if not self.evicted:
            return None
        if self._clocked:
            return histogram("seconds", self._seconds, self.chunk)
        return histogram("prompts", self._prompts, self.chunk)

    def _make_run(self, first: int, count: int) -> Blank | None:
        run = super()._make_run(first, count)
        return None if run is None else _Dated(len(run), self.now, self.outcome.requests)

    def _freed(self, run: Run) -> None:
        super()._freed(run)
        assert isinstance(run, _Dated)
        self._seconds[int(self.now - run.time).bit_length()] += len(run)
        self._prompts[(self.outcome.requests - run.prompt).bit_length()] += len(run)


def histogram(unit: str, found: Counter[int], chunk: int) -> Histogram:
    """Of chunks by the bit length of something; of many lengths two make a bin."""
    low, high = min(found, default=0), max(found, default=-1)
    step = 1 if high - low < _BARS else 2
    bits = [*range(low, high + 1, step)]
    edges = [float(2 ** (bit - 1)) if bit else 0.0 for bit in [*bits, low + step * len(bits)]]
    return Histogram(
        unit, edges, [chunk * sum(found[bit + n] for n in range(step)) for bit in bits]
    )

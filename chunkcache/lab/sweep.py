"""Hit rates of a trace by policy and size, beside the bound.

LRU is done for all sizes in one pass, and so is what the bound needs to know; other policies run once for
each size, in as many processes as there are cores.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from chunkcache.errors import ConfigError, TraceError
from chunkcache.lab.atoms import atomise
from chunkcache.lab.belady import Future
from chunkcache.lab.distance import Distances
from chunkcache.lab.simulator import Simulator
from chunkcache.lab.trace import TOKENS, Request, Trace
from chunkcache.tree import named_policy

BELADY = "belady"
CHUNK = 64  # tokens, where the trace has no blocks of its own
_HELD = 2**28  # bytes of a file whose requests are kept in memory; others are read once per run
_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of all different tokens, for sizes that nobody chose


@dataclass(frozen=True)
class Case:
    """One policy at one size.

    Attributes:
        capacity_tokens: None is without limit.
    """

    policy: str
    capacity_tokens: int | None


@dataclass(frozen=True)
class Result:
    """What a policy hits at one size.

    Attributes:
        hit_rate: hit tokens / prompt tokens.
        percent_of_belady: of what the optimum hits at this size; None if it was not computed.
    """

    policy: str
    capacity_tokens: int | None
    requests: int
    prompt_tokens: int
    hit_tokens: int
    hit_rate: float
    percent_of_belady: float | None

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


class Sweep:
    """A trace, looked at as a whole once, and cases of it.

    Args:
        chunk: tokens of a chunk; the trace's own blocks if None.

    Raises:
        ConfigError: they are no multiple of the trace's blocks.
    """

    def __init__(self, trace: Trace, chunk: int | None = None):
        self.trace = trace
        self.chunk = chunk or (CHUNK if trace.form is TOKENS else trace.form.block)
        if self.chunk % trace.form.block:
            raise ConfigError(
                f"blocks of {trace.form.block} tokens make no chunks of {self.chunk}; try a multiple"
            )
        self.requests = held(trace)
        self.atoms = atomise(self.requests, trace.form, self.chunk)
        self._distances = Distances(self.atoms)
        self._future = Future(self.atoms)

    @property
    def footprint(self) -> int:
        """Tokens of all different chunks: what a cache without limit holds at the end."""
        return self.atoms.chunks * self.chunk

    def sizes(self) -> list[int]:
        """Sizes to look at where nobody chose any: parts of the footprint, in tokens."""
        found = (int(share * self.atoms.chunks) * self.chunk for share in _SHARES)
        return sorted({max(self.chunk, size) for size in found})

    def run(
        self, cases: Sequence[Case], jobs: int | None = None, done: Callable[[], object] = int
    ) -> list[Result]:
        """Results in the order of the cases.

        Args:
            jobs: processes; as many as there are cores if None.
            done: called after each case.
        """
        hits: dict[Case, int] = {}
        for case in cases:
            if self._has_one_pass(case):
                hits[case] = self._at_once(case)
                done()
        slow = [case for case in dict.fromkeys(cases) if case not in hits]
        for case, found in self._simulated(slow, jobs or os.cpu_count() or 1):
            hits[case] = found
            done()
        return [self._result(case, hits[case]) for case in cases]

    def _has_one_pass(self, case: Case) -> bool:
        """In a trace of tokens a chunk that matches in part is used too, which depends on the size."""
        return case.policy == BELADY or (case.policy == "lru" and self.trace.form is not TOKENS)

    def _at_once(self, case: Case) -> int:
        chunks = _chunks(case, self.chunk)
        capacity = float("inf") if chunks is None else chunks
        way = self._future if case.policy == BELADY else self._distances
        return way.hit_tokens(capacity)

    def _simulated(self, cases: Sequence[Case], jobs: int) -> Iterator[tuple[Case, int]]:
        if min(jobs, len(cases)) < 2:
            for case in cases:
                yield case, simulate(self.requests, self.trace, self.chunk, case)
            return
        spawn = multiprocessing.get_context("spawn")
        tasks, results = spawn.SimpleQueue(), spawn.SimpleQueue()
        where = (self.trace.path, self.trace.block, self.chunk)
        workers = [
            spawn.Process(target=_work, args=(*where, tasks, results), daemon=True)
            for _ in range(min(jobs, len(cases)))
        ]
        waiting = iter(cases)
        for worker in workers:
            worker.start()
        try:
            for case in islice(waiting, 2 * len(workers)):  # all at once would fill the pipe
                tasks.put(case)
            for _ in cases:
                yield _received(results, workers)
                if (more := next(waiting, None)) is not None:
                    tasks.put(more)
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()

    def _result(self, case: Case, hit: int) -> Result:
        tokens = sum(self.atoms.tokens)
        best = self._at_once(Case(BELADY, case.capacity_tokens))
        rate = hit / tokens if tokens else 0.0
        percent = 100 * hit / best if best else None
        size = case.capacity_tokens
        return Result(case.policy, size, len(self.atoms.tokens), tokens, hit, rate, percent)


def held(trace: Trace) -> Iterable[Request]:
    """The requests of a trace, in memory if it is small; each iteration reads others anew."""
    return list(trace) if trace.path.stat().st_size <= _HELD else trace


def _chunks(case: Case, chunk: int) -> int | None:
    return None if case.capacity_tokens is None else case.capacity_tokens // chunk


def simulate(requests: Iterable[Request], trace: Trace, chunk: int, case: Case) -> int:
    """Tokens that one policy hits at one size."""
    cache = Simulator(trace.form, chunk, _chunks(case, chunk), named_policy(case.policy))
    return cache.run(requests).hit_tokens


def _work(path: Path, block: int | None, chunk: int, tasks: Any, results: Any) -> None:
    """A process: reads the trace once and does cases until it is ended."""
    trace = Trace(path, block, on_bad=lambda line: None)  # whoever started it was told
    requests = held(trace)
    while True:
        case = tasks.get()
        results.put((case, simulate(requests, trace, chunk, case)))


def _received(results: Any, workers: Sequence[Any]) -> tuple[Case, int]:
    """The next result; a process that died makes none.

    Raises:
        TraceError: one did, for lack of memory, say.
    """
    while results.empty():
        if any(worker.exitcode for worker in workers):
            raise TraceError("a process of the sweep died; try --jobs 1")
        time.sleep(0.01)
    found: tuple[Case, int] = results.get()
    return found

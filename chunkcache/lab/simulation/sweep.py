"""Hit rates of a trace by policy and size, beside the bound.

LRU is done for all sizes in one pass, and so is what the bound needs to know; others are simulated, in as
many processes as there are cores. What looks at a trace as a whole needs memory for all of it: a sweep
that streams does without, and reads the file once in each process for all cases there.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from chunkcache.errors import ConfigError, TraceError
from chunkcache.lab.simulation.atoms import Atoms, atomise
from chunkcache.lab.simulation.belady import Future
from chunkcache.lab.simulation.cases import Case, Found, Setup, simulate
from chunkcache.lab.simulation.distance import Distances
from chunkcache.lab.simulation.simulator import Outcome
from chunkcache.lab.traces.trace import TOKENS, Request, Trace

BELADY = "belady"
CHUNK = 64  # tokens, where the trace has no blocks of its own
_HELD = 2**28  # bytes of a file whose requests are kept in memory; others are read once per run
_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of all different tokens, for sizes that nobody chose
_STEP = 1000  # requests between two signs of life


@dataclass(frozen=True)
class Result:
    """What a policy hits at one size.

    Attributes:
        capacity_tokens: of each replica's device; None is without limit.
        hit_rate: hit tokens / prompt tokens.
        percent_of_belady: of what the optimum hits in one cache as large as all devices and tiers
            together; None if that was not computed.
        router: between replicas; None if there is one, and for the optimum.
        imbalance: most tokens that a replica computed / the mean; None without a router.
        tiers: hit tokens by tier; the optimum's are all the device's.
    """

    policy: str
    capacity_tokens: int | None
    requests: int
    prompt_tokens: int
    hit_tokens: int
    hit_rate: float
    percent_of_belady: float | None
    replicas: int
    router: str | None
    imbalance: float | None
    tiers: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


class Sweep:
    """A trace and cases of it; it is looked at as a whole once, when that is needed.

    Args:
        chunk: tokens of a chunk; the trace's own blocks if None.
        setup: what all cases have in common; one cache of one tier if None.
        stream: the trace is not looked at as a whole, and never in memory. Nothing is compared with
            the optimum then, nor can that be a case.

    Raises:
        ConfigError: chunks are no multiple of the trace's blocks.
    """

    def __init__(
        self,
        trace: Trace,
        chunk: int | None = None,
        setup: Setup | None = None,
        stream: bool = False,
    ):
        self.trace = trace
        self.chunk = chunk or (CHUNK if trace.form is TOKENS else trace.form.block)
        if self.chunk % trace.form.block:
            raise ConfigError(
                f"blocks of {trace.form.block} tokens make no chunks of {self.chunk}; try a multiple"
            )
        self.setup = setup or Setup()
        self.stream = stream
        self._bests: dict[float, int] = {}

    @cached_property
    def requests(self) -> Iterable[Request]:
        """The trace's, held in memory if they are few and nothing streams."""
        return self.trace if self.stream else held(self.trace)

    @cached_property
    def atoms(self) -> Atoms:
        """The trace as a whole."""
        assert not self.stream, "memory would grow with the trace"
        return atomise(self.requests, self.trace.form, self.chunk)

    @cached_property
    def _distances(self) -> Distances:
        return Distances(self.atoms)

    @cached_property
    def _future(self) -> Future:
        return Future(self.atoms)

    @property
    def footprint(self) -> int | None:
        """Tokens of all different chunks: what a cache without limit holds at the end.

        None if the trace is streamed.
        """
        return None if self.stream else self.atoms.chunks * self.chunk

    def sizes(self) -> list[int]:
        """Sizes to look at where nobody chose any: parts of the footprint, in tokens."""
        found = (int(share * self.atoms.chunks) * self.chunk for share in _SHARES)
        return sorted({max(self.chunk, size) for size in found})

    def run(
        self,
        cases: Sequence[Case],
        jobs: int | None = None,
        done: Callable[[], object] = int,
        read: Callable[[int], object] = int,
    ) -> list[Result]:
        """Results in the order of the cases.

        Args:
            jobs: processes; as many as there are cores if None.
            done: called after each case; read: of a trace that is streamed, now and then, with the
                number of requests so far.

        Raises:
            TraceError: a process died; the trace cannot be read.
        """
        found: dict[Case, Found] = {}
        for case in cases:
            if self._has_one_pass(case):
                found[case] = self._at_once(case)
                done()
        slow = [case for case in dict.fromkeys(cases) if case not in found]
        processes = max(1, min(jobs or os.cpu_count() or 1, len(slow)))
        way = self._streamed(slow, processes, read) if self.stream else self._each(slow, processes)
        for case, one in way:
            found[case] = one
            done()
        return [self._result(case, found[case]) for case in cases]

    def _has_one_pass(self, case: Case) -> bool:
        """In a trace of tokens a chunk that matches in part is used too, which depends on the size."""
        if case.policy == BELADY:
            return True
        lru = case.policy == "lru" and self.trace.form is not TOKENS
        return lru and self.setup.plain and not self.stream

    def _at_once(self, case: Case) -> Found:
        if case.policy == BELADY:
            hit = self._best(case)
        else:
            hit = self._distances.hit_tokens(self.setup.chunks(case, self.chunk))
        tokens = self.atoms.tokens
        return Found(Outcome(len(tokens), sum(tokens), hit))

    def _each(self, cases: Sequence[Case], processes: int) -> Iterator[tuple[Case, Found]]:
        """One case after another, in each process."""
        if processes == 1:
            for case in cases:
                yield from self._simulated(self.requests, [case])
            return
        waiting = iter([case] for case in cases)
        with _Workers(self, processes) as workers:
            for share in islice(waiting, 2 * processes):  # all at once would fill the pipe
                workers.give(share)
            for _ in cases:
                yield from workers.take()
                if (more := next(waiting, None)) is not None:
                    workers.give(more)

    def _streamed(
        self, cases: Sequence[Case], processes: int, read: Callable[[int], object]
    ) -> Iterator[tuple[Case, Found]]:
        """All cases side by side; the first share here, where bad lines are heard of."""
        first, *others = (cases[place::processes] for place in range(processes))
        with _Workers(self, len(others)) as workers:
            for share in others:
                workers.give(share)
            yield from self._simulated(_counted(self.requests, read), first)
            for _ in others:
                yield from workers.take()

    def _simulated(
        self, requests: Iterable[Request], cases: Sequence[Case]
    ) -> list[tuple[Case, Found]]:
        found = simulate(requests, self.trace.form, self.chunk, self.setup, cases)
        return list(zip(cases, found, strict=True))

    def _best(self, case: Case) -> int:
        """What the optimum hits with as much memory; 0 if that is not looked at."""
        if self.stream:
            return 0
        chunks = self.setup.chunks(case, self.chunk)
        if chunks not in self._bests:  # one for all policies and routers
            self._bests[chunks] = self._future.hit_tokens(chunks)
        return self._bests[chunks]

    def _result(self, case: Case, found: Found) -> Result:
        outcome, hit, best = found.outcome, found.outcome.hit_tokens, self._best(case)
        return Result(
            policy=case.policy,
            capacity_tokens=case.capacity_tokens,
            requests=outcome.requests,
            prompt_tokens=outcome.prompt_tokens,
            hit_tokens=hit,
            hit_rate=outcome.hit_rate,
            percent_of_belady=100 * hit / best if best else None,
            replicas=self.setup.replicas,
            router=case.router,
            imbalance=found.imbalance,
            tiers=outcome.tiers,
        )


def held(trace: Trace) -> Iterable[Request]:
    """The requests of a trace, in memory if it is small; each iteration reads others anew."""
    return list(trace) if trace.path.stat().st_size <= _HELD else trace


def _counted(requests: Iterable[Request], read: Callable[[int], object]) -> Iterator[Request]:
    for number, request in enumerate(requests, 1):
        if number % _STEP == 0:
            read(number)
        yield request


class _Workers:
    """Processes that simulate what they are given, each of which reads the trace itself."""

    def __init__(self, sweep: Sweep, count: int):
        spawn = multiprocessing.get_context("spawn")
        self._tasks, self._results = spawn.SimpleQueue(), spawn.SimpleQueue()
        what = (sweep.trace.path, sweep.trace.block, sweep.chunk, sweep.setup, sweep.stream)
        self._workers = [
            spawn.Process(target=_work, args=(*what, self._tasks, self._results), daemon=True)
            for _ in range(count)
        ]

    def __enter__(self) -> _Workers:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()

    def give(self, cases: Sequence[Case]) -> None:
        """Has cases simulated side by side."""
        self._tasks.put(list(cases))

    def take(self) -> list[tuple[Case, Found]]:
        """What became of some; a process that died makes nothing.

        Raises:
            TraceError: one did, for lack of memory, say.
        """
        while self._results.empty():
            if any(worker.exitcode for worker in self._workers):
                raise TraceError("a process of the sweep died; try --jobs 1")
            time.sleep(0.01)
        found: list[tuple[Case, Found]] = self._results.get()
        return found


def _work(
    path: Path, block: int | None, size: int, setup: Setup, stream: bool, tasks: Any, results: Any
) -> None:
    """A process: does cases until it is ended."""
    trace = Trace(path, block, on_bad=lambda line: None)  # whoever started it is told
    requests = trace if stream else held(trace)
    while True:
        cases = tasks.get()
        found = simulate(requests, trace.form, size, setup, cases)
        results.put(list(zip(cases, found, strict=True)))

"""Traces that are longer than memory: what streams hits the same, and nothing grows with the trace."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from gc import get_referents
from itertools import product
from pathlib import Path

import pytest

from chunkcache.lab.simulation.cases import Case, Setup, made
from chunkcache.lab.simulation.sweep import Sweep
from chunkcache.lab.traces.trace import Form, Request, Trace
from chunkcache.tree import POLICIES, Packed, pack

HERE = Path(__file__).resolve().parents[2]
FORM = Form(512, 8, partial=True)
CAPACITY = 40 * 512  # tokens
SLACK = 4 * 2**20  # bytes, besides a tenth
SETUPS = {
    "plain": Setup(),
    "tiers": Setup(tiers=(("host", CAPACITY), ("disk", 2 * CAPACITY)), admit=2),
    "fleet": Setup(replicas=3, tiers=(("host", CAPACITY),)),
}
# Reads what the process of a command took at most; a small one asks, since children begin as large.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(most * (1 if sys.platform == "darwin" else 1024), file=sys.stderr)
"""


def lines(count: int) -> Iterator[dict[str, object]]:
    """Pairs of turns with blocks that never come back, of tenants that never do; one in three is of all,
    and goes back some way."""
    for number in range(count):
        new = 10 + number - number % 2
        ids = [0, new] if number % 2 == 0 else [0, new, 10 + number]
        if number % 3 == 0:
            ids = [0, 10 + number - number % 50]
        yield {
            "timestamp": 7 * number,
            "input_length": 512 * len(ids) - 12,
            "output_length": 1,
            "hash_ids": ids,
            "tenant": str(number // 6) if number % 3 else "",
        }


def written(path: Path, count: int) -> Path:
    with path.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines(count))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return Trace(written(tmp_path / "trace.jsonl", 1500))


# -- the same results


def routed(setup: Setup) -> list[str | None]:
    return ["random", "prefix", "prefix+load"] if setup.replicas > 1 else [None]


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_streams_hits_as_what_does_not(trace: Trace, name: str, jobs: int) -> None:
    setup = SETUPS[name]
    cases = [Case(*one) for one in product(["lru", "s3fifo"], [1024, CAPACITY], routed(setup))]
    whole = Sweep(trace, setup=setup).run(cases, jobs)
    streamed = Sweep(trace, setup=setup, stream=True).run(cases, jobs)
    for one, other in zip(whole, streamed, strict=True):
        assert one.to_dict() | {"percent_of_belady": None} == other.to_dict()
    assert len({str(one.tiers) for one in whole}) > 1 and whole[0].percent_of_belady is not None


def test_all_cases_of_a_process_share_one_reading(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Trace.__iter__
    begun, seen = [], []

    def noted(self: Trace) -> Iterator[Request]:
        begun.append(self)
        return read(self)

    monkeypatch.setattr(Trace, "__iter__", noted)
    sweep = Sweep(trace, stream=True)
    cases = [Case(policy, CAPACITY) for policy in ("lru", "lfu", "arc")]
    results = sweep.run(cases, 1, read=seen.append)
    assert begun == [trace] and seen == [1000]
    assert [one.requests for one in results] == [1500] * 3 and sweep.footprint is None


# -- memory


def requests(count: int) -> Iterator[Request]:
    """As the lines, but made on the way."""
    for line in lines(count):
        ids = line["hash_ids"]
        assert isinstance(ids, list)
        keys = Packed(pack([word for one in ids for word in (one, 0)]))
        time = float(str(line["timestamp"])) / 1000
        yield Request(time, keys, int(str(line["input_length"])), tenant=str(line["tenant"]))


def size(root: object) -> int:
    """Bytes of all that an object leads to, but classes and code."""
    seen, waiting, total = {id(root)}, [root], 0
    while waiting:
        one = waiting.pop()
        total += sys.getsizeof(one)
        for each in get_referents(one):
            if id(each) not in seen and not isinstance(each, SKIPPED):
                seen.add(id(each))
                waiting.append(each)
    return total


SKIPPED = (type, types.ModuleType, types.FunctionType, types.CodeType)


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("policy", [*sorted(POLICIES), "ttl:5"])
def test_no_cache_grows_with_the_trace(
    policy: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ghosts, tenants that are gone, and windows of routers among what could."""
    monkeypatch.setattr(
        "chunkcache.lab.simulation.simulator._TREES", 32
    )  # the bound is reached early then
    setup = SETUPS[name]
    router = "prefix+load" if setup.replicas > 1 else None
    cache = made(Case(policy, CAPACITY, router), FORM, 512, setup)
    sizes: dict[bool, list[int]] = {False: [], True: []}
    for number, request in enumerate(requests(6000)):
        cache.request(replace(request, time=request.time * 20))  # windows pass
        late = number >= 5000
        if number % 37 == 0 and (late or 1000 <= number < 2000):
            sizes[late].append(size(cache))
    # What is empty is dropped now and then, so that sizes go up and down.
    assert max(sizes[True]) < 1.25 * max(sizes[False])


def measured(trace: Path, *options: str) -> tuple[int, dict[str, object]]:
    """The most bytes of a process, and what it printed."""
    command = [sys.executable, "-m", "chunkcache", "simulate", str(trace), *options, "--json"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, cwd=HERE
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1]), json.loads(done.stdout)


def test_a_process_that_streams_is_as_large_for_ten_times_as_many_requests(tmp_path: Path) -> None:
    few, many = (written(tmp_path / str(count), count) for count in (5000, 50_000))
    options = ("--capacity", "100k", "--policy", "lru,s3fifo", "--jobs", "2")
    # One policy in each process; the largest one counts.
    small, _ = measured(few, *options, "--stream")
    large, streamed = measured(many, *options, "--stream")
    assert large < 1.1 * small + SLACK
    whole, other = measured(many, *options)
    assert whole > 1.1 * small + SLACK, "else the trace is too short to tell"

    def hits(found: dict[str, object]) -> list[tuple[object, ...]]:
        results = found["results"]
        assert isinstance(results, list)
        return [(one["policy"], one["requests"], one["hit_tokens"]) for one in results]

    assert hits(streamed) == hits(other) and hits(streamed)[0][1] == 50_000

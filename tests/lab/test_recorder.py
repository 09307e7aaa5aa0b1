"""What was recorded is read again; hashes tell which prefixes are equal, and nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.errors import InvalidTokensError, TraceError
from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.traces.recorder import Recorder
from chunkcache.lab.traces.trace import Request, Trace
from chunkcache.tree import LRU, unpack

IDS = st.lists(st.integers(0, 3), max_size=20)
TURNS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=12)


def record(path: Path, turns: list[tuple[list[int], list[int]]], **how) -> list[Request]:
    path.unlink(missing_ok=True)
    with Recorder(path, **how) as recorder:
        for number, (tokens, answer) in enumerate(turns):
            recorder.write(tokens, answer, time=number, tenant="me", reuse={"cached_tokens": 0})
    return list(Trace(path))


@settings(max_examples=60, deadline=None)
@given(TURNS)
def test_tokens_come_back(tmp_path_factory: pytest.TempPathFactory, turns) -> None:
    found = record(tmp_path_factory.mktemp("t") / "t", turns)
    ids = [(unpack(one.keys).tolist(), unpack(one.answer).tolist()) for one in found]
    assert ids == turns
    assert [one.time for one in found] == list(range(len(turns)))
    assert all((one.tenant, one.reuse) == ("me", {"cached_tokens": 0}) for one in found)
    assert [one.output for one in found] == [len(answer) for _, answer in turns]


@settings(max_examples=60, deadline=None)
@given(TURNS, st.sampled_from([1, 2, 5]), st.integers(0, 12))
def test_hashes_hit_as_tokens_do(
    tmp_path_factory: pytest.TempPathFactory, turns, block: int, capacity: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "t"
    hashed = record(path, turns, block=block)
    form = Trace(path).form
    plain = record(path, turns)
    hits = []
    for requests, kind in ((hashed, form), (plain, Trace(path).form)):
        cache = Simulator(kind, block, capacity, LRU())
        hits.append([cache.request(one) for one in requests])
    if block == 1:  # else a block that matches in part is a use too, of which hashes know nothing
        assert hits[0] == hits[1]
    assert [one.tokens for one in hashed] == [one.tokens for one in plain]


def test_no_text_leaves(tmp_path: Path) -> None:
    """Neither ids nor names, nor the salt; another salt gives other hashes, the same one the same."""
    path, turns = tmp_path / "t", [([1, 2, 3, 4], [5, 6])]
    texts = []
    for salt in (b"one", b"one", b"two", None):
        record(path, turns, block=2, salt=salt)
        texts.append(path.read_text())
    assert texts[0] == texts[1] and len(set(texts)) == 3
    for text in texts:
        assert (
            '"tokens"' not in text
            and "me" not in text.replace("timestamp", "")
            and "one" not in text
        )


def test_a_trace_may_be_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "t"
    for _ in range(2):
        with Recorder(path) as recorder:
            recorder.write([1, 2])
    assert len(list(Trace(path))) == 2
    for how in ({"block": 4}, {"block": 4, "salt": b"x"}):
        with pytest.raises(TraceError, match="name another file"):
            Recorder(path, **how)
    hashed = tmp_path / "hashed"
    Recorder(hashed, block=4, salt=b"x").close()
    Recorder(hashed, block=4, salt=b"x").close()
    with pytest.raises(TraceError, match="name another file"):
        Recorder(hashed, block=4)  # hashes of another salt would mean nothing here


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with Recorder(path) as recorder:
        recorder.write([1, 2, 3])
        recorder.write([4, 5, 6])
    path.write_bytes(path.read_bytes()[:-9])
    with Recorder(path) as recorder:
        recorder.write([7])
    told = []
    ids = [unpack(one.keys).tolist() for one in Trace(path, on_bad=told.append)]
    assert ids == [[1, 2, 3], [7]] and [one.number for one in told] == [3]


def test_an_empty_salt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="empty salt"):
        Recorder(tmp_path / "t", block=4, salt=b"")


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with Recorder(path) as recorder, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: recorder.write([n] * 3000), range(40)))
    assert sorted(int(unpack(one.keys)[0]) for one in Trace(path)) == list(range(40))


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be written"):
        Recorder(tmp_path / "none" / "t")
    recorder = Recorder(tmp_path / "t")
    with pytest.raises(InvalidTokensError):
        recorder.write([-1])
    recorder.close()
    with pytest.raises(TraceError, match="cannot be written"):
        recorder.write([1])


def test_two_that_begin_a_trace_at_once_make_one(tmp_path: Path) -> None:
    """Both saw an empty file, and both wrote its first line."""
    path = tmp_path / "t"
    with Recorder(path, block=2, salt=b"s") as recorder:
        recorder.write([1, 2, 3, 4])
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, first, *rest]))
    assert [one.tokens for one in Trace(path)] == [4]
    with Recorder(path, block=2, salt=b"s") as recorder:
        recorder.about(capacity_tokens=7)
        recorder.write([1, 2, 3, 4, 5, 6])
    trace = Trace(path)
    assert [one.tokens for one in trace] == [4, 6]
    assert trace.cache == {"capacity_tokens": 7}
    requests = list(trace)
    assert requests[0].keys[:] == requests[1].keys[: len(requests[0].keys)]

"""Traces are read line by line, and what is no request is told by its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.errors import TraceError
from chunkcache.lab.traces.trace import TOKENS, BadLine, Trace
from chunkcache.tree import unpack

GOOD = {"timestamp": 1500, "input_length": 700, "output_length": 9, "hash_ids": [3, 2**64 - 1]}


def write(path: Path, *lines: object) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def test_blocks(tmp_path: Path) -> None:
    """A block's key is two words, the lower one first."""
    trace = Trace(write(tmp_path / "t", GOOD, "", GOOD))
    first, second = trace
    assert (trace.form.block, trace.form.partial) == (512, True)
    assert (first.time, first.tokens, first.output) == (1.5, 700, 9)
    assert unpack(first.keys).tolist() == [3, 0, 2**32 - 1, 2**32 - 1]
    assert first == second == next(iter(trace))


def test_tokens(tmp_path: Path) -> None:
    line = {
        "tokens": [1, 2, 3],
        "answer": [4],
        "tenant": "a",
        "prompt": "bot",
        "reuse": {"cached_tokens": 1},
    }
    (found,) = Trace(write(tmp_path / "t", {"chunkcache_trace": 1}, line))
    assert (found.tokens, found.time, found.tenant, found.prompt) == (3, 0.0, "a", "bot")
    assert unpack(found.keys).tolist() == [1, 2, 3] and unpack(found.answer).tolist() == [4]
    assert found.reuse == {"cached_tokens": 1}
    assert Trace(tmp_path / "t").form is TOKENS


def test_the_first_line_says_how_long_blocks_are(tmp_path: Path) -> None:
    head = {"chunkcache_trace": 1, "block_size": 64}
    whole = {"input_length": 130, "hash_ids": [1, 2]}
    trace = Trace(write(tmp_path / "t", head, whole))
    (found,) = trace
    assert (trace.form.block, trace.form.partial, found.tokens) == (64, False, 130)
    assert trace.form.limit(found) == 4, "both blocks"
    exactly = {"input_length": 128, "hash_ids": [1, 2]}
    trace = Trace(write(tmp_path / "t", head, exactly))
    assert trace.form.limit(next(iter(trace))) == 2, "the last token is computed"


BAD = {
    "no JSON": "{",
    "hash_ids is missing": {"input_length": 3},
    "input_length is missing": {"hash_ids": [1]},
    "1 blocks of 512 for 700 tokens": GOOD | {"hash_ids": [1]},
    "hash_ids must be a list of integers": GOOD | {"hash_ids": [1, 2.0]},
    "hash_ids must be from 0": GOOD | {"hash_ids": [1, -1]},
    "to 2**64 - 1": GOOD | {"hash_ids": [1, 2**64]},
    "input_length must be a number of tokens": GOOD | {"input_length": -1},
    "output_length must be": GOOD | {"output_length": "9"},
    "timestamp must be a number": GOOD | {"timestamp": float("nan")},
    "not an object": [1, 2],
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_line_is_told_by_its_number(why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t", GOOD, BAD[why], GOOD)
    with pytest.raises(TraceError, match="line 2: ") as raised:
        list(Trace(path))
    assert why in str(raised.value)
    told: list[BadLine] = []
    assert len(list(Trace(path, on_bad=told.append))) == 2
    assert [line.number for line in told] == [2]


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)))
def test_no_line_is_more_than_a_bad_one(tmp_path_factory: pytest.TempPathFactory, line) -> None:
    path = tmp_path_factory.mktemp("t") / "t"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line.replace(b"\n", b" ") + b"\n")
    told: list[BadLine] = []
    assert len(list(Trace(path, on_bad=told.append))) == 1
    assert len(told) == bool(line.strip())


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        Trace(tmp_path / "none")
    for lines in ([], ["text"], [{"a": 1}]):
        with pytest.raises(TraceError, match="has no request"):
            Trace(write(tmp_path / "t", *lines))
    with pytest.raises(TraceError, match="version 2"):
        Trace(write(tmp_path / "t", {"chunkcache_trace": 2}, GOOD))
    with pytest.raises(TraceError, match="blocks of 0"):
        Trace(write(tmp_path / "t", {"chunkcache_trace": 1, "block_size": 0}, GOOD))

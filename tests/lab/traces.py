"""Traces for tests: small random ones, and those of the data that nobody here wrote."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st

from chunkcache.lab.traces.trace import Form, Request, Trace
from chunkcache.tree import Packed, pack

HERE = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CHUNKCACHE_DATA", HERE.parent / "shared" / "data"))
BLOCKS = Form(1, 4)  # a chunk is one small number


def data(name: str) -> Path:
    """A file that the repository does not have; needed in CI, elsewhere the test is skipped."""
    path = DATA / name
    if not path.exists():
        reason = f"{path} is missing; set CHUNKCACHE_DATA"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@cache
def mooncake() -> tuple[Trace, list[Request]]:
    """The production trace, and its requests."""
    trace = Trace(data("traces/mooncake_conversation.jsonl"))
    return trace, list(trace)


def request(ids: list[int], answer: list[int] | None = None, tenant: str = "") -> Request:
    """One whose whole prompt may be a hit but for its last number."""
    keys, rest = Packed(pack(ids)), Packed(pack(answer or []))
    return Request(0.0, keys, len(ids), len(answer or []), rest, tenant=tenant)


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
REQUESTS = st.lists(
    st.builds(request, IDS, st.one_of(st.none(), IDS), st.sampled_from(["", "", "other"])),
    min_size=1,
    max_size=40,
)

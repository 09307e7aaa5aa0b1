"""Reports as people see them: units, shares, and prompts that cannot inject markup."""

from __future__ import annotations

import doctest
import io
from typing import Any

import pytest
from rich.console import Console

from chunkcache.lab import Stats, TreeRow, render


def shown(renderable: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(renderable)
    return out.getvalue()


@pytest.fixture
def stats() -> Stats:
    return Stats(
        model="llama",
        mode="exact",
        exactness="bit-exact rows",
        kernel="native avx2 1",
        tier="A",
        chunk_size=64,
        token_bytes=3072,
        requests=12,
        prompt_tokens=10_000,
        cached_tokens=7_500,
        generated_tokens=300,
        miss_tokens={"never seen": 2_000, "shorter than a chunk": 500},
        named={"support-bot": {"requests": 10, "cached_tokens": 6_000}},
        nodes=2,
        chunks=100,
        bytes=19 * 2**20,
        capacity_bytes=2**30,
        leased_chunks=1,
        pinned_chunks=2,
        evictable_chunks=97,
        tail_bytes=0,
        stored_chunks=110,
        evicted_chunks=10,
        refused_chunks=0,
        phase_one=0,
        phase_one_refused=0,
    )


def row(depth: int, **fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "start": 0,
        "tokens": 64,
        "bytes": 2**20,
        "hits": 3,
        "idle": 90.0,
        "pinned": False,
        "leases": 0,
        "names": (),
        "tier": "device",
        "text": "You are",
    }
    return TreeRow(depth=depth, **values | fields).to_dict()


def test_report(stats: Stats) -> None:
    text = shown(render.report(stats.to_dict()))
    for wanted in (
        "75.0% of all prompt tokens",
        "10,000",
        "support-bot",
        "6,000",
        "80.0%",
        "19.0 MiB of 1.0 GiB (1.9%)",
        "6,400",
    ):
        assert wanted in text, wanted
    assert text.index("never seen") < text.index("shorter than a chunk")


def test_report_of_nothing(stats: Stats) -> None:
    empty = stats.to_dict() | dict.fromkeys(("prompt_tokens", "cached_tokens", "requests"), 0)
    text = shown(render.report(empty | {"miss_tokens": {}, "named": {}}))
    assert "- of all prompt tokens" in text
    assert "Named" not in text


def test_tree_nests_and_escapes() -> None:
    rows = [
        row(0, names=("support-bot",), pinned=True),
        row(1, start=64, text="[bold]not markup[/bold] " * 9),
        row(1, start=64, text="", leases=2),
        row(0, text="other\nlines"),
    ]
    text = shown(render.tree(rows))
    head, first, second, third, last = text.splitlines()
    assert head == "4 stored prefixes, 256 tokens, 4.0 MiB"
    assert "support-bot" in first
    assert "pinned" in first
    assert second.startswith("│   ├──")
    assert "[bold]not markup[/bold]" in second
    assert "from token 64" in third
    assert "in use by 2" in third
    assert last.startswith('└── "other lines"')
    assert "used 1.5 min ago" in last


def test_empty_tree() -> None:
    assert shown(render.tree([])) == "0 stored prefixes, 0 tokens, 0 B\n"


def test_doctests() -> None:
    assert doctest.testmod(render).failed == 0


def tier(**fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "loaded": 1_234,
        "saved": 99,
        "failures": 0,
        "open": False,
        "token_bytes": 3_100.0,
        "chunk_seconds": 0.002,
        "call_seconds": 0.001,
        "compute_seconds": 0.03,
        "break_even": 1,
    }
    return values | fields


def test_colder_tiers_are_told_apart(stats: Stats) -> None:
    stores = {"loaded": 1_234, "saved": 99, "corrupt": 3, "failed": 1, "dropped": 0}
    tiers = {
        "disk": tier(),
        "redis": tier(failures=7, open=True, break_even=None, token_bytes=None),
        "redis-2": tier(chunk_seconds=None),
    }
    shown_ = shown(render.report(stats.to_dict() | {"stores": stores | tiers}))
    lines = {line.split()[0]: line for line in shown_.splitlines() if line.strip()}
    assert "3,100 B (+0.9%)" in lines["disk"] and "from 64 tokens" in lines["disk"]
    assert "7, left alone now" in lines["redis"] and "never" in lines["redis"]
    assert "not measured" in lines["redis-2"]
    assert "damaged values" in shown_


def test_break_even_is_told_in_words() -> None:
    text = render.break_even(tier(break_even=2), 64)
    assert text == (
        "64 tokens are read in 3.0 ms and computed in 30.0 ms: reading pays from 128 tokens"
    )
    assert "never" in render.break_even(tier(break_even=None), 64)
    assert "not known" in render.break_even(tier(compute_seconds=None), 64)

"""Reports as people see them: units, shares, and prompts that cannot inject markup."""

from __future__ import annotations

import doctest
import io
from typing import Any

import pytest
from rich.console import Console

from chunkcache.lab import Stats, TreeRow
from chunkcache.lab.views import stats as server
from chunkcache.lab.views import tree as prefixes
from chunkcache.lab.views import words


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
    text = shown(server.report(stats.to_dict()))
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
    text = shown(server.report(empty | {"miss_tokens": {}, "named": {}}))
    assert "- of all prompt tokens" in text
    assert "Named" not in text


def test_tree_nests_and_escapes() -> None:
    rows = [
        row(0, names=("support-bot",), pinned=True, hit_tokens=1_280),
        row(1, start=64, text="[bold]not markup[/bold] " * 9, skipped=12),
        row(1, start=64, text="", leases=2, snapshots=3),
        row(0, text="other\nlines"),
    ]
    text = shown(prefixes.tree(rows))
    head, names, first, second, third, last = map(str.rstrip, text.splitlines())
    assert head == "4 stored prefixes, 256 tokens, 4.0 MiB"
    assert names.split() == ["tokens", "size", "hits", "reused", "idle", "state"]
    assert first.startswith('support-bot "You are"')
    assert " ".join(first.split()[-9:]) == "64 1.0 MiB 3 1,280 1.5 min device, pinned"
    assert second.startswith('├ "...[bold]not markup[/bold]')
    assert third.startswith("└ from token 64 ")
    assert third.endswith("device, in use by 2, 3 snapshots")
    assert last.startswith('"other lines"')


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_a_row_of_the_tree_is_one_line(width: int) -> None:
    """Deep, with long names, and in a script that takes two columns a letter."""
    rows = [row(depth, names=("n" * depth,), text="長い文" * 60) for depth in range(40)]
    out = io.StringIO()
    Console(file=out, width=width).print(prefixes.tree(rows))
    lines = out.getvalue().splitlines()
    assert len(lines) == 42
    if width >= 80:
        assert "level 39: " in lines[-1]
        assert all(line.rstrip().endswith("1.5 min  device") for line in lines[2:])


def test_a_prompt_cannot_act_on_the_terminal() -> None:
    nasty = "\x1b]0;title\x07\x9b2J\u202eright to left\r\nnext\ud800"
    text = shown(prefixes.tree([row(0, text=nasty, names=(nasty,), tier=nasty)]))
    assert "next" in text and "right to left" in text
    assert not any(one in text for one in "\x1b\x07\x9b\u202e\r\ud800")


def test_the_most_reused_rows_are_shown_with_what_they_stand_behind() -> None:
    reused = (0, 10, 0, 90, 5, 70)
    depths = (0, 1, 1, 2, 0, 0)
    rows = [
        row(depth, start=64 * number, hit_tokens=tokens, text="")
        for number, (depth, tokens) in enumerate(zip(depths, reused, strict=True))
    ]
    assert [rows.index(one) for one in prefixes.most_reused(rows, 2)] == [0, 2, 3, 5]
    assert prefixes.most_reused(rows, 0) == prefixes.most_reused(rows, 6) == rows
    lines = shown(prefixes.tree(rows, top=2)).splitlines()
    assert lines[0].startswith("6 stored prefixes, 384 tokens"), "of all"
    assert len(lines) == 2 + 4 + 1, "a head, names of columns, a note"
    assert lines[-1] == "2 more prefixes with 128 tokens left out, the least reused"
    assert "left out" not in shown(prefixes.tree(rows))


def test_empty_tree() -> None:
    assert shown(prefixes.tree([])) == "0 stored prefixes, 0 tokens, 0 B\n"


def test_what_is_printed_can_be_read(stats: Stats) -> None:
    text = str(stats)
    assert "hit rate" in text and "\x1b" not in text and "Stats(" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_doctests() -> None:
    for module in (words, server, prefixes):
        assert doctest.testmod(module).failed == 0


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
    shown_ = shown(server.report(stats.to_dict() | {"stores": stores | tiers}))
    lines = {line.split()[0]: line for line in shown_.splitlines() if line.strip()}
    assert "3,100 B (+0.9%)" in lines["disk"] and "from 64 tokens" in lines["disk"]
    assert "7, left alone now" in lines["redis"] and "never" in lines["redis"]
    assert "not measured" in lines["redis-2"]
    assert "damaged values" in shown_


def test_break_even_is_told_in_words() -> None:
    text = server.break_even(tier(break_even=2), 64)
    assert text == (
        "64 tokens are read in 3.0 ms and computed in 30.0 ms: reading pays from 128 tokens"
    )
    assert "never" in server.break_even(tier(break_even=None), 64)
    assert "not known" in server.break_even(tier(compute_seconds=None), 64)

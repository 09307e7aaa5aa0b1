"""Simulated hit rates for people, in a terminal or as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from chunkcache.lab.render import columns, number, pairs, share
from chunkcache.lab.sweep import BELADY, Result, Sweep


def simulation(name: str, sweep: Sweep, results: Sequence[Result]) -> RenderableType:
    """Hit rates by size and policy, beside what the optimum reaches."""
    tokens = sum(sweep.atoms.tokens)
    about = {
        "prompts": number(len(sweep.atoms.tokens)),
        "prompt tokens": number(tokens),
        "different": f"{number(sweep.footprint)} tokens in chunks of {number(sweep.chunk)}",
    }
    note = Text(
        "In brackets: percent of what a cache that knows the future would hit.", style="dim"
    )
    return Group(pairs(name, about), Text(), _rates(results), note)


def _rates(results: Sequence[Result]) -> RenderableType:
    policies = list(dict.fromkeys(one.policy for one in results))
    sizes = list(dict.fromkeys(one.capacity_tokens for one in results))
    by_case = {(one.policy, one.capacity_tokens): one for one in results}
    rows = [[_size(size), *(_cell(by_case[policy, size]) for policy in policies)] for size in sizes]
    return columns("Hit rate by capacity", ["capacity in tokens", *policies], rows)


def _size(tokens: int | None) -> str:
    return "without limit" if tokens is None else number(tokens)


def _cell(result: Result) -> str:
    rate = share(result.hit_tokens, result.prompt_tokens)
    if result.policy == BELADY or result.percent_of_belady is None:
        return rate
    return f"{rate} ({result.percent_of_belady:.0f}%)"


def to_json(sweep: Sweep, results: Sequence[Result]) -> dict[str, Any]:
    """What `simulate --json` prints, but the trace's name."""
    return {
        "block_size": sweep.chunk,
        "footprint_tokens": sweep.footprint,
        "results": [one.to_dict() for one in results],
    }

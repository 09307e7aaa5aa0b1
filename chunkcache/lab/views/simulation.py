"""Simulated hit rates for people, in a terminal or as plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chunkcache.lab.simulation.sweep import BELADY, Result, Sweep
from chunkcache.lab.views.tables import columns, pairs
from chunkcache.lab.views.words import number, share


def simulation(name: str, sweep: Sweep, results: Sequence[Result]) -> RenderableType:
    """Hit rates by size and policy, beside what the optimum reaches."""
    own = [one for one in results if one.policy != BELADY]
    parts: list[RenderableType] = [pairs(name, _about(sweep, results[0])), Text()]
    parts.append(_table("Hit rate by capacity", results, _rate))
    if any(one.percent_of_belady is not None for one in results):
        parts.append(_note(sweep))
    if any(one.imbalance is not None for one in own):
        parts += [Text(), _table("Busiest replica / mean", own, _imbalance)]
        parts.append(Text("Of the prompt tokens that each replica computes.", style="dim"))
    if own and sweep.setup.tiers:
        parts += [Text(), _tiers(own)]
    return Group(*parts)


def _about(sweep: Sweep, first: Result) -> dict[str, str]:
    about = {"prompts": number(first.requests), "prompt tokens": number(first.prompt_tokens)}
    if sweep.footprint is None:
        about["chunks"] = f"of {number(sweep.chunk)} tokens"
    else:
        about["different"] = f"{number(sweep.footprint)} tokens in chunks of {number(sweep.chunk)}"
    setup = sweep.setup
    if setup.replicas > 1:
        about["replicas"] = f"{number(setup.replicas)}, each of the capacity"
    for name, tokens in setup.tiers:
        about[f"tier {name}"] = _tier(tokens, setup.admit, setup.replicas)
    return about


def _tier(tokens: int | None, admit: int, replicas: int) -> str:
    parts = [_size(tokens) + (" tokens" if tokens is not None else "")]
    if admit > 1:
        parts.append(f"of what {number(admit)} requests used")
    if replicas > 1:
        parts.append("shared by all replicas")
    return ", ".join(parts)


def _table(title: str, results: Sequence[Result], cell: Callable[[Result], str]) -> Table:
    """A line for each size and router, a column for each policy."""
    by_case = {(one.policy, one.capacity_tokens, one.router): one for one in results}
    policies = list(dict.fromkeys(one.policy for one in results))
    sizes = dict.fromkeys(one.capacity_tokens for one in results)
    routers = list(dict.fromkeys(one.router for one in results if one.policy != BELADY)) or [None]
    rows = []
    for size, router in product(sizes, routers):
        keys = [(name, size, None if name == BELADY else router) for name in policies]
        rows.append([*_case(size, router), *(cell(by_case[key]) for key in keys)])
    return columns(title, [*_heads(routers[0]), *policies], rows)


def _tiers(results: Sequence[Result]) -> Table:
    """A line for each case, a column for each tier."""
    rows = [
        [
            *_case(one.capacity_tokens, one.router),
            one.policy,
            *(share(hit, one.prompt_tokens) for hit in one.tiers.values()),
        ]
        for one in results
    ]
    names = [*_heads(results[0].router), "policy", *results[0].tiers]
    return columns("Hit rate by tier", names, rows)


def _heads(router: str | None) -> list[str]:
    """Names of the columns that `_case` fills."""
    return ["capacity in tokens"] if router is None else ["capacity in tokens", "router"]


def _case(size: int | None, router: str | None) -> list[str]:
    return [_size(size)] if router is None else [_size(size), router]


def _size(tokens: int | None) -> str:
    return "without limit" if tokens is None else number(tokens)


def _rate(result: Result) -> str:
    rate = share(result.hit_tokens, result.prompt_tokens)
    if result.policy == BELADY or result.percent_of_belady is None:
        return rate
    return f"{rate} ({result.percent_of_belady:.0f}%)"


def _imbalance(result: Result) -> str:
    return "-" if result.imbalance is None else f"{result.imbalance:.2f}"


def _note(sweep: Sweep) -> Text:
    large = "" if sweep.setup.plain else ", in one cache as large as all of these together"
    text = f"In brackets: percent of what a cache that knows the future would hit{large}."
    return Text(text, style="dim")


def to_json(sweep: Sweep, results: Sequence[Result]) -> dict[str, Any]:
    """What `simulate --json` prints, but the trace's name."""
    return {
        "block_size": sweep.chunk,
        "footprint_tokens": sweep.footprint,
        "tiers": dict(sweep.setup.tiers),
        "admit": sweep.setup.admit,
        "results": [one.to_dict() for one in results],
    }

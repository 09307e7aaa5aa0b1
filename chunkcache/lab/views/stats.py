"""The hit-rate report of a running cache, in a terminal.

It takes the dictionary of `Stats.to_dict()`, since that may come from a server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chunkcache.lab.views.tables import columns, grid, pairs
from chunkcache.lab.views.words import duration, number, share, size


def report(stats: Mapping[str, Any]) -> RenderableType:
    """The hit-rate report of `Stats.to_dict()`."""
    parts: list[RenderableType] = [_reuse(stats), Text(), _misses(stats)]
    if stats["named"]:
        parts += [Text(), _named(stats)]
    parts += [Text(), _memory(stats)]
    if stores := stats.get("stores"):
        parts += [Text(), _colder(stores, stats["chunk_size"], stats["token_bytes"])]
    return Group(*parts)


def _reuse(stats: Mapping[str, Any]) -> Table:
    prompt, cached = stats["prompt_tokens"], stats["cached_tokens"]
    return pairs(
        "Reuse",
        {
            "hit rate": f"{share(cached, prompt)} of all prompt tokens",
            "prompts": number(stats["requests"]),
            "prompt tokens": number(prompt),
            "reused": number(cached),
            "computed": number(prompt - cached),
            **_saved(stats),
            "generated tokens": number(stats["generated_tokens"]),
            "model": f"{stats['model']}, {stats['mode']} mode, {stats['exactness']}",
            "attention kernel": stats["kernel"],
        },
    )


def _saved(stats: Mapping[str, Any]) -> dict[str, str]:
    """Where reused tokens lay, if not all were on the device; the time that they saved."""
    found = {}
    if set(tiers := stats.get("tiers") or {}) - {"device"}:
        found["of which"] = ", ".join(f"{number(tokens)} {tier}" for tier, tokens in tiers.items())
    if seconds := stats.get("saved_seconds"):
        pace = duration(1000 * stats["token_seconds"])
        found["time saved"] = f"{duration(seconds)}, at {pace} for 1,000 tokens"
    return found


def _misses(stats: Mapping[str, Any]) -> Table:
    table = grid("Why tokens had to be computed", "reason", "tokens", "share of prompts")
    ranked = sorted(stats["miss_tokens"].items(), key=lambda item: -item[1])
    for reason, tokens in ranked:
        table.add_row(Text(reason), number(tokens), share(tokens, stats["prompt_tokens"]))
    return table


def _named(stats: Mapping[str, Any]) -> Table:
    table = grid("Named prompts", "name", "prompts", "tokens reused", "share of all reused")
    for name, counts in sorted(stats["named"].items()):
        cached = counts.get("cached_tokens", 0)
        requests = number(counts.get("requests", 0))
        table.add_row(Text(name), requests, number(cached), share(cached, stats["cached_tokens"]))
    return table


def _memory(stats: Mapping[str, Any]) -> Table:
    stored, capacity = stats["bytes"], stats["capacity_bytes"]
    states: dict[str, str] = {}
    if most := stats.get("snapshot_capacity_bytes"):
        held = stats["snapshot_bytes"]
        states = {
            "snapshots": f"{number(stats['snapshots'])}, {size(held)} of {size(most)}",
            "snapshots evicted so far": number(stats["evicted_snapshots"]),
            "snapshots refused so far": number(stats["refused_snapshots"]),
        }
    return pairs(
        "Memory",
        {
            "stored KV": f"{size(stored)} of {size(capacity)} ({share(stored, capacity)})",
            "stored tokens": number(stats["chunks"] * stats["chunk_size"]),
            "a token takes": size(stats["token_bytes"]),
            "chunks in use": number(stats["leased_chunks"]),
            "chunks pinned": number(stats["pinned_chunks"]),
            "chunks evicted so far": number(stats["evicted_chunks"]),
            "chunks refused so far": number(stats["refused_chunks"]),
            "running requests": f"{size(stats['tail_bytes'])} of their own",
        }
        | states,
    )


def _colder(stores: Mapping[str, Any], chunk_size: int, token_bytes: float) -> RenderableType:
    """What moved between the device and colder tiers, and which of them are broken now."""
    names = ("tier", "chunks loaded", "values written", "failed calls", "a token takes", "pays")
    rows = []
    for name, tier in stores.items():
        if isinstance(tier, Mapping):
            state = ", left alone now" if tier["open"] else ""
            takes = _takes(tier["token_bytes"], token_bytes)
            numbers = (number(tier[what]) for what in ("loaded", "saved"))
            failed = number(tier["failures"]) + state
            rows.append((name, *numbers, failed, takes, _pays(tier, chunk_size)))
    others = {
        "damaged values": number(stores["corrupt"]),
        "prefixes not written (queue full)": number(stores["dropped"]),
    }
    return Group(columns("Colder tiers", names, rows), pairs("", others))


def _takes(stored: float | None, device: float) -> str:
    """Bytes of a token in a store, against the device."""
    if stored is None:
        return "-"
    more = f" ({stored / device - 1:+.1%})" if device else ""
    return f"{number(stored)} B{more}"


def _pays(tier: Mapping[str, Any], chunk_size: int) -> str:
    if tier["chunk_seconds"] is None or tier["compute_seconds"] is None:
        return "not measured"
    least = tier["break_even"]
    return "never" if least is None else f"from {number(least * chunk_size)} tokens"


def break_even(tier: Mapping[str, Any], chunk_size: int) -> str:
    """Whether it pays to read a tier of `Stats.stores`, in words."""
    read, computed = tier["chunk_seconds"], tier["compute_seconds"]
    if read is None or computed is None:
        return "what reading takes is not known yet"
    return (
        f"{number(chunk_size)} tokens are read in {duration(tier['call_seconds'] + read)} and computed "
        f"in {duration(computed)}: reading pays {_pays(tier, chunk_size)}"
    )

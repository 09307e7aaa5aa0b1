"""Reports for people: hit rate, memory and the prefix tree, in a terminal or as plain text.

Everything takes the dictionaries of `Stats.to_dict()` and `TreeRow.to_dict()`, since they may come
from a server. Prompts are shown as `rich.text.Text`, never parsed as markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

_PLAIN_WIDTH = 120
_SNIPPET = 48


def console() -> Console:
    """Standard output: as wide as the terminal, or 120 columns of plain text in a pipe."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def number(value: float) -> str:
    """A count with thousands separators.

    >>> number(1234567)
    '1,234,567'
    """
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in binary units.

    >>> size(512), size(1536), size(3 * 2**20)
    ('512 B', '1.5 KiB', '3.0 MiB')
    """
    if value < 1024:
        return f"{value:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:,.1f} {unit}"
    return f"{value / 1024:,.1f} TiB"


def share(part: float, whole: float) -> str:
    """A percentage; of nothing it is a dash.

    >>> share(1, 3), share(0, 0)
    ('33.3%', '-')
    """
    return f"{100 * part / whole:.1f}%" if whole else "-"


def duration(seconds: float) -> str:
    """A time span in the unit that fits it.

    >>> duration(0.0123), duration(2.5), duration(90), duration(7200)
    ('12.3 ms', '2.50 s', '1.5 min', '2.0 h')
    """
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


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
            "generated tokens": number(stats["generated_tokens"]),
            "model": f"{stats['model']}, {stats['mode']} mode, {stats['exactness']}",
            "attention kernel": stats["kernel"],
        },
    )


def _misses(stats: Mapping[str, Any]) -> Table:
    table = _table("Why tokens had to be computed", "reason", "tokens", "share of prompts")
    ranked = sorted(stats["miss_tokens"].items(), key=lambda item: -item[1])
    for reason, tokens in ranked:
        table.add_row(Text(reason), number(tokens), share(tokens, stats["prompt_tokens"]))
    return table


def _named(stats: Mapping[str, Any]) -> Table:
    table = _table("Named prompts", "name", "prompts", "tokens reused", "share of all reused")
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


def tree(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The prefix tree of `TreeRow.to_dict()` rows, which come depth first."""
    tokens, held = sum(row["tokens"] for row in rows), sum(row["bytes"] for row in rows)
    noun = "prefix" if len(rows) == 1 else "prefixes"
    head = f"{number(len(rows))} stored {noun}, {number(tokens)} tokens, {size(held)}"
    root = Tree(Text(head, style="bold"))
    branches = [root]
    for row in rows:
        del branches[row["depth"] + 1 :]
        branches.append(branches[-1].add(_node(row)))
    return root


def _node(row: Mapping[str, Any]) -> Text:
    label = Text()
    if row["names"]:
        label.append(", ".join(row["names"]) + " ", style="bold green")
    label.append(_snippet(row["text"], row["start"]), style="cyan")
    facts = [
        f"{number(row['tokens'])} tokens",
        size(row["bytes"]),
        *([f"{number(row['snapshots'])} snapshots"] if row.get("snapshots") else []),
        f"{number(row['hits'])} hits",
        f"used {duration(row['idle'])} ago",
        *(["pinned"] if row["pinned"] else []),
        *([f"in use by {row['leases']}"] if row["leases"] else []),
        row["tier"],
    ]
    return label.append("  " + ", ".join(facts), style="dim")


def _snippet(text: str, start: int) -> str:
    flat = " ".join(text.split())
    if not flat:
        return f"from token {number(start)}"
    return f'"{flat[:_SNIPPET]}{"..." if len(flat) > _SNIPPET else ""}"'


def pairs(title: str, values: Mapping[str, str]) -> Table:
    """A title and lines of a name and a value."""
    table = _table(title, "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    for name, value in values.items():
        table.add_row(name, Text(value))
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def columns(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are aligned right."""
    table = _table(title, names[0], *names[1:])
    for row in rows:
        table.add_row(*map(Text, row))
    return table

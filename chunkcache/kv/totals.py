"""Sums over what a store holds: by namespace, and of all."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from chunkcache.kv.inventory import CHUNK, SNAPSHOT, Inventory, count, kind_of, note_of, text
from chunkcache.stores.base import StoreStats


@dataclass
class Space:
    """Sums of the families of one namespace.

    Attributes:
        namespace: hexadecimal digits; empty for families of which nobody knows.
        model, dtype, token_bytes: as the note says; the last is what a token takes on the device.
        chunk_bytes: of all chunks; bytes: of all values.
    """

    namespace: str
    model: str | None
    dtype: str | None
    token_bytes: int | None
    families: int = 0
    chunks: int = 0
    tokens: int = 0
    chunk_bytes: int = 0
    bytes: int = 0

    @property
    def stored_token_bytes(self) -> float | None:
        """What a token takes in the store; None if there are none."""
        return self.chunk_bytes / self.tokens if self.tokens else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"stored_token_bytes": self.stored_token_bytes}


def spaces(inventory: Inventory) -> list[Space]:
    """Sums by namespace, the largest first."""
    found: dict[str, Space] = {}
    for family in inventory.families:
        name = family.namespace
        space = found.setdefault(name, _space(name, inventory))
        space.families += 1
        space.chunks += family.chunks
        space.tokens += family.tokens
        space.chunk_bytes += family.chunk_bytes
        space.bytes += family.bytes
    return sorted(found.values(), key=lambda space: -space.bytes)


def _space(namespace: str, inventory: Inventory) -> Space:
    note = inventory.models.get(note_of(namespace), {})
    size = count(note.get("token_bytes"))
    return Space(namespace, text(note.get("model")), text(note.get("dtype")), size)


def totals(inventory: Inventory, stats: StoreStats, budget: int | None) -> dict[str, Any]:
    """Of all values, for JSON; times in seconds since the epoch.

    Args:
        stats: of the store; of a server they say how much memory it uses, and may.
        budget: of the store, if whoever asks knows it.
    """
    kinds = Counter(kind_of(key) for key in inventory.values)
    used = [one.used for one in inventory.values.values() if one.used is not None]
    found: dict[str, Any] = {
        "kind": stats.kind,
        "values": len(inventory.values),
        "bytes": sum(one.bytes for one in inventory.values.values()),
        "budget": budget,
        "chunks": kinds[CHUNK],
        "snapshots": kinds[SNAPSHOT],
        "notes": kinds.total() - kinds[CHUNK] - kinds[SNAPSHOT],
        "families": len(inventory.families),
        "tokens": sum(family.tokens for family in inventory.families),
        "oldest_use": min(used, default=None),
        "newest_use": max(used, default=None),
        "namespaces": [space.to_dict() for space in spaces(inventory)],
    }
    if stats.policy is not None:
        memory = {"used_memory": stats.bytes, "maxmemory": stats.budget, "policy": stats.policy}
        found["server"] = memory
    return found

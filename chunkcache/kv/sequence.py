"""One sequence: the shared chunks it reads and the private tail behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from chunkcache.kv.pool import PoolRun


@dataclass
class Sequence:
    """Where the KV of one sequence lies.

    Attributes:
        tokens: ids whose KV is stored, in order.
        shared: runs of whole stored chunks, from position 0 on.
        tail: ids of the arena chunks behind them; the last one may be partly filled.
    """

    chunk_size: int
    tokens: list[int] = field(default_factory=list)
    shared: tuple[PoolRun, ...] = ()
    tail: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens stored."""
        return len(self.tokens)

    @property
    def shared_tokens(self) -> int:
        """Tokens in shared chunks; a multiple of the chunk size."""
        return sum(map(len, self.shared)) * self.chunk_size

    def missing_chunks(self, tokens: int) -> int:
        """How many chunks the tail lacks to take `tokens` more tokens."""
        need = self.length - self.shared_tokens + tokens
        return max(0, -(-need // self.chunk_size) - len(self.tail))


def cut(runs: Iterable[PoolRun], chunks: int) -> tuple[list[PoolRun], list[PoolRun]]:
    """The first `chunks` chunks of consecutive runs, and the rest."""
    head, rest = [], []
    for run in runs:
        if chunks >= len(run):
            head.append(run)
        elif chunks > 0:
            first, second = run.split(chunks)
            head.append(first)
            rest.append(second)
        else:
            rest.append(run)
        chunks -= min(chunks, len(run))
    return head, rest

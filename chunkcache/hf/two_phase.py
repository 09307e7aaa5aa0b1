"""Reuse without copying: attention reads chunks where they lie, states start from snapshots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from chunkcache.attention.batch import Batch
from chunkcache.attention.groups import Gate
from chunkcache.attention.kernel import Kernel
from chunkcache.hf.cache import ChunkCache, Kept, Place
from chunkcache.hf.carrier import Carried, Carrier, Snapshot, Source
from chunkcache.kv import Arena, ChunkLayout, PoolRun
from chunkcache.kv.sequence import Sequence as Tokens
from chunkcache.kv.sequence import cut


class TwoPhase(Carrier):
    """See the module.

    Args:
        twin: uses chunkcache's attention; its hooks act on forwards with a ChunkCache.
        kernels: makes the attention kernel of a row.
        copies: nothing is read where it lies: a hit runs the very same products as a miss.
    """

    reads_in_place = True
    alone = False

    def __init__(
        self,
        twin: PreTrainedModel,
        layout: ChunkLayout,
        kept: tuple[Kept, ...],
        kernels: Callable[[], Kernel],
        gate: Gate | None = None,
        copies: bool = False,
    ):
        super().__init__()
        self.model = self.generator = twin
        self.layout = layout
        self.kept = kept
        self.snapshots = any(one.states for one in kept)
        self.kernels = kernels
        self.gate = gate or Gate()
        self.copies = copies

    def open(self, source: Source) -> ChunkCache:
        """A row that reads whole chunks where they are, and owns a copy of a chunk used in part."""
        layout, tokens = self.layout, source.tokens
        whole, rest = divmod(len(tokens), layout.chunk_size)
        if self.copies:
            whole, rest = 0, len(tokens)
        shared, behind = cut(source.runs, whole)
        sequence = Tokens(layout.chunk_size, list(tokens), tuple(shared))
        arena = Arena(layout)
        if rest:
            self._copy(arena, sequence, behind, rest)
        batch = Batch(layout, [sequence], arena, self.kernels(), self.gate, self.decisions)
        cache = ChunkCache(batch, self.kept)
        if source.snapshot is not None:
            cache.set_states(_states(source.snapshot))
        return cache

    def _copy(self, arena: Arena, sequence: Tokens, runs: list[PoolRun], tokens: int) -> None:
        size, layers = self.layout.chunk_size, range(len(self.layout.layers))
        needed = -(-tokens // size)
        sequence.tail = list(arena.extend(needed))
        at = 0
        for run in cut(runs, needed)[0]:
            arena.copy_chunks([run.layer(layer) for layer in layers], at)
            at += len(run)
        arena.clear_behind(needed - 1, tokens - (needed - 1) * size)

    def logits(self, carried: Carried, ids: list[int]) -> torch.Tensor:
        """As the base class says."""
        logits: torch.Tensor = self._run(carried, ids).logits[0]
        return logits

    def forward(self, carried: Carried, ids: list[int]) -> None:
        """As the base class says."""
        assert isinstance(carried, ChunkCache)
        carried.logits = False
        try:
            self._run(carried, ids)
        finally:
            carried.logits = True

    def _run(self, carried: Carried, ids: list[int]) -> Any:
        tensor = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            return self.model(input_ids=tensor, past_key_values=carried, use_cache=True)

    def join(self, rows: Sequence[Carried], copies: int, pads: list[int]) -> ChunkCache:
        """As the base class says; rows that have no state yet get one of zeros."""
        caches = [row for row in rows if isinstance(row, ChunkCache)]
        joined = caches[0]
        if len(caches) > 1:
            batch = Batch.join([cache.batch for cache in caches])
            joined = ChunkCache(batch, self.kept)
            joined.set_states(_joined([cache.states() for cache in caches]))
        if copies > 1:
            joined.reorder_cache(torch.arange(len(caches)).repeat_interleave(copies))
        joined.pads = pads
        return joined

    def rebase(self, carried: Carried, tokens: int, runs: Sequence[PoolRun]) -> None:
        """Reads stored chunks from the pool; only what is behind them stays private."""
        assert isinstance(carried, ChunkCache)
        batch, size = carried.batch, self.layout.chunk_size
        (sequence,) = batch.sequences
        shared, _ = cut(runs, tokens // size)
        keep = sequence.tail[(tokens - sequence.shared_tokens) // size :]
        arena = batch.arena.select(keep)
        moved = Tokens(size, sequence.tokens, tuple(shared), list(range(len(keep))))
        batch.adopt(Batch(self.layout, [moved], arena, batch.kernel))


def _states(snapshot: Snapshot) -> dict[Place, torch.Tensor]:
    """Copies of a snapshot's states."""
    pairs = zip(snapshot.ends.plain, snapshot.ends.tensors, strict=True)
    return {place: tensor.clone() for place, tensor in pairs}


def _joined(rows: list[dict[Place, torch.Tensor]]) -> dict[Place, torch.Tensor]:
    """The states of several rows as one."""
    known = {place: state for states in rows for place, state in states.items()}
    return {
        place: torch.cat([states.get(place, torch.zeros_like(state)) for states in rows])
        for place, state in known.items()
    }

"""A batch of sequences in one forward after another: where new KV goes and what each row attends to.

Knows tensors and chunks, not transformers: `hf.cache` adapts it.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from chunkcache.attention.plan import (
    Decisions,
    Gate,
    Group,
    PrefillPlan,
    StepPlan,
    group_rows,
    plan_step,
)
from chunkcache.attention.two_phase import Block, attend_prefill, attend_step
from chunkcache.attention.workspace import Workspace
from chunkcache.kv.arena import Arena
from chunkcache.kv.layout import KV, ChunkLayout
from chunkcache.kv.sequence import Sequence


class Batch:
    """Sequences, the arena of their tails, and the forward in progress.

    Life of a forward: `begin(ids)`; per layer `write` and `attend`; `end()`. A forward that fails in
    between leaves the batch as it was before `begin`.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        sequences: list[Sequence],
        arena: Arena,
        gate: Gate | None = None,
        space: Workspace | None = None,
        decisions: Decisions | None = None,
        ordered: bool = True,
    ):
        self.layout = layout
        self.sequences = sequences
        self.arena = arena
        self.gate = gate or Gate()
        self.space = space or Workspace(layout.device)
        self.decisions = decisions or Decisions()
        self.ordered = ordered
        self.attended = 0
        self._groups: list[Group] | None = None
        self._plan: StepPlan | PrefillPlan | None = None
        self._ids: list[list[int]] = []

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return len(self.sequences)

    @property
    def new_tokens(self) -> int:
        """Tokens per row of the forward in progress."""
        return len(self._ids[0])

    @property
    def positions(self) -> list[int]:
        """Where the next token of each row goes."""
        return [sequence.length for sequence in self.sequences]

    def begin(self, ids: list[list[int]]) -> None:
        """Makes room for the new ids, as many for each row; several only if there is one row."""
        assert len(ids) == self.rows and (len(ids[0]) == 1 or self.rows == 1)
        for sequence in self.sequences:
            missing = sequence.missing_chunks(len(ids[0]))
            if missing:
                sequence.tail += self.arena.extend(missing)
        self._ids = ids
        size = self.layout.chunk_size
        if self.rows == 1:
            one = self.sequences[0]
            self._plan = PrefillPlan(one.length, len(ids[0]), one.shared_tokens, size)
        else:
            self._plan = plan_step(
                self.sequences, self.groups(), self.arena.used, size, self.layout.device
            )

    def groups(self) -> list[Group]:
        """Shared runs and their rows; made again only after the batch changed."""
        if self._groups is None:
            self._groups = group_rows(
                self.sequences, self.gate, self.layout.chunk_size, self.decisions
            )
        return self._groups

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores the new KV of one layer: keys `[rows, heads, tokens, dim]`, values alike."""
        plan = self._plan
        if isinstance(plan, StepPlan):
            self.arena.append_step(layer, plan.chunk, plan.offset, keys[:, :, 0], values[:, :, 0])
            return
        sequence = self.sequences[0]
        own = sequence.length - sequence.shared_tokens
        size = self.layout.chunk_size
        self.arena.append(layer, sequence.tail[own // size], own % size, keys[0], values[0])

    def attend(self, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of the new tokens.

        Takes `[rows, query_heads, tokens, dim]`, gives `[rows, tokens, query_heads, value_dim]`.
        """
        self.attended += 1
        plan, tails = self._plan, Block(*self.arena.layer(layer))
        if isinstance(plan, StepPlan):
            shared = [Block(*group.run.layer(layer)) for group in plan.groups]
            return attend_step(query, shared, tails, plan, scaling, self.space, self.ordered)
        assert plan is not None, "attend() outside of begin() and end()"
        shared = [Block(*run.layer(layer)) for run in self.sequences[0].shared]
        return attend_prefill(query, shared, tails, plan, scaling, self.space, self.ordered)

    def end(self) -> None:
        """The forward is complete: its tokens are part of the sequences."""
        for sequence, ids in zip(self.sequences, self._ids, strict=True):
            sequence.tokens += ids
        self._ids, self._plan = [], None

    def tail_blocks(self, row: int, first: int, count: int) -> list[KV]:
        """Copies of `count` chunks of one row's tail, from its chunk `first` on, a pair per layer."""
        ids = self.sequences[row].tail[first : first + count]
        chosen: slice | torch.Tensor = torch.tensor(ids, device=self.layout.device)
        if ids == list(range(ids[0], ids[0] + count)):
            chosen = slice(ids[0], ids[0] + count)
        pairs = (self.arena.layer(layer) for layer in range(len(self.layout.layers)))
        return [(keys[chosen], values[chosen]) for keys, values in pairs]

    def select(self, rows: Rows[int]) -> Batch:
        """A batch of copies of the named rows (repeats allowed); shared chunks are not copied."""
        ids: list[int] = []
        chosen = []
        for row in rows:
            old = self.sequences[row]
            used = -(-(old.length - old.shared_tokens) // self.layout.chunk_size)
            tail = list(range(len(ids), len(ids) + used))
            ids += old.tail[:used]
            chosen.append(Sequence(old.chunk_size, list(old.tokens), old.shared, tail))
        arena = self.arena.select(ids)
        return self._like(chosen, arena)

    def adopt(self, other: Batch) -> None:
        """Becomes the other batch (same layout), in place."""
        self.sequences, self.arena = other.sequences, other.arena
        self._groups = self._plan = None

    @staticmethod
    def join(batches: Rows[Batch]) -> Batch:
        """One batch of all rows of several."""
        first = batches[0]
        arena = Arena(first.layout)
        joined = []
        for batch in batches:
            used = batch.arena.used
            start = arena.extend(used).start
            arena.copy_chunks(
                [batch.arena.layer(layer) for layer in range(len(first.layout.layers))], start
            )
            for old in batch.sequences:
                tail = [start + chunk for chunk in old.tail]
                joined.append(Sequence(old.chunk_size, list(old.tokens), old.shared, tail))
        return first._like(joined, arena)

    def _like(self, sequences: list[Sequence], arena: Arena) -> Batch:
        return Batch(
            self.layout, sequences, arena, self.gate, self.space, self.decisions, self.ordered
        )

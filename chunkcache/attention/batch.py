"""A batch of sequences in one forward after another: where new KV goes and what each row attends to.

Knows tensors and chunks, not transformers: `hf.cache` adapts it.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from chunkcache.attention.groups import Decisions, Gate, Group, group_rows
from chunkcache.attention.kernel import Kernel, Plan
from chunkcache.attention.rule import Hiding, Rule
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
        kernel: Kernel,
        gate: Gate | None = None,
        decisions: Decisions | None = None,
    ):
        self.layout = layout
        self.sequences = sequences
        self.arena = arena
        self.kernel = kernel
        self.gate = gate or Gate()
        self.decisions = decisions or Decisions()
        self.rules: dict[int, set[Hiding]] = {}  # by which layers were attended to
        self._groups: list[Group] | None = None
        self._plan: Plan | None = None
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None
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
        self._ids, self._places = ids, None
        if self.rows == 1:
            self._plan = self.kernel.prefill(self.sequences[0], len(ids[0]))
        else:
            self._plan = self.kernel.step(self.sequences, self.groups(), self.arena.used)
            self._places = self._new_places()

    def _new_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The arena chunk and the offset in it of each row's new token."""
        size = self.layout.chunk_size
        places = []
        for sequence in self.sequences:
            depth, offset = divmod(sequence.length - sequence.shared_tokens, size)
            places.append((sequence.tail[depth], offset))
        where = torch.tensor(places, device=self.layout.device)
        return where[:, 0], where[:, 1]

    def groups(self) -> list[Group]:
        """Shared runs and their rows; made again only after the batch changed."""
        if self._groups is None:
            self._groups = group_rows(
                self.sequences, self.gate, self.layout.chunk_size, self.decisions
            )
        return self._groups

    def write(self, layer: int, *parts: torch.Tensor) -> None:
        """Stores the new KV of one layer.

        Args:
            parts: `[rows, heads, tokens, width]`: keys, and values unless the layer is latent.
        """
        if self._places is not None:
            self.arena.append_step(layer, *self._places, *(part[:, :, 0] for part in parts))
            return
        sequence = self.sequences[0]
        chunk, offset = divmod(sequence.length - sequence.shared_tokens, self.layout.chunk_size)
        self.arena.append(layer, sequence.tail[chunk], offset, *(part[0] for part in parts))

    def attend(self, layer: int, query: torch.Tensor, rule: Rule) -> torch.Tensor:
        """Attention of the new tokens; once a layer or, where others read its KV, more often.

        Takes `[rows, query_heads, tokens, dim]`, gives `[rows, tokens, query_heads, value_dim]`.
        """
        assert self._plan is not None, "attend() outside of begin() and end()"
        self.rules.setdefault(layer, set()).add(rule.hiding)
        return self._plan.attend(layer, query, self.arena.layer(layer), rule)

    def end(self) -> None:
        """The forward is complete: its tokens are part of the sequences."""
        for sequence, ids in zip(self.sequences, self._ids, strict=True):
            sequence.tokens += ids
        self._ids, self._plan, self._places = [], None, None

    def tail_blocks(self, row: int, first: int, count: int) -> list[KV]:
        """Copies of `count` chunks of one row's tail, from its chunk `first` on, a tuple per layer."""
        ids = self.sequences[row].tail[first : first + count]
        chosen: slice | torch.Tensor = torch.tensor(ids, device=self.layout.device)
        if ids == list(range(ids[0], ids[0] + count)):
            chosen = slice(ids[0], ids[0] + count)
        held = (self.arena.layer(layer) for layer in range(len(self.layout.layers)))
        return [tuple(tensor[chosen] for tensor in tensors) for tensors in held]

    def finite_chunks(self, row: int) -> int:
        """How many chunks of a row's tail come before the first that is not all finite numbers.

        Looks at the last layer only: what is not finite in an earlier one shows there too.
        """
        ids = torch.tensor(self.sequences[row].tail, dtype=torch.long, device=self.layout.device)
        kept = torch.ones_like(ids, dtype=torch.bool)
        for tensor in self.arena.layer(-1) if self.layout.layers else ():
            kept &= tensor[ids].isfinite().flatten(1).all(1)
        return int(kept.cumprod(0).sum())

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
        self._groups = self._plan = self._places = None

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
        return Batch(self.layout, sequences, arena, self.kernel, self.gate, self.decisions)

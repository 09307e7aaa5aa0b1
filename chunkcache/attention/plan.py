"""How the torch kernel takes a step or a prefill: index tensors and masks, the same for all layers."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from chunkcache.attention.groups import Group
from chunkcache.attention.workspace import Workspace
from chunkcache.kv.sequence import Sequence

_BLOCKS = 16  # of scores in a block of prefill; on a CPU its partial outputs take about 32 MiB


@dataclass
class StepPlan:
    """One decoding step of a batch, the same for all layers.

    Attributes:
        groups: shared runs and their rows.
        owner: `[tail chunks]` the row that owns each arena chunk.
        levels: per depth in the tails: (arena chunk ids, rows) as index tensors; None for "all, in order".
        hidden: `[tail chunks, 1, 1, chunk]` True behind the last token of a row.
    """

    rows: int
    groups: list[Group]
    owner: torch.Tensor
    levels: list[tuple[torch.Tensor | None, torch.Tensor | None]]
    hidden: torch.Tensor
    indexes: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def index(self, rows: tuple[int, ...]) -> torch.Tensor | None:
        """Rows as an index tensor; None if they are all rows in order."""
        if len(rows) == self.rows:
            return None
        if rows not in self.indexes:
            self.indexes[rows] = torch.tensor(rows, device=self.owner.device)
        return self.indexes[rows]


def plan_step(
    sequences: Rows[Sequence], groups: list[Group], used: int, chunk_size: int, device: torch.device
) -> StepPlan:
    """The plan of a step that adds one token to each row; its chunks must be there already.

    Args:
        used: arena chunks in use; every one belongs to some row's tail.
    """
    rows = len(sequences)
    owner = [0] * used
    filled = [chunk_size] * used
    for row, sequence in enumerate(sequences):
        new = sequence.length - sequence.shared_tokens  # where the new token goes in the tail
        for depth, chunk in enumerate(sequence.tail):
            owner[chunk] = row
            filled[chunk] = min(chunk_size, max(0, new + 1 - depth * chunk_size))
    ends = torch.tensor(filled, device=device).view(-1, 1, 1, 1)
    hidden = torch.arange(chunk_size, device=device) >= ends
    owners = torch.tensor(owner, device=device)
    return StepPlan(rows, groups, owners, _levels(sequences, used, device), hidden)


def _levels(
    sequences: Rows[Sequence], used: int, device: torch.device
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    levels: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
    for depth in range(max(len(sequence.tail) for sequence in sequences)):
        rows = [row for row, sequence in enumerate(sequences) if len(sequence.tail) > depth]
        ids = [sequences[row].tail[depth] for row in rows]
        every_row = len(rows) == len(sequences)
        levels.append(
            (
                None if ids == list(range(used)) else torch.tensor(ids, device=device),
                None if every_row else torch.tensor(rows, device=device),
            )
        )
    return levels


class PrefillStep(NamedTuple):
    """New tokens `begin` .. `end` of a prefill, the tail chunks they see, and what they must not see.

    `hidden` is True where a key lies behind its query, for the last chunks: `[h, 1, rows, chunk]`.
    """

    begin: int
    end: int
    seen: int
    hidden: torch.Tensor


class PrefillPlan:
    """How the new tokens of one sequence are taken in blocks; the same for all layers.

    Args:
        start: position of the first new token; tail_start: of the tail's first.
    """

    def __init__(self, start: int, tokens: int, tail_start: int, chunk_size: int):
        self.start = start
        self.tokens = tokens
        self.tail_start = tail_start
        self.chunk_size = chunk_size
        self._steps: dict[tuple[int, int], list[PrefillStep]] = {}

    def steps(self, query_heads: int, heads: int, space: Workspace) -> list[PrefillStep]:
        """Blocks for a layer with so many heads; made once."""
        found = self._steps.get((query_heads, heads))
        if found is None:
            found = self._steps[query_heads, heads] = self._cut(query_heads, heads, space)
        return found

    def _cut(self, query_heads: int, heads: int, space: Workspace) -> list[PrefillStep]:
        keys, device = self.start + self.tokens, space.device
        fitting = _BLOCKS * space.block // (query_heads * keys) // 16 * 16
        most = self.chunk_size if device.type == "cpu" else self.tokens
        size = max(16, min(most, fitting))
        steps, at = [], 0
        while at < self.tokens:
            first = self.start + at
            end = min(self.tokens, at + size - first % size)
            seen = -(-(self.start + end - self.tail_start) // self.chunk_size)
            hidden = self._hidden(first, end - at, seen, query_heads // heads, device)
            steps.append(PrefillStep(at, end, seen, hidden))
            at = end
        return steps

    def _hidden(
        self, first: int, tokens: int, seen: int, folded: int, device: torch.device
    ) -> torch.Tensor:
        size = self.chunk_size
        masked = seen - (first - self.tail_start) // size  # chunks beyond the first query's own
        position = torch.arange(first, first + tokens, device=device).repeat_interleave(folded)
        key = self.tail_start + torch.arange((seen - masked) * size, seen * size, device=device)
        return key.view(masked, 1, 1, size) > position.view(1, 1, -1, 1)

"""How the torch kernel takes a step or a prefill: index tensors and masks, the same for all layers
that hide the same keys."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch

from chunkcache.attention.groups import Group
from chunkcache.attention.partial import Mask
from chunkcache.attention.rule import Rule
from chunkcache.attention.workspace import Workspace
from chunkcache.kv.sequence import Sequence

_BLOCKS = 16  # of scores in a block of prefill; on a CPU its partial outputs take about 32 MiB
Index = torch.Tensor | None  # None for "all, in order"
Sight = tuple[int, int]  # the keys that a row sees: from the first to before the second


class Part(NamedTuple):
    """Chunks `begin` .. `end` of a block, which some row sees, and what other rows do not see of them."""

    block: int
    begin: int
    end: int
    masks: list[Mask]


def seen_part(
    block: int,
    start: int,
    chunks: int,
    sights: Rows[Sight],
    folded: int,
    size: int,
    device: torch.device,
) -> Part | None:
    """What rows see of a block of chunks; None if that is nothing.

    Args:
        start: the number of its first chunk, counted from position 0.
        sights: of the rows, each of which stands for `folded` query heads.
    """
    lows, highs = zip(*sights, strict=True)
    begin = max(0, min(lows) // size - start)
    end = min(chunks, -(-max(highs) // size) - start)
    if begin >= end:
        return None
    masks = []

    def hide(first: int, last: int, borders: tuple[int, ...], below: bool) -> None:
        if first < last:
            key = torch.arange((start + first) * size, (start + last) * size, device=device)
            border = torch.tensor(borders, device=device).repeat_interleave(folded).unsqueeze(1)
            key = key.view(-1, 1, 1, size)
            masks.append(Mask(first - begin, key < border if below else key >= border))

    hide(begin, min(end, -(-max(lows) // size) - start), lows, True)
    hide(max(begin, min(highs) // size - start), end, highs, False)
    return Part(block, begin, end, masks)


class Tails(NamedTuple):
    """The tail chunks that a step attends to.

    Attributes:
        chosen: their arena ids.
        owner: `[chosen]` the row that owns each.
        levels: per depth in the tails: (which of the chosen, rows).
        mask: `[chosen, 1, 1, chunk]` behind the last token of a row, and before the first it sees.
    """

    chosen: Index
    owner: torch.Tensor
    levels: list[tuple[Index, Index]]
    mask: Mask


class StepView(NamedTuple):
    """A step under one rule: the parts of groups that some row sees, and tails."""

    shared: list[Part]
    tails: Tails


class StepPlan:
    """One decoding step of a batch, one token for each row, whose chunks must be there already.

    Args:
        groups: shared runs and their rows.
        used: arena chunks in use; every one belongs to some row's tail.
    """

    def __init__(
        self,
        sequences: Rows[Sequence],
        groups: list[Group],
        used: int,
        chunk_size: int,
        device: torch.device,
    ):
        self.sequences = [(seq.length, seq.shared_tokens, list(seq.tail)) for seq in sequences]
        self.groups = groups
        self.used = used
        self.chunk_size = chunk_size
        self.device = device
        self._indexes: dict[tuple[int, ...], torch.Tensor] = {}
        self._views: dict[tuple[int | None, int | None, int], StepView] = {}

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.sequences)

    def index(self, rows: tuple[int, ...]) -> Index:
        """Rows as an index tensor."""
        if len(rows) == self.rows:
            return None
        if rows not in self._indexes:
            self._indexes[rows] = torch.tensor(rows, device=self.device)
        return self._indexes[rows]

    def view(self, rule: Rule, folded: int) -> StepView:
        """The step under a rule for a layer with so many query heads per head; made once."""
        key = rule.window, rule.span, folded
        if key not in self._views:
            sights = [(rule.first(length), length + 1) for length, _, _ in self.sequences]
            self._views[key] = StepView(self._shared(sights, folded), self._tails(sights))
        return self._views[key]

    def _shared(self, sights: list[Sight], folded: int) -> list[Part]:
        reached = [0] * self.rows  # chunks of each row that are in groups so far
        parts = []
        for number, (run, rows) in enumerate(self.groups):
            start = reached[rows[0]]
            for row in rows:
                reached[row] += len(run)
            seen = [sights[row] for row in rows]
            part = seen_part(number, start, len(run), seen, folded, self.chunk_size, self.device)
            if part is not None:
                parts.append(part)
        return parts

    def _tails(self, sights: list[Sight]) -> Tails:
        size = self.chunk_size
        owner, first = [0] * self.used, [0] * self.used
        for row, (_, shared, tail) in enumerate(self.sequences):
            for depth, chunk in enumerate(tail):
                owner[chunk], first[chunk] = row, shared + depth * size
        seen = [i for i in range(self.used) if first[i] + size > sights[owner[i]][0]]
        if 2 * len(seen) > self.used:  # then choosing, which copies, would not pay
            seen = list(range(self.used))
        columns = [(owner[i], first[i], *sights[owner[i]]) for i in seen]
        owners, starts, lows, highs = torch.tensor(columns, device=self.device).unbind(1)
        key = starts.unsqueeze(1) + torch.arange(size, device=self.device)
        hidden = (key < lows.unsqueeze(1)) | (key >= highs.unsqueeze(1))
        mask = Mask(0, hidden.view(-1, 1, 1, size))
        return Tails(self._choice(seen, self.used), owners, self._levels(seen), mask)

    def _levels(self, seen: list[int]) -> list[tuple[Index, Index]]:
        place = {chunk: number for number, chunk in enumerate(seen)}
        levels = []
        for depth in range(max(len(tail) for _, _, tail in self.sequences)):
            found = [
                (place[tail[depth]], row)
                for row, (_, _, tail) in enumerate(self.sequences)
                if len(tail) > depth and tail[depth] in place
            ]
            if found:
                ids, rows = map(list, zip(*found, strict=True))
                levels.append((self._choice(ids, len(seen)), self._choice(rows, self.rows)))
        return levels

    def _choice(self, ids: list[int], count: int) -> Index:
        return None if ids == list(range(count)) else torch.tensor(ids, device=self.device)


class PrefillStep(NamedTuple):
    """New tokens `begin` .. `end` of a prefill, and what they see."""

    begin: int
    end: int
    parts: list[Part]


class PrefillPlan:
    """How the new tokens of one sequence are taken in blocks; the same for all layers.

    Args:
        start: position of the first new token.
        chunks: of each block, in order: the sequence's runs and its tail.
    """

    def __init__(self, start: int, tokens: int, chunks: list[int], chunk_size: int):
        self.start = start
        self.tokens = tokens
        self.chunks = chunks
        self.chunk_size = chunk_size
        self._steps: dict[tuple[int | None, ...], list[PrefillStep]] = {}

    def steps(
        self, query_heads: int, heads: int, rule: Rule, space: Workspace
    ) -> list[PrefillStep]:
        """Blocks for a layer with so many heads under a rule; made once."""
        key = rule.window, rule.span, query_heads, heads
        if key not in self._steps:
            self._steps[key] = self._cut(query_heads, heads, rule, space)
        return self._steps[key]

    def _cut(self, query_heads: int, heads: int, rule: Rule, space: Workspace) -> list[PrefillStep]:
        most = self.chunk_size if space.device.type == "cpu" else self.tokens
        keys = self.start + self.tokens
        for limit in (rule.window, rule.span):
            keys = min(keys, keys if limit is None else limit + most)
        fitting = _BLOCKS * space.block // (query_heads * keys) // 16 * 16
        size = max(16, min(most, fitting))
        steps, at = [], 0
        while at < self.tokens:
            first = self.start + at
            end = min(self.tokens, at + size - first % size)
            sights = [(rule.first(p), p + 1) for p in range(first, self.start + end)]
            steps.append(PrefillStep(at, end, self._parts(sights, query_heads // heads, space)))
            at = end
        return steps

    def _parts(self, sights: list[Sight], folded: int, space: Workspace) -> list[Part]:
        parts, start = [], 0
        for block, chunks in enumerate(self.chunks):
            part = seen_part(block, start, chunks, sights, folded, self.chunk_size, space.device)
            if part is not None:
                parts.append(part)
            start += chunks
        return parts

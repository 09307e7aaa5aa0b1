"""Plans for the compiled modules: which chunks lie where, as arrays of numbers."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence as Rows
from itertools import accumulate
from typing import NamedTuple

import torch

from chunkcache.attention.groups import Group
from chunkcache.attention.kernel import Kernel, Plan
from chunkcache.attention.rule import Rule
from chunkcache.attention.workspace import Workspace
from chunkcache.kv.layout import KV, ChunkLayout
from chunkcache.kv.pool import Pool
from chunkcache.kv.sequence import Sequence
from chunkcache.native.library import TYPES, VERSION, Library, Queries, Shape

_SEGMENT = 512  # tokens whose chunks are folded into one state
_EVERYTHING = 2**31 - 1  # keys; more need not be counted


class NativeKernel(Kernel):
    """See chunkcache/native/attention.h for the arithmetic.

    Args:
        instructions: the instruction set that `library` was compiled for.
    """

    def __init__(self, layout: ChunkLayout, library: Library, instructions: str):
        self.layout = layout
        self.library = library
        self.name = f"native {instructions} {VERSION}"
        self.space = Workspace(layout.device)
        self.segment = max(1, _SEGMENT // layout.chunk_size)
        self._made: tuple[list[Group], list[int], _Items] | None = None

    def step(self, sequences: Rows[Sequence], groups: list[Group], used: int) -> Plan:
        """As the base class says."""
        sizes = [len(sequence.tail) for sequence in sequences]
        if self._made is None or self._made[0] is not groups or self._made[1] != sizes:
            items = _items(sequences, groups, self.segment)
            self._made = groups, sizes, items
        return _Step(self, self._made[2], [sequence.length + 1 for sequence in sequences])

    def prefill(self, sequence: Sequence, tokens: int) -> Plan:
        """As the base class says."""
        if tokens == 1:  # taken by segments, so that all threads find work
            groups = [Group(run, (0,)) for run in sequence.shared]
            return _Step(self, _items([sequence], groups, self.segment), [sequence.length + 1])
        return _Prefill(self, sequence, tokens)

    def shape(self, layer: int, query_heads: int, rule: Rule) -> Shape:
        """The first argument of the library's functions."""
        shape = self.layout.attention(layer)
        return (
            shape.kv_heads,
            query_heads // shape.kv_heads,
            shape.head_dim,
            shape.value_dim,
            self.layout.chunk_size,
            self.segment,
            rule.scaling,
            TYPES[self.layout.dtype],
            shape.latent,
            min(rule.window or 0, _EVERYTHING),
            min(rule.span or 0, _EVERYTHING),
            rule.softcap or 0.0,
        )

    def prepare(
        self, layer: int, query: torch.Tensor, rows: int, tokens: int, rule: Rule
    ) -> _Prepared:
        """Everything of one call that hangs on the query.

        Raises:
            ValueError: for what the library, which is handed addresses, could not refuse.
        """
        shape = self.layout.attention(layer)
        heads = query.shape[1]
        if query.shape != (rows, heads, tokens, shape.head_dim) or query.device.type != "cpu":
            raise ValueError(
                f"layer {layer} asks for attention of {tuple(query.shape)} on {query.device}, not of "
                f"{rows} rows and {tokens} tokens of {shape.head_dim} on the CPU"
            )
        if not heads or heads % shape.kv_heads or not rule.scaling > 0:
            raise ValueError(
                f"layer {layer}: {heads} query heads for {shape.kv_heads}, scaling {rule.scaling}"
            )
        if query.stride(-1) != 1 or query.dtype != self.layout.dtype:
            query = query.to(self.layout.dtype).contiguous()
        out = query.new_empty(rows, tokens, heads, shape.value_dim)
        return _Prepared(self.shape(layer, heads, rule), query, out, _sinks(layer, heads, rule))


class _Prepared(NamedTuple):
    """The shape of a call, and the tensors whose addresses it is handed."""

    shape: Shape
    query: torch.Tensor
    out: torch.Tensor
    sinks: torch.Tensor | None

    def queries(self, places: int) -> Queries:
        """The second argument; `places` is the dimension of the query in which rows or tokens are."""
        size = self.query.element_size()
        strides = self.query.stride(places) * size, self.query.stride(1) * size
        sinks = 0 if self.sinks is None else self.sinks.data_ptr()
        return self.query.data_ptr(), *strides, self.out.data_ptr(), sinks


def _sinks(layer: int, heads: int, rule: Rule) -> torch.Tensor | None:
    if rule.sinks is None:
        return None
    if rule.sinks.shape != (heads,):
        raise ValueError(f"layer {layer}: {tuple(rule.sinks.shape)} sinks for {heads} query heads")
    return rule.sinks.detach().to("cpu", torch.float32).contiguous()


class _Prefill(Plan):
    def __init__(self, kernel: NativeKernel, sequence: Sequence, tokens: int):
        self.kernel = kernel
        self.shared = sequence.shared
        self.start = sequence.length
        self.tokens = tokens

    def attend(self, layer: int, query: torch.Tensor, tails: KV, rule: Rule) -> torch.Tensor:
        kernel = self.kernel
        call = kernel.prepare(layer, query, 1, self.tokens, rule)
        blocks = array("q")
        for block in [*(run.layer(layer) for run in self.shared), tails]:
            blocks.extend(_block(block))
        kernel.library.prefill(
            call.shape,
            call.queries(2),
            self.tokens,
            self.start,
            _address(blocks),
            len(blocks) // 3,
            torch.get_num_threads(),
        )
        return call.out.to(query.dtype)


class _Items(NamedTuple):
    """What a step does, as the library reads it.

    Attributes:
        slabs: the pool's slabs that items lie in; the arena is the source behind them.
        items: six numbers each: source, chunk in it, chunks, index of the first in its sequence,
            and the range of `members` that attends to them, which is by length; by segment, then by
            index.
        segments: where the items of each segment begin, and the end.
        members: rows.
        slots: where the states of each row begin, one for every segment it has chunks in; and the end.
    """

    slabs: list[tuple[Pool, int]]
    items: array[int]
    segments: array[int]
    members: array[int]
    slots: array[int]


def _items(sequences: Rows[Sequence], groups: list[Group], segment: int) -> _Items:
    """Cuts shared runs and tails at the borders of segments. O(chunks / segment + tail chunks)."""
    slabs: dict[tuple[Pool, int], int] = {}
    found: list[tuple[int, int, int, int, int, int]] = []
    members = array("q")
    reached = [0] * len(sequences)  # chunks of each row that are in items

    def add(source: int, chunk: int, count: int, rows: Rows[int]) -> None:
        begin = len(members)
        members.extend(sorted(rows, key=lambda row: sequences[row].length))
        index = reached[rows[0]]
        for row in rows:
            reached[row] += count
        while count:
            part = min(count, segment - index % segment)
            found.append((source, chunk, part, index, begin, len(members)))
            chunk, index, count = chunk + part, index + part, count - part

    for group in groups:  # each row's in order of position
        where = group.run.pool, group.run.slab
        add(slabs.setdefault(where, len(slabs)), group.run.start, len(group.run), group.rows)
    for row, sequence in enumerate(sequences):
        for chunk, count in _consecutive(sequence.tail):
            add(-1, chunk, count, (row,))
    found.sort(key=lambda item: item[3])
    items = array("q")
    for source, *rest in found:
        items.extend((len(slabs) if source < 0 else source, *rest))
    segments = [-(-chunks // segment) for chunks in reached]
    in_segment = Counter(item[3] // segment for item in found)
    begins = accumulate((in_segment[at] for at in range(max(segments))), initial=0)
    slots = accumulate(segments, initial=0)
    return _Items(list(slabs), items, array("q", begins), members, array("q", slots))


def _consecutive(chunks: list[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive numbers, as (first, count)."""
    runs: list[tuple[int, int]] = []
    for chunk in chunks:
        if runs and sum(runs[-1]) == chunk:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((chunk, 1))
    return runs


class _Step(Plan):
    def __init__(self, kernel: NativeKernel, items: _Items, limits: list[int]):
        self.kernel = kernel
        self.items = items
        self.limits = array("q", limits)

    def attend(self, layer: int, query: torch.Tensor, tails: KV, rule: Rule) -> torch.Tensor:
        kernel, items, rows = self.kernel, self.items, len(self.limits)
        call = kernel.prepare(layer, query, rows, 1, rule)
        sources = array("q")
        for pool, slab in items.slabs:
            sources.extend(_block(pool.slab_layer(slab, layer)))
        sources.extend(_block(tails))
        states, _ = kernel.space.get(
            "states", (kernel.library.state_floats(call.shape, items.slots[-1]),)
        )
        kernel.library.step(
            call.shape,
            call.queries(0),
            rows,
            _address(self.limits),
            _address(sources),
            _address(items.items),
            _address(items.segments),
            len(items.segments) - 1,
            _address(items.members),
            _address(items.slots),
            states.data_ptr(),
            torch.get_num_threads(),
        )
        return call.out.to(query.dtype)


def _block(kv: KV) -> tuple[int, int, int]:
    """Addresses of keys and values, which are none in a latent layer, and the number of chunks."""
    keys, *values = kv
    return keys.data_ptr(), values[0].data_ptr() if values else 0, len(keys)


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]

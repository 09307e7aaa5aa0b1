"""Plans for the compiled modules: which chunks lie where, as arrays of numbers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch

from chunkcache.attention.groups import Group
from chunkcache.attention.kernel import Kernel, Plan
from chunkcache.attention.native.library import Library, Shape
from chunkcache.attention.workspace import Workspace
from chunkcache.kv.layout import KV, ChunkLayout
from chunkcache.kv.pool import Pool
from chunkcache.kv.sequence import Sequence

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SEGMENT = 512  # tokens whose chunks are folded into one state
_VERSION = 1  # of the arithmetic; part of the name


class NativeKernel(Kernel):
    """See native.cpp for the arithmetic.

    Args:
        instructions: the instruction set that `library` was compiled for.
    """

    def __init__(self, layout: ChunkLayout, library: Library, instructions: str):
        self.layout = layout
        self.library = library
        self.name = f"native {instructions} {_VERSION}"
        self.space = Workspace(layout.device)
        self.segment = max(1, _SEGMENT // layout.chunk_size)
        self._shared: tuple[list[Group], list[int], _Items] | None = None

    def step(self, sequences: Rows[Sequence], groups: list[Group], used: int) -> Plan:
        """As the base class says."""
        sizes = [len(sequence.tail) for sequence in sequences]
        if self._shared is None or self._shared[0] is not groups or self._shared[1] != sizes:
            items = _items(sequences, groups, self.segment, self.layout.chunk_size)
            self._shared = groups, sizes, items
        limits = array("q", [sequence.length + 1 for sequence in sequences])
        return _Step(self, self._shared[2], limits)

    def prefill(self, sequence: Sequence, tokens: int) -> Plan:
        """As the base class says."""
        if tokens == 1:  # taken by segments, so that all threads find work
            groups = [Group(run, (0,)) for run in sequence.shared]
            return self.step([sequence], groups, len(sequence.tail))
        return _Prefill(self, sequence, tokens)

    def shape(self, layer: int, query_heads: int, scaling: float) -> Shape:
        """The first argument of the library's functions."""
        shape = self.layout.layers[layer]
        return (
            shape.kv_heads,
            query_heads // shape.kv_heads,
            shape.head_dim,
            shape.value_dim,
            self.layout.chunk_size,
            self.segment,
            scaling,
            TYPES[self.layout.dtype],
        )

    def inputs(self, layer: int, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The query as the library can read it, and room for the output."""
        if query.stride(-1) != 1 or query.dtype != self.layout.dtype:
            query = query.to(self.layout.dtype).contiguous()
        rows, heads, tokens, _ = query.shape
        return query, query.new_empty(rows, tokens, heads, self.layout.layers[layer].value_dim)


class _Prefill(Plan):
    def __init__(self, kernel: NativeKernel, sequence: Sequence, tokens: int):
        self.kernel = kernel
        self.shared = sequence.shared
        self.start = sequence.length
        self.tokens = tokens

    def attend(self, layer: int, query: torch.Tensor, tails: KV, scaling: float) -> torch.Tensor:
        kernel = self.kernel
        source, out = kernel.inputs(layer, query)
        blocks = array("q")
        for keys, values in [*(run.layer(layer) for run in self.shared), tails]:
            blocks.extend((keys.data_ptr(), values.data_ptr(), len(keys)))
        size = source.element_size()
        kernel.library.prefill(
            kernel.shape(layer, query.shape[1], scaling),
            source.data_ptr(),
            source.stride(1) * size,
            source.stride(2) * size,
            out.data_ptr(),
            self.tokens,
            self.start,
            _address(blocks),
            len(blocks) // 3,
            torch.get_num_threads(),
        )
        return out.to(query.dtype)


class _Items(NamedTuple):
    """What a step does, as the library reads it.

    Attributes:
        slabs: the pool's slabs that items lie in; the arena is the source behind them.
        items: six numbers each: source, chunk in it, chunks, index of the first in its sequence,
            and the range of `members` that attends to them; by segment, then by index.
        segments: where the items of each segment begin, and the end.
        members: rows.
    """

    slabs: list[tuple[Pool, int]]
    items: array[int]
    segments: array[int]
    members: array[int]

    @property
    def depth(self) -> int:
        """Segments of the longest row."""
        return len(self.segments) - 1


def _items(sequences: Rows[Sequence], groups: list[Group], segment: int, chunk_size: int) -> _Items:
    """Cuts shared runs and tails at the borders of segments. O(chunks / segment + tail chunks)."""
    slabs: dict[tuple[Pool, int], int] = {}
    found: list[tuple[int, int, int, int, int, int]] = []
    members = array("q")
    reached = [0] * len(sequences)  # chunks of each row that are in items

    def add(source: int, chunk: int, count: int, rows: Rows[int]) -> None:
        begin = len(members)
        members.extend(rows)
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
    begins = array("q", [0] * (-(-max(reached) // segment) + 1))
    for item in found:
        begins[item[3] // segment + 1] += 1
    for at in range(1, len(begins)):
        begins[at] += begins[at - 1]
    arena = len(slabs)
    items = array("q")
    for source, *rest in found:
        items.extend((arena if source < 0 else source, *rest))
    return _Items(list(slabs), items, begins, members)


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
    def __init__(self, kernel: NativeKernel, items: _Items, limits: array[int]):
        self.kernel = kernel
        self.items = items
        self.limits = limits

    def attend(self, layer: int, query: torch.Tensor, tails: KV, scaling: float) -> torch.Tensor:
        kernel, items = self.kernel, self.items
        source, out = kernel.inputs(layer, query)
        sources = array("q")
        for pool, slab in items.slabs:
            sources.extend(_block(pool.slab_layer(slab, layer)))
        sources.extend(_block(tails))
        shape = kernel.shape(layer, query.shape[1], scaling)
        rows, size = len(source), source.element_size()
        floats = kernel.library.state_floats(shape, rows, items.depth)
        states, _ = kernel.space.get("states", (floats,))
        kernel.library.step(
            shape,
            source.data_ptr(),
            source.stride(0) * size,
            source.stride(1) * size,
            out.data_ptr(),
            rows,
            _address(self.limits),
            _address(sources),
            _address(items.items),
            _address(items.segments),
            items.depth,
            _address(items.members),
            states.data_ptr(),
            torch.get_num_threads(),
        )
        return out.to(query.dtype)


def _block(kv: KV) -> tuple[int, int, int]:
    keys, values = kv
    return keys.data_ptr(), values.data_ptr(), len(keys)


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]

"""The memory of stored chunks on one device, with a byte budget.

The pool grows slab by slab, never by copying, so growth does not double the peak. Inside a slab,
free chunks are kept as maximal ranges, in one sorted list by length (best fit) and two dicts by
their ends (merging neighbours), so that allocating and freeing cost O(log n). A run is a range of
one slab: splitting it is arithmetic on two numbers.

A model without attention layers has chunks without KV: the state it resumes from is a snapshot's.
Each still costs its token ids in the tree, and counts as these, so that the number is bounded.
"""

from __future__ import annotations

from itertools import pairwise
from threading import RLock

import torch
from sortedcontainers import SortedList

from chunkcache.errors import ConfigError
from chunkcache.kv.layout import KV, ChunkLayout, by_layer
from chunkcache.kv.memory import populate

SLAB_BYTES = 256 * 2**20
_ID_BYTES = 4  # what the tree keeps of a token


class PoolRun:
    """`count` consecutive chunks of one slab, from `start` on. Immutable."""

    __slots__ = ("count", "pool", "slab", "start")

    def __init__(self, pool: Pool, slab: int, start: int, count: int):
        self.pool = pool
        self.slab = slab
        self.start = start
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"PoolRun(slab={self.slab}, start={self.start}, count={self.count})"

    def split(self, chunks: int) -> tuple[PoolRun, PoolRun]:
        """The first `chunks` chunks and the rest; O(1), no KV is touched."""
        assert 0 < chunks < self.count, (chunks, self.count)
        head = PoolRun(self.pool, self.slab, self.start, chunks)
        rest = PoolRun(self.pool, self.slab, self.start + chunks, self.count - chunks)
        return head, rest

    def layer(self, layer: int) -> KV:
        """Views of one layer: its tensors as the layout has them, `[count, ...]` each."""
        end = self.start + self.count
        return tuple(part[self.start : end] for part in self.pool.slab_layer(self.slab, layer))

    def chunk(self, place: int) -> list[KV]:
        """Views of one chunk: per run of layers that are alike tensors `[layers, ...]`."""
        return self.pool.slab_chunk(self.slab, self.start + place)


class Pool:
    """Allocates runs of chunks within `budget` bytes.

    Raises:
        ConfigError: the budget is smaller than one chunk.
    """

    def __init__(self, layout: ChunkLayout, budget: int, slab_bytes: int = SLAB_BYTES):
        self.layout = layout
        self.chunk_bytes = layout.chunk_bytes or _ID_BYTES * layout.chunk_size
        self.capacity = budget // self.chunk_bytes
        if self.capacity < 1:
            raise ConfigError(
                f"device_bytes is {budget}, but one chunk of {layout.chunk_size} tokens of this "
                f"model takes {self.chunk_bytes} bytes"
            )
        self._slab_chunks = max(1, min(self.capacity, slab_bytes // self.chunk_bytes or 1))
        self._slabs: list[list[KV]] = []  # by run of layers that are alike
        self._layers: list[list[KV]] = []  # views of them
        self._sizes: list[int] = []
        self._free: SortedList = SortedList()  # (length, slab, start)
        self._by_start: dict[tuple[int, int], int] = {}  # (slab, start) -> length
        self._by_end: dict[tuple[int, int], int] = {}  # (slab, end) -> length
        self._lock = RLock()
        self.used = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the chunks handed out."""
        return self.used * self.chunk_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all slabs, used or not."""
        return sum(self._sizes) * self.chunk_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the chunks that fit."""
        return self.capacity * self.chunk_bytes

    @property
    def available(self) -> int:
        """Chunks that can still be handed out within the budget."""
        return self.capacity - self.used

    def slab_layer(self, slab: int, layer: int) -> KV:
        """The whole tensors of one slab and layer."""
        return self._layers[slab][layer]

    def slab_chunk(self, slab: int, place: int) -> list[KV]:
        """One chunk: per run of layers that are alike tensors `[layers, ...]`."""
        return [tuple(part[:, place] for part in parts) for parts in self._slabs[slab]]

    def allocate(self, chunks: int) -> PoolRun | None:
        """A run of up to `chunks` chunks, as long as contiguous room allows; None if all is used.

        Takes the tightest free range that fits, else a new slab, else the longest range. O(log n).
        """
        assert chunks > 0
        with self._lock:
            index = self._free.bisect_left((chunks, -1, -1))
            if index == len(self._free):
                self._grow(chunks)
                index = self._free.bisect_left((chunks, -1, -1))
            if not self._free:
                return None
            length, slab, start = self._free[min(index, len(self._free) - 1)]
            self._take(length, slab, start)
            count = min(length, chunks)
            if count < length:
                self._give(length - count, slab, start + count)
            self.used += count
            return PoolRun(self, slab, start, count)

    def prepare(self, size: int) -> None:
        """Has memory for the first `size` bytes of chunks at hand, so that no request waits for it."""
        with self._lock:
            if not self._slabs:
                self._grow(1)
            for part in (part for layer in self._layers[0] for part in layer):
                populate(part[: max(1, size // self.chunk_bytes)])

    def free(self, run: PoolRun) -> None:
        """Takes a run (or a part of one) back; merges it with free neighbours. O(log n)."""
        with self._lock:
            slab, start, length = run.slab, run.start, run.count
            before = self._by_end.get((slab, start))
            if before:
                self._take(before, slab, start - before)
                start, length = start - before, length + before
            after = self._by_start.get((slab, start + length))
            if after:
                self._take(after, slab, start + length)
                length += after
            self._give(length, slab, start)
            self.used -= run.count

    def release(self) -> None:
        """Gives all slabs back if no chunk is handed out."""
        with self._lock:
            if not self.used:
                self._slabs.clear()
                self._layers.clear()
                self._sizes.clear()
                self._free.clear()
                self._by_start.clear()
                self._by_end.clear()

    def _grow(self, chunks: int) -> None:
        room = self.capacity - sum(self._sizes)
        if room <= 0:
            return
        size = min(room, max(chunks, self._slab_chunks))
        try:
            self._slabs.append(self.layout.allocate_alike(size))
        except torch.OutOfMemoryError:  # the budget was more than the device has
            self.capacity = max(1, sum(self._sizes))
            return
        self._layers.append(by_layer(self._slabs[-1]))
        self._sizes.append(size)
        self._give(size, len(self._slabs) - 1, 0)

    def _give(self, length: int, slab: int, start: int) -> None:
        self._free.add((length, slab, start))
        self._by_start[slab, start] = length
        self._by_end[slab, start + length] = length

    def _take(self, length: int, slab: int, start: int) -> None:
        self._free.remove((length, slab, start))
        del self._by_start[slab, start]
        del self._by_end[slab, start + length]

    def check(self) -> None:
        """Walks the free ranges: inside their slabs, apart from each other, and free + used == total."""
        with self._lock:
            ranges = sorted((slab, start, length) for length, slab, start in self._free)
            for (slab, start, length), (other, begin, _) in pairwise(ranges):
                assert slab != other or start + length < begin, "free ranges touch or overlap"
            for slab, start, length in ranges:
                assert length > 0 and start >= 0 and start + length <= self._sizes[slab]
                assert self._by_start[slab, start] == length
                assert self._by_end[slab, start + length] == length
            assert len(self._by_start) == len(self._by_end) == len(ranges)
            free = sum(length for _, _, length in ranges)
            assert free + self.used == sum(self._sizes) <= self.capacity

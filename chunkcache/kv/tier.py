"""One colder tier: a store behind its guard, what it is given, and whether reading it pays."""

from __future__ import annotations

import os
from collections import Counter, deque
from statistics import median
from threading import Lock
from time import perf_counter
from typing import Any

from chunkcache.kv.codec import Identity, decode_chunk, encode_chunk, identities
from chunkcache.kv.layout import ChunkLayout
from chunkcache.stores.base import Buffer
from chunkcache.stores.guard import Guard
from chunkcache.stores.open import Admission
from chunkcache.tree import TOKEN_BYTES, Node

_SAMPLES = 9  # loads whose median counts, so that one that was disturbed does not
_AGAIN = 32  # of so many loads that seem not to pay, one is done all the same: things change
_TRIES = 5
_MEASURE = 0.5  # seconds
_HEAD = 2048  # bytes of a value that are no numbers, at most
_NEVER = 2**32  # chunks, which no prompt has
_GRAIN = 0.005  # seconds that are lost in what else a machine does
_BATCH = 4 * 2**20  # bytes that are read or written together
_MOST = 64  # values, of small models


class Pace:
    """Seconds to read chunks of one tier and to compute them, measured.

    Reading takes `call` seconds and `chunk` more for each chunk. As long as either is not known,
    reading is thought to pay.

    Args:
        compute: seconds to compute a chunk; None if it is not known.
    """

    def __init__(self, compute: float | None = None):
        self.compute = compute
        self.call = 0.0
        self._chunks: deque[float] = deque(maxlen=_SAMPLES)
        self._refused = 0

    @property
    def chunk(self) -> float | None:
        """Seconds per chunk; None before the first load."""
        samples = tuple(self._chunks)  # others may add to it
        return median(samples) if samples else None

    def observe(self, chunks: int, seconds: float) -> None:
        """So many chunks were read in one go."""
        if chunks:
            self._chunks.append(max(0.0, seconds - self.call) / chunks)

    @property
    def break_even(self) -> int | None:
        """The fewest chunks that are read faster than computed; None if computing is always faster."""
        if self.chunk is None or self.compute is None:
            return 1
        gain = self.compute - self.chunk
        return int(self.call / gain) + 1 if gain * _NEVER > self.call else None

    def pays(self, chunks: int) -> bool:
        """Whether up to `chunks` chunks should be read: unless that is clearly slower."""
        if self.chunk is None or self.compute is None:
            return True
        if self.call + chunks * self.chunk <= chunks * self.compute + _GRAIN:
            return True
        self._refused += 1
        return self._refused % _AGAIN == 0


class Tier:
    """See the module.

    Attributes:
        name: unique among the tiers of one model: the kind of the store, and a number behind the second.
        counts: chunks `loaded` and values `saved`; `loaded_bytes` and `saved_bytes` of chunks, and the
            `tokens` of both; loads that were `computed` instead.
    """

    def __init__(self, guard: Guard, admission: Admission | None = None, name: str = ""):
        self.guard = guard
        self.name = name or guard.kind
        self.admission = admission or Admission()
        self.pace = Pace()
        self.counts: Counter[str] = Counter()
        self._lock = Lock()

    def count(self, **numbers: int) -> None:
        """Adds to the sums."""
        with self._lock:
            self.counts.update(numbers)

    def admits(self, node: Node | None, named: bool) -> int:
        """Tokens of the path down to a node that belong here; O(depth)."""
        hits, depth, _, _ = self.admission
        while node is not None and not named and not node.pins and node.hits < hits:
            node = node.parent
        end = 0 if node is None else node.start + node.token_count
        return end if depth is None else min(end, depth)

    def room(self, layout: ChunkLayout) -> int:
        """Chunks of one prompt that it can hold; a longer path would drive out its own beginning."""
        budget = self.guard.store.budget
        size = int(1.1 * layout.chunk_bytes) + _HEAD + TOKEN_BYTES * layout.chunk_size
        return _NEVER if budget is None else budget // size

    def pays(self, chunks: int) -> bool:
        """Whether it should be asked for so many chunks."""
        pays = self.admission.always or self.pace.pays(chunks)
        if not pays:
            self.count(computed=1)
        return pays

    def moved(self, way: str, identity: Identity, size: int) -> None:
        """Counts the bytes of a chunk's value that was `loaded` or `saved`."""
        self.count(**{f"{way}_bytes": size, "tokens": len(identity.data) // TOKEN_BYTES})

    def measure(self, layout: ChunkLayout, compute: float) -> None:
        """Finds its pace with a few values of its own, which are deleted again.

        Args:
            compute: seconds to compute a chunk.

        Raises:
            StoreError: it cannot be used now; loads will tell its pace.
        """
        self.pace = Pace(compute)
        size = layout.chunk_size
        path = identities(os.urandom(32), bytes(2 * size * TOKEN_BYTES), size)
        chunk = [tuple(part[:, 0].zero_() for part in kv) for kv in layout.allocate_alike(1)]
        read: list[Buffer] = []  # given back together: so much memory is at hand afterwards
        try:
            self.guard.put([(one.key, encode_chunk(one, chunk, layout)) for one in path])
            one = two = float("inf")
            end = perf_counter() + _MEASURE
            for _ in range(_TRIES):
                one = min(one, self._timed(path[:1], layout, read))
                two = min(two, self._timed(path, layout, read))
                if perf_counter() > end:  # a slow one is told by one look
                    break
        finally:
            self.guard.store.recycle(read)
            self.guard.delete([one.key for one in path])
        if two < float("inf"):
            self.pace.call = max(0.0, 2 * one - two)
            self.pace.observe(2, two)

    def _timed(self, path: list[Identity], layout: ChunkLayout, read: list[Buffer]) -> float:
        """Seconds to read chunks, whose values are added; infinity if they are not there any more."""
        begin, to = perf_counter(), layout.allocate_alike(1)
        for identity, value in zip(path, self.guard.get([one.key for one in path]), strict=True):
            if value is None:
                return float("inf")
            read.append(value)
            for stored, parts in zip(to, decode_chunk(value, identity, layout), strict=True):
                for there, here in zip(stored, parts, strict=True):
                    there[:, 0].copy_(here)
        return perf_counter() - begin

    def report(self) -> dict[str, Any]:
        """For statistics; asks the store nothing."""
        guard, pace, counts = self.guard, self.pace, self.counts
        calls = {name: guard.counts[name] for name in ("calls", "failures", "timeouts", "skipped")}
        moved = {name: counts[name] for name in ("loaded", "saved", "computed")}
        moved |= {name: counts[name] for name in ("loaded_bytes", "saved_bytes")}
        size = counts["loaded_bytes"] + counts["saved_bytes"]
        return {
            **calls,
            **moved,
            "open": guard.open,
            "token_bytes": size / counts["tokens"] if counts["tokens"] else None,
            "chunk_seconds": pace.chunk,
            "call_seconds": pace.call,
            "compute_seconds": pace.compute,
            "break_even": pace.break_even,
        }


def batch_of(layout: ChunkLayout) -> int:
    """How many chunks are read or written together."""
    return max(1, min(_MOST, _BATCH // max(1, layout.chunk_bytes)))

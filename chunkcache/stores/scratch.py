"""Memory that values are read into, used again and again: the system clears new memory, slowly."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock
from typing import Any

import numpy as np

from chunkcache.stores.base import Buffer

_KEPT = 32 * 2**20  # bytes that wait to be used again
_STEP = 64 * 2**10  # bytes; values of one model differ by less


class Scratch:
    """See the module. Thread-safe. What is taken and never given back is lost to it, and nothing else."""

    def __init__(self) -> None:
        self._free: list[Any] = []
        self._bytes = 0
        self._lock = Lock()

    def take(self, size: int) -> memoryview:
        """Memory of that many bytes, whatever is in it, until it is given back. O(pieces kept)."""
        with self._lock:
            for number, piece in enumerate(self._free):
                if size <= piece.nbytes <= 2 * size + _STEP:
                    self._bytes -= piece.nbytes
                    return memoryview(self._free.pop(number))[:size]
        fresh: Any = np.empty(-(-size // _STEP) * _STEP, dtype=np.uint8)
        return memoryview(fresh)[:size]

    def give(self, views: Iterable[Buffer]) -> None:
        """Takes back what `take` gave and nobody looks at any more; leaves other memory alone."""
        with self._lock:
            for view in views:
                piece: Any = view.obj if isinstance(view, memoryview) else None
                known = any(piece is one for one in self._free)  # given twice, two would get it
                if isinstance(piece, np.ndarray) and not known:
                    self._free.append(piece)
                    self._bytes += piece.nbytes
            while self._bytes > _KEPT:
                self._bytes -= self._free.pop(0).nbytes

"""LRU at every size at once: reuse distances in one pass (Mattson et al., IBM Systems Journal, 1970).

What was used last lies on top of a stack, and a cache of n chunks holds its upper n. That is true of
LRU in a prefix tree too, where only leaves leave: a prefix is used whenever what continues it is, so
parents lie above their children, and what lies lowest is always a leaf.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from chunkcache.lab.simulation.atoms import Atoms

_BITS = 9  # of the number of places in a bucket
_ROOM = 4  # places for each atom


class _Stack:
    """How many chunks were used after an atom was.

    A use is a place; sums over buckets of places make "how many behind this one" two sums of a few
    hundred numbers, which take a microsecond. Places run out after a while and are dealt out anew.
    """

    def __init__(self, sizes: Sequence[int]):
        self._sizes = sizes
        self._places = array("q", [-1]) * len(sizes)
        buckets = (_ROOM * len(sizes) >> _BITS) + 2
        self._chunks = [0] * (buckets << _BITS)
        self._sums = [0] * buckets
        self._next = 0

    def above(self, atom: int) -> int:
        """Chunks that were used after an atom; -1 if that was never used."""
        place = self._places[atom]
        if place < 0:
            return -1
        bucket = place >> _BITS
        return sum(self._sums[bucket + 1 :]) + sum(self._chunks[place + 1 : (bucket + 1) << _BITS])

    def use(self, atom: int) -> None:
        """Puts an atom on top. O(1) on average."""
        if self._next == len(self._chunks):
            self._deal()
        size, old, new = self._sizes[atom], self._places[atom], self._next
        if old >= 0:
            self._chunks[old] = 0
            self._sums[old >> _BITS] -= size
        self._chunks[new] = size
        self._sums[new >> _BITS] += size
        self._places[atom] = new
        self._next += 1

    def _deal(self) -> None:
        used = sorted((place, atom) for atom, place in enumerate(self._places) if place >= 0)
        self._chunks = [0] * len(self._chunks)
        self._sums = [0] * len(self._sums)
        self._next = 0
        for _, atom in used:
            self._places[atom] = -1
            self.use(atom)


class Distances:
    """Reuse distances of a trace, and what they mean for a cache of any size.

    Takes O(1) on average for each atom that a prompt uses, and 24 bytes for each that is used again.

    Attributes:
        prompts, above, sizes: of each reuse of an atom its prompt, the chunks that were used since, and
            its own.
    """

    def __init__(self, atoms: Atoms):
        self.atoms = atoms
        found = array("q"), array("q"), array("q")
        stack, begin = _Stack(atoms.sizes), 0
        for prompt, end in enumerate(atoms.ends):
            path = atoms.visits[begin:end]
            for atom in path:
                above = stack.above(atom)
                if above < 0:  # nor was what lies behind it
                    break
                for column, value in zip(found, (prompt, above, atoms.sizes[atom]), strict=True):
                    column.append(value)
            for atom in reversed(path):
                stack.use(atom)
            begin = end
        self.prompts, self.above, self.sizes = (np.frombuffer(c, np.int64) for c in found)
        self._tokens = np.frombuffer(atoms.tokens, np.int64)
        self._limits = np.frombuffer(atoms.limits, np.int64)

    def by_prompt(self, capacity: float) -> npt.NDArray[np.int64]:
        """Tokens that each prompt hits in a cache of so many chunks. O(reuses)."""
        fitting = np.clip(capacity - self.above, 0, self.sizes)
        chunks = np.bincount(self.prompts, fitting, len(self._tokens)).astype(np.int64)
        chunks = np.minimum(chunks, self._limits)
        tokens: npt.NDArray[np.int64] = np.minimum(chunks * self.atoms.chunk, self._tokens)
        return tokens

    def hit_tokens(self, capacity: float) -> int:
        """Of all prompts. O(reuses)."""
        return int(self.by_prompt(capacity).sum())

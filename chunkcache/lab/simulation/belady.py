"""The bound: what a cache that knows the future would hit (Belady, IBM Systems Journal, 1966).

What is used again last leaves first, and what would be that itself is not stored at all. A prefix is
used no later than what continues it, so the rule never takes a parent before its child, and what it
keeps is as good as any prefix cache can be: chunks of equal worth, room made one chunk at a time.
"""

from __future__ import annotations

from array import array
from heapq import heappop, heappush

from chunkcache.lab.simulation.atoms import Atoms


class Future:
    """When each atom that a prompt uses may be a hit again. O(visits) time and memory."""

    def __init__(self, atoms: Atoms):
        self.atoms = atoms
        self.never = len(atoms.ends)
        self._next = array("q", bytes(8 * len(atoms.visits)))
        last = array("q", [self.never]) * len(atoms.sizes)
        end = len(atoms.visits)
        for prompt in range(len(atoms.ends) - 1, -1, -1):
            begin = atoms.ends[prompt - 1] if prompt else 0
            for place in range(begin, end):
                atom = atoms.visits[place]
                self._next[place] = last[atom]
                if atoms.may_hit(prompt, atom):
                    last[atom] = prompt
            end = begin

    def hit_tokens(self, capacity: float) -> int:
        """What the optimum hits with so many chunks. O(visits log atoms)."""
        return sum(self.by_prompt(capacity))

    def by_prompt(self, capacity: float) -> list[int]:
        """The same for each prompt."""
        cache, atoms, begin, found = _Cache(self.atoms, capacity), self.atoms, 0, []
        for prompt, end in enumerate(atoms.ends):
            path = list(zip(atoms.visits[begin:end], self._next[begin:end], strict=True))
            found.append(atoms.hit_tokens(prompt, cache.stored([atom for atom, _ in path])))
            cache.use(path)
            begin = end
        return found


class _Cache:
    """Chunks stored of each atom, from its beginning on, and who leaves next."""

    def __init__(self, atoms: Atoms, capacity: float):
        self._sizes = atoms.sizes
        self._depths = atoms.depths
        self._room = capacity
        self._stored = array("q", bytes(8 * len(atoms.sizes)))
        self._next = array("q", bytes(8 * len(atoms.sizes)))
        self._heap: list[
            tuple[int, int, int]
        ] = []  # (-next use, -depth, atom), old ones among them

    def stored(self, path: list[int]) -> int:
        """Chunks of a path, as far as there is no gap."""
        found = 0
        for atom in path:
            found += self._stored[atom]
            if self._stored[atom] < self._sizes[atom]:
                break
        return found

    def use(self, path: list[tuple[int, int]]) -> None:
        """A prompt uses atoms, each of which is used again at a known time; what is worth it is stored."""
        for atom, again in path:
            self._next[atom] = again
            missing = self._sizes[atom] - self._stored[atom]
            if missing and self._room < missing:
                self._make_room(missing, (-again, -self._depths[atom]))
            new = int(min(missing, self._room))
            self._stored[atom] += new
            self._room -= new
            if self._stored[atom]:
                heappush(self._heap, (-again, -self._depths[atom], atom))
            if new < missing:  # what lies behind it is not used sooner
                return

    def _make_room(self, chunks: int, rank: tuple[int, int]) -> None:
        """Lets go of what is used later than something of that rank, until so many chunks have room."""
        heap = self._heap
        while self._room < chunks and heap and heap[0][:2] < rank:
            again, _, atom = heap[0]
            if -again != self._next[atom] or not self._stored[atom]:
                heappop(heap)
                continue
            freed = int(min(self._stored[atom], chunks - self._room))
            self._stored[atom] -= freed
            self._room += freed
            if not self._stored[atom]:
                heappop(heap)

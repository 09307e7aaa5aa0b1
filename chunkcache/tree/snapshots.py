"""Snapshots: states that can be resumed only at the positions where they were saved.

A recurrent layer (and an encoder's output) has a state of constant size instead of rows per token.
The tree keeps such states as opaque payloads beside the chunks: one at position p belongs to the
node with start < p <= end, the one at position 0 to the root. It leaves with the chunk that ends
at p, or alone: its bytes have a budget of their own.

Order of leaving: least recently used first, where a use is to be stored or to be resumed from.
Snapshots of one request are equally old; of these the one that saves fewest tokens, the distance
to the one before it on its path, goes first, so that an evenly covered prompt is thinned and not
cut off; then the shallower. Inside a node the distance follows every change. Across nodes it is as
of the last use: one node may have thousands below it, and a change must not cost a visit to each.
Position 0 stands for work that is no tokens (an encoder's), so of equals it goes last.

Pins: the deepest snapshot of every pinned node never leaves alone, nor does the root's while
anything is pinned. So a pinned prompt stays resumable where it was, and so do the places where
other prompts branch off it, which is where nodes end. Rejected: holding all snapshots of pinned
nodes (one long pinned prompt fills the budget with states that its end makes useless), and exactly
one per pin (a new snapshot would take over the pins of a whole subtree). Leases hold nothing here:
who reads a snapshot has a reference to the payload.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sortedcontainers import SortedList

if TYPE_CHECKING:
    from chunkcache.tree.node import Node

NO_BUDGET = float("inf")
_NOT_TOKENS = float("inf")  # what the snapshot at position 0 saves


class Snapshot(Protocol):
    """The state of a model after some number of tokens; opaque to the tree."""

    @property
    def bytes(self) -> int:
        """Memory it takes; read once, when it is stored."""


class Resume(NamedTuple):
    """A state, and the number of tokens it stands behind."""

    position: int
    snapshot: Snapshot


Key = tuple[int, float, int, int, "Entry"]


class Entry:
    """A stored snapshot: where it is, and what its place in the order depends on."""

    __slots__ = ("bytes", "key", "node", "owner", "position", "saves", "serial", "snapshot", "used")

    def __init__(self, owner: Snapshots, node: Node, position: int, snapshot: Snapshot) -> None:
        self.owner = owner
        self.node = node
        self.position = position
        self.snapshot = snapshot
        self.bytes = snapshot.bytes
        self.used = self.serial = 0
        self.saves: float = 0
        self.key: Key | None = None  # its place in the order

    @property
    def rank(self) -> Key:
        """What sorts it among the others; the lowest leaves first."""
        return self.used, self.saves, self.position, self.serial, self

    def __repr__(self) -> str:
        return f"<Entry at {self.position} bytes={self.bytes} used={self.used} saves={self.saves}>"


def _position(entry: Entry) -> int:
    return entry.position


class SnapshotOrder:
    """Which snapshot leaves next, over all trees that share it, and their budget in bytes.

    Trees that share an order must share a lock. `refused` counts snapshots for which no room could
    be made. `tick` grows with every use of a path in one of the trees.
    """

    def __init__(self, budget: float = NO_BUDGET) -> None:
        self.budget = budget
        self.entries: Any = SortedList()  # keys of exactly the entries that may leave alone
        self.bytes = self.evictable_bytes = 0
        self.tick = self.serial = self.refused = 0

    def place(self, entry: Entry, evictable: bool) -> None:
        """Put an entry into the order, move it there, or take it out. O(log entries)."""
        key = entry.rank if evictable else None
        if key == entry.key:
            return
        if entry.key is not None:
            self.entries.remove(entry.key)
            self.evictable_bytes -= entry.bytes
        if key is not None:
            self.entries.add(key)
            self.evictable_bytes += entry.bytes
        entry.key = key

    def evict(self, size: float) -> int:
        """Drop snapshots, least valuable first, until `size` bytes are free; return the bytes.

        Runtime complexity: O(log entries) a snapshot.
        """
        freed = 0
        while freed < size and self.entries:
            entry: Entry = self.entries[0][-1]
            freed += entry.bytes
            entry.owner.drop(entry)
        return freed

    def admit(self) -> bool:
        """Go back to the budget if that can be done; else drop nothing and count a refusal."""
        excess = self.bytes - self.budget
        if excess > self.evictable_bytes:
            self.refused += 1
            return False
        self.evict(excess)
        return True


class Snapshots:
    """The snapshots of one tree. No locking, no walking by tokens; PrefixTree adds them."""

    def __init__(self, order: SnapshotOrder, on_drop: Callable[[Snapshot], object] | None) -> None:
        self.order = order
        self.on_drop: Callable[[Snapshot], object] = on_drop or (lambda snapshot: None)
        self.count = self.bytes = 0

    @staticmethod
    def deepest(node: Node, limit: int) -> Entry | None:
        """Return the last one at or before `limit` on the path to `node`. O(depth + log)."""
        step: Node | None = node
        while step is not None:
            kept = step._snapshots
            if kept is not None and (index := bisect_right(kept, limit, key=_position)):
                return kept[index - 1]
            step = step.parent
        return None

    def add(self, node: Node, position: int, snapshot: Snapshot) -> bool:
        """Attach a snapshot; False if one is there (it stays, and was used) or the budget is full.

        The new one never makes room for itself. O(depth + log entries), plus what leaves.
        """
        there = self.deepest(node, position)
        if there is not None and there.position == position:
            self.use(there)
            return False
        entry = Entry(self, node, position, snapshot)
        if entry.bytes < 0:
            raise ValueError(f"a snapshot cannot have {entry.bytes} bytes")
        self._link(entry)
        if not self.order.admit():
            self._unlink(entry)
            return False
        self.use(entry)
        return True

    def use(self, entry: Entry) -> None:
        """Make an entry the youngest, and measure anew what it saves. O(depth + log)."""
        entry.used = self.order.tick
        entry.saves = self._distance(entry)
        self._place(entry)

    def drop(self, entry: Entry) -> None:
        """Let one leave. O(log entries)."""
        self._unlink(entry)
        self.on_drop(entry.snapshot)

    def leave(self, node: Node, end: int) -> None:
        """Drop those of a node that lie behind position `end`. O(log entries) each."""
        while node._snapshots is not None and node._snapshots[-1].position > end:
            self.drop(node._snapshots[-1])

    def clear(self, node: Node) -> None:
        """Drop all of a node, wherever it is. O(log entries) each."""
        self.leave(node, -1)

    def split(self, node: Node, upper: Node) -> None:
        """Move those that end in the new upper half of a node there. O(snapshots of the node)."""
        kept = node._snapshots
        assert kept is not None
        index = bisect_right(kept, node.start, key=_position)
        upper._snapshots, node._snapshots = kept[:index] or None, kept[index:] or None
        for entry in kept[:index]:
            entry.node = upper
        self.repinned(upper)

    def repinned(self, node: Node) -> None:
        """Note that a node's pins, or which of its snapshots is deepest, changed. O(log entries)."""
        if node._snapshots is not None:
            self._place(node._snapshots[-1])

    def _place(self, entry: Entry) -> None:
        kept = entry.node._snapshots
        assert kept is not None
        self.order.place(entry, not entry.node.pins or entry is not kept[-1])

    def _distance(self, entry: Entry) -> float:
        if not entry.position:
            return _NOT_TOKENS
        before = self.deepest(entry.node, entry.position - 1)
        return entry.position - (0 if before is None else before.position)

    def _link(self, entry: Entry) -> None:
        """Add an entry to its node and the sums, but not yet to the order."""
        entry.saves = self._distance(entry)
        kept = entry.node._snapshots
        if kept is None:
            kept = entry.node._snapshots = []
        index = bisect_left(kept, entry.position, key=_position)
        kept.insert(index, entry)
        self.order.serial += 1
        entry.serial = self.order.serial
        self._count(entry, +1)
        if index + 1 < len(kept):
            kept[index + 1].saves = kept[index + 1].position - entry.position
            self._place(kept[index + 1])
        elif index:
            self._place(kept[index - 1])  # no longer the deepest

    def _unlink(self, entry: Entry) -> None:
        """Take an entry out of its node, the sums and the order."""
        kept = entry.node._snapshots
        assert kept is not None
        index = bisect_left(kept, entry.position, key=_position)
        del kept[index]
        self.order.place(entry, False)
        self._count(entry, -1)
        if index < len(kept):
            kept[index].saves += entry.saves
            self._place(kept[index])
        elif kept:
            self._place(kept[-1])  # the deepest now
        else:
            entry.node._snapshots = None

    def _count(self, entry: Entry, sign: int) -> None:
        self.count += sign
        self.bytes += sign * entry.bytes
        self.order.bytes += sign * entry.bytes

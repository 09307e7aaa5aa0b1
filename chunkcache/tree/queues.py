"""Policies that keep what was used once apart from what was used again.

A scan of prompts that never come back then leaves the others alone. Two queues each; shares are of the
capacity that the order was given, or of what is stored where it has none.
"""

from __future__ import annotations

from collections import OrderedDict

from chunkcache.tree.keys import TOKEN_BYTES
from chunkcache.tree.node import Node
from chunkcache.tree.order import LeafOrder
from chunkcache.tree.policies import Policy

_NEW, _OLD = 0, 1  # queues: of what was used once, and of what was used again


class SLRU(Policy):
    """Two lists, each least recently used first: what was reused is protected from what was not.

    What the protected list holds beyond its share falls back behind all of the other. Karedla, Love and
    Wherry, "Caching strategies to improve disk system performance", 1994.

    Args:
        protected: share of the capacity.
    """

    queues = 2

    def __init__(self, protected: float = 0.8) -> None:
        self.protected = protected

    def priority(self, node: Node, now: float) -> tuple[int, int]:
        return (_OLD if node.hits else _NEW), node.tick

    def victim(self, order: LeafOrder) -> int:
        return order.first(_OLD if self._full(order) else _NEW)

    def spared(self, node: Node, order: LeafOrder) -> tuple[int, int] | None:
        falls = node.priority[0] == _OLD and self._full(order)
        return (_NEW, order.next_tick()) if falls else None

    def _full(self, order: LeafOrder) -> bool:
        return order.sizes[_OLD] > self.protected * order.room


class Gone:
    """What left lately, by its first chunk; the oldest is forgotten first. Every operation is O(1).

    Attributes:
        chunks: that are remembered; bound: how many may be.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[int, int] = OrderedDict()
        self.chunks = 0
        self.bound = 0.0

    def remember(self, node: Node, chunks: int) -> None:
        """The last chunks of a node leave."""
        name = _name(node, node.chunks - chunks)
        self.chunks += chunks - self._entries.pop(name, 0)
        self._entries[name] = chunks
        while self.chunks > self.bound:
            self.chunks -= self._entries.popitem(last=False)[1]

    def recall(self, node: Node) -> int:
        """How many chunks left with what a new node begins with; they are forgotten then."""
        chunks = self._entries.pop(_name(node, 0), 0)
        self.chunks -= chunks
        return chunks


def _name(node: Node, chunk: int) -> int:
    """Of one of a node's chunks: its place and tokens, which in other prompts are seldom the same."""
    size = len(node.data) // node.chunks
    begin = chunk * size
    return hash((node.start + begin // TOKEN_BYTES, node.data[begin : begin + size]))


class TwoQueues(Policy):
    """First in, first out for what is new; least recently used for what came back after it left.

    Johnson and Shasha, "2Q", VLDB 1994, the full version.

    Args:
        new: share of the capacity for what is new; share: of it, remembered.
    """

    queues = 2

    def __init__(self, new: float = 0.25, share: float = 0.5) -> None:
        self.new = new
        self.share = share
        self._gone = Gone()

    def priority(self, node: Node, now: float) -> tuple[int, int]:
        if node.memo is None:
            node.memo = (_OLD if self._gone.recall(node) else _NEW), node.tick
        queue, since = node.memo
        return queue, (since if queue == _NEW else node.tick)

    def victim(self, order: LeafOrder) -> int:
        self._gone.bound = self.share * order.room
        full = order.sizes[_NEW] > self.new * order.room
        return order.first(_NEW if full else _OLD)

    def evicted(self, node: Node, chunks: int) -> None:
        if node.priority[0] == _NEW:
            self._gone.remember(node, chunks)


class S3FIFO(Policy):
    """Queues without reordering: a small one that most leave soon, and a main one with more chances.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.

    Args:
        small: share of the capacity; least: uses in the small queue that lead to the main one.
    """

    queues = 2

    def __init__(self, small: float = 0.1, least: int = 2) -> None:
        self.small = small
        self.least = least
        self._gone = Gone()

    def priority(self, node: Node, now: float) -> tuple[int, int]:
        if node.memo is None:
            node.memo = (_OLD if self._gone.recall(node) else _NEW), node.tick, node.hits
        queue, since, _ = node.memo
        return queue, since

    def victim(self, order: LeafOrder) -> int:
        self._gone.bound = (1 - self.small) * order.room
        full = order.sizes[_NEW] >= self.small * order.room
        return order.first(_NEW if full else _OLD)

    def spared(self, node: Node, order: LeafOrder) -> tuple[int, int] | None:
        queue, _, base = node.memo
        uses = min(3, node.hits - base)
        if uses < (self.least if queue == _NEW else 1):
            return None
        left = 0 if queue == _NEW else uses - 1
        since = order.next_tick()
        node.memo = _OLD, since, node.hits - left
        return _OLD, since

    def evicted(self, node: Node, chunks: int) -> None:
        if node.priority[0] == _NEW:
            self._gone.remember(node, chunks)


class ARC(Policy):
    """Two lists, each least recently used first, whose shares follow what is missed.

    What comes back after it left the list of what was used once makes that list larger, and what left
    the other one makes it smaller. Megiddo and Modha, "ARC", FAST 2003.
    """

    queues = 2

    def __init__(self) -> None:
        self.new = 0.0  # chunks that were used once, at which these leave first
        self._gone = Gone(), Gone()
        self._capacity = 0.0

    def priority(self, node: Node, now: float) -> tuple[int, int]:
        if node.memo is None:
            node.memo = self._came_back(node)
        return (_OLD if node.memo or node.hits else _NEW), node.tick

    def _came_back(self, node: Node) -> bool:
        for queue, sign in ((_NEW, 1), (_OLD, -1)):
            own, other = self._gone[queue], self._gone[1 - queue]
            ratio = max(1.0, other.chunks / own.chunks) if own.chunks else 1.0
            if chunks := own.recall(node):
                self.new = min(max(0.0, self.new + sign * ratio * chunks), self._capacity)
                return True
        return False

    def victim(self, order: LeafOrder) -> int:
        self._capacity = order.room
        for gone in self._gone:
            gone.bound = order.room / 2
        return order.first(_NEW if order.sizes[_NEW] > self.new else _OLD)

    def evicted(self, node: Node, chunks: int) -> None:
        self._gone[node.priority[0]].remember(node, chunks)

"""Policies that keep what was used once apart from what was used again.

A scan of prompts that never come back then leaves the others alone. Two queues each; shares are of the
capacity that the order was given, and an order without one (infinite) never evicts.
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
        return order.sizes[_OLD] > self.protected * order.capacity


class Remembering(Policy):
    """Base of policies that know for a while what they let go.

    Attributes:
        share: of the capacity, chunks that are remembered.
    """

    queues = 2
    share = 1.0

    def __init__(self) -> None:
        self._gone: OrderedDict[int, int] = OrderedDict()  # chunks that left with that first one
        self._chunks = 0
        self._bound = 0.0

    def remember(self, node: Node, chunks: int) -> None:
        """Notes that the last chunks of a node leave. O(1)."""
        name = _name(node, node.chunks - chunks)
        self._chunks += chunks - self._gone.pop(name, 0)
        self._gone[name] = chunks
        while self._chunks > self._bound:
            self._chunks -= self._gone.popitem(last=False)[1]

    def recall(self, node: Node) -> bool:
        """Whether what a new node begins with left lately; that is forgotten then. O(1)."""
        chunks = self._gone.pop(_name(node, 0), 0)
        self._chunks -= chunks
        return chunks > 0

    def victim(self, order: LeafOrder) -> int:
        self._bound = self.share * order.capacity
        return order.first(self.queue(order))

    def queue(self, order: LeafOrder) -> int:
        """From which one leaves."""
        raise NotImplementedError


def _name(node: Node, chunk: int) -> int:
    """Of one of a node's chunks: its place and tokens, which in other prompts are seldom the same."""
    size = len(node.data) // node.chunks
    begin = chunk * size
    return hash((node.start + begin // TOKEN_BYTES, node.data[begin : begin + size]))


class TwoQueues(Remembering):
    """First in, first out for what is new; least recently used for what came back after it left.

    Johnson and Shasha, "2Q", VLDB 1994, the full version.

    Args:
        new: share of the capacity for what is new; share: of it, remembered.
    """

    def __init__(self, new: float = 0.25, share: float = 0.5) -> None:
        super().__init__()
        self.new = new
        self.share = share

    def priority(self, node: Node, now: float) -> tuple[int, int]:
        if node.memo is None:
            node.memo = (_OLD if self.recall(node) else _NEW), node.tick
        queue, since = node.memo
        return queue, (since if queue == _NEW else node.tick)

    def queue(self, order: LeafOrder) -> int:
        return _NEW if order.sizes[_NEW] > self.new * order.capacity else _OLD

    def evicted(self, node: Node, chunks: int) -> None:
        if node.priority[0] == _NEW:
            self.remember(node, chunks)


class S3FIFO(Remembering):
    """Queues without reordering: a small one that most leave soon, and a main one with more chances.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.

    Args:
        small: share of the capacity; least: uses in the small queue that lead to the main one.
    """

    share = 0.9

    def __init__(self, small: float = 0.1, least: int = 2) -> None:
        super().__init__()
        self.small = small
        self.least = least

    def priority(self, node: Node, now: float) -> tuple[int, int]:
        if node.memo is None:
            node.memo = (_OLD if self.recall(node) else _NEW), node.tick, node.hits
        queue, since, _ = node.memo
        return queue, since

    def queue(self, order: LeafOrder) -> int:
        return _NEW if order.sizes[_NEW] >= self.small * order.capacity else _OLD

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
            self.remember(node, chunks)

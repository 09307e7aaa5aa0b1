"""The tree without its public face: links, splits, holds, counters, the order of eviction.

Holds (leases and pins) count on the whole path, not only where they end. Then a node knows in O(1)
whether anything below needs it, a split just copies the counts, and what repeated eviction could
free is `chunks - held`. The price is O(depth) per hold, and paths are compressed.

A split gives the original Node object the lower half: every hold, name, pin, ghost and child
refers to where a prompt *ends*, so nothing has to be found and moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sortedcontainers import SortedList

from chunkcache.errors import RunLengthError
from chunkcache.tree.ghosts import Ghosts
from chunkcache.tree.keys import TOKEN_BYTES
from chunkcache.tree.node import Miss, Node, Run, climb, link, unlink
from chunkcache.tree.order import LeafOrder
from chunkcache.tree.snapshots import Snapshots


class _NoRun:
    """The root's run: no chunks."""

    def __len__(self) -> int:
        return 0

    def split(self, chunks: int) -> tuple[Run, Run]:
        raise AssertionError("the root is never split")


class Structure:
    """Nodes, counters and eviction order. No locking, no clock; PrefixTree adds them."""

    def __init__(
        self,
        chunk_size: int,
        order: LeafOrder,
        free: Callable[[Run], object] | None,
        ghosts: int,
        snapshots: Snapshots,
    ) -> None:
        self.chunk_bytes = chunk_size * TOKEN_BYTES
        self.order = order
        self.free: Callable[[Run], object] = free or (lambda run: None)
        self.root = Node(0, b"", 0, _NoRun(), 0, None)
        self.by_deadline: Any = SortedList()  # (deadline, serial, node) of nodes that expire
        self.named: dict[str, Node] = {}
        self.ghosts = Ghosts(ghosts)
        self.snapshots = snapshots
        self.version = 0
        self.chunks = self.leased = self.pinned = self.held = self.nodes = self.leaves = 0

    # -- counters and indexes, kept by taking a node out, changing it, and putting it back

    def count(self, node: Node, sign: int) -> None:
        """Add (or with -1 take away) a node's share of every counter. O(1)."""
        chunks = sign * node.chunks
        self.nodes += sign
        self.chunks += chunks
        if self.order.several:
            self.order.count(node, sign)
        if not node.children:
            self.leaves += sign
        if node.leases:
            self.leased += chunks
        if node.pins:
            self.pinned += chunks
        if node.leases or node.pins:
            self.held += chunks

    def place(self, node: Node) -> None:
        """Put a node into, or take it out of, the order of eviction. O(log leaves)."""
        wanted = not (node.children or node.leases or node.pins or node.parent is None)
        if wanted or node._entry is not None:
            self.order.place(node, self, wanted)

    def mark(self, node: Node, leases: int = 0, pins: int = 0) -> None:
        """Change the holds of one node. O(log leaves)."""
        chunks = node.chunks
        was_leased, was_pinned = node.leases > 0, node.pins > 0
        node.leases += leases
        node.pins += pins
        leased, pinned = node.leases > 0, node.pins > 0
        self.leased += chunks * (leased - was_leased)
        self.pinned += chunks * (pinned - was_pinned)
        self.held += chunks * ((leased or pinned) - (was_leased or was_pinned))
        if pinned != was_pinned:
            self.snapshots.repinned(node)
        if not node.children:
            self.place(node)

    def hold(self, node: Node, leases: int = 0, pins: int = 0) -> None:
        """Change the holds of a whole path; pins count at the root too. O(depth)."""
        for step in climb(node):
            self.mark(step, leases, pins)
        if pins:  # its snapshot may be the only one on the path
            self.mark(self.root, pins=pins)

    def set_deadline(self, node: Node, deadline: float) -> None:
        """Move a node in the expiry index. O(log nodes)."""
        self.unschedule(node)
        node.deadline = deadline
        self.schedule(node)

    def schedule(self, node: Node) -> None:
        """Enter a node into the expiry index, if it expires at all."""
        if node.deadline != float("inf"):
            self.order.soonest = min(self.order.soonest, node.deadline)
            self.by_deadline.add((node.deadline, node.serial, node))

    def unschedule(self, node: Node) -> None:
        """Take a node out of the expiry index (an overdue one has left it already)."""
        if node._overdue:
            node._overdue = False
        elif node.deadline != float("inf"):
            self.by_deadline.remove((node.deadline, node.serial, node))

    def touch(self, node: Node, now: float, leaf_first: bool, hit: int | None = None) -> None:
        """Give every node of a path a new tick and priority; `hit` counts so many tokens. O(depth).

        The path is reindexed only once the policy has answered for all of it.
        """
        self.snapshots.order.tick += 1
        path, order = climb(node), self.order
        for step in path if leaf_first else reversed(path):
            order.tick += 1
            step.tick = order.tick
            step.last_used = now
            if hit is not None:
                step.hits += 1
                step.hit_tokens += min(step.token_count, hit - step.start)
            priority = order.rank(step, now)
            if order.several:
                order.rerank(step, priority)
            else:
                step.priority = priority
        self.place(node)

    # -- shape

    def _next(self) -> int:
        self.order.serial += 1
        return self.order.serial

    def attach(self, parent: Node, data: bytes, run: Run, deadline: float, now: float) -> Node:
        """Add a leased leaf under a leased parent: an insert in progress holds both. O(log)."""
        self.version += 1
        start = parent.start + parent.token_count
        node = Node(self._next(), data, start, run, len(run), parent)
        node.created = node.last_used = now
        node.tick = self.order.tick
        try:
            node.priority = self.order.rank(node, now)
        except BaseException:  # nothing is linked yet: give the run back, and let it pass
            self.free(run)
            raise
        node.leases = 1
        node.deadline = deadline
        key = data[: self.chunk_bytes]
        if parent.parent is not None and not parent.children:
            self.leaves -= 1
        link(parent, key, node)
        self.count(node, +1)
        self.schedule(node)
        self.ghosts.discard(parent, key)
        return node

    def cut(self, node: Node, chunks: int) -> Node:
        """Split a node; return the new upper one of `chunks` chunks. O(tokens of the node)."""
        head, tail = split_run(node.run, node.chunks, chunks)
        self.version += 1
        edge = chunks * self.chunk_bytes
        parent = node.parent
        assert parent is not None
        upper = Node(self._next(), node.data[:edge], node.start, head, chunks, parent)
        for name in ("leases", "pins", "hits", "tick", "last_used", "created", "priority", "memo"):
            setattr(upper, name, getattr(node, name))
        upper.deadline, upper._overdue = node.deadline, node._overdue
        upper.hit_tokens = min(node.hit_tokens, node.hits * upper.token_count)
        self.count(node, -1)
        node.hit_tokens -= upper.hit_tokens
        node.data, node.run = node.data[edge:], tail
        node.chunks -= chunks
        node.start += upper.token_count
        node.parent = upper
        link(upper, node.data[: self.chunk_bytes], node)
        link(parent, upper.data[: self.chunk_bytes], upper)
        self.count(node, +1)
        self.count(upper, +1)
        if not upper._overdue:
            self.schedule(upper)
        if node._snapshots is not None:
            self.snapshots.split(node, upper)
        return upper

    def trim(self, leaf: Node, chunks: int, why: Miss) -> None:
        """Free the last `chunks` chunks of a leaf that has more. O(tokens of the leaf)."""
        head, tail = split_run(leaf.run, leaf.chunks, leaf.chunks - chunks)
        self.version += 1
        edge = len(leaf.data) - chunks * self.chunk_bytes
        lost = leaf.data[edge : edge + self.chunk_bytes]
        self.count(leaf, -1)
        leaf.data, leaf.run = leaf.data[:edge], head
        leaf.chunks -= chunks
        leaf.hit_tokens = min(leaf.hit_tokens, leaf.hits * leaf.token_count)
        self.count(leaf, +1)
        self.unname(leaf)
        self.ghosts.forget(leaf)
        self.ghosts.add(leaf, lost, why)
        if leaf._snapshots is not None:
            self.snapshots.leave(leaf, leaf.start + leaf.token_count)
        self.free(tail)

    def drop_leaf(self, leaf: Node, why: Miss | None) -> Node:
        """Free a leaf nobody holds; return its parent. O(log)."""
        parent = leaf.parent
        assert parent is not None and not (leaf.children or leaf.leases or leaf.pins)
        self.version += 1
        key = leaf.data[: self.chunk_bytes]
        self.count(leaf, -1)
        unlink(parent, key)
        leaf.parent = None
        self.place(leaf)
        self.unschedule(leaf)
        self.ghosts.forget(leaf)
        self.unname(leaf)
        if why is not None:
            self.ghosts.add(parent, key, why)
        if parent.parent is not None and not parent.children:
            self.leaves += 1
            self.place(parent)
        if leaf._snapshots is not None:
            self.snapshots.clear(leaf)
        self.free(leaf.run)
        return parent

    def unname(self, node: Node) -> None:
        """Drop the names of a prompt whose last chunk leaves."""
        for name in node._names:
            del self.named[name]
        node._names = ()

    def shed(self, leaf: Node, chunks: int) -> int:
        """Evict up to `chunks` chunks of a leaf nobody holds, from its end; return how many."""
        freed = min(chunks, leaf.chunks)
        self.order.policy.evicted(leaf, freed)
        if freed < leaf.chunks:
            self.trim(leaf, freed, Miss.EVICTED)
        else:
            self.drop_leaf(leaf, Miss.EVICTED)
        return freed


def split_run(run: Run, whole: int, chunks: int) -> tuple[Run, Run]:
    """Split a run and insist on what the tree relies on."""
    head, tail = run.split(chunks)
    if len(head) != chunks or len(tail) != whole - chunks:
        raise RunLengthError(
            f"{whole} chunks split at {chunks} gave {len(head)} and {len(tail)}"
        )  # fmt: skip
    return head, tail

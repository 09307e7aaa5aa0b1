"""Names, pins and time to live.

Both clocks are sorted lists looked at from the front, so asking "anything due?" is O(1). Two rules
keep lookups simple: a node never expires before its children (an insert extends its whole path),
and a pin extends its path to at least its own end. So what has expired is always whole subtrees,
and a pinned node is never expired. An expired node that is leased waits outside the index and
leaves with its last lease; walks treat it as gone from the moment it expired.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from sortedcontainers import SortedList

from chunkcache.tree.node import NEVER, Miss, Node, climb
from chunkcache.tree.structure import Structure


def seconds_of(ttl: float | None) -> float:
    """Return a time to live as a number; None never ends. Raises ValueError if not positive."""
    if ttl is None:
        return NEVER
    if not ttl > 0 or math.isnan(ttl):
        raise ValueError(f"ttl must be a positive number of seconds, not {ttl!r}")
    return ttl


class Pin(NamedTuple):
    """A hold without an owner, up to `deadline`; sorts by it."""

    deadline: float
    sequence: int
    node: Node
    name: str | None


class Lifetimes:
    """Who is named and pinned, and until when. Holds no KV itself."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.pin_ends: Any = SortedList()  # pins that end
        self.sequence = 0

    def label(self, node: Node, name: str) -> None:
        """Name the prompt that ends at `node`; the name (and its pin) leaves its old place."""
        old = self.structure.named.get(name)
        if old is node:
            return
        if old is not None:
            self.unpin(old, name)
            old._names = tuple(other for other in old._names if other != name)
        self.structure.named[name] = node
        node._names += (name,)

    def pin(self, node: Node, name: str | None, deadline: float) -> None:
        """Hold `node`'s path up to `deadline`; the same pin again only moves the end. O(depth)."""
        if name is not None:
            self.label(node, name)
        self.unpin(node, name)
        self.extend(node, deadline)
        self.sequence += 1
        pin = Pin(deadline, self.sequence, node, name)
        if node._pins is None:
            node._pins = {}
        node._pins[name] = pin
        if deadline != NEVER:
            self.pin_ends.add(pin)
            order = self.structure.order
            order.soonest = min(order.soonest, deadline)
        self.structure.hold(node, pins=+1)

    def unpin(self, node: Node, name: str | None) -> bool:
        """End one pin; whether there was one. O(depth)."""
        pin = (node._pins or {}).get(name)
        if pin is None:
            return False
        assert node._pins is not None
        del node._pins[name]
        if not node._pins:
            node._pins = None
        if pin.deadline != NEVER:
            self.pin_ends.remove(pin)
        self.structure.hold(node, pins=-1)
        if self.structure.order.policy.ttl is not None:
            self._age(node, self.structure.order.policy.ttl)
        return True

    def _age(self, node: Node, ttl: float) -> None:
        """Have a path that was pinned end `ttl` after its last use again. O(depth, children)."""
        for step in climb(node):
            if step.pins or step._overdue:
                return
            ends = [step.last_used + ttl, *(child.deadline for child in step.children.values())]
            if step.deadline > max(ends):
                self.structure.set_deadline(step, max(ends))

    def unpin_all(self, node: Node) -> bool:
        """End every pin that ends at `node`; whether there was one."""
        return any([self.unpin(node, name) for name in list(node._pins or ())])

    def extend(self, node: Node, deadline: float) -> None:
        """Let a path live until `deadline` at least. O(depth log nodes)."""
        above: Node | None = node
        # Stops at the first that lives long enough: everything above it does too.
        while above is not None and above.parent is not None and above.deadline < deadline:
            self.structure.set_deadline(above, deadline)
            above = above.parent

    @property
    def next_deadline(self) -> float:
        """When a pin or a node ends next."""
        nodes = self.structure.by_deadline
        node: float = nodes[0][0] if nodes else NEVER
        return min(node, self.pin_ends[0].deadline) if self.pin_ends else node

    def expire(self, now: float) -> int:
        """End pins and drop subtrees that are due; leased ones wait. O(log) each."""
        structure = self.structure
        while self.pin_ends and self.pin_ends[0].deadline <= now:
            pin = self.pin_ends[0]
            self.unpin(pin.node, pin.name)
        freed = 0
        while structure.by_deadline and structure.by_deadline[0][0] <= now:
            node = structure.by_deadline[0][2]
            if node.leases:
                structure.unschedule(node)
                node._overdue = True
            else:
                freed += self.drop(node, Miss.EXPIRED)
        return freed

    def released(self, path: list[Node]) -> None:
        """Put overdue nodes that have just lost their last lease back in line. O(path)."""
        for node in path:
            if node._overdue and not node.leases:
                node._overdue = False
                self.structure.schedule(node)

    def drop(self, top: Node, why: Miss) -> int:
        """Drop an unleased subtree, leaves first, its pins and names too. O(nodes log)."""
        freed, node = 0, top
        while True:
            if node.children:
                node = next(iter(node.children.values()))
                continue
            self.unpin_all(node)
            freed += node.chunks
            last = node is top
            node = self.structure.drop_leaf(node, why if last else None)
            if last:
                return freed

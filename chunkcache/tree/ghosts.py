"""A bounded memory of what left the tree, so that a miss can say why.

A ghost is 8 bytes of blake2b of the first chunk that left from under a node. It only explains, it
never decides a match: a collision costs a wrong word in a report (2**-64 a look-up). Ghosts live
as long as the node they hang on; the oldest of all go first. Rejected: tombstone nodes in the tree
(unbounded, and every walk would step over them).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from chunkcache.tree.node import Miss, Node


def digest(chunk: bytes) -> bytes:
    """Return the 8-byte name of a chunk's tokens. O(chunk)."""
    return hashlib.blake2b(chunk, digest_size=8).digest()


class Ghosts:
    """At most `bound` ghosts over all nodes; every operation O(1), `forget` O(ghosts of the node).

    >>> from chunkcache.tree.node import Node
    >>> root, ghosts = Node(0, b"", 0, None, 0, None), Ghosts(bound=1)
    >>> ghosts.add(root, b"abcd", Miss.EVICTED); str(ghosts.reason(root, b"abcd"))
    'evicted'
    >>> ghosts.add(root, b"efgh", Miss.EXPIRED); ghosts.reason(root, b"abcd") is None
    True
    """

    def __init__(self, bound: int = 65_536) -> None:
        self.bound = bound
        self.entries: OrderedDict[tuple[int, bytes], Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, node: Node, chunk: bytes, why: Miss) -> None:
        """Remember that `chunk` left from under `node`."""
        if self.bound < 1:
            return
        name = digest(chunk)
        if node._ghosts is None:
            node._ghosts = {}
        node._ghosts[name] = why
        self.entries[node.serial, name] = node
        self.entries.move_to_end((node.serial, name))
        if len(self.entries) > self.bound:
            (_, oldest), owner = self.entries.popitem(last=False)
            self._strip(owner, oldest)

    def discard(self, node: Node, chunk: bytes) -> None:
        """Forget one: the chunk is stored again."""
        if node._ghosts is not None:
            name = digest(chunk)
            if self.entries.pop((node.serial, name), None) is not None:
                self._strip(node, name)

    def forget(self, node: Node) -> None:
        """Forget all of a node that leaves or loses its tail."""
        for name in node._ghosts or ():
            del self.entries[node.serial, name]
        node._ghosts = None

    def reason(self, node: Node, chunk: bytes) -> Miss | None:
        """Return why `chunk` is not under `node`, if remembered."""
        return None if node._ghosts is None else node._ghosts.get(digest(chunk))

    @staticmethod
    def _strip(node: Node, name: bytes) -> None:
        assert node._ghosts is not None
        del node._ghosts[name]
        if not node._ghosts:
            node._ghosts = None

"""The compressed tree of many prompts, without anything that a cache needs besides."""

from __future__ import annotations

from chunkcache.tree import TOKEN_BYTES, common_prefix


class Node:
    """Keys that all prompts use together or not at all.

    Attributes:
        data: packed keys; children: by their first key; mark: a number of whoever uses the tree, -1 at first.
    """

    __slots__ = ("children", "data", "mark")

    def __init__(self, data: bytes = b"", children: dict[bytes, Node] | None = None):
        self.data = data
        self.children = {} if children is None else children
        self.mark = -1


def insert(root: Node, data: bytes, size: int) -> None:
    """Adds a prompt of keys of `size` bytes; what is no whole key is left out. O(keys)."""
    node, at, end = root, 0, len(data) // size * size
    while at < end:
        key = data[at : at + size]
        child = node.children.get(key)
        if child is None:
            node.children[key] = Node(data[at:end])
            return
        length = len(child.data)
        if at + length > end or not data.startswith(child.data, at):
            length = common(data, at, child.data, 0, size, min(length, end - at))
            below = Node(child.data[length:], child.children)
            below.mark = child.mark
            child.data, child.children = child.data[:length], {below.data[:size]: below}
        node, at = child, at + length


def path(root: Node, data: bytes, size: int) -> tuple[list[Node], int]:
    """The nodes that a prompt runs through, the last one maybe in part, and how many bytes match. O(keys)."""
    node, at, end, found = root, 0, len(data) // size * size, [root]
    while at < end:
        child = node.children.get(data[at : at + size])
        if child is None:
            break
        found.append(child)
        length = len(child.data)
        if at + length > end or not data.startswith(child.data, at):
            return found, at + common(data, at, child.data, 0, size, min(length, end - at))
        node, at = child, at + length
    return found, at


def common(one: bytes, at: int, other: bytes, there: int, size: int, most: int) -> int:
    """Bytes of whole keys that are equal from two places on, at most so many. O(keys)."""
    words = common_prefix(one, at // TOKEN_BYTES, other, there // TOKEN_BYTES, most // TOKEN_BYTES)
    return words * TOKEN_BYTES // size * size

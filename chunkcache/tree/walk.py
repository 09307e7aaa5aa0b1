"""Following a prompt down the tree. Changes nothing; the caller holds the tree's lock."""

from __future__ import annotations

from typing import NamedTuple

from chunkcache.tree.keys import TOKEN_BYTES, common_prefix
from chunkcache.tree.node import Miss, Node, nearest
from chunkcache.tree.structure import Structure


class Stop(NamedTuple):
    """Where a walk ended: the deepest node that shares a token, the tokens shared, and why."""

    node: Node
    tokens: int
    reason: Miss


def walk(structure: Structure, data: bytes, end: int, now: float) -> Stop:
    """Follow packed tokens to byte `end`; expired nodes count as gone.

    Runtime complexity: O(n) bytes compared, one dict probe a node, O(log siblings) at the end.
    """
    size = structure.chunk_bytes
    node, at = structure.root, 0
    while at < end:
        child = node.children.get(data[at : at + size])
        if child is None or child.deadline <= now:
            return _leave(structure, node, child, data, at, end, now)
        if at + len(child.data) > end or not data.startswith(child.data, at):
            return _inside(structure, child, data, at, end)
        node, at = child, at + len(child.data)
    return Stop(node, at // TOKEN_BYTES, Miss.NONE)


def _leave(
    structure: Structure,
    node: Node,
    gone: Node | None,
    data: bytes,
    at: int,
    end: int,
    now: float,
) -> Stop:
    """End a walk at a chunk border: a neighbour may still share part of the next chunk."""
    size = structure.chunk_bytes
    near, shared = nearest(node, data[at : min(end, at + size)], now)
    tokens = at // TOKEN_BYTES + shared
    chunk = data[at : at + size]
    if tokens * TOKEN_BYTES == end:
        reason = Miss.NONE
    elif gone is not None:
        reason = Miss.EXPIRED
    elif len(chunk) < size:
        reason = Miss.TOO_SHORT
    else:
        reason = structure.ghosts.reason(node, chunk) or Miss.NEVER_SEEN
    return Stop(node if near is None else near, tokens, reason)


def _inside(structure: Structure, child: Node, data: bytes, at: int, end: int) -> Stop:
    """End a walk inside a node's run."""
    start, left = at // TOKEN_BYTES, (end - at) // TOKEN_BYTES
    chunk_size = structure.chunk_bytes // TOKEN_BYTES
    shared = common_prefix(data, start, child.data, 0, left)
    if shared == left:
        return Stop(child, start + shared, Miss.NONE)
    border = start + shared // chunk_size * chunk_size
    short = len(data) // TOKEN_BYTES - border < chunk_size
    return Stop(child, start + shared, Miss.TOO_SHORT if short else Miss.NEVER_SEEN)


def find(structure: Structure, data: bytes) -> tuple[Node, int] | None:
    """Return the node with the last whole chunk of `data`, and which of its chunks that is."""
    size = structure.chunk_bytes
    whole = len(data) // size * size
    node, at = structure.root, 0
    while at < whole:
        child = node.children.get(data[at : at + size])
        if child is None:
            return None
        length = min(len(child.data), whole - at)
        if not data.startswith(memoryview(child.data)[:length], at):
            return None
        node, at = child, at + length
        if at == whole:
            return node, length // size
    return None

"""The invariant walker behind PrefixTree.check: recomputes everything from the nodes alone.

It raises by hand instead of asserting, so that it also works under ``python -O``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from chunkcache.tree.ghosts import digest
from chunkcache.tree.keys import TOKEN_BYTES
from chunkcache.tree.node import NEVER, Node

if TYPE_CHECKING:
    from chunkcache.tree.view import View


class _Findings:
    def __init__(self) -> None:
        self.found: list[str] = []

    def expect(self, holds: bool, what: str, node: Node | None = None) -> None:
        if not holds:
            self.found.append(what if node is None else f"{what}: {node!r}")

    def equal(self, kept: Any, real: Any, what: str, node: Node | None = None) -> None:
        if kept != real:
            self.expect(False, f"{what} is {kept!r}, recomputed {real!r}", node)


def check(tree: View) -> None:
    """Raise AssertionError with the findings and a dump of the tree. O(everything stored)."""
    findings = _Findings()
    nodes = list(tree._iterate())
    for node in nodes:
        _check_links(tree, node, findings)
    _check_children(tree._structure.root, findings)
    _check_holds(tree, nodes, findings)
    _check_counters(tree, nodes, findings)
    _check_order(tree, nodes, findings)
    _check_lifetimes(tree, nodes, findings)
    _check_ghosts(tree, nodes, findings)
    _check_snapshots(tree, nodes, findings)
    if findings.found:
        raise AssertionError("\n".join([*findings.found, "tree:", *dump(nodes)]))


def dump(nodes: Iterable[Node]) -> list[str]:
    """Return a line per node, in depth-first order."""
    return [f"  {node!r} data={node.data[:32].hex()} run={node.run!r}" for node in nodes]


def _check_links(tree: View, node: Node, findings: _Findings) -> None:
    parent = node.parent
    assert parent is not None
    size = tree._structure.chunk_bytes
    findings.expect(parent.children.get(node.data[:size]) is node, "not under its key", node)
    findings.expect(node.chunks >= 1, "no chunks", node)
    findings.equal(len(node.data), node.chunks * size, "bytes", node)
    findings.equal(len(node.run), node.chunks, "run length", node)
    findings.equal(node.start, parent.start + parent.token_count, "start", node)
    bounded = 0 <= node.hit_tokens <= node.hits * node.token_count
    findings.expect(bounded, f"hit_tokens={node.hit_tokens}", node)
    if parent.parent is not None:
        if tree.touch == "leaf_first":
            findings.expect(node.tick <= parent.tick, "younger than its parent", node)
        findings.expect(node.deadline <= parent.deadline, "outlives its parent", node)
    _check_children(node, findings)


def _check_children(node: Node, findings: _Findings) -> None:
    for child in node.children.values():
        findings.expect(child.parent is node, "wrong parent", child)
    if node._order is None:
        findings.expect(len(node.children) < 2, "no sorted children", node)
    elif list(node._order) != sorted(node.children):
        findings.expect(False, "sorted children differ", node)


def _check_holds(tree: View, nodes: list[Node], findings: _Findings) -> None:
    leases = Counter(hold.node.serial for hold in tree._open)
    pins = Counter({node.serial: len(node._pins) for node in nodes if node._pins})
    for node in reversed(nodes):  # children before parents
        findings.equal(node.leases, leases[node.serial], "leases", node)
        findings.equal(node.pins, pins[node.serial], "pins", node)
        if node.parent is not None:
            leases[node.parent.serial] += node.leases
            pins[node.parent.serial] += node.pins
    root = tree._structure.root
    findings.equal(root.pins, pins[root.serial], "pins", root)


def _check_counters(tree: View, nodes: list[Node], findings: _Findings) -> None:
    kept = tree._structure
    findings.equal(kept.nodes, len(nodes), "nodes")
    findings.equal(kept.leaves, sum(not n.children for n in nodes), "leaves")
    findings.equal(kept.chunks, sum(n.chunks for n in nodes), "chunks")
    findings.equal(kept.leased, sum(n.chunks for n in nodes if n.leases), "leased chunks")
    findings.equal(kept.pinned, sum(n.chunks for n in nodes if n.pins), "pinned chunks")
    free = sum(n.chunks for n in nodes if not (n.leases or n.pins))
    findings.equal(tree.evictable_chunks, free, "evictable chunks")


def _check_order(tree: View, nodes: list[Node], findings: _Findings) -> None:
    everyone = tree._structure.order.entries
    order = [entry for entry in everyone if entry[-1] is tree._structure]
    real = [n for n in nodes if not (n.children or n.leases or n.pins)]
    findings.equal({e[1] for e in order}, {n.serial for n in real}, "evictable leaves")
    findings.equal(len(order), len(real), "evictable leaves, counted")
    findings.expect(all(a <= b for a, b in pairwise(everyone)), "order unsorted")
    shared = any(entry[-1] is not tree._structure for entry in everyone)
    if tree._structure.order.several and not shared:
        sizes = Counter[int]()
        for node in nodes:
            sizes[node.priority[0]] += node.chunks
        kept = tree._structure.order.sizes
        findings.equal(kept, [sizes[queue] for queue in range(len(kept))], "queues")
    for node in nodes:
        if node._entry is not None:
            real_entry = (node.priority, node.serial, node, tree._structure)
            findings.equal(node._entry, real_entry, "entry", node)


def _check_lifetimes(tree: View, nodes: list[Node], findings: _Findings) -> None:
    real = [(n.deadline, n.serial) for n in nodes if n.deadline != NEVER and not n._overdue]
    kept = [entry[:2] for entry in tree._structure.by_deadline]
    findings.equal(kept, sorted(real), "expiry index")
    pins = [pin for n in nodes for pin in (n._pins or {}).values()]
    ends = sorted(pin[:2] for pin in pins if pin.deadline != NEVER)
    findings.equal([pin[:2] for pin in tree._lifetimes.pin_ends], ends, "pin ends")
    for node in nodes:
        findings.expect(node.leases > 0 or not node._overdue, "overdue but free", node)
        for name, pin in (node._pins or {}).items():
            findings.expect(pin.node is node and pin.name == name, "stray pin", node)
            findings.expect(pin.deadline <= node.deadline, "pin outlives its node", node)
            findings.expect(name is None or name in node._names, "pin without name", node)
    named = {name: node.serial for node in nodes for name in node._names}
    findings.equal({k: n.serial for k, n in tree._structure.named.items()}, named, "names")


def _check_ghosts(tree: View, nodes: list[Node], findings: _Findings) -> None:
    ghosts = tree._structure.ghosts
    findings.expect(len(ghosts) <= ghosts.bound, f"{len(ghosts)} ghosts")
    real: set[tuple[int, bytes]] = set()
    for node in [tree._structure.root, *nodes]:
        findings.expect(node._ghosts is None or bool(node._ghosts), "empty ghosts", node)
        if node._ghosts:
            real.update((node.serial, name) for name in node._ghosts)
            stored = {digest(key) for key in node.children}
            findings.expect(stored.isdisjoint(node._ghosts), "ghost of a stored chunk", node)
    findings.equal(set(ghosts.entries), real, "ghosts")


def _check_snapshots(tree: View, nodes: list[Node], findings: _Findings) -> None:
    kept, order = tree._structure.snapshots, tree._structure.snapshots.order
    with_some = [n for n in [tree._structure.root, *nodes] if n._snapshots is not None]
    entries = [entry for node in with_some for entry in node._snapshots or ()]
    for node in with_some:
        _check_snapshots_of(tree, node, findings)
    findings.equal(kept.count, len(entries), "snapshots")
    findings.equal(kept.bytes, sum(entry.bytes for entry in entries), "snapshot bytes")
    mine = [key for key in order.entries if key[-1].owner is kept]
    real = sorted(entry.key for entry in entries if entry.key is not None)
    findings.equal(mine, real, "order of snapshots")
    findings.equal(
        order.evictable_bytes, sum(k[-1].bytes for k in order.entries), "evictable bytes"
    )
    findings.expect(order.evictable_bytes <= order.bytes <= order.budget, "bytes and budget")


def _check_snapshots_of(tree: View, node: Node, findings: _Findings) -> None:
    entries, size = node._snapshots or [], tree._structure.chunk_bytes // TOKEN_BYTES
    findings.expect(bool(entries), "empty snapshots", node)
    end = node.start + node.token_count
    for entry in entries:
        at = entry.position
        inside = node.start < at <= end or at == end == 0
        findings.expect(inside and at % size == 0, f"{entry!r} is elsewhere", node)
        mine = entry.node is node and entry.owner is tree._structure.snapshots
        findings.expect(mine, f"{entry!r} is another's", node)
        findings.expect(entry.saves > 0 and (not at or entry.saves <= at), f"{entry!r}", node)
        stays = node.pins > 0 and entry is entries[-1]
        findings.equal(entry.key, None if stays else entry.rank, "place of a snapshot", node)
    for first, second in pairwise(entries):
        findings.equal(second.saves, second.position - first.position, "tokens saved", node)

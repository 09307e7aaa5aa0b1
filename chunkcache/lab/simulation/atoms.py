"""A trace as numbers: the runs of chunks that all its prompts use together or not at all.

What no prompt leaves or ends inside of is one *atom*: a node of the compressed tree of all prompts. Who
looks at a trace as a whole (LRU at every size at once, the optimum that knows the future) then handles
a few atoms a prompt instead of many chunks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from chunkcache.lab.simulation.trie import Node, insert
from chunkcache.lab.traces.trace import Form, Request
from chunkcache.tree import TOKEN_BYTES


@dataclass
class Atoms:
    """See the module; a few bytes for each atom that a prompt uses.

    Attributes:
        chunk: tokens of a chunk.
        sizes: chunks by atom; depths: chunks before it on its path.
        tokens: by prompt; limits: chunks of each that may be hits.
        visits: the atoms of all prompts, one prompt after the other, each from its beginning on; behind
            its own come those of its answer.
        ends: where the visits of each prompt end.
    """

    chunk: int
    sizes: array[int] = field(default_factory=lambda: array("q"))
    depths: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    limits: array[int] = field(default_factory=lambda: array("q"))
    visits: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))

    @property
    def chunks(self) -> int:
        """Different ones of all prompts."""
        return sum(self.sizes)

    def may_hit(self, prompt: int, atom: int) -> bool:
        """Whether an atom of a prompt counts if it is stored; as a whole or not at all."""
        return self.depths[atom] < self.limits[prompt]

    def hit_tokens(self, prompt: int, chunks: int) -> int:
        """Of a prompt of which so many chunks are stored."""
        return min(min(chunks, self.limits[prompt]) * self.chunk, self.tokens[prompt])


def atomise(requests: Iterable[Request], form: Form, chunk: int) -> Atoms:
    """The atoms of a trace, which is kept in memory meanwhile. O(keys), and O(1) for each atom used."""
    size = chunk // form.block * form.width
    roots: dict[str, Node] = {}
    prompts: list[tuple[Node, bytes]] = []
    found = Atoms(chunk)
    for request in requests:
        root = roots.setdefault(request.tenant, Node())
        limit = form.limit(request) * TOKEN_BYTES // size
        insert(root, request.keys, size)
        if limit < len(request.keys) // size:  # what lies behind can be stored, but is no hit
            insert(root, request.keys[: limit * size], size)
        stored = bytes(request.keys)
        if request.answer:
            stored = request.keys + request.answer
            insert(root, stored, size)
        prompts.append((root, stored))
        found.tokens.append(request.tokens)
        found.limits.append(limit)
    for root, stored in prompts:
        _visit(found, root, stored, size)
    return found


def _visit(found: Atoms, root: Node, data: bytes, size: int) -> None:
    """Notes the path of a prompt; what is visited for the first time becomes an atom."""
    node, at, end = root, 0, len(data) // size * size
    visits = found.visits
    while at < end:
        node = node.children[data[at : at + size]]
        if node.mark < 0:
            node.mark = len(found.sizes)
            found.sizes.append(len(node.data) // size)
            found.depths.append(at // size)
        visits.append(node.mark)
        at += len(node.data)
    found.ends.append(len(visits))

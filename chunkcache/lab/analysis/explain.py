"""Why tokens had to be computed, prompt by prompt: where each left what was known, and what would help.

Every token of every prompt counts once: it was reused; or it was known, but not there any more; or it comes
again behind a place at which prompts differ; or it is new. Places that recur are put together, with what
would be reused if that which differs there came last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from chunkcache.lab.analysis.causes import (
    EXAMPLES,
    MOVABLE,
    NEW,
    REUSED,
    REWRITTEN,
    Branch,
    Explanation,
    Group,
    Parting,
    merged,
)
from chunkcache.lab.analysis.parting import Hole, Windows, holes
from chunkcache.lab.analysis.places import Differing, differing
from chunkcache.lab.analysis.roles import GENERATED, Roles
from chunkcache.lab.analysis.told import Asked, cache_of
from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.simulation.trie import Node, insert, path
from chunkcache.lab.traces.trace import TOKENS, Request, Trace
from chunkcache.tree import TOKEN_BYTES, Miss, named_policy, unpack

_KEY = 16  # tokens behind a hole by which it is known again
_COMPARED = 4  # prompts of each kind that one is compared with
_CONTEXT = 12  # tokens on both sides
_BRANCHES = 3
_SAMPLES = 3  # prompts that show how messages are marked
Decode = Callable[[list[int]], str]


class _Seen(NamedTuple):
    """What prompts of one tenant began with, and the text in them."""

    root: Node
    windows: Windows


class Explainer:
    """Looks at a trace, whose prompts it keeps in memory.

    Args:
        asked: changes the cache that the trace tells of, to simulate another; else what the trace says that
            was reused counts, and without that a cache without limit.
        chunk: tokens of a chunk, else what the trace says.
        decode: from ids to text: for places in words, and to tell dialogues from what templates fill in.

    Raises:
        ConfigError: chunks that are no multiple of the trace's blocks; no such policy.
    """

    def __init__(
        self,
        trace: Trace,
        asked: Asked | None = None,
        chunk: int | None = None,
        decode: Decode | None = None,
    ):
        self.requests: list[Request] = list(trace)
        self._form = trace.form
        self._cache = cache_of(trace, chunk, asked)
        self._simulate = asked is not None or any(one.reuse is None for one in self.requests)
        self._decode = decode
        self._stored = [bytes(one.keys + one.answer) for one in self.requests]
        self._roles = Roles([])
        if decode is not None and self._form is TOKENS:
            self._roles = Roles(
                [decode(self._ids(n)) for n in range(len(self.requests))[:_SAMPLES]]
            )
        self._partings: list[Parting] | None = None

    @property
    def chunk(self) -> int:
        """Tokens that are reused together."""
        return self._cache.chunk_size

    @property
    def of_tokens(self) -> bool:
        """Whether the trace has tokens, which can be read, or hashes."""
        return self._form is TOKENS

    def _ids(self, number: int) -> list[int]:
        """Of a prompt and its answer."""
        return list(map(int, unpack(self._stored[number])))

    # -- prompt by prompt

    def partings(self) -> list[Parting]:
        """Of all prompts. O(keys), and up to some milliseconds for each."""
        if self._partings is None:
            self._partings = list(self._walk())
        return self._partings

    def _walk(self) -> Iterator[Parting]:
        seen: dict[str, _Seen] = {}
        hits = self._hits()
        for number, request in enumerate(self.requests):
            known = seen.setdefault(request.tenant, _Seen(Node(), Windows()))
            parting = self._parting(number, request, known, next(hits))
            yield parting
            stored = self._stored[number]
            insert(known.root, stored, self._form.width)
            for node in path(known.root, stored, self._form.width)[0]:
                node.mark = number
            if self._form is TOKENS:
                known.windows.add(number, stored, parting.known)

    def _hits(self) -> Iterator[int]:
        """Tokens that each prompt reused."""
        if not self._simulate:
            for request in self.requests:
                assert request.reuse is not None
                yield request.reuse["cached_tokens"]
            return
        capacity = self._cache.capacity_tokens
        chunks = None if capacity is None else capacity // self.chunk
        cache = Simulator(self._form, self.chunk, chunks, named_policy(self._cache.policy))
        yield from map(cache.request, self.requests)

    def _parting(self, number: int, request: Request, seen: _Seen, cached: int) -> Parting:
        nodes, length = path(seen.root, request.keys, self._form.width)
        limit = self._form.limit(request) * TOKEN_BYTES
        known = min(min(length, limit) // self._form.width * self._form.block, request.tokens)
        whole = known if self._form.partial else known - known % self.chunk
        other: int | None = None
        like: int | None = None
        found: list[Hole] = []
        rewritten = False
        if seen.root.mark >= 0 and length < limit:
            other = nodes[-1].mark
            rewritten = len(self.requests[other].keys) <= length < len(self._stored[other])
            if self._form is TOKENS:
                alike = seen.windows.find(request.keys, known, request.tokens - 1, _COMPARED)
                others = dict.fromkeys([*_others(nodes), *alike])
                found, like = self._most_alike(request, known, others, rewritten)
        return Parting(
            number + 1,
            request.tokens,
            cached,
            known,
            whole,
            None if other is None else other + 1,
            None if like is None else like + 1,
            self._reason(request) if cached < whole else "",
            found,
            rewritten,
        )

    def _reason(self, request: Request) -> str:
        """Why something that was known was not there."""
        told = None if self._simulate else (request.reuse or {}).get("reason")
        return str(told or Miss.EVICTED)

    def _most_alike(
        self, request: Request, known: int, others: Iterable[int], rewritten: bool
    ) -> tuple[list[Hole], int | None]:
        """What differs from the prompt that this one is most like behind what is known."""
        best: list[Hole] = []
        like, most = None, 0
        for other in others:
            found = holes(request.keys, self._stored[other], request.tokens - 1)
            if not rewritten:
                found = self._filled_in(request.keys, found)
            reach = max((hole.at + hole.length + hole.run for hole in found), default=0)
            gain = sum(hole.run for hole in found)
            if reach > known and gain > most:
                best, like, most = found, other, gain
        return best, like

    def _filled_in(self, keys: bytes, found: list[Hole]) -> list[Hole]:
        """Those before the first that a template would not fill in: in an answer, or from message to message.

        Dialogues differ in what is said, and may well say the same again afterwards.
        """
        if self._decode is None:
            return found
        for place, hole in enumerate(found):
            begin, end = hole.at * TOKEN_BYTES, (hole.at + hole.length) * TOKEN_BYTES
            if self._roles.messages(self._decode(_unpacked(keys[begin:end]))):
                return found[:place]
            if self._roles.at(_unpacked(keys[:begin]), hole.at, self._decode) in GENERATED:
                return found[:place]
        return found

    def around(self, parting: Parting) -> tuple[str, str, str] | None:
        """Text before the first token that differs, and behind it as it was known and as it is.

        None without tokens, or where nothing was known.
        """
        if self._decode is None or parting.other is None or self._form is not TOKENS:
            return None
        mine, theirs = self._ids(parting.number - 1), self._ids(parting.other - 1)
        at = parting.known
        return (
            self._decode(mine[max(0, at - _CONTEXT) : at]),
            self._decode(theirs[at : at + _CONTEXT]),
            self._decode(mine[at : min(at + _CONTEXT, parting.tokens)]),
        )

    # -- all together

    def explain(self) -> Explanation:
        """All prompts together."""
        tokens: Counter[str] = Counter()
        groups: dict[bytes, Group] = {}
        branches: dict[bytes, Branch] = {}
        footprint = 0
        for parting in self.partings():
            lost = max(0, parting.whole - parting.cached)
            gains = parting.gains(self.chunk)
            tokens[REUSED] += parting.cached
            tokens[parting.reason] += lost
            tokens[REWRITTEN if parting.rewritten else MOVABLE] += sum(gains)
            tokens[NEW] += parting.tokens - parting.cached - lost - sum(gains)
            footprint += max(0, parting.tokens - parting.whole)
            self._add(groups, parting, gains)
            self._branch(branches, parting)
        most = sorted(branches.values(), key=lambda branch: -branch.tokens)[:_BRANCHES]
        return Explanation(
            len(self.requests),
            sum(one.tokens for one in self.requests),
            self.chunk,
            {cause: count for cause, count in tokens.most_common() if count},
            merged(self._described(group) for group in groups.values() if group.tokens),
            self._cache.capacity_tokens,
            footprint,
            [branch for branch in most if branch.requests > 1],
            self.of_tokens,
        )

    def _branch(self, branches: dict[bytes, Branch], parting: Parting) -> None:
        """Counts where a prompt left what is known, if that was anything."""
        if not parting.known or parting.other is None:
            return
        keys = self.requests[parting.number - 1].keys
        end = parting.known // self._form.block * self._form.width
        name = blake2b(keys[:end], digest_size=16).digest()
        branch = branches.get(name)
        if branch is None:
            branch = branches[name] = Branch(parting.known)
            if self._decode is not None and self._form is TOKENS:
                branch.text = self._decode(
                    _unpacked(keys[max(0, end - _CONTEXT * TOKEN_BYTES) : end])
                )
        branch.requests += 1
        branch.tokens += parting.tokens - parting.known

    def _add(self, groups: dict[bytes, Group], parting: Parting, gains: list[int]) -> None:
        """Counts the holes of a prompt, each at the place that the text behind it tells."""
        keys = self.requests[parting.number - 1].keys
        earlier = None
        for hole, gain in zip(parting.holes, gains, strict=True):
            begin = (hole.at + hole.length) * TOKEN_BYTES
            key = bytes(keys[begin : begin + _KEY * TOKEN_BYTES])
            if parting.rewritten:
                key = REWRITTEN.encode()
            group = groups.setdefault(key, Group(key, parting.rewritten))
            group.add(hole, parting.number - 1, gain, earlier)
            earlier = key
            if self._decode is not None and len(group.examples) < EXAMPLES:
                self._example(group, parting, hole)

    def _example(self, group: Group, parting: Parting, hole: Hole) -> None:
        """Adds what stood in a hole, here and in the other prompt."""
        assert parting.like is not None
        there = Hole(hole.there, hole.old, hole.at, hole.length, hole.run)
        for number, part in ((parting.like - 1, there), (parting.number - 1, hole)):
            found = self._differing(number, part)
            if found.text not in group.examples and len(group.examples) < EXAMPLES:
                group.examples.append(found.text)
                group.kinds.update(found.kinds)

    def _differing(self, number: int, hole: Hole) -> Differing:
        assert self._decode is not None
        return differing(self._ids(number), hole.at, hole.length, self._decode, self._roles)

    def _described(self, group: Group) -> Group:
        """The same with words for what differs and where; from tokens alone only how far in."""
        assert group.sample is not None
        number, hole = group.sample
        if self._decode is None:
            return replace(group, where=f"token {hole.at + 1:,}")
        found = self._differing(number, hole)
        return replace(group, where=found.where, before=found.before, after=found.after)


def _unpacked(keys: bytes) -> list[int]:
    return list(map(int, unpack(keys)))


def _others(nodes: Sequence[Node]) -> list[int]:
    """Prompts that ran through the last node of a path, and went on from there in the last ways."""
    last = nodes[-1]
    newest: Iterable[Node] = islice(reversed(last.children.values()), _COMPARED)
    return [last.mark, *(child.mark for child in newest)]

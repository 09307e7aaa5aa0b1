"""Why tokens had to be computed, prompt by prompt: where each left what was known, and what would help.

Every token of every prompt counts once: it was reused; or it was known, but not there any more; or it comes
again behind a place at which prompts differ; or it is new. Places that recur are put together, with what
would be reused if that which differs there came last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from typing import Any, NamedTuple

from chunkcache.lab.analysis.parting import Hole, Windows, holes
from chunkcache.lab.analysis.places import Differing, crosses_messages, differing
from chunkcache.lab.analysis.report import Cache, told_cache
from chunkcache.lab.simulation.simulator import Simulator
from chunkcache.lab.simulation.trie import Node, insert, path
from chunkcache.lab.traces.trace import TOKENS, Request, Trace
from chunkcache.tree import TOKEN_BYTES, Miss, named_policy, unpack

_KEY = 16  # tokens behind a hole by which it is known again
_COMPARED = 4  # prompts of each kind that one is compared with
_EXAMPLES = 3
_SAME = 16  # characters behind two places that are one
_CONTEXT = 12  # tokens on both sides
_ORDER = (
    "date and time",
    "date",
    "time",
    "identifier",
    "address",
    "number",
    "text",
)  # if there are several

REUSED = "reused"
MOVABLE = "the same again behind what differs"
REWRITTEN = "history that was rewritten"
NEW = "new"
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Parting:
    """Where one prompt left the longest prefix that was known.

    Attributes:
        number: of the prompt in the trace, from 1 on; other: of the one that it was like for longest.
        tokens, cached: of the prompt, and reused; known: tokens that an earlier prompt or answer began with;
            whole: the same in whole chunks.
        reason: why not all that was known was reused; empty if it was.
        holes: what differs behind `known`, if the texts are the same again; rewritten: it differs in an
            answer of the other prompt.
    """

    number: int
    tokens: int
    cached: int
    known: int
    whole: int
    other: int | None
    reason: str
    holes: list[Hole]
    rewritten: bool

    def gains(self, chunk: int) -> list[int]:
        """Tokens in whole chunks that could be reused too if each hole in turn came last."""
        reach, found = self.known, []
        for hole in self.holes:
            begin = hole.at + hole.length
            run = (
                begin + hole.run - max(begin, self.known)
            )  # some of it may be known from another prompt
            after = min(reach + max(0, run), self.tokens - 1)
            found.append(after - after % chunk - (reach - reach % chunk))
            reach = after
        return found


@dataclass
class Group:
    """A place at which prompts differ again and again.

    Attributes:
        requests: prompts that left what was known there; tokens: that came again behind it.
        kinds: of what differs: "date", "time", "number", ...; where: in words.
        examples: what stood there, in different prompts; before, after: the text around it.
    """

    rewritten: bool
    requests: int = 0
    tokens: int = 0
    where: str = ""
    before: str = ""
    after: str = ""
    examples: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    sample: tuple[int, Hole] | None = None  # a prompt, and a hole of it

    @property
    def kind(self) -> str:
        """Of what differs, in a word or two; empty if nobody can read it."""
        if {"date", "time"} <= self.kinds:
            return "date and time"
        return min(self.kinds, key=_ORDER.index, default="")

    def to_dict(self) -> dict[str, Any]:
        """What people read, for JSON."""
        fields = asdict(self)
        del fields["sample"], fields["kinds"]
        return fields | {"kind": self.kind}


@dataclass(frozen=True)
class Explanation:
    """See the module.

    Attributes:
        tokens: by cause, all of them together those of all prompts.
        groups: the largest first.
        chunk: tokens that are reused together.
    """

    requests: int
    prompt_tokens: int
    chunk: int
    tokens: dict[str, int]
    groups: list[Group]

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self) | {"groups": [group.to_dict() for group in self.groups]}


class _Seen(NamedTuple):
    """What prompts of one tenant began with, and the text in them."""

    root: Node
    windows: Windows


class Explainer:
    """Looks at a trace, whose prompts it keeps in memory.

    Args:
        cache: to simulate; what the trace says that was reused if None, and without that a cache
            without limit.
        decode: from ids to text, for places in words.
    """

    def __init__(
        self,
        trace: Trace,
        cache: Cache | None = None,
        chunk: int | None = None,
        decode: Decode | None = None,
    ):
        self.requests: list[Request] = list(trace)
        self._form = trace.form
        self._cache = cache or told_cache(trace, chunk)
        self._simulate = cache is not None or any(one.reuse is None for one in self.requests)
        self._decode = decode
        self._stored = [bytes(one.keys + one.answer) for one in self.requests]
        self._partings: list[Parting] | None = None

    @property
    def chunk(self) -> int:
        """Tokens that are reused together."""
        return self._cache.chunk_size

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
        found: list[Hole] = []
        other = rewritten = None
        if seen.root.mark >= 0 and length < limit:
            found, other = self._compared(request, known, _others(nodes), seen.windows)
            rewritten = self._answers(other, length)
        reason = ""
        if cached < whole:
            told = None if self._simulate else (request.reuse or {}).get("reason")
            reason = str(told or Miss.EVICTED)
        other = None if other is None else other + 1
        return Parting(
            number + 1,
            request.tokens,
            cached,
            known,
            whole,
            other,
            reason,
            found,
            bool(rewritten),
        )

    def _answers(self, other: int, length: int) -> bool:
        """Whether so many bytes of another prompt and its answer end in the answer."""
        return len(self.requests[other].keys) <= length < len(self._stored[other])

    def _compared(
        self, request: Request, known: int, siblings: Sequence[int], windows: Windows
    ) -> tuple[list[Hole], int]:
        """What differs from the prompt that this one is most like behind what is known.

        Those that went on where it parts come first, then those that have text of it further on.
        """
        best: tuple[list[Hole], int] = [], siblings[0]
        if self._form is not TOKENS:
            return best
        end = request.tokens - 1
        alike = windows.find(request.keys, known, end, _COMPARED)
        most = 0
        for other in dict.fromkeys([*siblings, *alike]):
            found = self._inside(request.keys, holes(request.keys, self._stored[other], end))
            reach = max((hole.at + hole.length + hole.run for hole in found), default=0)
            gain = sum(hole.run for hole in found) if reach > known else 0
            if gain > most:
                best, most = (found, other), gain
        return best

    def _inside(self, keys: bytes, found: list[Hole]) -> list[Hole]:
        """Those before the first that goes from one message to another: what a template fills in does not.

        Dialogues differ in whole messages, and may well say the same again afterwards.
        """
        if self._decode is None:
            return found
        for place, hole in enumerate(found):
            begin, end = hole.at * TOKEN_BYTES, (hole.at + hole.length) * TOKEN_BYTES
            if crosses_messages(self._decode(unpack(keys[begin:end]).tolist())):
                return found[:place]
        return found

    def explain(self) -> Explanation:
        """All prompts together."""
        tokens: Counter[str] = Counter()
        groups: dict[bytes, Group] = {}
        for parting in self.partings():
            left = parting.tokens - parting.cached
            tokens[REUSED] += parting.cached
            lost = max(0, parting.whole - parting.cached)
            if lost:
                tokens[parting.reason] += lost
            gains = parting.gains(self.chunk)
            tokens[REWRITTEN if parting.rewritten else MOVABLE] += sum(gains)
            tokens[NEW] += left - lost - sum(gains)
            self._add(groups, parting, gains)
        found = _merged(self._described(group) for group in groups.values() if group.tokens)
        used = {cause: count for cause, count in tokens.most_common() if count}
        total = sum(one.tokens for one in self.requests)
        return Explanation(len(self.requests), total, self.chunk, used, found)

    def _add(self, groups: dict[bytes, Group], parting: Parting, gains: list[int]) -> None:
        keys = self.requests[parting.number - 1].keys
        for hole, gain in zip(parting.holes, gains, strict=True):
            begin = (hole.at + hole.length) * TOKEN_BYTES
            key = keys[begin : begin + _KEY * TOKEN_BYTES]
            if parting.rewritten:
                key = REWRITTEN.encode()
            group = groups.setdefault(bytes(key), Group(parting.rewritten))
            group.requests += 1
            group.tokens += gain
            if group.sample is None:
                group.sample = parting.number - 1, hole
            if self._decode is not None and len(group.examples) < _EXAMPLES:
                self._example(group, parting, hole)

    def _example(self, group: Group, parting: Parting, hole: Hole) -> None:
        """Adds what stood in a hole, here and in the other prompt."""
        assert parting.other is not None
        there = Hole(hole.there, hole.old, hole.at, hole.length, hole.run)
        for number, part in ((parting.other - 1, there), (parting.number - 1, hole)):
            found = self._differing(number, part)
            if found.text not in group.examples and len(group.examples) < _EXAMPLES:
                group.examples.append(found.text)
                group.kinds.add(found.kind)

    def _differing(self, number: int, hole: Hole) -> Differing:
        assert self._decode is not None
        ids = unpack(self._stored[number]).tolist()
        return differing(ids, hole.at, hole.length, self._decode)

    def _described(self, group: Group) -> Group:
        """The same with words for what differs and where; from tokens alone only how far in."""
        assert group.sample is not None
        number, hole = group.sample
        if self._decode is None:
            return replace(group, where=f"token {hole.at + 1:,}")
        found = self._differing(number, hole)
        return replace(group, where=found.where, before=found.before, after=found.after)

    def around(self, parting: Parting) -> tuple[str, str, str] | None:
        """Text before the first token that differs, and behind it as it was known and as it is.

        None without tokens, or where nothing was known.
        """
        if self._decode is None or parting.other is None or self._form is not TOKENS:
            return None
        mine = unpack(self._stored[parting.number - 1]).tolist()
        theirs = unpack(self._stored[parting.other - 1]).tolist()
        at = parting.known
        return (
            self._decode(mine[max(0, at - _CONTEXT) : at]),
            self._decode(theirs[at : at + _CONTEXT]),
            self._decode(mine[at : min(at + _CONTEXT, parting.tokens)]),
        )


def _merged(groups: Iterable[Group]) -> list[Group]:
    """The largest first. Two of one place are one: by chance more than what stands there may be equal."""
    found: dict[tuple[bool, str], list[Group]] = {}
    for group in sorted(groups, key=lambda group: -group.tokens):
        places = found.setdefault((group.rewritten, group.where), [])
        known = next((one for one in places if _same(one.after, group.after)), None)
        if known is None:
            places.append(group)
            continue
        known.requests += group.requests
        known.tokens += group.tokens
        known.kinds |= group.kinds
        known.examples = [*dict.fromkeys(known.examples + group.examples)][:_EXAMPLES]
    return sorted(chain.from_iterable(found.values()), key=lambda group: -group.tokens)


def _same(after: str, other: str) -> bool:
    """Whether the text behind one hole goes on as that behind another, or does soon."""
    return after[:_SAME] in other or other[:_SAME] in after


def _others(nodes: Sequence[Node]) -> list[int]:
    """Prompts that ran through the last node of a path, and went on from there in the last ways."""
    last = nodes[-1]
    newest: Iterable[Node] = islice(reversed(last.children.values()), _COMPARED)
    return list(dict.fromkeys([last.mark, *(child.mark for child in newest)]))

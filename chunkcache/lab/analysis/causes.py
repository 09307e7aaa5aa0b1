"""What an explanation is made of: prompts, places at which they part, and causes of computing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from chunkcache.lab.analysis.parting import Hole

REUSED = "reused"
MOVABLE = "the same again behind what differs"
REWRITTEN = "history that was rewritten"
NEW = "new"
EXAMPLES = 3
_SAME = 16  # characters behind two places that are one
_ORDER = ("date", "time", "identifier", "address", "number", "text")  # if there are several


@dataclass(frozen=True)
class Parting:
    """Where one prompt left the longest prefix that was known.

    Attributes:
        number: of the prompt in the trace, from 1 on.
        tokens, cached: of the prompt, and reused; known: tokens that an earlier prompt or answer began with;
            whole: the same in whole chunks.
        other: the last prompt that began with these; like: the one that goes on most alike, if one does.
        reason: why not all that was known was reused; empty if it was.
        holes: what differs from `like`, with text behind it that is the same.
        rewritten: what is known ends inside the answer of `other`.
    """

    number: int
    tokens: int
    cached: int
    known: int
    whole: int
    other: int | None
    like: int | None
    reason: str
    holes: list[Hole]
    rewritten: bool

    def gains(self, chunk: int) -> list[int]:
        """Tokens that could be reused too, in whole chunks, if each hole came last, after those before it."""
        reach, base, found = self.known, max(self.cached, self.whole), []
        for hole in self.holes:
            begin = hole.at + hole.length
            # Some of it may be known already, from another prompt.
            run = max(0, begin + hole.run - max(begin, self.known))
            reach = min(reach + run, self.tokens - 1)
            now = max(base, reach - reach % chunk)
            found.append(now - base)
            base = now
        return found


@dataclass
class Group:
    """A place at which prompts differ again and again.

    Attributes:
        requests: prompts that differ there; tokens: that came again behind it.
        alone: of these tokens, those that need no other place to be moved.
        kinds: of what differs: "date", "time", "number", ...; where: in words.
        examples: what stood there, in different prompts; before, after: the text around it.
        earlier: keys of places that come before it in the same prompts.
        sample: a prompt, and its hole.
    """

    key: bytes
    rewritten: bool
    requests: int = 0
    tokens: int = 0
    alone: int = 0
    where: str = ""
    before: str = ""
    after: str = ""
    examples: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    earlier: Counter[bytes] = field(default_factory=Counter)
    sample: tuple[int, Hole] | None = None

    @property
    def kind(self) -> str:
        """Of what differs, in a word or two; empty if nobody can read it."""
        if {"date", "time"} <= self.kinds:
            return "date and time"
        return min(self.kinds, key=_ORDER.index, default="")

    def add(self, hole: Hole, number: int, gain: int, earlier: bytes | None) -> None:
        """Counts a prompt, if it would gain something."""
        self.requests += gain > 0
        self.tokens += gain
        if earlier is None:
            self.alone += gain
        else:
            self.earlier[earlier] += 1
        if self.sample is None:
            self.sample = number, hole

    def join(self, other: Group) -> None:
        """Takes in another of the same place."""
        self.requests += other.requests
        self.tokens += other.tokens
        self.alone += other.alone
        self.kinds |= other.kinds
        self.earlier += other.earlier
        self.examples = [*dict.fromkeys(self.examples + other.examples)][:EXAMPLES]

    def to_dict(self) -> dict[str, Any]:
        """What people read, for JSON."""
        names = ("rewritten", "requests", "tokens", "alone", "where", "before", "after", "examples")
        return {name: getattr(self, name) for name in names} | {"kind": self.kind}


@dataclass
class Branch:
    """A prefix behind which prompts go ways of their own.

    Attributes:
        known: tokens of it; requests: prompts that leave there; tokens: theirs from there on.
        text: its end, if it can be read.
    """

    known: int
    requests: int = 0
    tokens: int = 0
    text: str = ""


@dataclass(frozen=True)
class Explanation:
    """Where all tokens went, and the places at which prompts differ.

    Attributes:
        tokens: by cause, all of them together those of all prompts.
        groups: the largest first.
        chunk: tokens that are reused together.
        capacity_tokens: of the cache, None without limit; footprint_tokens: different ones, in whole chunks.
        branches: where most prompts leave what is known.
        of_tokens: whether the trace has tokens; hashes cannot show what comes again behind a difference.
    """

    requests: int
    prompt_tokens: int
    chunk: int
    tokens: dict[str, int]
    groups: list[Group]
    capacity_tokens: int | None
    footprint_tokens: int
    branches: list[Branch]
    of_tokens: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        shallow = {name: value for name, value in vars(self).items() if name != "groups"}
        parts = {
            "groups": [group.to_dict() for group in self.groups],
            "branches": [asdict(branch) for branch in self.branches],
        }
        return shallow | parts


def merged(groups: Iterable[Group]) -> list[Group]:
    """The largest first. Two of one place are one: by chance more than what stands there may be equal."""
    found: dict[tuple[bool, str], list[Group]] = {}
    names: dict[bytes, bytes] = {}
    for group in sorted(groups, key=lambda group: -group.tokens):
        message = group.where.partition(" of ")[2]  # the line may be another one in each prompt
        places = found.setdefault((group.rewritten, message), [])
        known = next((one for one in places if _same(one.after, group.after)), None)
        if known is None:
            places.append(group)
            continue
        names[group.key] = known.key
        known.join(group)
    ranked = sorted(chain.from_iterable(found.values()), key=lambda group: -group.tokens)
    for group in ranked:
        group.earlier = _renamed(group.earlier, names)
    return ranked


def _renamed(counts: Counter[bytes], names: dict[bytes, bytes]) -> Counter[bytes]:
    found: Counter[bytes] = Counter()
    for key, count in counts.items():
        found[names.get(key, key)] += count
    return found


def _same(after: str, other: str) -> bool:
    """Whether the text behind one hole goes on as that behind another, or does soon."""
    return bool(after and other) and (after[:_SAME] in other or other[:_SAME] in after)


def as_fields(parting: Parting) -> dict[str, Any]:
    """A parting for JSON."""
    return asdict(parting) | {"holes": [hole._asdict() for hole in parting.holes]}

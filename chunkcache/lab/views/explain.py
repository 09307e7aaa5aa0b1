"""An explanation in words: sections for a terminal, Markdown or a page."""

from __future__ import annotations

from collections.abc import Sequence

from chunkcache.lab.analysis.explain import NEW, REUSED, REWRITTEN, Explanation, Group, Parting
from chunkcache.lab.views.sections import Section
from chunkcache.lab.views.words import number, share
from chunkcache.tree import Miss

_SHOWN = 5  # places
_MATTERS = 0.005  # of all prompt tokens
_SIDE = 60  # characters of context
_WAYS = 3  # holes of one prompt


def sections(found: Explanation, top: int = _SHOWN) -> list[Section]:
    """Where tokens went, the `top` places at which prompts differ, and what to do."""
    groups = [one for one in found.groups if one.tokens >= _MATTERS * found.prompt_tokens][:top]
    places = [_place(place, group, found) for place, group in enumerate(groups, 1)]
    told = Section("What to do", [(line,) for line in advice(found, groups)])
    return [_causes(found), *places, told]


def _causes(found: Explanation) -> Section:
    rows = [
        (cause, number(tokens), share(tokens, found.prompt_tokens))
        for cause, tokens in found.tokens.items()
    ]
    title = f"Where the tokens of {number(found.requests)} prompts went"
    return Section(title, rows, ("", "tokens", "share"))


def _place(place: int, group: Group, found: Explanation) -> Section:
    rows = [
        ("prompts that part there", number(group.requests)),
        ("the same again behind it", _of(group.tokens, found)),
    ]
    if group.examples:
        rows += [
            ("before", _end(group.before)),
            ("what differs", " | ".join(group.examples)),
            ("behind", _begin(group.after)),
        ]
    return Section(f"{place}. {_title(group)}", rows)


def _title(group: Group) -> str:
    what = {"": "What differs", "text": "Text that differs"}.get(group.kind, f"A {group.kind}")
    what = what.replace("A a", "An a").replace("A i", "An i")
    return f"{what} in {'an answer, rewritten, ' if group.rewritten else ''}{group.where}"


def advice(found: Explanation, groups: Sequence[Group]) -> list[str]:
    """What would help, in sentences."""
    lines = [_move(group, found) for group in groups if not group.rewritten]
    gain = sum(group.tokens for group in groups if not group.rewritten)
    if len(lines) > 1:
        now = found.tokens.get(REUSED, 0)
        both = f"{share(now, found.prompt_tokens)} to {share(now + gain, found.prompt_tokens)}"
        lines.append(f"All of that together would take the hit rate from {both}.")
    if found.tokens.get(REWRITTEN, 0) >= _MATTERS * found.prompt_tokens:
        lines.append(
            f"{_of(found.tokens[REWRITTEN], found)} follow history that is rendered otherwise than it was "
            "generated: chunkcache lint-template MODEL shows what the chat template changes."
        )
    gone = {Miss.EVICTED: "evicted", Miss.EXPIRED: "expired"}
    lost = sum(found.tokens.get(str(reason), 0) for reason in gone)
    if lost >= _MATTERS * found.prompt_tokens:
        lines.append(
            f"{_of(lost, found)} were known and had left the cache: chunkcache report shows what more room "
            "or another policy would keep."
        )
    return lines or [_nothing(found)]


def _move(group: Group, found: Explanation) -> str:
    what = "what differs" if group.kind in ("", "text") else f"the {group.kind}"
    points = 100 * group.tokens / max(1, found.prompt_tokens)
    return (
        f"Move {what} in {group.where} behind what prompts share: {points:.1f} points of hit rate."
    )


def _nothing(found: Explanation) -> str:
    new = share(found.tokens.get(NEW, 0), found.prompt_tokens)
    return f"Nothing recurs that could be moved: {new} of all prompt tokens are new."


def of_one(parting: Parting, around: tuple[str, str, str] | None, chunk: int) -> list[Section]:
    """One prompt: what was reused of it, where it left what was known, and what would be the same again."""
    rows = {
        "prompt tokens": number(parting.tokens),
        "reused": f"{number(parting.cached)} ({share(parting.cached, parting.tokens)})",
        "longest known prefix": number(parting.known)
        + (
            ""
            if parting.other is None or not parting.known
            else f", of prompt {number(parting.other)}"
        ),
        "why no more": _why(parting, chunk),
    }
    found = [Section(f"Prompt {number(parting.number)}", list(rows.items()))]
    if around is not None:
        before, known, new = around
        lines = [("before", _end(before)), ("known", _begin(known)), ("this one", _begin(new))]
        title = f"Token {number(parting.known + 1)}, the first that differs"
        found.append(Section(title, lines))
    if parting.holes:
        rows_ = [
            (f"token {number(hole.at + 1)}", number(hole.length), number(hole.run), number(gain))
            for hole, gain in zip(parting.holes, parting.gains(chunk), strict=True)
        ]
        names = ("what differs", "tokens", "the same behind it", "would be reused")
        found.append(Section("If what differs came last", rows_, names))
    return found


def _why(parting: Parting, chunk: int) -> str:
    if parting.reason:
        return f"{number(parting.whole)} tokens were known in whole chunks, but: {parting.reason}"
    if parting.known >= parting.tokens - 1:
        return "all was known; the last token is always computed"
    if parting.known < chunk:
        return f"{Miss.NEVER_SEEN}; less than a chunk of {chunk} tokens was known"
    if parting.rewritten:
        return "an answer is not rendered as it was generated"
    return "it differs from all prompts before it, from there on"


def _of(tokens: int, found: Explanation) -> str:
    return f"{number(tokens)} tokens ({share(tokens, found.prompt_tokens)} of all)"


def _begin(text: str) -> str:
    flat = _flat(text)
    return flat if len(flat) <= _SIDE else f"{flat[:_SIDE]}..."


def _end(text: str) -> str:
    flat = _flat(text)
    return flat if len(flat) <= _SIDE else f"...{flat[-_SIDE:]}"


def _flat(text: str) -> str:
    """On one line, with its line breaks to be seen."""
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", " ")

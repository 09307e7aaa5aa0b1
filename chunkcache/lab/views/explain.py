"""An explanation in words: sections for a terminal, Markdown or a page."""

from __future__ import annotations

from collections.abc import Sequence

from chunkcache.lab.analysis.causes import NEW, REUSED, REWRITTEN, Explanation, Group, Parting
from chunkcache.lab.views.sections import Section
from chunkcache.lab.views.words import number, share
from chunkcache.tree import Miss

_SHOWN = 5  # places
_MATTERS = 0.005  # of all prompt tokens
_BRANCH = 0.02  # of all prompt tokens
_SIDE = 60  # characters of context
_QUOTED = 32  # characters by which text is known


def sections(found: Explanation, top: int = _SHOWN, reported: bool = False) -> list[Section]:
    """Where tokens went, the `top` places at which prompts differ with those before them, and what to do.

    Args:
        reported: a report stands beside it, which tells of what had left.
    """
    groups = _shown(found, top)
    places = [_place(place, group, found) for place, group in enumerate(groups, 1)]
    told = Section("What to do", [(line,) for line in advice(found, groups, reported)])
    return [_causes(found), *places, *_branches(found), told]


def _branches(found: Explanation) -> list[Section]:
    """Prefixes behind which most is computed, whatever the reason."""
    rows = [
        (
            _end(branch.text) or "(no text)",
            number(branch.known),
            number(branch.requests),
            _of(branch.tokens, found),
        )
        for branch in found.branches
        if branch.tokens >= _BRANCH * found.prompt_tokens
    ]
    names = ("end of the prefix", "its tokens", "prompts", "their tokens behind it")
    return [Section("Where most prompts leave what is known", rows, names)] if rows else []


def _shown(found: Explanation, top: int) -> list[Group]:
    """The largest groups, in the order in which they would have to be moved."""
    chosen = [one for one in found.groups if one.tokens >= _MATTERS * found.prompt_tokens][:top]
    known = {group.key: group for group in found.groups}
    ranks: dict[bytes, int] = {}

    def rank(group: Group) -> int:
        """How many others come before it in most of its prompts, as far as these matter."""
        if group.key in ranks:
            return ranks[group.key]
        ranks[group.key] = 0
        key, count = next(iter(group.earlier.most_common(1)), (b"", 0))
        if 2 * count >= group.requests and key in known and key != group.key:
            if known[key] not in chosen:
                chosen.append(known[key])
            ranks[group.key] = rank(known[key]) + 1
        return ranks[group.key]

    for group in list(chosen):
        rank(group)
    return sorted(chosen, key=lambda group: (not _alone(group), rank(group), -group.tokens))


def _alone(group: Group) -> bool:
    """Whether most of what it would save needs no other place to be moved.

    Text can be put in front of all that differs, however much that is.
    """
    return group.kind == "text" or 2 * group.alone >= group.tokens


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
            ("what differs", " | ".join(text or "(nothing)" for text in group.examples)),
            ("behind", _begin(group.after)),
        ]
    return Section(f"{place}. {_title(group)}", rows)


def _title(group: Group) -> str:
    if group.rewritten:
        return f"History that is rewritten, first in {group.where}"
    what = {"": "What differs", "text": "Text that differs"}.get(group.kind, f"A {group.kind}")
    what = what.replace("A a", "An a").replace("A i", "An i")
    return f"{what} in {group.where}"


def advice(found: Explanation, groups: Sequence[Group], reported: bool = False) -> list[str]:
    """What would help, in sentences."""
    movable = [group for group in groups if not group.rewritten]
    lines = [_move(group, found, movable) for group in movable]
    gain = sum(group.tokens for group in movable)
    now = found.tokens.get(REUSED, 0)
    if len(lines) > 1:
        both = f"{share(now, found.prompt_tokens)} to {share(now + gain, found.prompt_tokens)}"
        lines.append(f"All of that together would take the hit rate from {both}.")
    room = found.capacity_tokens
    if lines and room is not None and room < found.footprint_tokens - gain:
        lines.append(
            f"That is if the cache keeps what is shared: it has room for {number(room)} tokens."
        )
    if found.tokens.get(REWRITTEN, 0) >= _MATTERS * found.prompt_tokens:
        lines.append(
            f"{_of(found.tokens[REWRITTEN], found)} follow history that is rendered otherwise than it was "
            "generated: chunkcache lint-template MODEL shows what the chat template changes."
        )
    lost = sum(found.tokens.get(str(reason), 0) for reason in (Miss.EVICTED, Miss.EXPIRED))
    if lost >= _MATTERS * found.prompt_tokens and not reported:
        lines.append(
            f"{_of(lost, found)} were known and had left the cache: chunkcache report shows what more room "
            "or another policy would keep."
        )
    return lines or [_nothing(found)]


def _move(group: Group, found: Explanation, others: Sequence[Group]) -> str:
    what = "what differs" if group.kind in ("", "text") else f"the {group.kind}"
    text, alone = group.kind == "text", _alone(group)
    gain = group.alone if alone and not text else group.tokens
    points = f"{100 * gain / max(1, found.prompt_tokens):.1f} points"
    front = _begin(group.after.strip(), _QUOTED)
    if text:
        where = f"{group.where} and after"
        return f'Put "{front}", in {where}, in front of all that differs: {points} of hit rate.'
    same = [one for one in others if (one.where, one.kind) == (group.where, group.kind)]
    which = f' (before "{front}")' if len(same) > 1 and front else ""
    move = f"ove {what} in {group.where}{which} behind what prompts share: {points}"
    return f"M{move} of hit rate." if alone else f"Then m{move} more."


def _nothing(found: Explanation) -> str:
    new = share(found.tokens.get(NEW, 0), found.prompt_tokens)
    if not found.of_tokens:
        return (
            f"{new} of all prompt tokens follow a beginning that was never seen. Whether they are the same "
            "again behind what differs cannot be seen in hashes: record tokens, with serve --trace alone."
        )
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
        known = _begin(known) or "(the end of that prompt)"
        lines = [("before", _end(before)), ("known", known), ("this one", _begin(new))]
        title = f"Token {number(parting.known + 1)}, the first that differs"
        found.append(Section(title, lines))
    if parting.holes:
        rows_ = [
            (f"token {number(hole.at + 1)}", number(hole.length), number(hole.run), number(gain))
            for hole, gain in zip(parting.holes, parting.gains(chunk), strict=True)
            if gain
        ]
        names = ("what differs", "tokens", "the same behind it", "would be reused")
        if rows_:
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


def _begin(text: str, most: int = _SIDE) -> str:
    flat = _flat(text)
    return flat if len(flat) <= most else f"{flat[:most]}..."


def _end(text: str) -> str:
    flat = _flat(text)
    return flat if len(flat) <= _SIDE else f"...{flat[-_SIDE:]}"


def _flat(text: str) -> str:
    """On one line, with its line breaks to be seen."""
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", " ")

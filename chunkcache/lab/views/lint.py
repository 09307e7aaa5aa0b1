"""What is wrong with a chat template, in a terminal."""

from __future__ import annotations

from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from chunkcache.lab.analysis.lint import Finding, Lint
from chunkcache.lab.views.words import number

_WIDTH = 72  # of decoded text


def lint(name: str, found: Lint) -> RenderableType:
    """A paragraph for each finding, and what was looked at."""
    parts: list[RenderableType] = []
    for (sample, why), group in groupby(found.findings, lambda one: (one.sample, one.why)):
        parts += [_paragraph(sample, why, list(group)), Text()]
    for sample, why in found.refused.items():
        parts += [
            Text(f"{sample}: the template takes no such dialogue ({why})", style="dim"),
            Text(),
        ]
    good = "" if found.findings else "every one extends the one before"
    if not found.turns:
        good = "so that nothing could be checked: dialogues need two answers"
    lost = sum(one.lost for one in found.findings)
    summary = good or f"{len(found.findings)} findings, {number(lost)} tokens computed again"
    return Group(
        *parts, Text(f"{name}: {number(found.turns)} later turns, {summary}", style="bold")
    )


def _paragraph(sample: str, why: str, findings: list[Finding]) -> Text:
    first = findings[0]
    turns = ", ".join(str(one.turn) for one in findings if one.turn)
    where = f" (turn {turns})" if turns else ""
    lost = " + ".join(number(one.lost) for one in findings)
    text = Text()
    text.append(f"{sample}{where}: {why}; {lost} tokens lost\n", style="bold yellow")
    text.append(f"    behind    {_shown(first.before, end=True)}\n", style="dim")
    text.append(f"    stored    {_shown(first.stored)}\n")
    text.append(f"    rendered  {_shown(first.rendered)}")
    return text


def _shown(text: str, end: bool = False) -> str:
    """One line of text, its end or its beginning."""
    line = repr(text)[1:-1]
    if len(line) <= _WIDTH:
        return line
    return f"...{line[-_WIDTH:]}" if end else f"{line[:_WIDTH]}..."

"""A report in words: sections for a terminal, Markdown, a page or a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from chunkcache.lab.analysis.report import Histogram, Part, Report, Size, other_sizes
from chunkcache.lab.views.sections import Section, bar
from chunkcache.lab.views.words import duration, number, share
from chunkcache.tree import Miss

_SHOWN = 20  # names of a table
_MATTERS = 0.02  # of all prompt tokens
_UNITS = {"seconds": duration}
_BEFORE = "More than 100%: the cache knew prefixes before the first of these prompts."


def sections(report: Report, explained: bool = False) -> list[Section]:
    """All that is worth saying of a report; `explained`: an explanation stands beside it."""
    tiers = [_tiers(report)] if set(report.tiers) - {"device"} else []
    return [_reuse(report), *tiers, _misses(report), *outlook(report, explained)]


def outlook(report: Report, explained: bool = False) -> list[Section]:
    """What sums alone do not tell: other sizes, parts, distances, advice."""
    found = [_sizes(report)]
    if set(report.prompts) - {""}:
        found.append(_parts("Named prompts", "name", report.prompts, "without a name"))
    if len(report.tenants) > 1:
        found.append(_parts("Tenants", "tenant", report.tenants, "without one"))
    if report.reuse.tokens:
        found.append(_bars("Tokens used in between, of what was used again", report.reuse))
    if report.lifetimes is not None:
        found.append(_bars("How long stored chunks stayed, of those that left", report.lifetimes))
    return [*found, Section("What to do", [(line,) for line in advice(report, explained)])]


def _reuse(report: Report) -> Section:
    cache, prompt = report.cache, report.prompt_tokens
    rows = {
        "hit rate": f"{share(report.cached_tokens, prompt)} of all prompt tokens, {report.source}",
        "prompts": number(report.requests),
        "prompt tokens": number(prompt),
        "reused": number(report.cached_tokens),
        "computed": number(prompt - report.cached_tokens),
        "generated tokens": number(report.generated_tokens),
        "of what is possible": _possible(report),
        "cache": f"{_capacity(cache.capacity_tokens)}, {cache.policy}, chunks of {cache.chunk_size}",
        "different tokens": number(report.footprint_tokens),
    }
    if cache.model:
        rows["model"] = cache.model
    if report.seconds is not None:
        rows["time"] = duration(report.seconds)
    if report.saved_seconds is not None and report.token_seconds is not None:
        pace = duration(1000 * report.token_seconds)
        rows["time saved"] = f"{duration(report.saved_seconds)}, at {pace} for 1,000 tokens"
    if report.money is not None:
        money = report.money
        rows["money saved"] = f"{money.saved:,.2f} of {money.saved + money.spent:,.2f}"
    known = report.whole_tokens > report.unlimited_tokens > 0
    return Section("Reuse", list(rows.items()), note=_BEFORE if known else "")


def _possible(report: Report) -> str:
    if not report.unlimited_tokens:
        return "nothing of these prompts comes again"
    if report.cache.capacity_tokens is None and report.source == "simulated":
        return "all; --capacity says what a cache that is smaller would hit"
    return (
        f"{_percent(report.percent_of_unlimited)} of what a cache without limit hits, "
        f"{_percent(report.percent_of_belady)} of the best of its size"
    )


def _tiers(report: Report) -> Section:
    rows = [
        (name, number(tokens), share(tokens, report.prompt_tokens))
        for name, tokens in report.tiers.items()
    ]
    return Section("Where reused tokens lay", rows, ("tier", "tokens", "share of prompts"))


def _misses(report: Report) -> Section:
    rows = [
        (reason, number(tokens), share(tokens, report.prompt_tokens))
        for reason, tokens in report.misses.items()
        if tokens
    ]
    names = ("reason", "tokens", "share of prompts")
    return Section("Why tokens had to be computed", rows, names)


def _sizes(report: Report) -> Section:
    now = report.cache.capacity_tokens
    rows = []
    for size in report.sizes:
        rows.append(
            (
                _capacity(size.capacity_tokens),
                share(size.hit_tokens, report.prompt_tokens),
                share(size.hit_tokens, size.belady_tokens),
                share(size.belady_tokens, report.prompt_tokens),
                "<- now" if size.capacity_tokens == now else "",
            )
        )
    names = ("capacity", f"hit rate, {report.cache.policy}", "of the best", "best possible", "")
    note = "Simulated, in whole chunks. The best possible knows the future."
    last = number(report.requests)
    return Section(f"Other sizes, by the last {last} prompts", rows, names, note)


def _parts(title: str, name: str, parts: Mapping[str, Part], nameless: str) -> Section:
    rows = [
        (
            label or f"({nameless})",
            number(part.requests),
            number(part.prompt_tokens),
            number(part.cached_tokens),
            share(part.cached_tokens, part.prompt_tokens),
        )
        for label, part in list(parts.items())[:_SHOWN]
    ]
    left = len(parts) - len(rows)
    note = f"and {number(left)} more" if left else ""
    return Section(title, rows, (name, "prompts", "tokens", "reused", "hit rate"), note)


def _bars(title: str, histogram: Histogram) -> Section:
    most, all_ = max(histogram.tokens, default=0), sum(histogram.tokens)
    shown = _UNITS.get(histogram.unit, lambda value: f"{number(value)} {histogram.unit}")
    rows = [
        (f"under {shown(edge)}", number(tokens), share(tokens, all_), bar(tokens, most))
        for edge, tokens in zip(histogram.edges[1:], histogram.tokens, strict=True)
    ]
    return Section(title, rows, ("", "tokens", "share", ""))


def advice(report: Report, explained: bool = False) -> list[str]:
    """What would help, in sentences; the largest gain first."""
    found = _grown(report) + _other_policy(report) + ([] if explained else _prompts(report))
    ranked = [line for _, line in sorted(found, key=lambda item: -item[0])]
    return ranked or ["Nothing stands out: most of what can be reused is reused."]


def _grown(report: Report) -> list[tuple[float, str]]:
    """Another size of the cache."""
    smaller, here, larger = other_sizes(report)
    prompt = report.prompt_tokens
    if here is None or not prompt:
        return []
    found = []
    for size in larger[:1]:
        gain = (size.hit_tokens - here.hit_tokens) / prompt
        if gain >= _MATTERS:
            found.append(
                (gain, f"{_capacity(size.capacity_tokens)} would hit {_points(gain)} more.")
            )
    enough = _enough(here, smaller)
    if enough is not None:
        found.append((0.0, f"{_capacity(enough)} would be enough: they hit as much."))
    return found


def _enough(here: Size, smaller: Sequence[Size]) -> int | None:
    """The smallest size that hits nearly the same."""
    near = [one for one in smaller if one.hit_tokens >= 0.99 * here.hit_tokens > 0]
    return near[0].capacity_tokens if near else None


def _other_policy(report: Report) -> list[tuple[float, str]]:
    prompt = report.prompt_tokens
    if not prompt or (report.source == "recorded" and report.whole_tokens > report.belady_tokens):
        return []
    gain = (report.belady_tokens - report.whole_tokens) / prompt
    lost = (report.unlimited_tokens - report.whole_tokens) / prompt
    if gain < _MATTERS or gain < lost / 2:
        return []
    return [
        (
            gain / 2,  # no policy gets all of it
            f"At this size the best choice of what to keep would hit {_points(gain)} more: compare policies "
            "with chunkcache simulate.",
        )
    ]


def _prompts(report: Report) -> list[tuple[float, str]]:
    """Prompts that differ too early."""
    prompt = report.prompt_tokens
    new = report.misses.get(str(Miss.NEVER_SEEN), 0) / prompt if prompt else 0.0
    if new < 0.2:
        return []
    return [
        (
            new / 4,
            f"{100 * new:.1f}% of all prompt tokens follow a beginning that was never seen, which no size "
            "helps: chunkcache explain shows where prompts part, and what moving that would save (of a chat "
            "log, or of what serve --trace FILE records).",
        )
    ]


def _capacity(tokens: int | None) -> str:
    return "without limit" if tokens is None else f"{number(tokens)} tokens"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}%"


def _points(gain: float) -> str:
    return f"{100 * gain:.1f} points"


def notebook(report: Report) -> str:
    """HTML without figures."""
    parts = []
    for section in sections(report):
        head = "".join(f"<th>{html.escape(name)}</th>" for name in section.names)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in section.rows
        )
        note = f"<p>{html.escape(section.note)}</p>" if section.note else ""
        parts.append(
            f"<h4>{html.escape(section.title)}</h4><table><tr>{head}</tr>{rows}</table>{note}"
        )
    return "".join(parts)

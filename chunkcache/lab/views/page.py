"""A report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import chunkcache
from chunkcache.lab.analysis.report import Report
from chunkcache.lab.views.figures import each_of_report, to_svg
from chunkcache.lab.views.report import sections
from chunkcache.lab.views.sections import Section
from chunkcache.lab.views.words import duration, number, share, visible


class Card(NamedTuple):
    """A number that is looked at first; `share` of 1 draws a bar."""

    name: str
    value: str
    note: str
    share: float | None = None


def to_page(report: Report, more: Sequence[Section] = ()) -> str:
    """The page; `more` sections come behind those of the report.

    Raises:
        ConfigError: matplotlib is missing.
    """
    from jinja2 import Environment, StrictUndefined

    pictures = {name: to_svg(figure) for name, figure in each_of_report(report).items()}
    found = [*sections(report, explained=bool(more)), *more]
    told = [one for one in found if all(len(row) == 1 for row in one.rows)]
    drawn = [one for one in found if tuple(one.names[-2:]) == ("share", "")]  # in figures too
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = files("chunkcache.lab.views").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=visible(report.name),
        subtitle=_subtitle(report),
        cards=_cards(report),
        told=_joined(told),
        tables=[one for one in found if one not in told and one not in drawn],
        figures={name: b64encode(svg.encode()).decode() for name, svg in pictures.items()},
        version=chunkcache.__version__,
    )


def _joined(sections: Sequence[Section]) -> list[Section]:
    """Sentences under one title; those that came last are more to the point."""
    found: dict[str, list[Sequence[str]]] = {}
    for section in reversed(sections):
        found.setdefault(section.title, []).extend(section.rows)
    return [Section(title, rows) for title, rows in found.items()]


def _subtitle(report: Report) -> str:
    size = report.cache.capacity_tokens
    capacity = "a cache without limit" if size is None else f"a cache of {number(size)} tokens"
    how = "recorded by" if report.source == "recorded" else "simulated for"
    model = f", model {visible(report.cache.model)}" if report.cache.model else ""
    return f"{number(report.requests)} prompts, {how} {capacity} ({report.cache.policy}){model}"


def _cards(report: Report) -> list[Card]:
    prompt, cached = report.prompt_tokens, report.cached_tokens
    found = [
        Card("hit rate", share(cached, prompt), "of all prompt tokens", report.hit_rate),
        Card("prompt tokens", number(prompt), f"{number(prompt - cached)} computed"),
        _bound("of what is possible", report.percent_of_unlimited, "against a cache without limit"),
        _bound("of the best choice", report.percent_of_belady, "against Belady's optimum"),
    ]
    if report.saved_seconds is not None:
        found.append(Card("time saved", duration(report.saved_seconds), "of computing prompts"))
    if report.money is not None:
        whole: Any = report.money.saved + report.money.spent
        found.append(Card("money saved", f"{report.money.saved:,.2f}", f"of {whole:,.2f}"))
    return found


def _bound(name: str, percent: float | None, note: str) -> Card:
    if percent is None:
        return Card(name, "-", note)
    return Card(name, f"{percent:.1f}%", note, min(1.0, percent / 100))

"""`chunkcache report`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from .caches import asked_cache, cache_options
from .client import fetch, read, server_options
from .loading import load_tokenizer
from .traces import FILE, opened, tell, trace_options, working

if TYPE_CHECKING:
    from rich.console import RenderableType

    from chunkcache.lab.analysis.report import Report
    from chunkcache.lab.traces.trace import Trace
    from chunkcache.lab.views.sections import Section

_OUT = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command(short_help="Show what was reused, why not more, and what would help.")
@server_options
@click.option("--trace", type=FILE, help="Requests that were recorded, or a chat log.")
@trace_options
@cache_options
@click.option("--price", type=click.FloatRange(0), help="Of a million tokens of prompts.")
@click.option(
    "--cached-price",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of a million tokens that were reused.",
)
@click.option("--markdown", is_flag=True, help="Print Markdown instead of a table.")
@click.option("--html", type=_OUT, help="Write a page with figures, which needs no network.")
@click.option("--plot", type=_OUT, help="Write the figures: .svg, .png or .pdf.")
def command(
    url: str,
    api_key: str | None,
    as_json: bool,
    trace: Path | None,
    markdown: bool,
    html: Path | None,
    plot: Path | None,
    **options: Any,
) -> None:
    """Show what was reused, why not more, and what another size of the cache would do.

    Of a running server (its memory and its last requests), or with --trace of requests that serve --trace
    recorded, of a trace as Mooncake's, or of a chat log with --tokenizer. Where no cache is told of, one
    without limit is simulated; --capacity makes it yours.
    """
    if as_json and markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    stats: dict[str, Any] | None = None
    more: list[Section] = []
    if trace is None:
        stats = fetch(url, "/stats", api_key)
        assert stats is not None
        report = _of_server(url, api_key, stats["model"], options)
    else:
        report, more = _of_file(trace, options, html is not None)
    if report is not None:
        _draw(report, html, plot, more)
    elif html or plot:
        raise click.ClickException("there was no request yet, of which figures could be drawn")
    if as_json:
        click.echo(json.dumps(_to_json(stats, report), indent=2))
    elif markdown:
        click.echo(_to_markdown(report), nl=False)
    else:
        from chunkcache.lab.views.tables import console

        console().print(_to_terminal(stats, report))


def _of_file(path: Path, options: dict[str, Any], whole: bool) -> tuple[Report, list[Section]]:
    """Of recorded requests; if the `whole` is asked for, with places at which prompts differ."""
    keys = ("tokenizer", "interleave", "block_size")
    with opened(path, *(options[key] for key in keys)) as (trace, bad):
        report = _make(path.name, trace, options)
        tell(bad)
        more = _explained(trace, options) if whole and options["tokenizer"] else []
        return report, more


def _explained(trace: Trace, options: dict[str, Any]) -> list[Section]:
    from chunkcache.lab.analysis.explain import Explainer
    from chunkcache.lab.views.explain import sections

    decode = load_tokenizer(options["tokenizer"]).decode
    cache = asked_cache(options)
    found = Explainer(trace, cache, options["block_size"], decode).explain()
    return sections(found, reported=True)


def _of_server(url: str, api_key: str | None, model: str, options: dict[str, Any]) -> Report | None:
    """Of its last requests; None before the first."""
    with _history(url, api_key) as path:
        if path.read_bytes().count(b'"input_length"') == 0:
            return None
        from chunkcache.lab.traces.trace import Trace

        return _make(f"{model} at {url}", Trace(path), options)


@contextmanager
def _history(url: str, api_key: str | None) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "history.jsonl")
        path.write_bytes(read(url, "/history", api_key))
        yield path


def _make(name: str, trace: Trace, options: dict[str, Any]) -> Report:
    from chunkcache.lab.analysis.making import make_report

    with working("looking at all requests"):
        return make_report(
            name,
            trace,
            asked_cache(options),
            options["block_size"],
            options["price"],
            options["cached_price"],
        )


def _draw(report: Report, html: Path | None, plot: Path | None, more: list[Section]) -> None:
    """Writes what was asked for, and says so."""
    if html is not None:
        from chunkcache.lab.views.page import to_page

        _write(html, to_page(report, more))
    if plot is not None:
        from chunkcache.lab.views.figures import of_report, save

        save(of_report(report), plot)
        click.echo(f"{plot} is written", err=True)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from error
    click.echo(f"{path} is written", err=True)


def _to_json(stats: dict[str, Any] | None, report: Report | None) -> dict[str, Any]:
    """A server's statistics, and the report; of a file only the report."""
    found = None if report is None else report.to_dict()
    return found or {} if stats is None else stats | {"report": found}


def _to_markdown(report: Report | None) -> str:
    from chunkcache.lab.views.report import sections
    from chunkcache.lab.views.sections import to_markdown

    if report is None:
        raise click.ClickException("there was no request yet")
    return to_markdown(report.name, sections(report))


def _to_terminal(stats: dict[str, Any] | None, report: Report | None) -> RenderableType:
    """A server's own sums since it started, and what its last requests tell of other sizes."""
    from rich.console import Group
    from rich.text import Text

    from chunkcache.lab.views import stats as server
    from chunkcache.lab.views.report import outlook, sections
    from chunkcache.lab.views.sections import to_terminal

    if stats is None:
        assert report is not None
        return to_terminal(sections(report))
    more = [] if report is None else [Text(), to_terminal(outlook(report))]
    return Group(server.report(stats), *more)

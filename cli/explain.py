"""`chunkcache explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .caches import asked_cache, cache_options
from .loading import load_tokenizer
from .traces import opened, tell, trace_argument, working

if TYPE_CHECKING:
    from chunkcache.lab.analysis.causes import Parting
    from chunkcache.lab.analysis.explain import Explainer
    from chunkcache.lab.traces.trace import Trace
    from chunkcache.lab.views.sections import Section


@click.command(short_help="Tell why prompts were computed, and what to change in them.")
@trace_argument
@cache_options
@click.option("--request", type=click.IntRange(1), help="Only the prompt of this number.")
@click.option(
    "--top", type=click.IntRange(0), default=5, show_default=True, help="Places to show at most."
)
@click.option("--markdown", is_flag=True, help="Print Markdown instead of a table.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    trace: Path,
    tokenizer: str | None,
    interleave: int,
    block_size: int | None,
    request: int | None,
    top: int,
    markdown: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Tell why the prompts of TRACE were not reused: where they leave what is known, and what recurs there.

    TRACE is what serve --trace or wrap(trace=...) recorded, or a chat log with --tokenizer; without a
    tokenizer, or of a trace of hashes, there are places but no text. If no cache recorded it, one without
    limit is assumed, or of --capacity.
    """
    if as_json and markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    with opened(trace, tokenizer, interleave, block_size) as (source, bad):
        explainer = _explainer(source, tokenizer, block_size, options)
        tell(bad)
    if not explainer.requests:
        raise click.ClickException(f"no line of {trace} could be read")
    found, as_dict = (
        _all(explainer, top) if request is None else _one(explainer, _parting(explainer, request))
    )
    if tokenizer is None and explainer.of_tokens:
        click.echo("Hint: with --tokenizer MODEL, what differs is shown in words", err=True)
    if as_json:
        click.echo(json.dumps({"trace": str(trace)} | as_dict | {"bad_lines": len(bad)}, indent=2))
        return
    from chunkcache.lab.views.sections import to_markdown, to_terminal
    from chunkcache.lab.views.tables import console

    if markdown:
        click.echo(to_markdown(trace.name, found), nl=False)
        return
    console().print(to_terminal(found))


def _explainer(
    trace: Trace, tokenizer: str | None, block_size: int | None, options: dict[str, Any]
) -> Explainer:
    """Which has read everything."""
    from chunkcache.lab.analysis.explain import Explainer

    decode = None
    if tokenizer is not None:
        decode = load_tokenizer(tokenizer).decode
    with working("looking at all prompts"):
        explainer = Explainer(trace, asked_cache(options), block_size, decode)
        explainer.partings()
    return explainer


def _all(explainer: Explainer, top: int) -> tuple[list[Section], dict[str, Any]]:
    from chunkcache.lab.views.explain import sections

    found = explainer.explain()
    return sections(found, top), found.to_dict()


def _parting(explainer: Explainer, request: int) -> Parting:
    found = explainer.partings()
    if request > len(found):
        raise click.ClickException(
            f"there are {len(found):,} prompts, and none of number {request}"
        )
    return found[request - 1]


def _one(explainer: Explainer, parting: Parting) -> tuple[list[Section], dict[str, Any]]:
    from chunkcache.lab.analysis.causes import as_fields
    from chunkcache.lab.views.explain import of_one

    around = explainer.around(parting)
    context = around and dict(zip(("before", "known", "prompt"), around, strict=True))
    return of_one(parting, around, explainer.chunk), as_fields(parting) | {"context": context}

"""`chunkcache tree`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .client import fetch, server_options

_STDOUT = "-"


@click.command(short_help="Show the prefixes a server has stored.")
@server_options
@click.option(
    "--top",
    type=click.IntRange(0),
    default=50,
    show_default=True,
    help="Prefixes in the table: those of which most tokens were reused, and what they stand "
    "behind. 0 for all.",
)
@click.option(
    "--svg",
    metavar="FILE",
    help="Draw all of them instead of the table; - is standard output.",
)
def command(url: str, api_key: str | None, as_json: bool, top: int, svg: str | None) -> None:
    """Show the prefixes a server has stored: names, beginnings, tokens, bytes, hits, last use, pins, tier.

    Prefixes are indented under what they stand behind. A hit is a prompt that reused the prefix, or a part of
    it; "reused" counts its tokens over all hits. --json and --svg have every prefix.
    """
    if as_json and svg == _STDOUT:
        raise click.UsageError("--json and --svg - cannot both write to standard output")
    rows = _rows(url, api_key)
    if svg is not None:
        _draw(rows, svg)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif svg is None:
        from chunkcache.lab.views.tables import console
        from chunkcache.lab.views.tree import tree

        console().print(tree(rows, top))


def _rows(url: str, api_key: str | None) -> list[dict[str, Any]]:
    found = fetch(url, "/tree", api_key)
    if isinstance(found, list) and all(isinstance(row, dict) and "depth" in row for row in found):
        return found
    raise click.ClickException(
        f"{url.rstrip('/')}/tree has no prefixes: is it a chunkcache server?"
    )


def _draw(rows: list[dict[str, Any]], svg: str) -> None:
    """Writes the picture, and says where."""
    from chunkcache.lab.views.icicle import icicle

    picture = icicle(rows)
    if svg == _STDOUT:
        click.echo(picture)
        return
    try:
        Path(svg).write_text(picture + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        why = getattr(error, "strerror", None) or error
        raise click.ClickException(f"cannot write {svg}: {why}") from error
    click.echo(f"wrote {svg}", err=True)

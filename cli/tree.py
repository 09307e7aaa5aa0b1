"""`chunkcache tree`."""

from __future__ import annotations

import json

import click

from .client import fetch, server_options


@click.command(short_help="Show the prefixes a server has stored.")
@server_options
def command(url: str, api_key: str | None, as_json: bool) -> None:
    """Show the prefixes a server has stored: tokens, bytes, hits, last use, pins, tier."""
    rows = fetch(url, "/tree", api_key)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from chunkcache.lab.render import console, tree

    console().print(tree(rows))
